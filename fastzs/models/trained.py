"""What every trained system shares: the CLIP whose text it reads, a vocabulary's text vectors, checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from fastzs import clip as clip_module
from fastzs.clip import Clip, WeightsError
from fastzs.clip.state import file_fingerprint, read_state
from fastzs.vocabulary import Vocabulary

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TrainedModel(nn.Module, PyTorchModelHubMixin, library_name="fastzs", license="apache-2.0"):
    """A network that scores the pixels of pictures against the text vectors of any classes.

    Parameters carry the published checkpoints' names. The text tower is no part of the network: it is found by name
    when a vocabulary is first embedded.

    Args:
        backbone, weights: the CLIP of the text vectors, see :func:`fastzs.clip.load`.
        clip: the same, if it is loaded already.
        text_dim: width D of the text vectors.
        seen, calibration: the training classes, whose scores are lowered in testing.

    Attributes:
        activation: what turns its low-resolution output into scores, see :func:`fastzs.ops.label_map`.
        default_templates: see :data:`fastzs.clip.TEMPLATES`.
        mean, std: what pictures are normalised with, on the 0 to 1 scale.
        short_side, crop, stride: see :class:`fastzs.predict.Segmenter`.
        settings: constructor arguments that :meth:`save_pretrained` writes.
    """

    activation: str = "softmax"
    default_templates = "single"
    opaque: Sequence[str] = ()  # packages whose objects published checkpoints hold besides their tensors
    mean: Sequence[float]
    std: Sequence[float]
    short_side: int | None
    crop: int | None
    stride: int | None

    def __init__(
        self,
        *,
        backbone: str,
        weights: str,
        clip: Clip | None = None,
        text_dim: int,
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.0,
    ):
        super().__init__()
        self.backbone_name, self.weights = backbone, str(weights)
        self._clip = clip
        self.text_dim = text_dim
        self.fingerprint = ""  # of the checkpoint file, for run records
        self.seen = None if seen is None else list(seen)
        self.calibration = calibration
        self._vocabulary: tuple[Vocabulary, Tensor] | None = None
        self.settings: dict[str, Any] = {
            "backbone": backbone,
            "weights": self.weights,
            "seen": self.seen,
            "calibration": calibration,
        }
        self._hub_mixin_config = self.settings

    @property
    def clip(self) -> Clip:
        """The CLIP whose text tower belongs to the model, found when it is first asked for.

        Raises:
            WeightsError: no known CLIP fits, or its weights are not there.
        """
        if self._clip is None:
            if not self.backbone_name:
                raise WeightsError(
                    f"{type(self).__name__}: the checkpoint has no text tower and its sizes are no known CLIP's; "
                    "give the text vectors: Vocabulary(names, embeddings=...)"
                )
            self._clip = clip_module.load(self.backbone_name, self.weights)
        return self._clip

    def text(self, vocabulary: Vocabulary | Tensor) -> Tensor:
        """Text vectors [rows, D] in the model's dtype and on its device.

        Raises:
            ValueError: they are not as wide as the model's joint space.
        """
        like, wide = next(self.parameters()), self.text_dim
        if isinstance(vocabulary, Tensor):
            if vocabulary.ndim != 2 or vocabulary.shape[1] != wide or vocabulary.shape[0] == 0:
                raise ValueError(
                    f"{type(self).__name__}: text vectors are {list(vocabulary.shape)}; wanted [classes, {wide}]"
                )
            return vocabulary.to(like)
        if self._vocabulary and self._vocabulary[0] is vocabulary:
            text = self._vocabulary[1]
            if text.dtype == like.dtype and text.device == like.device:
                return text
        with torch.inference_mode(False), torch.no_grad():
            given = vocabulary.embeddings
            text = vocabulary.embed(self.clip, self.default_templates) if given is None else given
            if text.shape[1] != wide:
                raise ValueError(
                    f"{type(self).__name__}: the vocabulary's vectors are {text.shape[1]} wide; "
                    f"this checkpoint wants {wide}, the joint space of its CLIP"
                )
            text = text.to(like, copy=True)
        self._vocabulary = (vocabulary, text)
        return text

    def training_text(self, vocabulary: Vocabulary | Tensor) -> tuple[Tensor, Sequence[str]]:
        """One text vector for each class, [C, D], and the classes' names.

        Raises:
            ValueError: a class has several, or :meth:`text` does not fit.
        """
        if not isinstance(vocabulary, Vocabulary):
            return self.text(vocabulary), [str(i) for i in range(len(vocabulary))]
        if vocabulary.synonyms == "max" and len(vocabulary.phrases) > len(vocabulary):
            raise ValueError("training wants one text vector for each class: Vocabulary(..., synonyms='mean')")
        return self.text(vocabulary), vocabulary.names

    def seen_indices(self, names: Sequence[str]) -> list[int] | None:
        """Where the seen classes are among ``names``; None if the model was not told any.

        Raises:
            ValueError: none of the seen classes is among them, or an index is too large.
        """
        return None if self.seen is None else class_indices(self.seen, names)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> Self:
        """Read a published checkpoint or a safetensors file with the same names.

        Sizes come from the tensors. Parameters that no output depends on are left out. Only tensors are read; no
        pickled code runs.

        Raises:
            WeightsError: not a checkpoint of this model, damaged, of sizes that do not fit each other, tensors missing
                or unexpected (named).
        """
        path = Path(path)
        if not path.is_file():
            raise WeightsError(f"checkpoint {path}: there is no such file")
        state = read_state(path, cls.opaque)
        cls._check_kind(path, state)
        used = cls._used(state)
        try:
            options = cls._sizes(used, options)
        except KeyError as error:
            raise WeightsError(
                f"{path}: {error.args[0]!r} is missing; is this a whole {cls.__name__} checkpoint?"
            ) from error
        with torch.device("meta"):
            model = cls(**options)
        model = model.to_empty(device="cpu")
        model._load(path, used)
        model.fingerprint = file_fingerprint(path)
        model._clip = model._own_clip(path, state)
        return model.eval()

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        """Refuse checkpoints of other models with a WeightsError that says what they are."""
        raise NotImplementedError

    @classmethod
    def _used(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors by this model's names, without those that no output depends on."""
        return dict(state)

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments from the tensors; KeyError names one that is missing."""
        raise NotImplementedError

    def _own_clip(self, path: Path, state: Mapping[str, Tensor]) -> Clip | None:
        """The text tower inside a checkpoint, if there is one."""
        return None

    def _load(self, path: Path, state: Mapping[str, Tensor]) -> None:
        wanted = self.state_dict()
        missing = sorted(wanted.keys() - state.keys())
        unexpected = sorted(state.keys() - wanted.keys() - self._left_out(state))
        if missing or unexpected:
            parts = [
                f"{what}: {_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
            ]
            raise WeightsError(f"{path}: does not fit {type(self).__name__}; {'; '.join(parts)}")
        for name, tensor in wanted.items():
            if state[name].shape != tensor.shape:
                raise WeightsError(
                    f"{path}: {name} is {list(state[name].shape)}; "
                    f"the checkpoint's other tensors want {list(tensor.shape)}"
                )
            if not torch.isfinite(state[name]).all():
                raise WeightsError(
                    f"{path}: {name} has NaN or infinite values; the file is damaged or training diverged"
                )
            tensor.copy_(state[name])

    def _left_out(self, state: Mapping[str, Tensor]) -> set[str]:
        """Names of a checkpoint that this model, as it is set, has no use for."""
        return set()


def class_indices(seen: Sequence, names: Sequence[str]) -> list[int]:
    """Positions of the seen classes, given by name or index, among ``names``, ascending."""
    place = {" ".join(name.casefold().split()): i for i, name in enumerate(names)}
    indices, unknown = [], []
    for item in seen:
        if isinstance(item, str):
            index = place.get(" ".join(item.casefold().split()))
        else:
            index = int(item) if 0 <= int(item) < len(names) else None
        (unknown if index is None else indices).append(item if index is None else index)
    if unknown or not indices:
        what = f"{_some([str(item) for item in unknown])} is not among" if unknown else "no class is among"
        raise ValueError(
            f"seen classes: {what} the {len(names)} names ({_some(list(names))}); write them as the vocabulary does"
        )
    if len(set(indices)) < len(indices):
        raise ValueError(f"seen classes: {len(indices) - len(set(indices))} of them are given twice")
    return sorted(indices)


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers under ``prefix``."""
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
    if not numbers:
        raise KeyError(prefix)
    return max(numbers) + 1


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
