"""Exported graphs held against their model in fp64."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastzs.export.graphs import ExportError
from fastzs.needed import needed

Runner = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
UNIT = 2.0**-24  # the relative error of rounding to fp32
FACTOR = 2.0


def bound(model: nn.Module) -> float:
    """The largest error that fp32 may give a logit, as a share of the largest.

    A sum of n products errs by about sqrt(n) roundings of its largest term. The errors of one layer pass on to the
    next, so they are added up over all layers with weights, each taken to be as long as the longest. ``FACTOR`` is for
    what has no weights: norms, softmax, interpolation.
    """
    layers = [p for p in model.parameters() if p.ndim >= 2]
    longest = max((p[0].numel() for p in layers), default=1)
    return FACTOR * len(layers) * math.sqrt(longest) * UNIT


def onnx_runtime(path: Path) -> Runner:
    """Runs an ONNX file in ONNX Runtime on the CPU.

    Raises:
        MissingPackage: it is not installed.
    """
    ort = needed("onnxruntime", "onnxruntime", "ONNX files", "export")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [one.name for one in session.get_inputs()]
    return lambda feeds: session.run(None, {name: np.ascontiguousarray(feeds[name]) for name in inputs})


def openvino_package() -> Any:
    """OpenVINO, without the package by which it and NNCF tell their makers of each import and conversion.

    Raises:
        MissingPackage: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # cannot be imported any more
    return needed("openvino", "openvino", "OpenVINO models", "export")


def openvino(path: Path) -> Runner:
    """Runs an ONNX file or an OpenVINO model in OpenVINO on the CPU, in fp32.

    Raises:
        MissingPackage: it is not installed.
    """
    ov = openvino_package()
    core = ov.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [one.get_any_name() for one in compiled.inputs]

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = compiled({name: np.ascontiguousarray(feeds[name]) for name in names})
        return [found[i] for i in range(len(compiled.outputs))]

    return run


def judge(got: Tensor, right: Tensor, allowed: float | None, what: str) -> dict[str, Any]:
    """Hold logits or labels against what is right.

    Args:
        got: logits [1, T, h, w], or labels [1, H, W].
        right: in fp64, logits or scores [1, T, h, w] of the same places.
        allowed: error as a share of the largest value; None: whatever it is, it is only told.
        what: for the message.

    Returns:
        ``error`` (of logits), ``allowed``, ``labels`` (the share that is equal) and ``ties`` (of the others, those
        whose two classes are as good within the error).

    Raises:
        ExportError: the error is larger, or labels differ that are no ties.
    """
    out: dict[str, Any] = {"allowed": allowed}
    largest = right.abs().max().item()
    labels = got
    if got.is_floating_point():
        if got.shape != right.shape:
            raise ExportError(f"{what}: expected logits {list(right.shape)}, got {list(got.shape)}")
        out["error"] = error = (got.double() - right).abs().max().item() / max(largest, 1e-30)
        if allowed is not None and not error <= allowed:
            raise ExportError(
                f"{what}: its logits are off by {error:.1e} of the largest, at most {allowed:.1e} allowed"
            )
        labels = got.argmax(1)
    best, wanted = right.max(1)
    off = labels != wanted
    gap = (best - right.gather(1, labels.long()[:, None])[:, 0])[off]
    ties = gap <= 2 * (allowed or 0.0) * largest
    out |= {"labels": 1 - off.double().mean().item(), "ties": int(ties.sum())}
    if allowed is not None and not ties.all():
        raise ExportError(f"{what}: {int((~ties).sum())} labels differ from the model's, beyond what rounding explains")
    return out
