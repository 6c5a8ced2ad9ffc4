"""Colours of labels, and a picture with its labels and a legend drawn on it."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Above, below and between the entries of the legend, in units of the letter size.
MARGIN, GAP = 0.6, 0.5


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


def draw_overlay(
    picture: Image.Image,
    labels: np.ndarray,
    names: tuple[str, ...],
    background: int | None,
    opacity: float,
) -> Image.Image:
    """Tint a picture by its labels and put a legend of the names that occur below it.

    Args:
        picture: RGB, width x height.
        labels: integers ``[height, width]``, indices into ``names``.
        background: the label whose pixels stay as they are, if any.
        opacity: 0 (the picture) to 1 (the colours).

    Returns:
        RGB image, at least as wide as the picture (wider where a name would not fit) and higher by the legend.
    """
    colours = label_colours(len(names), background)
    tinted = Image.blend(picture, Image.fromarray(colours[labels]), opacity)
    if background is not None:
        tinted.paste(picture, mask=Image.fromarray(labels == background))
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=len(names)))
    entries = [(_one_line(names[i]), None if i == background else tuple(colours[i].tolist())) for i in present]
    return _with_legend(tinted, entries)


def _with_legend(image: Image.Image, entries: list[tuple[str, tuple[int, ...] | None]]) -> Image.Image:
    letter = min(max(min(image.size) // 28, 12), 96)
    font = ImageFont.load_default(letter)
    margin, gap = round(letter * MARGIN), round(letter * GAP)
    # Each entry is a square of the letter size, half a letter of space and the name.
    widths = [letter + gap + round(font.getlength(name)) for name, _ in entries]
    width = max(image.width, 2 * margin + max(widths))

    rows, free = [[]], width - 2 * margin
    for entry, needed in zip(entries, widths, strict=True):
        if rows[-1] and needed > free:
            rows.append([])
            free = width - 2 * margin
        rows[-1].append((*entry, width - margin - free))
        free -= needed + 2 * gap

    step = letter + gap
    canvas = Image.new("RGB", (width, image.height + 2 * margin + step * len(rows) - gap), "white")
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = image.height + margin + step * i
        for name, colour, left in row:
            draw.rectangle((left, top, left + letter - 1, top + letter - 1), fill=colour, outline="black")
            draw.text((left + letter + gap, top + letter / 2), name, fill="black", font=font, anchor="lm")
    return canvas


def _one_line(name: str, longest: int = 60) -> str:
    line = " ".join(name.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
