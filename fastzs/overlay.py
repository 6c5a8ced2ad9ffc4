"""Colours of labels, and an image with its labels and a legend drawn on it."""

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from fastzs.fonts import draw_text, text_width

# Above, below and between the entries of the legend, in units of the letter size.
MARGIN, GAP = 0.6, 0.5
# Pixels worked on at a time, so that a large image does not need several times its size.
PIECE = 1 << 20


def voc_colours(count: int) -> np.ndarray:
    """The colours of the PASCAL VOC development kit, uint8 ``[count, 3]``; the first is black.

    The bits of the index are dealt out in turn to red, green and blue, from the highest bit of a colour down.
    """
    index = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colours


def label_colours(count: int, background: int | None) -> np.ndarray:
    """One colour for each of ``count`` labels, uint8 ``[count, 3]``.

    Black is for the background, as in VOC, so class ``i`` has VOC's colour ``i + 1``.
    """
    colours = voc_colours(count + 1)[1:]
    if background is not None:
        colours[background] = 0
    return colours


def labels_present(labels: np.ndarray, count: int) -> list[int]:
    """Which of the labels 0 to ``count - 1`` occur, in order."""
    flat = labels.reshape(-1)
    seen = np.zeros(count, np.int64)
    for start in range(0, len(flat), PIECE):
        seen += np.bincount(flat[start : start + PIECE], minlength=count)
    return np.flatnonzero(seen).tolist()


def draw_overlay(
    picture: np.ndarray,
    labels: np.ndarray,
    names: tuple[str, ...],
    background: int | None,
    opacity: float,
) -> Image.Image:
    """Tint an image by its labels and put a legend of the names that occur below it.

    Args:
        picture: uint8 RGB ``[3, height, width]``.
        labels: integers ``[height, width]``, indices into ``names``.
        background: the label whose pixels stay as they are, if any.
        opacity: 0 (the image) to 1 (the colours).

    Returns:
        RGB image, at least as wide as the image (wider where a name would not fit) and higher by the legend.
    """
    height, width = labels.shape
    canvas = legend(names, labels_present(labels, len(names)), background, (height, width))
    tint(canvas, picture, labels, len(names), background, opacity)
    return canvas


def legend(names: tuple[str, ...], listed: Iterable[int], background: int | None, size: tuple[int, int]) -> Image.Image:
    """A white canvas with room for a picture of ``size`` (height, width), and below it the names of some labels."""
    colours = label_colours(len(names), background)
    entries = [(_one_line(names[i]), None if i == background else tuple(colours[i].tolist())) for i in listed]
    return _legend(entries, size[1], size[0])


def tint(
    canvas: Image.Image, picture: np.ndarray, labels: np.ndarray, count: int, background: int | None, opacity: float
) -> None:
    """Paste a picture into the upper left corner of a canvas, tinted by its ``count`` labels; see
    :func:`draw_overlay`."""
    width = labels.shape[1]
    colours = label_colours(count, background)
    rows = max(PIECE // width, 1)
    for top in range(0, len(labels), rows):
        some = labels[top : top + rows]
        plain = Image.fromarray(np.ascontiguousarray(picture[:, top : top + rows].transpose(1, 2, 0)))
        tinted = Image.blend(plain, Image.fromarray(colours[some]), opacity)
        if background is not None:
            tinted.paste(plain, mask=Image.fromarray(some == background))
        canvas.paste(tinted, (0, top))


def _legend(entries: list[tuple[str, tuple[int, ...] | None]], width: int, height: int) -> Image.Image:
    """A white canvas with the legend below the ``height`` rows that are left to the image."""
    letter = min(max(min(width, height) // 28, 12), 96)
    margin, gap = round(letter * MARGIN), round(letter * GAP)
    # Each entry is a square of the letter size, half a letter of space and the name.
    widths = [letter + gap + text_width(name, letter) for name, _ in entries]
    width = max(width, 2 * margin + max(widths))

    rows, free = [[]], width - 2 * margin
    for entry, needed in zip(entries, widths, strict=True):
        if rows[-1] and needed > free:
            rows.append([])
            free = width - 2 * margin
        rows[-1].append((*entry, width - margin - free))
        free -= needed + 2 * gap

    step = letter + gap
    canvas = Image.new("RGB", (width, height + 2 * margin + step * len(rows) - gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = height + margin + step * i
        for name, colour, left in row:
            draw.rectangle((left, top, left + letter - 1, top + letter - 1), fill=colour, outline="black")
            draw_text(draw, left + letter + gap, top + letter / 2, name, letter)
    return canvas


def _one_line(name: str, longest: int = 60) -> str:
    line = " ".join(name.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
