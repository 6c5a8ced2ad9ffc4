"""From a system's name, a checkpoint, a folder or a hub id to a model that segments images."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastzs import clip as clip_module
from fastzs.clip import Clip, WeightsError
from fastzs.clip.state import read_state
from fastzs.devices import Precision, choose_device, choose_precision
from fastzs.export.about import is_exported
from fastzs.models import saved
from fastzs.models.base import SegmentationModel
from fastzs.models.trained import TrainedModel
from fastzs.recipe import check_keys
from fastzs.registry import System, system, systems
from fastzs.renamed import old_arguments
from fastzs.segmenter import Segmenter, Windows

# of constructors: what load gives by other names, or not at all
_OWN = ("self", "clip", "backbone", "weights")


@old_arguments(batch="batch_size")
def load(
    model: str | Path | None = None,
    *,
    backbone: str | nn.Module | None = None,
    weights: str | Path | None = None,
    checkpoint: str | Path | None = None,
    tokenizer: Callable[..., Any] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    short_side: int | None = None,
    crop: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    windows: Windows = "separate",
    optimize: bool = True,
    **options: Any,
) -> Segmenter:
    """A model ready to segment images.

    Args:
        model: a system's name (see :func:`fastzs.list_models`); or what a trained one lies in, as for ``checkpoint``,
            which then says itself which system it is; or an exported ``model.onnx`` or its folder, which ONNX Runtime
            runs. Omitted: see :func:`default_model`.
        backbone, weights: see :func:`fastzs.clip.load`; ViT-B-16 and openai where nothing else is known;
            ``weights="shapes"`` needs no download. Of a checkpoint without a text tower they name the CLIP that the
            text tower is taken from. ``backbone`` may also be a model at hand, of open_clip or transformers, in
            systems without training; it brings its weights, see :func:`fastzs.clip.from_model`.
        tokenizer: of a model at hand whose texts are not CLIP's own, open_clip's or transformers'.
        checkpoint: a published ``.pth`` or safetensors file, or a folder or hub id that ``save_pretrained`` or
            ``push_to_hub`` wrote.
        device: "auto" takes a GPU if there is one.
        precision: "auto" takes bf16 where the device computes it natively, else fp32; "int8", on CPUs with VNNI only,
            multiplies bytes and computes the rest as "auto" does, see :meth:`fastzs.Segmenter.optimize`.
        short_side, crop, stride, batch_size, windows: see :class:`fastzs.Segmenter`.
        optimize: call :meth:`fastzs.Segmenter.optimize`.
        options: the system's own settings, see the constructor of its class in :mod:`fastzs.models`; of published
            checkpoints also what their tensors do not tell (``heads``).

    Raises:
        ValueError: unknown model, option, device or precision (nearest known names are given).
        WeightsError: weights that cannot be found, read or fitted.
    """
    if model is None:
        model = default_model(weights, checkpoint)
    if isinstance(model, nn.Module):
        raise ValueError(f"model: expected the name of a system, got {type(model).__name__}; pass it as backbone=...")
    model = os.path.expanduser(model)
    checkpoint = None if checkpoint is None else os.path.expanduser(checkpoint)
    given = {"backbone": backbone, "weights": None if weights is None else str(weights), "tokenizer": tokenizer}
    given = {name: value for name, value in given.items() if value is not None}
    if is_exported(model):
        exported = _exported(model, device, precision, {**given, **options})
        return Segmenter(exported, short_side=short_side, crop=crop, stride=stride, batch_size=batch_size)
    if checkpoint is None and _is_checkpoint(str(model)):
        checkpoint, entry = model, system_of(model)
    else:
        entry = system(str(model))
    check_options(entry, options)
    if not issubclass(entry.kind, TrainedModel):
        if checkpoint is not None:
            raise ValueError(
                f"{entry.name} has no training and so no checkpoint; give CLIP's weights as weights={str(checkpoint)!r}"
            )
        network: SegmentationModel = entry.kind(_clip(**given), **options)  # type: ignore[call-arg]
    elif checkpoint is None:
        raise ValueError(
            f"{entry.name} needs a trained checkpoint: checkpoint='voc_zero.pth', a folder or a hub id; to train one, "
            f"start from fastzs.models.{entry.kind.__name__}(...); model='naclip' needs none"
        )
    elif backbone is not None and not isinstance(backbone, str):
        raise ValueError(
            f"{entry.name} has towers of its own: expected the name of a backbone, got {type(backbone).__name__}"
        )
    else:
        network = entry.kind.open(checkpoint, **given, **options)
    chosen = choose_device(device)
    network.to(chosen, choose_precision(precision, chosen))
    segmenter = Segmenter(
        network, short_side=short_side, crop=crop, stride=stride, batch_size=batch_size, windows=windows
    )
    if optimize:
        segmenter.optimize(int8=precision == "int8")
    elif precision == "int8":
        raise ValueError("precision int8 is a way to optimize: expected optimize=True, got False")
    return segmenter


def _exported(model: str | Path, device: str, precision: str, options: Mapping[str, Any]) -> SegmentationModel:
    """A model that was exported to ONNX.

    Raises:
        ValueError: it is to run elsewhere than on the CPU, in another precision, or with settings.
    """
    from fastzs.export.runtime import ExportedModel

    if device not in ("auto", "cpu"):
        raise ValueError(
            f"{model}: exported models run on the CPU here; expected device 'auto' or 'cpu', got {device!r}"
        )
    if precision not in ("auto", "fp32"):
        raise ValueError(
            f"{model}: its precision was chosen when it was exported; leave precision out, got {precision!r}"
        )
    if options:
        raise ValueError(f"{model}: an exported model is as it was exported; leave {next(iter(options))} out")
    return ExportedModel(model)


def _clip(
    *, backbone: str | nn.Module | None = None, tokenizer: Callable[..., Any] | None = None, **weights: str
) -> Clip:
    """The CLIP of a system without training, by name or at hand."""
    if backbone is not None and not isinstance(backbone, str):
        if weights:
            raise ValueError(f"{type(backbone).__name__} brings its weights; leave out weights={weights['weights']!r}")
        return clip_module.from_model(backbone, tokenizer)
    if tokenizer is not None:
        raise ValueError("tokenizer: a backbone that is given by its name brings its own; leave out tokenizer=...")
    return clip_module.load(**({} if backbone is None else {"backbone": backbone}), **weights)


def default_model(weights: str | Path | None = None, checkpoint: str | Path | None = None) -> str:
    """The system that is taken where none is named: the checkpoint's, else what gives the best masks without training.

    That is NACLIP with its refinement, which has the best published mean over the eight benchmarks of the training-free
    systems without a second network that are free to use (docs/training-free.md). The built-in weights are read as they
    were trained, by MaskCLIP.
    """
    if checkpoint is not None:
        return system_of(os.path.expanduser(checkpoint)).name
    return "maskclip" if str(weights) == "shapes" else "naclip"


def system_of(checkpoint: str | Path) -> System:
    """The system that a checkpoint is of: its folder says so, or the names of its tensors do.

    Raises:
        WeightsError: it cannot be found or read, or is none of a known system.
    """
    if not saved.is_file_name(checkpoint):
        name = saved.kind_name(saved.find(checkpoint))
        for entry in systems().values():
            if entry.kind.__name__ == name:
                return entry
        what = (
            "does not say which system it holds" if name is None else f"says that it holds a {name}, which is unknown"
        )
        raise WeightsError(
            f"{checkpoint}: its config.json {what}; name the system: "
            f"fastzs.load('clip_rc', checkpoint={str(checkpoint)!r})"
        )
    path = Path(checkpoint)
    if not path.is_file():
        raise WeightsError(f"checkpoint {path}: there is no such file")
    trained = {entry.name: entry.kind for entry in systems().values() if issubclass(entry.kind, TrainedModel)}
    state = read_state(path, sorted({package for kind in trained.values() for package in kind.opaque}))
    found = [name for name, kind in trained.items() if kind.recognises(state)]
    if len(found) == 1:
        return system(found[0])
    if found:
        raise WeightsError(
            f"{path} can be a checkpoint of {' or '.join(found)}, which its tensors do not tell; name the system: "
            f"fastzs.load({found[0]!r}, checkpoint={str(path)!r})"
        )
    raise WeightsError(
        f"{path}: its tensors ({', '.join(list(state)[:3])}, ...) are those of no known system's checkpoint; weights "
        "of CLIP itself are given as weights=..."
    )


def check_options(entry: System, options: Mapping[str, Any]) -> None:
    """Refuse options that a system does not have.

    Raises:
        ValueError: names the first unknown one and the nearest known.
    """
    known = [name for name in _parameters(entry.kind) if name not in _OWN]
    check_keys(options, [*known, *getattr(entry.kind, "file_options", ())], entry.name)


def _parameters(kind: type) -> list[str]:
    """Names of a constructor's arguments, with those that it hands on to the class it builds on."""
    found: list[str] = []
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found += [one.name for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
            if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
                break
    return found


def _is_checkpoint(name: str) -> bool:
    return saved.is_file_name(name) or Path(name).is_dir() or (name not in systems() and "/" in name)
