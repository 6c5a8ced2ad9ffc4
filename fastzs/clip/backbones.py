"""What backbones there are, read from open_clip's configurations and the modules they build (without weights)."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import nn

from fastzs.clip import towers
from fastzs.clip.conv import ConvTower
from fastzs.clip.state import WeightsError
from fastzs.clip.text import TextEncoder
from fastzs.clip.vision import OPERATORS, VisionTransformer

KEPT = Path(__file__).with_name("backbones.json")


@dataclass(frozen=True)
class Backbone:
    """One of open_clip's architectures.

    Attributes:
        name: what :func:`fastzs.load` calls it.
        tags: pretrained weights by name, the ``weights`` of :func:`fastzs.load`.
        image_size: pixels of a side in training.
        patch: pixels of a side that one feature stands for.
        width: channels of the last stage.
        text_dim: of the joint space.
        vision_parameters, text_parameters: counts; the text tower's is None where its sizes stand on the hub only.
        text: "CLIP", or the hub id of the text tower or the tokenizer.
        operators: what ``dense`` can be.
        licences: of the weights by tag, where timm's records have their repository; the weights' own page decides.
    """

    name: str
    tags: tuple[str, ...]
    image_size: int
    patch: int
    width: int
    text_dim: int
    vision_parameters: int
    text_parameters: int | None
    text: str
    operators: Sequence[str]
    licences: Mapping[str, str]


def list_backbones(pretrained: bool = False) -> list[Backbone]:
    """Every architecture of open_clip that this package runs, in open_clip's order.

    Building 144 modules takes a while, so what they say is kept beside this file (``python -m fastzs.clip.backbones``
    writes it); an architecture that a newer open_clip brings is built.

    Args:
        pretrained: only those with weights that can be loaded by name.
    """
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    out = []
    for name in open_clip.list_models():
        sizes = kept[name] if name in kept else measure(name)
        tags = tuple(open_clip.list_pretrained_tags_by_model(name))
        if sizes is not None and (tags or not pretrained):
            out.append(Backbone(name, tags, **sizes, licences=_licences(name)))
    return out


def lines(backbones: Sequence[Backbone]) -> list[str]:
    """One line for each backbone, and one for its weights."""
    out = []
    for one in backbones:
        text = "" if one.text_parameters is None else f" + {one.text_parameters / 1e6:.0f}"
        few = f"dense: {', '.join(one.operators)}" if len(one.operators) < len(OPERATORS) else "dense: all"
        out.append(
            f"{one.name}: {one.image_size} pixels, patch {one.patch}, width {one.width}, text {one.text_dim}, "
            f"{one.vision_parameters / 1e6:.0f}{text} million parameters, {few}"
        )
        tags = (f"{tag} ({one.licences[tag]})" if tag in one.licences else tag for tag in one.tags)
        out.append(f"  weights: {', '.join(tags)}")
    return out


def measure(name: str) -> dict[str, Any] | None:
    """What a backbone's module says, by the names of :class:`Backbone`; None if this package does not run it.

    Raises:
        WeightsError: open_clip does not know the name.
    """
    config: Any = open_clip.get_model_config(name)
    if config is None:
        raise WeightsError(f"backbone {name!r} is not one of open_clip's")
    try:
        with towers.Sizes():
            tower = towers.build(config, name, None, name)
    except WeightsError:
        return None
    text = config["text_cfg"]
    hub = text.get("hf_model_name")
    with towers.Sizes():
        encoder = None if hub else TextEncoder.of_config(text, config["embed_dim"], False)
    size = config["vision_cfg"].get("image_size", 224)
    return {
        "image_size": tower.grid * tower.patch_size if isinstance(tower, VisionTransformer) else size,
        "patch": tower.patch_size,
        "width": tower.width,
        "text_dim": config["embed_dim"],
        "vision_parameters": _parameters(tower),
        "text_parameters": None if encoder is None else _parameters(encoder.tower),
        "text": hub or text.get("hf_tokenizer_name") or "CLIP",
        "operators": list(tower.operators),
    }


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _licences(name: str) -> dict[str, str]:
    known, out = _recorded(), {}
    for tag in open_clip.list_pretrained_tags_by_model(name):
        repository = (open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or "").rsplit("/", 1)[0]
        if repository in known:
            out[tag] = known[repository]
    return out


@functools.cache
def _recorded() -> dict[str, str]:
    """Licences of repositories in timm's records."""
    out = {}
    for name in timm.list_pretrained():
        record = timm.get_pretrained_cfg(name)
        if record is not None and record.hf_hub_id and record.license:
            repository = f"timm/{name}" if record.hf_hub_id == "timm/" else record.hf_hub_id
            out[repository] = record.license
    return out


def multiply_adds(name: str, side: int) -> int:
    """Multiplications with an addition in a forward pass over one image of ``side`` x ``side`` pixels.

    Counted by torch over matrix products, convolutions and attention.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config: Any = open_clip.get_model_config(name)
    with towers.Sizes():
        tower = towers.build(config, name, None, name).eval()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens, grid = tower.trunk(torch.empty(1, 3, side, side))
        tower.dense(tokens, grid, "identity" if isinstance(tower, ConvTower) else "qk")
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    rows = [f"{json.dumps(name)}: {json.dumps(measure(name))}" for name in open_clip.list_models()]
    KEPT.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
