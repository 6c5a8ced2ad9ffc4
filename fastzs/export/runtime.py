"""A model that was exported to ONNX, run by ONNX Runtime under the contract of all models."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastzs.clip import Clip, WeightsError
from fastzs.export.about import About, tokenizer_of
from fastzs.export.check import onnx_runtime
from fastzs.features import features_kind
from fastzs.models.base import Features, SegmentationModel, join
from fastzs.models.training_free import padded
from fastzs.readout import Readout


class OnnxText:
    """A text tower in ONNX Runtime, as :class:`fastzs.clip.text.TextEncoder` is called."""

    def __init__(self, path: Path, tokenizer: Any):
        self.tokenizer, self.run = tokenizer, onnx_runtime(path)

    def encode(self, texts: list[str], batch: int = 256) -> Tensor:
        """Texts -> unit vectors fp32 [n, D], ``batch`` at a time."""
        parts = [self.tokenizer(texts[i : i + batch]).numpy() for i in range(0, len(texts), batch)]
        return torch.cat([torch.from_numpy(self.run({"tokens": part})[0]) for part in parts])


class ExportedModel(SegmentationModel):
    """An exported model; it cannot be trained, moved or cast.

    Args:
        place: the folder, or an ONNX file in it.

    Raises:
        WeightsError: files are missing or damaged, or in another format than ONNX.
        MissingPackage: ONNX Runtime is not installed.
    """

    def __init__(self, place: str | Path):
        super().__init__()
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
        about = About.read(folder)
        if about.format != "onnx":
            raise WeightsError(f"{folder}: expected a model exported to onnx, got {about.format}; export it again")
        self.about = about
        settings = dict(about.settings)
        vector = settings.pop("learned_vector")
        self._learned = None if vector is None else torch.tensor(vector)
        for name, value in settings.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        try:
            self.readout = None if about.readout is None else Readout(**about.readout)
            self.kind = features_kind(about.features["kind"])
            self.encoder, self.decoder = (onnx_runtime(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
            self._clip = None if about.clip is None else _clip(about.clip, folder)
        except (WeightsError, ModuleNotFoundError):
            raise
        except Exception as error:  # ONNX Runtime raises whatever comes to it
            raise WeightsError(f"{folder}: is no exported model that can be run: {error}") from error
        self.fingerprint = f"{self.fingerprint} onnx{' int8' if about.int8 else ''}"
        self.device_of = nn.Parameter(
            torch.zeros(0), requires_grad=False
        )  # tells the device and dtype, as of all models

    def encode(self, images: Tensor) -> Features:
        size = self.about.size
        if size is not None and list(images.shape[2:]) != size:
            raise ValueError(
                f"this model was exported for windows of {size[0]} x {size[1]} pixels, got {images.shape[2]} x "
                f"{images.shape[3]}; leave crop as it is and give a short_side of at least {max(size)}, or export it "
                "with --dynamic"
            )
        fields = self.about.features["fields"]
        rows = [self.encoder({"images": image[None].numpy()}) for image in images]
        parts = [self.kind(**dict(zip(fields, map(torch.from_numpy, row), strict=True))) for row in rows]
        return self.kind.cat(parts)

    def decode(
        self, features: Any, text: Tensor, *, groups: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        if groups is not None and not self.about.joins:
            raise ValueError(
                f"this exported {self.about.system} takes one text vector for a class; leave synonyms out, or join "
                "them with Vocabulary(..., synonyms='mean')"
            )
        vectors = self.prepare_text(text).numpy()
        maps = []
        for i in range(len(features)):
            values = {name: value.numpy() for name, value in features[i : i + 1].tensors().items()}
            maps.append(torch.from_numpy(self.decoder({"text": vectors, **values})[0]))
        return join(torch.cat(maps), groups)

    def covered(self, windows: Tensor) -> Tensor:
        return padded(windows, self.about.multiple)

    def learned_vector(self) -> Tensor:
        assert self._learned is not None
        return self._learned


def _clip(about: dict[str, Any], folder: Path) -> Clip:
    encoder: Any = OnnxText(folder / "text.onnx", tokenizer_of(about, folder))
    return Clip(
        about["backbone"],
        about["source"],
        about["config"],
        about["quick_gelu"],
        (0.0,) * 3,
        (1.0,) * 3,
        f"{about['fingerprint']} onnx",
        templates=about["templates"],
        background=None if about["background"] is None else tuple(about["background"]),
        _text=[encoder],
    )
