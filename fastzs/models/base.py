"""The contract of every system: images become features once, and features become class maps for any text vectors.

No system knows a class by its name. It gets text vectors [T, D], one for each phrase, and where it matters the class of
each row and which classes were seen in training; :mod:`fastzs.segmenter` and :mod:`fastzs.train` turn names into these.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fastzs.clip.state import WeightsError
from fastzs.losses import honest_target, inductive_target, transductive_target
from fastzs.operators import identity_of
from fastzs.windows import Size

if TYPE_CHECKING:
    from fastzs.clip import Clip
    from fastzs.readout import Readout

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# attributes of models that change no feature
NOT_OF_FEATURES = (
    "training", "weights", "fingerprint", "calibration", "seen", "train_unseen", "short_side", "crop", "stride",
    "activation", "dropout", "prompt_dropout", "checkpointing",
)  # fmt: skip
Activation = Literal["sigmoid", "softmax", "none", "cosine"]


@dataclass(frozen=True)
class Features:
    """What a system computes of images without any text.

    Each system has its own subclass. Every field is a tensor with the batch first, or None, so that features can be
    sliced, joined, moved and kept. Features that lie in the text space have a property ``dense``, [B, D, h, w] of unit
    length.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def __getitem__(self, index: slice | Tensor) -> Self:
        """The images of a slice or an index tensor."""
        return type(self)(**{name: value[index] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """On another device; ``dtype`` applies to floating-point fields."""
        moved = {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for name, value in self.tensors().items()
        }
        return type(self)(**moved)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The images of all parts, one after the other."""
        names = parts[0].tensors()
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class Labels:
    """The labels of a training batch, as far as its setting lets the model know them.

    Attributes:
        target: int64 [B, H, W], indices of the rows of the text vectors or ``ignore_index``.
        classes: the index of each of these rows in the whole vocabulary.
        seen: in the transductive settings the rows of the seen classes; the labels of the others are still to be
            replaced. None in the other settings.
        honest: whether ignored pixels count as pixels without a seen label, see :func:`fastzs.losses.honest_target`.
    """

    target: Tensor
    classes: Sequence[int]
    seen: Sequence[int] | None
    honest: bool
    ignore_index: int

    def completed(self, logits: Tensor) -> Tensor:
        """``target``, in the transductive settings with the model's own labels from logits [B, C, h, w]."""
        if self.seen is None:
            return self.target
        complete = honest_target if self.honest else transductive_target
        return complete(self.target, logits, self.seen, self.ignore_index)


class SegmentationModel(nn.Module):
    """A network that scores the pixels of images against text vectors.

    Subclasses have :meth:`encode` and :meth:`score`, where needed :meth:`finish` (or, with two stages, their own
    :meth:`decode`), and :meth:`loss_parts` if they are trained.

    Attributes:
        mean, std: per channel, what images are normalised with, on the 0 to 1 scale.
        short_side, crop, stride: see :class:`fastzs.Segmenter`.
        activation: what turns logits into scores, see :func:`fastzs.ops.label_map`; "cosine": logits are cosines of
            every name, and ``readout`` says how they become labels.
        readout: see :mod:`fastzs.readout`; None unless ``activation`` is "cosine".
        text_dim: width D of the text vectors.
        default_templates: see :data:`fastzs.clip.TEMPLATES`.
        seen: training classes, by name or index, whose scores are lowered by ``calibration`` in testing, those of them
            that are asked for; None if the model was not told any.
        calibration: see ``seen``; on the scale of the scores.
        train_unseen: those of ``seen`` that :meth:`decode` has to treat as unseen.
        fixed_classes: names of the classes if they were fixed in training, else None.
        learned_class: name of a class whose text vector is trained, see :meth:`learned_vector`; None without one.
        takes_regions: whether :meth:`encode` and :meth:`encode_stitched` take ``regions``, int64 [B, H, W], and let
            patches attend inside their region only, see :mod:`fastzs.regions`.
        class_options: attributes that hold classes by name or index, which training turns into indices and passes to
            :meth:`losses` under the same names.
        transductive: whether there is transductive training.
        weights: what the weights of its CLIP were called when it was made.
        fingerprint: identifies the weights, for run records and kept features.
    """

    mean: Sequence[float]
    std: Sequence[float]
    short_side: int | None
    crop: int | tuple[int, int] | None
    stride: int | tuple[int, int] | None
    activation: Activation = "softmax"
    readout: "Readout | None" = None
    text_dim: int
    default_templates: str = "single"
    seen: Sequence[str | int] | None = None
    calibration: float = 0.0
    train_unseen: Sequence[str | int] = ()
    fixed_classes: Sequence[str] | None = None
    learned_class: str | None = None
    class_options: ClassVar[tuple[str, ...]] = ()
    transductive: ClassVar[bool] = False
    takes_regions: ClassVar[bool] = False
    fingerprint: str = ""
    weights: str = ""

    _clip: "Clip | None" = None

    @property
    def clip(self) -> "Clip":
        """The CLIP whose text tower belongs to the model.

        Raises:
            WeightsError: there is none.
        """
        if self._clip is None:
            raise WeightsError(
                f"{type(self).__name__} has no text tower; give the text vectors: Vocabulary(names, embeddings=...)"
            )
        return self._clip

    def identity(self, written: bool = False) -> str:
        """Tells models apart whose features differ: the class, the weights, the settings of all parts and the dtype.

        Args:
            written: the weights have changed since they were loaded, so that :attr:`fingerprint` is of others.
        """
        parts = [[name, type(part).__name__, _settings(part)] for name, part in self.named_modules()]
        weights = self.fingerprint
        if written or not weights:  # as it was made or trained in this process
            weights = weights_digest(self)
        content = [weights, str(next(self.parameters()).dtype), parts]
        return f"{type(self).__name__}:{hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]}"

    def encode(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] of any size, normalised with ``mean`` and ``std``."""
        raise NotImplementedError

    @classmethod
    def why_not_exported(cls) -> str | None:
        """Why models of this system have no graph of fixed shape for :mod:`fastzs.export`; None if they have."""
        return None

    def why_not_stitched(self) -> str | None:
        """Why :meth:`encode_stitched` cannot be had; None if it can."""
        return f"{type(self).__name__} reads each window by itself"

    def encode_stitched(self, image: Tensor, crop: int | Size, stride: int | Size, batch_size: int) -> Features:
        """Features of a whole image [1, 3, H, W], normalised, put together from windows before the last step.

        Args:
            crop, stride: of the windows in pixels; crop 0: the whole image is the window.
            batch_size: windows at a time.
        """
        raise NotImplementedError

    def score(self, features: Any, text: Tensor) -> Tensor:
        """One map for each text vector: [T, D] -> [B, T, h, w]; ``text`` is as :meth:`prepare_text` gives it."""
        raise NotImplementedError

    def finish(self, features: Any, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """What a system does with class maps [B, C, h, w] once synonyms are joined; nothing unless it says so."""
        return logits

    def decode(
        self, features: Any, text: Tensor, *, groups: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Logits [B, C, h, w], fp32 at least, of low resolution.

        Args:
            features: from :meth:`encode`.
            text: text vectors [T, D].
            groups: int64 [T], the class of each row; a class has the largest of its rows' scores. Omitted: each row is
                a class.
            seen: bool [C], the classes seen in training, for systems that treat them differently.

        Raises:
            ValueError: text vectors of another width.
        """
        return self.finish(features, join(self.score(features, self.prepare_text(text)), groups), seen)

    def forward(
        self, images: Tensor, text: Tensor, *, groups: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """:meth:`decode` of the features of images [B, 3, H, W]: logits [B, C, h, w]."""
        return self.decode(self.encode(images), text, groups=groups, seen=seen)

    def prepare_text(self, text: Tensor) -> Tensor:
        """Text vectors [T, D] on the model's device and in the dtype that :meth:`score` computes in.

        Raises:
            ValueError: they are not [T, ``text_dim``], or none.
        """
        if text.ndim != 2 or text.shape[1] != self.text_dim or text.shape[0] == 0:
            raise ValueError(
                f"{type(self).__name__}: expected text vectors [classes, {self.text_dim}], got {list(text.shape)}"
            )
        like = next(self.parameters())
        return text.to(like.device, self.text_dtype(like.dtype))

    def text_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of text vectors for parameters of ``dtype``."""
        return dtype

    def covered(self, windows: Tensor) -> Tensor:
        """What the maps of windows int64 [W, 4] (top, left, height, width) cover; for a model with a readout."""
        return windows

    def learned_vector(self) -> Tensor:
        """The unit vector [1, D] of ``learned_class``, which takes the place of its text vectors."""
        raise NotImplementedError

    def losses(
        self,
        images: Tensor,
        target: Tensor,
        text: Tensor,
        *,
        seen: Sequence[int] | None = None,
        transductive: bool | Literal["honest"] = False,
        ignore_index: int = 255,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The weighted training losses by name, and their sum ``total``; scalars.

        Args:
            images: [B, 3, H, W], normalised.
            target: integer labels [B, H', W'] of the whole vocabulary, or ``ignore_index``.
            text: text vectors [C, D], one for each class of the vocabulary.
            seen: indices of the classes whose labels may be used; all (fully supervised) if omitted.
            transductive: pixels of the other classes are trained with the model's own labels, instead of being
                ignored; "honest" does not tell these pixels from ignored ones.
            options: of the system, see its :meth:`loss_parts`.

        Raises:
            ValueError: labels out of range, text vectors of another width, a setting that the system does not have.
        """
        text, target = self.prepare_text(text), target.long()  # a narrow one may not hold ignore_index
        if transductive and not self.transductive:
            raise ValueError(
                f"{type(self).__name__} has no transductive training; use setting 'inductive' or 'supervised'"
            )
        if transductive and seen is None:
            raise ValueError("transductive training: tell which classes are seen, seen=[...]")
        classes = list(range(len(text)))
        if seen is not None:
            seen = sorted(seen)
            if not seen or len(set(seen)) < len(seen) or seen[0] < 0 or seen[-1] >= len(text):
                raise ValueError(f"seen: expected distinct indices of the {len(text)} classes, got {seen}")
        if seen is not None and not transductive:
            classes = seen
            target, text = inductive_target(target, classes, len(text), ignore_index), text[classes]
        labels = Labels(target, classes, seen if transductive else None, transductive == "honest", ignore_index)
        out = self.loss_parts(images, labels, text, **options)
        return out | {"total": torch.stack(list(out.values())).sum()}

    def loss_parts(self, images: Tensor, labels: Labels, text: Tensor, **options: Any) -> dict[str, Tensor]:
        """The weighted losses of one batch by name.

        Args:
            images: [B, 3, H, W], normalised.
            labels: of the classes that are trained.
            text: their text vectors [C, D].
        """
        raise NotImplementedError(f"{type(self).__name__} is not trained")


def weights_digest(module: nn.Module) -> str:
    """Tells weights from others without a file: a digest of each parameter's sum."""
    sums = [(name, list(p.shape), p.detach().double().sum().item()) for name, p in module.named_parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _settings(part: nn.Module) -> dict[str, Any]:
    """A module's attributes that are plain values, and the names of its functions, as far as they change features."""
    own = {name: value for name, value in vars(part).items() if name[0] != "_" and name not in NOT_OF_FEATURES}
    stand_ins = getattr(part, "_stand_ins", ())
    plain = {name: value for name, value in own.items() if isinstance(value, str | int | float | tuple | list | None)}
    functions = {name: identity_of(value) for name, value in own.items() if callable(value) and name not in stand_ins}
    return plain | functions


def join(scores: Tensor, groups: Tensor | None) -> Tensor:
    """The largest score of each class's rows: [B, T, h, w] and the class of each row, int64 [T] -> [B, C, h, w]."""
    if groups is None:
        return scores
    if torch.compiler.is_compiling():
        placed, classes = groups.to(scores.device), int(groups.max()) + 1
    else:
        placed, classes = kept_groups(tuple(groups.tolist()), scores.device)
    index = placed[None, :, None, None].expand_as(scores)
    out = scores.new_full((scores.shape[0], classes, *scores.shape[2:]), -torch.inf)
    return out.scatter_reduce(1, index, scores, "amax")


@functools.lru_cache(64)
def kept_groups(groups: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """The class of each row on a device, and how many classes: copied once, for the copy waits for the device."""
    with torch.inference_mode(False):  # a training may meet it again
        return torch.tensor(groups).to(device), max(groups) + 1
