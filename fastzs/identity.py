"""What decides a label map, in one place: two runs with the same key give the same files.

The key is made of what was loaded, not of what it was called: the same path with other contents is another model.
"""

from typing import TYPE_CHECKING, Any

from fastzs import __version__
from fastzs.clip.templates import TEMPLATES
from fastzs.question import background_words
from fastzs.regions import contents

if TYPE_CHECKING:
    from fastzs.segmenter import Segmenter
    from fastzs.vocabulary import Vocabulary

NUMERICS = 1  # to be raised with a change of code that changes labels


def identity(
    segmenter: "Segmenter",
    vocabulary: "Vocabulary",
    *,
    background: str,
    threshold: float | None,
    options: dict[str, Any],
    regions: str | None = None,
) -> dict[str, Any]:
    """All that decides the labels of an image, as plain values.

    Args:
        background, threshold: as the segmenter is called with.
        options: of the model, as they were asked for.
        regions: as of the command line, see :func:`fastzs.regions.find`.
    """
    model: Any = segmenter.model
    clip = None if vocabulary.embeddings is not None else model.clip
    templates = None if clip is None else vocabulary.templates or TEMPLATES[clip.templates or model.default_templates]
    return {
        "fastzs": __version__,
        "numerics": NUMERICS,
        "model": type(model).__name__,
        "weights": model.fingerprint,
        "settings": plain(getattr(model, "settings", {})),
        "options": plain(options),
        "text": None if clip is None else [clip.fingerprint, clip.backbone, clip.quick_gelu, plain(clip.config)],
        "vocabulary": vocabulary.hash,
        "templates": plain(templates),
        "seen": plain(model.seen),
        "calibration": model.calibration,
        "activation": model.activation,
        "preprocessing": plain([model.mean, model.std, segmenter.short_side, segmenter.crop, segmenter.stride]),
        "windows": segmenter.windows,
        "resizing": [segmenter.long_side, segmenter.antialias],
        "readout": str(model.readout),
        "precision": segmenter.precision,
        "regions": contents(regions),
        "background": [background, *background_words(model)] if background == "prompt" else background,
        "threshold": threshold if background == "threshold" else None,
    }


def plain(value: Any) -> Any:
    """A value as JSON holds it; what it cannot hold is told by its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
