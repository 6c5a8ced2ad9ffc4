"""The gallery of docs/getting-started.md: what the built-in model makes of drawn scenes, without a download.

    python examples/gallery.py docs/pictures/gallery

Each function is an example of its own. The images lie in the folder under the functions' names.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

import fastzs
from fastzs.data.shapes import PAIRS, UNSEEN_PAIRS, draw

SCENE, UNSEEN_SCENE = 31, 13  # seeds
OBJECTS = ["yellow disc", "yellow moon", "pink heart", "pink square", "cyan square", "green star"]


def scene(seed: int = SCENE, pairs: Sequence[str] = PAIRS) -> torch.Tensor:
    """A drawn image, uint8 [3, H, W]."""
    return draw(1, (240, 360), seed=seed, objects=(5, 6), radius=(20, 36), pairs=pairs).images[0]


def image(seg: fastzs.Segmenter) -> Image.Image:
    """What the others are of."""
    return Image.fromarray(scene().permute(1, 2, 0).numpy())


def names(seg: fastzs.Segmenter) -> Image.Image:
    """Every pixel gets one of the names."""
    return seg(scene(), [*OBJECTS, "wood"]).overlay()


def background(seg: fastzs.Segmenter) -> Image.Image:
    """What fits other words better than the names is background, and is not coloured."""
    return seg(scene(), ["yellow disc", "pink heart", "green star"], background="prompt").overlay()


def synonyms(seg: fastzs.Segmenter) -> Image.Image:
    """One class under several names: the best of them counts."""
    classes = [{"square": ["pink square", "cyan square"]}, {"yellow thing": ["yellow disc", "yellow moon"]}, "wood"]
    return seg(scene(), [*classes, "pink heart", "green star"]).overlay()


def unseen(seg: fastzs.Segmenter) -> Image.Image:
    """Pairs of colour and shape that no caption named in training."""
    pairs = ["blue ring", "red disc", "green triangle", "orange ring", "yellow square"]
    assert set(pairs) <= set(UNSEEN_PAIRS)
    return seg(scene(UNSEEN_SCENE, UNSEEN_PAIRS), pairs, background="prompt").overlay()


def features(seg: fastzs.Segmenter) -> Image.Image:
    """The dense features without any names: their three strongest directions as red, green and blue."""
    dense = seg.encode(scene()).dense.float()  # [D, h, w], unit length
    points = dense.flatten(1).T - dense.flatten(1).mean(1)
    directions = torch.linalg.svd(points, full_matrices=False).Vh[:3]
    directions = directions * directions.sum(1, keepdim=True).sign()  # which of its two signs a direction has is chance
    values = points @ directions.T
    low, high = values.quantile(torch.tensor([0.02, 0.98]), dim=0)
    colours = (255 * ((values - low) / (high - low)).clamp(0, 1)).byte()
    small = Image.fromarray(colours.unflatten(0, dense.shape[1:]).numpy())
    return small.resize((360, 240), Image.Resampling.NEAREST)


GALLERY: tuple[Callable[[fastzs.Segmenter], Image.Image], ...] = (
    image, names, background, synonyms, unseen, features
)  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    seg = fastzs.load("maskclip", weights="shapes", precision="fp32")
    for make in GALLERY:
        make(seg).convert("RGB").save(folder / f"{make.__name__}.jpg", quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
