"""What every trained system shares: the CLIP whose text it reads, and checkpoints."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor

from fastzs import clip as clip_module
from fastzs.clip import Clip, WeightsError
from fastzs.clip.state import file_fingerprint, read_state
from fastzs.models import saved
from fastzs.models.base import SegmentationModel
from fastzs.needed import MissingPackage

OWN = "folders and hub ids of save_pretrained"

HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


class TrainedModel(SegmentationModel, PyTorchModelHubMixin, library_name="fastzs", license="apache-2.0"):
    """A network that scores the pixels of images against the text vectors of any classes.

    Parameters carry the published checkpoints' names. The text tower is no part of the network: it is found by name
    when a vocabulary is first embedded.

    Args:
        backbone, weights: the CLIP of the text vectors, see :func:`fastzs.clip.load`.
        clip: the same, if it is loaded already.
        text_dim: width D of the text vectors.
        seen, calibration: the training classes, whose scores are lowered in testing.

    Attributes:
        settings: constructor arguments that :meth:`save_pretrained` writes.
    """

    file_options: Sequence[str] = ()  # of from_checkpoint, beside the constructor's
    opaque: Sequence[str] = ()  # packages whose objects published checkpoints hold besides their tensors

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
        self.seen = None if seen is None else list(seen)
        self.calibration = calibration
        self.settings: dict[str, Any] = {
            "backbone": backbone,
            "weights": self.weights,
            "seen": self.seen,
            "calibration": calibration,
        }
        self._hub_mixin_config = {saved.MODEL: type(self).__name__}

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

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the settings and all weights into a folder; :meth:`from_pretrained` reads it."""
        self._hub_mixin_config = {saved.MODEL: type(self).__name__, **self.settings}
        return super().save_pretrained(save_directory, **options)

    @classmethod
    def open(cls, place: str | Path, **options: Any) -> Self:
        """A checkpoint: a file by :meth:`from_checkpoint`, a folder or hub id by :meth:`from_pretrained`."""
        place = os.path.expanduser(place)
        return (cls.from_checkpoint if saved.is_file_name(place) else cls.from_pretrained)(place, **options)

    @classmethod
    def from_pretrained(cls, place: str | Path, **options: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read a folder or hub id that ``save_pretrained`` or ``push_to_hub`` wrote.

        Every parameter comes from the file, and every tensor of the file is used.

        Args:
            place: folder or hub id.
            options: constructor arguments that win over the saved ones; ``revision``, ``token``, ``cache_dir``,
                ``force_download`` and ``local_files_only`` as the hub takes them.

        Raises:
            WeightsError: there is no such place, it is another model's, damaged, or its files do not fit each other;
                the message names the file.
            CheckpointError: a file is not as training wrote it.
        """
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        folder = saved.find(place, **hub)
        config = saved.read_config(folder, cls)
        identity = saved.fingerprint(folder, config)
        path = folder / saved.WEIGHTS
        state = read_state(path)
        try:
            model = cls(**{**config, **options})
        except (WeightsError, MissingPackage):
            raise
        except Exception as error:  # whatever settings of the wrong kind or size make of a constructor
            raise WeightsError(f"{folder / saved.CONFIG}: its settings make no {cls.__name__}: {error}") from error
        with torch.no_grad():
            model._load(path, state)
        model.fingerprint = identity
        return model.eval()

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
        state = cls._read(path)
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
    def _read(cls, path: Path) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by their names in the file."""
        return read_state(path, cls.opaque)

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether tensors of these names are a checkpoint of this model."""
        try:
            cls._check_kind(Path(), state)
        except WeightsError:
            return False
        return True

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


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers under ``prefix``."""
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
    if not numbers:
        raise KeyError(prefix)
    return max(numbers) + 1


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
