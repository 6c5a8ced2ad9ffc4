"""What the page shows of an answer, as HTML and as images of the size of a screen. Names are text, never HTML."""

import html
import io
import json

import numpy as np
from PIL import Image
from torch import Tensor

from fastzs.demo.answers import Answer
from fastzs.overlay import label_colours

SIDE = 1600  # of what is shown, in pixels, at most
FILES = {"labels.png": "label map (PNG)", "overlay.jpg": "overlay (JPEG)", "coco.json": "COCO (JSON)"}


def card(answer: Answer) -> str:
    """An image with its masks, the legend, what was computed and how fast, and the downloads.

    ``view.js`` draws the masks into the canvas and answers to the pointer.
    """
    result, title = answer.result, html.escape(answer.title)
    height, width = result.labels.shape
    colours = hex_colours(answer)
    picture = (
        f'<div class="picture"><img src="images/{answer.image_id}.jpg" width="{width}" height="{height}" alt="{title}">'
        f'<canvas data-map="answers/{answer.id}/map.png" data-colours="{html.escape(json.dumps(colours))}" '
        f'role="img" aria-label="masks of {title}"></canvas><div class="tip" hidden></div></div>'
    )
    entries = "".join(
        f'<li tabindex="0" data-label="{label}"><i style="background:{colours[label] or "transparent"}"></i>'
        f'<b>{html.escape(result.names[label])}</b> <span title="share of the pixels, and their mean score">'
        f"{100 * share:.3g} %, {score:.2f}</span></li>"
        for label, share, score in shares(answer)
    )
    links = " ".join(f'<a href="answers/{answer.id}/{file}" download>{what}</a>' for file, what in FILES.items())
    return (
        f'<figure class="answer" data-answer="{answer.id}"><figcaption>{title} <small>{width} x {height}</small>'
        f'<p class="facts">{facts(answer)}</p></figcaption>{picture}<ul class="legend">{entries}</ul>'
        f'<p class="links">{links}</p></figure>'
    )


def problem(message: str) -> str:
    """A message that something could not be done."""
    return f'<p class="problem" role="alert">{html.escape(message)}</p>'


def facts(answer: Answer) -> str:
    """What was computed for an answer, and how long it took."""
    count = len(answer.result.names)
    labelled = f"{count} names answered in <b>{1000 * answer.label_seconds:.0f} ms</b>"
    if answer.encode_seconds is None:
        return f"{labelled}. The image was encoded before: <b>the network did not run</b>."
    return f"The network encoded the image in <b>{1000 * answer.encode_seconds:.0f} ms</b>; {labelled}."


def shares(answer: Answer) -> list[tuple[int, float, float]]:
    """Of each label that occurs: the label, its share of the pixels, the mean of their scores. The largest is first."""
    labels, scores = answer.result.labels.numpy().ravel(), answer.result.scores
    assert scores is not None
    count = len(answer.result.names)
    pixels = np.bincount(labels, minlength=count)
    sums = np.bincount(labels, scores.numpy().ravel(), minlength=count)
    found = [(i, float(pixels[i] / len(labels)), float(sums[i] / pixels[i])) for i in np.flatnonzero(pixels).tolist()]
    return sorted(found, key=lambda entry: -entry[1])


def hex_colours(answer: Answer) -> list[str | None]:
    """The colours of the labels as in overlays, such as "#800000"; None for the background, which is not coloured."""
    background = answer.result.background
    colours = label_colours(len(answer.result.names), background).tolist()
    return [None if i == background else "#{:02x}{:02x}{:02x}".format(*rgb) for i, rgb in enumerate(colours)]


def shown_image(image: Tensor) -> bytes:
    """A JPEG of an image uint8 [3, H, W], no larger than is shown."""
    shown = Image.fromarray(image.permute(1, 2, 0).numpy())
    return _encoded(shown.resize(_size(shown), Image.Resampling.BILINEAR), "JPEG", quality=90)


def shown_map(answer: Answer) -> bytes:
    """A PNG of the labels, no larger than is shown: red holds the low byte of a label, green the high one."""
    labels = answer.result.labels.numpy().astype(np.uint16)
    low, high = labels.astype(np.uint8), (labels >> 8).astype(np.uint8)
    coded = Image.fromarray(np.stack([low, high, np.zeros_like(low)], 2))
    return _encoded(coded.resize(_size(coded), Image.Resampling.NEAREST), "PNG", compress_level=1)


def _size(image: Image.Image) -> tuple[int, int]:
    scale = min(1.0, SIDE / max(image.size))
    return (max(1, round(image.width * scale)), max(1, round(image.height * scale)))


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
