"""From a picture and names to labels: resize, windows, model, label map."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

from fastzs import clip as clip_module
from fastzs.clip.packed import pack
from fastzs.models import SZN, ClipRC, LSeg, MaskCLIP, MaskCLIPPlus, ZegCLIP, ZegFormer, ZSSeg
from fastzs.models.trained import TrainedModel
from fastzs.ops import label_map
from fastzs.pictures import read_picture
from fastzs.result import Segmentation
from fastzs.trace import span, traced
from fastzs.vocabulary import Vocabulary
from fastzs.windows import resize_size, window_grid

Picture = str | Path | Image.Image | np.ndarray | Tensor
Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Model = MaskCLIP | TrainedModel
MODELS: dict[str, type[Model]] = {
    "maskclip": MaskCLIP,
    "clip_rc": ClipRC,
    "zegclip": ZegCLIP,
    "lseg": LSeg,
    "szn": SZN,
    "maskclip_plus": MaskCLIPPlus,
    "zegformer": ZegFormer,
    "zsseg": ZSSeg,
}
BACKGROUND = ("background", "wall", "floor", "ground", "sky")
MAPS_BYTES = 128 << 20  # of class maps held at a time, where a picture keeps its size
LONG_SIDE = 4  # times the short side: published test pipelines resize to (2048, 512)


def load(
    model: str = "maskclip",
    *,
    backbone: str = "ViT-B-16",
    weights: str | Path = "openai",
    checkpoint: str | Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    short_side: int | None = None,
    crop: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    batch: int = 8,
    **options: Any,
) -> "Segmenter":
    """A model ready to segment pictures.

    Args:
        model: "maskclip", which needs no training, or a trained system with a ``checkpoint``: "clip_rc", "zegclip",
            "lseg", "szn", "maskclip_plus", "zegformer", "zsseg".
        backbone, weights: see :func:`fastzs.clip.load`; ``weights="shapes"`` needs no download. Of a
            checkpoint without a text tower they name the CLIP that the text tower is taken from.
        checkpoint: a published ``.pth`` or safetensors file, or a folder or hub id that ``save_pretrained`` or
            ``push_to_hub`` wrote.
        device: "auto" takes a GPU if there is one.
        precision: "auto" takes bf16 where the device computes it natively, else fp32.
        short_side, crop, stride, batch: see :class:`Segmenter`.
        options: the model's own settings, see :class:`fastzs.models.MaskCLIP`, and for trained ones
            ``from_checkpoint`` and the constructor of :class:`fastzs.models.ClipRC` (``seen=[...]``: the training
            classes, whose scores are lowered).

    Raises:
        ValueError: unknown model, device or precision (nearest known names are given).
        WeightsError: weights that cannot be found, read or fitted.
    """
    if model not in MODELS:
        near = difflib.get_close_matches(model, MODELS, n=3, cutoff=0.3) or list(MODELS)
        raise ValueError(f"unknown model {model!r}; nearest known: {', '.join(near)}")
    network = _network(model, backbone, weights, checkpoint, options)
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen)
    network.to(chosen, dtype)
    if chosen.type == "cpu":
        pack(network)
    return Segmenter(network, short_side=short_side, crop=crop, stride=stride, batch=batch)


def _network(
    model: str, backbone: str, weights: str | Path, checkpoint: str | Path | None, options: dict[str, Any]
) -> Model:
    kind = MODELS[model]
    if issubclass(kind, MaskCLIP):
        if checkpoint is not None:
            raise ValueError("maskclip has no training and so no checkpoint; give CLIP's weights as weights=...")
        return kind(clip_module.load(backbone, weights), **options)
    if checkpoint is None:
        raise ValueError(
            f"{model} needs a trained checkpoint: checkpoint='voc_zero.pth', a folder or a hub id; to train one, "
            f"start from fastzs.models.{kind.__name__}(...); model='maskclip' needs none"
        )
    if Path(checkpoint).is_file() or Path(checkpoint).suffix in (".pth", ".pt", ".safetensors"):
        if (backbone, str(weights)) != ("ViT-B-16", "openai"):
            options = {"backbone": backbone, "weights": str(weights)} | options
        return kind.from_checkpoint(checkpoint, **options)
    return kind.from_pretrained(str(checkpoint), **options)


def choose_device(name: str) -> torch.device:
    """The torch device for a name; "auto" takes CUDA, then Apple's GPU, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype for a name; "auto" takes bf16 where the device multiplies it natively, else fp32."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"precision must be auto, {', '.join(DTYPES)}, got {name!r}")
    return torch.bfloat16 if native_bf16(device) else torch.float32


def native_bf16(device: torch.device) -> bool:
    """Whether ``device`` has bf16 matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16"))
    return False


class Maps(NamedTuple):
    """Class maps of a picture's windows, as :func:`fastzs.ops.label_map` takes them."""

    logits: Tensor  # fp32 [W, C, h, w]
    windows: Tensor  # int64 [W, 4]
    size: tuple[int, int]  # of the resized picture
    picture_size: tuple[int, int]


class Segmenter:
    """Segments pictures with one model.

    Args:
        model: from :mod:`fastzs.models`, on its device and in its dtype.
        short_side: pictures are resized so that their shorter side has this many pixels (the longer at most four
            times that, the bound of the published test pipelines); 0 leaves their size; the model's own choice if
            omitted.
        crop, stride: sliding windows over the resized picture, a side or (height, width) in pixels; 0 takes the
            whole picture at once; the model's own choice if omitted, which shrinks to pictures smaller than it, as
            published; ``stride`` two thirds of the crop.
        batch: windows per forward pass.

    Raises:
        ValueError: a number out of range, a stride larger than the crop or without one.
    """

    def __init__(
        self,
        model: Model,
        *,
        short_side: int | None = None,
        crop: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        batch: int = 8,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if short_side is not None and short_side < 0:
            raise ValueError(f"short_side must not be negative, got {short_side}")
        self.model = model.eval()
        self.short_side = model.short_side if short_side is None else short_side
        self.crop = model.crop if crop is None else crop
        self._crop_is_given = crop is not None
        self.stride = model.stride if stride is None and crop is None else stride
        if self.crop:
            if self.stride is None:
                height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
                self.stride = (max(1, 2 * height // 3), max(1, 2 * width // 3))
            window_grid((1, 1), self.crop, self.stride)  # refuses here what it would refuse for every picture
        elif stride is not None:
            raise ValueError(
                f"stride {stride}: the distance of windows, but pictures are taken whole (crop is {self.crop}); "
                "give a crop, too, or no stride"
            )
        self.batch = batch
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        scale = torch.tensor(model.std, device=self.device) * 255
        self._mean = (torch.tensor(model.mean, device=self.device) * 255)[:, None, None]
        self._scale = scale[:, None, None]

    @traced("predict.picture")
    @torch.inference_mode()
    def __call__(
        self,
        picture: Picture,
        names: Vocabulary | Sequence[str | Mapping[str, Sequence[str]]],
        *,
        background: Literal["none", "threshold", "prompt"] = "none",
        threshold: float = 0.5,
        background_names: Sequence[str] | None = None,
        scores: bool = False,
    ) -> Segmentation:
        """Label every pixel of a picture.

        Args:
            picture: path, PIL image, uint8 array [H, W, 3] or uint8 tensor [3, H, W].
            names: the classes, see :class:`fastzs.Vocabulary`.
            background: pixels of none of the names: there are none; those whose best score is below ``threshold``;
                or those that fit ``background_names`` better. "background" then is the last of the result's names.
            threshold: score in 0..1.
            background_names: what "prompt" looks for; a few general words if omitted.
            scores: also keep the winning score of each pixel.

        Raises:
            PictureError: the picture cannot be read.
            ValueError: names or settings that do not fit, or a crop asked for that is larger than the resized picture;
                the message says which.
        """
        vocabulary = names if isinstance(names, Vocabulary) else Vocabulary(names)
        classes = vocabulary.names
        if background == "threshold":
            if self.model.activation == "softmax" and len(classes) == 1:
                raise ValueError(
                    "background='threshold' compares the names with each other, so it needs at least two; "
                    "with one name use background='prompt'"
                )
            classes = (*classes, "background")
        elif background == "prompt":
            words = background_names or getattr(self.model.clip, "background", None) or BACKGROUND
            vocabulary = vocabulary.with_class("background", words)
            classes = vocabulary.names
        elif background != "none":
            raise ValueError(f"background must be 'none', 'threshold' or 'prompt', got {background!r}")
        with span("predict.preprocess"):
            original = read_picture(picture)
        options = {
            "activation": self.model.activation,
            "seen": self.model.seen_indices(classes) if isinstance(self.model, TrainedModel) else None,
            "calibration": getattr(self.model, "calibration", 0.0),
            "threshold": threshold if background == "threshold" else None,
            "return_scores": scores,
        }
        labels, won = [], []
        for maps, rows in self._bands(original, vocabulary):
            with span("predict.label_map"):
                mapped = label_map(maps.logits, maps.windows, maps.size, output_size=maps.picture_size, **options)
            labels.append(mapped.labels[rows].cpu())
            won += [] if mapped.scores is None else [mapped.scores[rows].cpu()]
        return Segmentation(
            labels=torch.cat(labels), names=classes, scores=torch.cat(won) if scores else None, picture=original.cpu()
        )

    @torch.inference_mode()
    def maps(self, picture: Tensor, vocabulary: Vocabulary) -> Maps:
        """What the model says of a picture, uint8 [3, H, W], before :func:`fastzs.ops.label_map` makes labels of it.

        Raises:
            ValueError: a crop asked for is larger than the resized picture, or a vocabulary that does not fit.
        """
        resized, windows = self._windows(picture)
        logits = self.logits(resized, windows, vocabulary)
        return Maps(logits, windows, (resized.shape[1], resized.shape[2]), (picture.shape[1], picture.shape[2]))

    def _windows(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The resized picture and the windows over it, row by row."""
        with span("predict.preprocess"):
            resized = self._resize(picture)
        size = (resized.shape[1], resized.shape[2])
        if self.crop and self.stride:  # a crop always has a stride
            if self._crop_is_given:
                _check_crop(self.crop, size)
            return resized, window_grid(size, self.crop, self.stride)
        return resized, torch.tensor([[0, 0, *size]])

    def _bands(self, picture: Tensor, vocabulary: Vocabulary) -> Iterator[tuple[Maps, slice]]:
        """Maps of bands of the picture from top to bottom, and which rows of each band are wanted.

        A picture that keeps its size may have thousands of windows, whose maps would take gigabytes. What lies above
        the next row of windows is final, so no more than about ``MAPS_BYTES`` of maps are held. Where the labels are
        resized, rows mix, but the model's input is small: one band.
        """
        resized, windows = self._windows(picture)
        height, width = resized.shape[1:]
        if resized.shape != picture.shape:
            yield self.maps(picture, vocabulary), slice(None)
            return
        held, kept, begin = [], 0, 0  # maps from window ``kept`` on; the rows above ``begin`` are done
        for start in range(0, len(windows), self.batch):
            stop = min(start + self.batch, len(windows))
            held.append(self.logits(resized, windows[start:stop], vocabulary))
            end = height if stop == len(windows) else int(windows[stop, 0])
            if stop < len(windows) and (end == begin or sum(part.nbytes for part in held) < MAPS_BYTES):
                continue
            held = [torch.cat(held)]
            places = windows[kept:stop]
            places = places[places[:, 0] < end]
            top, bottom = int(places[0, 0]), int(places[-1, 0] + places[-1, 2])
            band = (bottom - top, width)
            moved = places - torch.tensor([top, 0, 0, 0])
            yield Maps(held[0][: len(places)], moved, band, band), slice(begin - top, end - top)
            over = int((places[:, 0] + places[:, 2] <= end).sum())
            held, kept, begin = [held[0][over:].clone()], kept + over, end

    def logits(self, picture: Tensor, windows: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Low-resolution class maps of the windows, fp32 [W, C, h, w], ``batch`` windows at a time."""
        parts = []
        for some in windows.split(self.batch):
            crops = [picture[:, top : top + height, left : left + width] for top, left, height, width in some.tolist()]
            images = (torch.stack(crops).to(self.device, torch.float32) - self._mean) / self._scale
            with span("predict.model"):
                parts.append(self.model(images.to(self.dtype), vocabulary).float())
        return torch.cat(parts)

    def _resize(self, picture: Tensor) -> Tensor:
        size = (picture.shape[1], picture.shape[2])
        if not self.short_side:
            return picture
        wanted = resize_size(size, self.short_side, LONG_SIDE * self.short_side)
        # antialiasing changes nothing where pictures grow, as in the published pipelines on their data sets
        return picture if wanted == size else TF.resize(picture, list(wanted), antialias=True)


def _check_crop(crop: int | tuple[int, int], size: tuple[int, int]) -> None:
    height, width = (crop, crop) if isinstance(crop, int) else crop
    if height > size[0] or width > size[1]:
        raise ValueError(
            f"the crop, {height} x {width} pixels, is larger than the picture, {size[0]} x {size[1]} as the model sees "
            "it; give a smaller crop, a larger short side, or crop 0 for the whole picture at once"
        )
