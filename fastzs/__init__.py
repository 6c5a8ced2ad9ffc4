"""Zero-shot semantic segmentation with CLIP, fast: name the classes, get the masks.

seg = fastzs.load(backbone="ViT-B-16", weights="openai")
result = seg("street.jpg", ["road", "car", "person"])
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fastzs import clip, models, ops
    from fastzs.clip.backbones import list_backbones
    from fastzs.errors import FastzsError
    from fastzs.features import ImageFeatures
    from fastzs.loading import load
    from fastzs.registry import list_models
    from fastzs.result import Segmentation
    from fastzs.segmenter import Segmenter
    from fastzs.vocabulary import Vocabulary

__all__ = [
    "FastzsError",
    "ImageFeatures",
    "Segmentation",
    "Segmenter",
    "Vocabulary",
    "clip",
    "list_backbones",
    "list_models",
    "load",
    "models",
    "ops",
]

# torch takes seconds to import: what needs it is imported when it is first asked for
_HOMES = {
    "Segmentation": "fastzs.result",
    "Segmenter": "fastzs.segmenter",
    "Vocabulary": "fastzs.vocabulary",
    "FastzsError": "fastzs.errors",
    "list_backbones": "fastzs.clip.backbones",
    "ImageFeatures": "fastzs.features",
    "list_models": "fastzs.registry",
    "load": "fastzs.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("clip", "models", "ops"):
        return importlib.import_module(f"fastzs.{name}")
    raise AttributeError(f"module 'fastzs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
