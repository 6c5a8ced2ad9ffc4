"""``metadata.json``: what there is to know about an exported model beside its graphs, as plain values."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip

from fastzs.clip import Clip, WeightsError
from fastzs.clip.tokenizers import FILES, FileTokenizer, StandInTokenizer, WordTokenizer
from fastzs.files import read_text
from fastzs.models.base import SegmentationModel
from fastzs.windows import Size

FILE = "metadata.json"
VERSION = 1  # of its layout
SETTINGS = (
    "mean",
    "std",
    "short_side",
    "crop",
    "stride",
    "activation",
    "text_dim",
    "default_templates",
    "calibration",
    "fixed_classes",
    "learned_class",
    "fingerprint",
    "weights",
)


@dataclass(frozen=True)
class About:
    """The content of ``metadata.json``.

    Attributes:
        format: "torch", "onnx" or "openvino".
        system: the model's class.
        size: height and width of the images in pixels; None where both vary.
        labels: whether the whole graph gives labels, not logits.
        int8: whether the weights of matrix products are in int8.
        joins: whether the synonyms of a class may be joined behind the decoder.
        settings: attributes of the model, see :class:`fastzs.models.base.SegmentationModel`; ``seen`` and
            ``learned_vector`` among them.
        readout: see :class:`fastzs.readout.Readout`; None of a model without one.
        multiple: what the sides of windows are padded to; 0: nothing.
        features: the class of the model's features, and the names of its fields.
        names: of the classes in ``text.npz``; None without them.
        clip: of the text tower; None without one.
        checks: what was found when the graphs were held against the model.
    """

    format: str
    system: str
    size: list[int] | None
    labels: bool
    int8: bool
    joins: bool
    settings: dict[str, Any]
    readout: dict[str, Any] | None
    multiple: int
    features: dict[str, Any]
    names: list[str] | None
    clip: dict[str, Any] | None
    checks: dict[str, Any]
    version: int = VERSION

    @classmethod
    def of(cls, model: SegmentationModel, size: Size | None, **others: Any) -> "About":
        """What the model itself says; images of one ``size`` are windows of it."""
        settings = {name: _plain(getattr(model, name)) for name in SETTINGS}
        settings["seen"] = _plain(model.seen)
        settings["learned_vector"] = model.learned_vector().tolist() if model.learned_class else None
        if size is not None:
            own = (model.crop, model.crop) if isinstance(model.crop, int) else model.crop
            if own != size:
                settings["stride"] = None
            settings["crop"] = list(size)
            if model.short_side:
                settings["short_side"] = max(model.short_side, *size)
        readout = None if model.readout is None else asdict(model.readout)
        multiple = getattr(model, "multiple", 0)
        return cls(
            system=type(model).__name__,
            size=None if size is None else list(size),
            settings=settings,
            readout=readout,
            multiple=multiple,
            **others,
        )

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "About":
        """What was written to ``folder``.

        Raises:
            WeightsError: there is none, it is damaged or of another version.
        """
        path = folder / FILE
        try:
            content = json.loads(read_text(path))
            if content["version"] != VERSION:
                raise WeightsError(f"{path}: expected version {VERSION}, got {content['version']}; export it again")
            return cls(**content)
        except OSError as error:
            raise WeightsError(
                f"{path}: cannot be read ({error.strerror}); an exported model is its whole folder"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"{path}: is no metadata of an exported model: {error}") from error


def is_exported(place: str | Path) -> bool:
    """Whether a model's place is an exported one: an ONNX file, or a folder with the metadata of one."""
    path = Path(place)
    return path.suffix.lower() == ".onnx" or (path / FILE).is_file()


def clip_of(clip: Clip) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A text tower's part of the metadata, and the files of its tokenizer.

    Raises:
        WeightsError: its tokenizer cannot be kept in files.
    """
    tokenizer, files = clip.text().tokenizer, {}
    if isinstance(tokenizer, WordTokenizer):
        kept: dict[str, Any] = {"kind": "words", "words": list(tokenizer.words)}
    elif isinstance(tokenizer, FileTokenizer):
        kept = {"kind": "file", "clean": tokenizer.clean, "strip_sep_token": tokenizer.strip is not None}
        files = {name: (tokenizer.folder / name).read_bytes() for name in FILES}
    elif isinstance(tokenizer, StandInTokenizer):
        kept = {"kind": "stand-in", "vocab_size": tokenizer.vocab_size}
    elif isinstance(tokenizer, open_clip.SimpleTokenizer):
        kept = {"kind": "clip"}
    else:
        raise WeightsError(f"its tokenizer ({type(tokenizer).__name__}) cannot be kept in files")
    context = clip.config["text_cfg"].get("context_length", 77)
    about = {name: _plain(getattr(clip, name)) for name in ("backbone", "source", "fingerprint", "templates")}
    about |= {"background": _plain(clip.background), "quick_gelu": clip.quick_gelu, "config": clip.config}
    return about | {"tokenizer": kept | {"context_length": context}}, files


def tokenizer_of(about: dict[str, Any], folder: Path) -> Any:
    """The tokenizer that :func:`clip_of` told about."""
    kept = about["tokenizer"]
    kind, context = kept["kind"], kept["context_length"]
    if kind == "words":
        return WordTokenizer(kept["words"], context)
    if kind == "file":
        return FileTokenizer(folder, context, kept["clean"], kept["strip_sep_token"])
    if kind == "stand-in":
        return StandInTokenizer(context, kept["vocab_size"])
    return open_clip.SimpleTokenizer(context_length=context)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
