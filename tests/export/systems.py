"""Every system of the registry, small enough to be exported in seconds."""

import torch

from bench.test_systems import TWINS, build
from fastzs.models import ProxyCLIP
from fastzs.models.base import SegmentationModel
from fastzs.registry import system
from tests.tiny import VISION, tiny_clip

DEEP = {**VISION, "layers": 11}  # ResCLIP reads the attention of blocks 5 to 8


def tiny(name: str) -> SegmentationModel:
    """The system of a name with random weights."""
    if name in TWINS:
        return build(name, True)
    torch.manual_seed(0)
    if name == "proxyclip":
        return ProxyCLIP(tiny_clip(), affinity=lambda images: images[:, :, ::8, ::8], multiple=16).eval()
    return system(name).kind(tiny_clip(DEEP if name == "resclip" else VISION)).eval()  # type: ignore[call-arg]
