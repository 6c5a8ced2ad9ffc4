"""Programs as ONNX files that share one file of weights, and their int8 form."""

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

from fastzs.export.graphs import ExportError, reason_of
from fastzs.needed import needed

WEIGHTS = "weights.bin"
INLINE = 1024  # bytes of a tensor that stays in its graph
ALIGNED = 4096  # where tensors begin, so that they can be mapped into memory
QUANTISED = ["MatMul", "Gemm"]


class Weights:
    """The file in which graphs of one folder keep their tensors, each content once."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self._places: dict[bytes, int] = {}

    def take(self, graph: Any) -> None:
        """Move the large tensors of a graph into the file."""
        onnx = needed("onnx.external_data_helper", "onnx", "ONNX files", "export")
        for tensor in graph.initializer:
            data = tensor.raw_data
            if len(data) < INLINE:
                continue
            digest = hashlib.sha256(data).digest()
            if digest not in self._places:
                self.stream.write(b"\0" * (-self.stream.tell() % ALIGNED))
                self._places[digest] = self.stream.tell()
                self.stream.write(data)
            onnx.set_external_data(tensor, WEIGHTS, self._places[digest], len(data))
            tensor.ClearField("raw_data")


def model_proto(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], what: str) -> Any:
    """The ONNX model of a program.

    Raises:
        ExportError: ONNX has no operator for something in it.
        MissingPackage: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        needed(package, package, "ONNX files", "export")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter tells of its steps
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs)
            )
    except Exception as error:  # the exporter raises whatever comes to it
        raise ExportError(f"{what} cannot be written as ONNX: {reason_of(error)}") from error
    finally:
        logging.disable(level)
    assert made is not None
    return made.model_proto


def quantised(proto: Any) -> Any:
    """The same with the weights of matrix products in int8, a scale for each of their outputs, by ONNX Runtime.

    Activations are rounded in each call, with one scale for a tensor.
    """
    onnx = needed("onnx", "onnx", "ONNX files", "export")
    quantization = needed("onnxruntime.quantization", "onnxruntime", "int8 weights", "export")
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        onnx.save(proto, before, save_as_external_data=True, location="before.bin")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it advises a preprocessing that our graphs do not need
        try:
            quantization.quantize_dynamic(
                before,
                after,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=QUANTISED,
                use_external_data_format=True,
            )
        finally:
            logging.disable(level)
        return onnx.load(after)
