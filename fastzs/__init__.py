"""Zero-shot semantic segmentation with CLIP, fast: name the classes, get the masks.

seg = fastzs.load("maskclip", backbone="ViT-B-16", weights="openai")
result = seg("street.jpg", ["road", "car", "person"])
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastzs import clip, models, ops
    from fastzs.result import Segmentation
    from fastzs.segmenter import Segmenter, load
    from fastzs.vocabulary import Vocabulary

__all__ = ["Segmentation", "Segmenter", "Vocabulary", "clip", "load", "models", "ops"]

# torch takes seconds to import: what needs it is imported when it is first asked for
_HOMES = {
    "Segmentation": "fastzs.result",
    "Segmenter": "fastzs.segmenter",
    "Vocabulary": "fastzs.vocabulary",
    "load": "fastzs.segmenter",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("clip", "models", "ops"):
        return importlib.import_module(f"fastzs.{name}")
    raise AttributeError(f"module 'fastzs' has no attribute {name!r}")
