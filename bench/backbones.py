"""``python -m bench.backbones`` writes the tables of docs/backbones.md: a dozen backbones with their cost, and all."""

from pathlib import Path

import fastzs
from fastzs.clip.backbones import Backbone, multiply_adds

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
SOME = (
    "MobileCLIP2-S0",
    "MobileCLIP2-S2",
    "ViT-B-32",
    "ViT-B-16",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "EVA02-B-16",
    "PE-Core-B-16",
    "convnext_base_w",
    "ViTamin-B",
    "ViT-L-14",
    "ViT-SO400M-16-SigLIP2-512",
)
SIDE = 512


def costs(backbones: dict[str, Backbone]) -> list[str]:
    """Rows of the table with costs."""
    rows = [
        f"| backbone | patch | parameters, vision + text (millions) | multiply-adds at {SIDE} x {SIDE} (billions) |"
    ]
    rows.append("|---|---|---|---|")
    for name in SOME:
        one = backbones[name]
        text = "" if one.text_parameters is None else f" + {one.text_parameters / 1e6:.0f}"
        count = multiply_adds(name, SIDE) / 1e9
        rows.append(f"| {name} | {one.patch} | {one.vision_parameters / 1e6:.0f}{text} | {count:.0f} |")
    return rows


def everything(backbones: dict[str, Backbone]) -> list[str]:
    """Rows of the table of all with pretrained weights."""
    rows = ["| backbone | image | patch | width | text | parameters, vision (millions) | weights |", "|---" * 7 + "|"]
    for one in backbones.values():
        if one.tags:
            tags = ", ".join(f"{tag} ({one.licences[tag]})" if tag in one.licences else tag for tag in one.tags)
            sizes = f"{one.image_size} | {one.patch} | {one.width} | {one.text}"
            rows.append(f"| {one.name} | {sizes} | {one.vision_parameters / 1e6:.0f} | {tags} |")
    return rows


def renewed(page: str) -> str:
    """The page with its tables as they are now."""
    backbones = {one.name: one for one in fastzs.list_backbones()}
    for name, rows in (("costs", costs(backbones)), ("all", everything(backbones))):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = page.split(begin)
        page = before + begin + "\n".join(rows) + "\n" + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
