"""A model's folder of graphs: made in a temporary folder, checked there, and only then put in its place."""

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastzs.clip import WeightsError
from fastzs.export import check
from fastzs.export.about import FILE, About, clip_of
from fastzs.export.graphs import (
    Decoder,
    Encoder,
    ExportError,
    Labels,
    Whole,
    fixed_rows,
    odd,
    program,
    references,
    sample,
)
from fastzs.export.onnx_files import WEIGHTS, Weights, model_proto, quantised
from fastzs.files import temporary_beside, write_atomically
from fastzs.models.base import SegmentationModel, join
from fastzs.needed import MissingPackage, needed
from fastzs.vocabulary import Vocabulary, class_indices, text_vectors
from fastzs.windows import Size

Format = Literal["torch", "onnx", "openvino"]
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}


def export(
    model: SegmentationModel,
    output: Path,
    form: Format,
    *,
    size: Size,
    dynamic: bool = False,
    labels: bool = False,
    int8: bool = False,
    vocabulary: Vocabulary | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> About:
    """Write a model's graphs, its text tower and ``metadata.json`` to a new folder.

    Args:
        model: in fp32 on the CPU, its weights not packed.
        output: the folder; there must be none, or an empty one.
        form: of the files. ``model`` is the whole in each of them; ONNX has ``encoder`` and ``decoder``, too.
        size: of the images in pixels; with ``dynamic`` that of the sample, and both sides vary.
        labels: the whole gives labels of the image's size, not logits.
        int8: weights of matrix products in int8, by ONNX Runtime or NNCF.
        vocabulary: its vectors are written to ``text.npz``.
        say: is told what is done.

    Returns:
        What was written, with what the checks found.

    Raises:
        ExportError: the model cannot be exported, or the graphs do not agree with it; nothing is left then.
        MissingPackage: the extra ``export`` is not installed.
        ValueError: ``output`` holds something.
    """
    check_system(type(model))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: expected a new or empty folder, but it holds something; name another one")
    if int8 and form == "torch":
        raise ValueError("--int8 needs --format onnx or openvino, whose tools make int8 weights; got torch")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_beside(output.absolute())
    folder.mkdir()
    try:
        about = _write(model, folder, form, size, dynamic, labels, int8, vocabulary, say)
        if output.is_dir():
            output.rmdir()
        os.replace(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return about


def check_system(kind: type[SegmentationModel]) -> None:
    """
    Raises:
        ExportError: models of this system cannot be exported.
    """
    if reason := kind.why_not_exported():
        raise ExportError(f"{kind.__name__} cannot be exported: {reason}")


def _write(
    model: SegmentationModel,
    folder: Path,
    form: Format,
    size: Size,
    dynamic: bool,
    labels: bool,
    int8: bool,
    vocabulary: Vocabulary | None,
    say: Callable[[str], None],
) -> About:
    name = type(model).__name__
    image, text = sample(model, odd(size) if dynamic else size)
    with references():
        features = model.encode(image)
    kind, fields = type(features), list(features.tensors())
    sides: set[int] = {2, 3} if dynamic else set()
    rows: set[int] = set() if fixed_rows(model) else {0}
    seen = _seen(model, vocabulary) if labels else []
    whole = Labels(model, seen) if labels else Whole(model)
    say("tracing the model")
    parts = {"model": (program(whole, (image, text), [sides, rows], name), ["images", "text"], [_output(labels)])}
    if form == "onnx":
        varying = _varying(model, size, features.tensors()) if dynamic else [set() for _ in fields]
        encoder = program(Encoder(model), (image,), [sides], f"{name}'s encoder")
        values = (text, *(value.contiguous() for value in features.tensors().values()))  # as runtimes give them
        decoder = program(Decoder(model, kind, fields), values, [rows, *varying], f"{name}'s decoder")
        parts["encoder"] = (encoder, ["images"], fields)
        parts["decoder"] = (decoder, ["text", *fields], ["logits"])
    clip = tokens = None
    if model._clip is not None:
        try:
            clip, files = clip_of(model.clip)
        except (WeightsError, MissingPackage) as error:
            say(f"the text tower is left out: {error}")
        else:
            tower = model.clip.text()
            tokens = tower.tokenizer(["a", "a a"])
            parts["text"] = (program(tower, (tokens,), [{0}], "the text tower"), ["tokens"], ["vectors"])
            for file, content in files.items():
                write_atomically(folder / file, content)
    if vocabulary is not None:
        vectors = text_vectors(model, vocabulary)
        np.savez(folder / "text.npz", names=np.array(vocabulary.names), vectors=vectors.numpy())
    about = About.of(
        model,
        None if dynamic else size,
        format=form,
        labels=labels,
        int8=int8,
        joins=_joins_late(model, size),
        features={"kind": f"{kind.__module__}.{kind.__qualname__}", "fields": fields},
        names=None if vocabulary is None else list(vocabulary.names),
        clip=clip,
        checks={},
    )
    _SAVERS[form](folder, parts, int8, say)
    say("checking the graphs against the model")
    sizes = [size, odd((size[0] * 3 // 2, size[1]))] if dynamic else [size]
    judged = _checks(model, whole, folder / f"model{SUFFIXES[form]}", form, sizes, int8)
    if tokens is not None:
        judged |= _text_checks(model, tokens, folder / f"text{SUFFIXES[form]}", form, int8)
    about = replace(about, checks=judged)
    write_atomically(folder / FILE, about.text().encode())
    return about


def _output(labels: bool) -> str:
    return "labels" if labels else "logits"


def _seen(model: SegmentationModel, vocabulary: Vocabulary | None) -> list[int]:
    if model.seen is None or not model.calibration:
        return []
    if vocabulary is None:
        raise ValueError("--labels: this model lowers the scores of its training classes; name the classes, too")
    return class_indices(model.seen, vocabulary.names, among=True)


def _varying(model: SegmentationModel, size: Size, fields: dict[str, Tensor]) -> list[set[int]]:
    """Of each field of the features the dimensions that vary with the image."""
    with references():
        other = model.encode(sample(model, (size[0] * 2, size[1] * 3))[0]).tensors()
    return [{i for i, n in enumerate(value.shape) if other[name].shape[i] != n} for name, value in fields.items()]


def _joins_late(model: SegmentationModel, size: Size) -> bool:
    """Whether joining the synonyms of classes behind the decoder gives what the decoder itself gives."""
    if fixed_rows(model):
        return False
    image, text = sample(model, size)
    groups = torch.arange(len(text)) // 2
    with references():
        features = model.encode(image)
        early, late = model.decode(features, text, groups=groups), join(model.decode(features, text), groups)
    return early.shape == late.shape and bool(torch.allclose(early, late, rtol=1e-5, atol=1e-5))


def _save_torch(folder: Path, parts: dict[str, Any], int8: bool, say: Callable[[str], None]) -> None:
    for name, (made, _, _) in parts.items():
        torch.export.save(made, folder / f"{name}.pt2")


def _save_onnx(folder: Path, parts: dict[str, Any], int8: bool, say: Callable[[str], None]) -> None:
    with open(folder / WEIGHTS, "xb") as stream:
        weights = Weights(stream)
        for name, (made, inputs, outputs) in parts.items():
            say(f"writing {name}.onnx")
            proto = model_proto(made, inputs, outputs, name)
            proto = quantised(proto) if int8 else proto
            weights.take(proto.graph)
            write_atomically(folder / f"{name}.onnx", proto.SerializeToString())


def _save_openvino(folder: Path, parts: dict[str, Any], int8: bool, say: Callable[[str], None]) -> None:
    ov = check.openvino_package()
    steps = folder / "onnx"
    steps.mkdir()
    _save_onnx(steps, parts, False, lambda sentence: None)
    for name in parts:
        say(f"writing {name}.xml")
        model = ov.convert_model(str(steps / f"{name}.onnx"))
        if int8:
            model = needed("nncf", "nncf", "int8 weights of OpenVINO", "export").compress_weights(model)
        ov.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=False)
    shutil.rmtree(steps)


_SAVERS = {"torch": _save_torch, "onnx": _save_onnx, "openvino": _save_openvino}


def _checks(
    model: SegmentationModel, whole: torch.nn.Module, path: Path, form: Format, sizes: Sequence[Size], int8: bool
) -> dict[str, Any]:
    """Hold the whole against the model in fp64, in each runtime that is installed and reads it."""
    exact = copy.deepcopy(whole).double()
    allowed = None if int8 else check.bound(model)
    out: dict[str, Any] = {}
    for runtime, runner in _runners(path, form).items():
        for one in sizes:
            image, text = sample(model, one)
            with references():
                wide = image.double(), text.double()
                right = exact.scores(*wide) if isinstance(exact, Labels) else exact(*wide)
            what = f"{form} in {runtime}"
            try:
                got = torch.from_numpy(np.array(runner({"images": image.numpy(), "text": text.numpy()})[0]))
                out[f"{runtime}, {one[0]} x {one[1]}"] = check.judge(got, right, allowed, what)
            except Exception as error:  # runtimes raise whatever comes to them
                if one == sizes[0]:
                    raise
                raise ExportError(
                    f"{type(model).__name__}: the size of its images cannot vary ({what}, {one[0]} x {one[1]}: "
                    f"{str(error).splitlines()[0][:200]}); export it without --dynamic"
                ) from error
    return out


def _text_checks(model: SegmentationModel, tokens: Tensor, path: Path, form: Format, int8: bool) -> dict[str, Any]:
    """Hold the text tower against its fp64."""
    tower = model.clip.text()
    with references():
        right = copy.deepcopy(tower).double()(tokens)
    allowed, out = None if int8 else check.bound(tower), {}
    for runtime, runner in _runners(path, form).items():
        error = float(np.abs(runner({"tokens": tokens.numpy()})[0] - right.numpy()).max())
        if allowed is not None and not error <= allowed:
            raise ExportError(f"text tower in {runtime}: off by {error:.1e}, at most {allowed:.1e} allowed")
        out[f"{runtime}, text"] = {"allowed": allowed, "error": error}
    return out


def _runners(path: Path, form: Format) -> dict[str, check.Runner]:
    if form == "torch":
        # its guards tell the size of the sample from multiples of the patch, for which the same operators are right
        module = torch.export.load(path).module(check_guards=False)
        return {"PyTorch": lambda feeds: [module(*(torch.from_numpy(x) for x in feeds.values())).numpy()]}
    if form == "openvino":
        return {"OpenVINO": check.openvino(path)}
    import importlib.util

    runners = {"ONNX Runtime": check.onnx_runtime(path)}
    if importlib.util.find_spec("openvino") is not None:
        runners["OpenVINO"] = check.openvino(path)
    return runners
