"""What ZegCLIP and CLIP-RC share: a prompted CLIP tower, losses, checkpoints."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch.nn.functional as F
from torch import Tensor

from fastzs import clip as clip_module
from fastzs.clip import Clip, VisionTransformer, WeightsError
from fastzs.clip.prompted import Encoded, PromptedVisionTransformer
from fastzs.clip.vision import mlp_ratio, vit_sizes
from fastzs.clip.weights import OPENAI_MEAN, OPENAI_STD
from fastzs.losses import honest_target, inductive_target, transductive_target
from fastzs.models.trained import IMAGENET_MEAN, IMAGENET_STD, TrainedModel, class_indices, count_layers
from fastzs.ops import mask_loss
from fastzs.trace import traced
from fastzs.vocabulary import Vocabulary

# CLIP ViTs by the sizes of their tensors (width, layers, patch, joint width): whose text tower fits a checkpoint
_KNOWN = {
    (768, 12, 16, 512): "ViT-B-16",
    (768, 12, 32, 512): "ViT-B-32",
    (1024, 24, 14, 768): "ViT-L-14",
}
# In published checkpoints, but no output depends on them (shared/unused in forward, or state of the training loss).
_UNUSED = (".self_attn.", ".norm1.", "decode_head.loss_decode.", "decode_head.conv_seg.", "text_encoder.")


class TrainingBatch(NamedTuple):
    """What the losses are made of."""

    encoded: Encoded
    text: Tensor  # [C, D]: the classes that get logits
    target: Tensor  # [B, H, W], indices of these classes or ignore_index
    seen: list[int] | None  # in the transductive settings, where the other classes' labels are still to be replaced
    honest: bool  # of these, the one that does not know where the other classes are
    ignore_index: int

    @traced("train.loss")
    def mask_losses(self, logits: Tensor, focal: float, dice: float) -> dict[str, Tensor]:
        """Weighted focal and dice loss of logits [B, C, h, w]."""
        target = self.target
        if self.seen is not None:
            replace = honest_target if self.honest else transductive_target
            target = replace(target, logits, self.seen, self.ignore_index)
        loss = mask_loss(logits, target, ignore_index=self.ignore_index)
        return {"focal": focal * loss.focal, "dice": dice * loss.dice}


class PromptTuned(TrainedModel):
    """A frozen CLIP ViT with learnt prompts, and a decoder that turns class names into masks.

    Subclasses have a ``decode_head`` and :meth:`decode`. Parameters carry the published checkpoints' names.
    """

    activation = "sigmoid"
    other: str  # a sentence for checkpoints of the other model
    mark: str  # a parameter that tells this model's checkpoints from the other's

    def __init__(
        self,
        *,
        backbone: str,
        weights: str,
        sizes: Mapping[str, Any] | None,
        prompts: int,
        deep_prompts: int | None,
        bridge: tuple[int, int] | None,
        crop: int,
        dropout: float,
        seen: Sequence[str] | Sequence[int] | None,
        calibration: float,
        double_class_embedding: bool,
        imagenet_normalization: bool,
    ):
        clip = plain = None
        if sizes is None:
            clip = clip_module.load(backbone, weights)
            plain = clip.vision()
            if not isinstance(plain, VisionTransformer):
                raise ValueError(
                    f"{type(self).__name__}: {backbone} is not a vision transformer, which its prompts need"
                )
            if crop < plain.patch_size:
                raise ValueError(f"{type(self).__name__}: crop is {crop}; wanted {plain.patch_size} pixels at least")
            sizes = vit_sizes(plain) | {"grid": crop // plain.patch_size}
        super().__init__(
            backbone=backbone,
            weights=weights,
            clip=clip,
            text_dim=sizes["output_dim"],
            seen=seen,
            calibration=calibration,
        )
        self.sizes = dict(sizes)
        self.backbone = PromptedVisionTransformer(
            prompts=prompts,
            deep_prompts=deep_prompts,
            bridge=bridge,
            prompt_dropout=dropout,
            double_class_embedding=double_class_embedding,
            **self.sizes,
        )
        if plain is not None:
            self.backbone.start_from(plain)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_("prompt" in name)
        self.dropout = dropout
        self.crop = self.short_side = crop
        self.stride = crop * 5 // 6  # published: 426 of 512
        if imagenet_normalization:
            self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        elif self.weights == "openai":
            self.mean, self.std = OPENAI_MEAN, OPENAI_STD
        else:
            self.mean, self.std = self.clip.mean, self.clip.std
        # sizes instead of the download they came from
        self.settings.update(
            sizes=self.sizes,
            prompts=prompts,
            deep_prompts=self.backbone.deep_prompts,
            crop=crop,
            dropout=dropout,
            double_class_embedding=double_class_embedding,
            imagenet_normalization=imagenet_normalization,
        )

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_size

    def forward(self, images: Tensor, vocabulary: Vocabulary | Tensor) -> Tensor:
        """Low-resolution logits [B, C, h, w], fp32 at least; a pixel's class probabilities are their sigmoids.

        Args:
            images: [B, 3, H, W] of any size, normalised with ``mean`` and ``std``.
            vocabulary: the classes, or their text vectors [C, D].

        Raises:
            ValueError: vectors of another width, or fewer patches along a side than the bridge has tokens.
        """
        logits = self.decode(self.encode(images), self.text(vocabulary))
        return vocabulary.reduce(logits) if isinstance(vocabulary, Vocabulary) else logits

    def encode(self, images: Tensor) -> Encoded:
        """The tower's features; sides are enlarged to multiples of the patch, so that they cover the whole picture."""
        size = [-(-side // self.patch_size) * self.patch_size for side in images.shape[2:]]
        if size != list(images.shape[2:]):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return self.backbone.encode(images.to(self.backbone.proj.dtype))

    def decode(self, encoded: Encoded, text: Tensor) -> Tensor:
        """Logits [B, C, h, w] of the classes with text vectors [C, D]."""
        raise NotImplementedError

    def training_batch(
        self,
        images: Tensor,
        target: Tensor,
        vocabulary: Vocabulary | Tensor,
        seen: Sequence | None,
        transductive: bool | Literal["honest"],
        ignore_index: int,
    ) -> "TrainingBatch":
        """The batch of one of the three published settings; see the models' ``losses``."""
        if transductive and seen is None:
            raise ValueError("transductive training: tell which classes are seen, seen=[...]")
        text, names = self.training_text(vocabulary)
        indices = None
        if seen is not None:
            indices = class_indices(seen, names)
            if not transductive:
                target = inductive_target(target, indices, len(text), ignore_index)
                text, indices = text[indices], None
        return TrainingBatch(self.encode(images), text, target, indices, transductive == "honest", ignore_index)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> Self:
        """Read a published checkpoint (mmcv's ``.pth``) or a safetensors file with the same names.

        Sizes come from the tensors. Heads do not show in them: 64 channels each, as in every CLIP, unless ``heads``
        (of the tower) or ``decoder_heads`` say otherwise; ``bridge=(rows, columns)`` is needed if it is not square.
        Parameters that no output depends on are left out. Only tensors are read; no pickled code runs.

        Raises:
            WeightsError: not a checkpoint of this model, damaged, of sizes that do not fit each other, tensors missing
                or unexpected (named).
        """
        return super().from_checkpoint(path, **options)

    @classmethod
    def _used(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in state.items() if not any(part in f".{name}" for part in _UNUSED)}

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if any(cls.mark in name for name in state):
            return
        if any(name.startswith("decode_head.") for name in state) and any(
            "prompt_embeddings" in name for name in state
        ):
            raise WeightsError(f"{path}: {cls.other}")
        some = ", ".join(list(state)[:3])
        raise WeightsError(f"{path}: not a {cls.__name__} checkpoint (no {cls.mark!r} in it; it holds {some}, ...)")

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments from the tensors; KeyError names one that is missing."""
        width, output_dim = state["backbone.proj"].shape
        layers = count_layers(state, "backbone.transformer.resblocks.")
        if width % 64 and "heads" not in options:
            raise WeightsError(
                f"a tower {width} wide cannot have heads of 64 channels; tell how many it has: heads=..."
            )
        sizes = {
            "width": width,
            "layers": layers,
            "heads": options.pop("heads", width // 64),
            "patch_size": state["backbone.conv1.weight"].shape[-1],
            "grid": math.isqrt(len(state["backbone.positional_embedding"]) - 1),
            "output_dim": output_dim,
            "mlp_ratio": mlp_ratio(len(state["backbone.transformer.resblocks.0.mlp.c_fc.weight"]), width),
        }
        deep = state.get("backbone.deep_prompt_embeddings")
        known = _KNOWN.get((width, layers, sizes["patch_size"], output_dim), "")
        return {
            "backbone": known,
            "weights": "openai",
            "sizes": sizes,
            "prompts": state["backbone.prompt_embeddings"].shape[1],
            "deep_prompts": 0 if deep is None else len(deep),
            "crop": sizes["grid"] * sizes["patch_size"],
        } | options

    def _left_out(self, state: Mapping[str, Tensor]) -> set[str]:
        return set() if self.backbone.deep_prompts else {"backbone.prompt_norm.weight", "backbone.prompt_norm.bias"}

    def _own_clip(self, path: Path, state: Mapping[str, Tensor]) -> Clip | None:
        prefix = "text_encoder."
        if f"{prefix}token_embedding.weight" not in state:
            return None
        width = state[f"{prefix}ln_final.weight"].shape[0]
        text = {
            "context_length": len(state[f"{prefix}positional_embedding"]),
            "vocab_size": len(state[f"{prefix}token_embedding.weight"]),
            "width": width,
            "heads": max(1, width // 64),
            "layers": count_layers(state, f"{prefix}transformer.resblocks."),
        }
        return Clip(
            backbone=self.backbone_name,
            source=str(path),
            config={"embed_dim": self.text_dim, "vision_cfg": {"layers": 0}, "text_cfg": text},
            quick_gelu=True,
            mean=self.mean,
            std=self.std,
            fingerprint=self.fingerprint,
            path=path,
        )
