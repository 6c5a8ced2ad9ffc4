"""What ZegCLIP and CLIP-RC share: a prompted CLIP tower, losses, checkpoints."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs import clip as clip_module
from fastzs.clip import Clip, VisionTransformer, WeightsError
from fastzs.clip.prompted import Encoded, PromptedVisionTransformer
from fastzs.clip.vision import mlp_ratio, vit_sizes
from fastzs.clip.weights import OPENAI_MEAN, OPENAI_STD
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD, Features, Labels
from fastzs.models.trained import TrainedModel, count_layers
from fastzs.ops import mask_loss
from fastzs.stitching import crops_of, stitch
from fastzs.trace import traced
from fastzs.windows import Size, next_multiple, window_grid

# CLIP ViTs by the sizes of their tensors (width, layers, patch, joint width): whose text tower fits a checkpoint
_KNOWN = {
    (768, 12, 16, 512): "ViT-B-16",
    (768, 12, 32, 512): "ViT-B-32",
    (1024, 24, 14, 768): "ViT-L-14",
}
# In published checkpoints, but no output depends on them (shared/unused in forward, or state of the training loss).
_UNUSED = (".self_attn.", ".norm1.", "decode_head.loss_decode.", "decode_head.conv_seg.", "text_encoder.")


@dataclass(frozen=True)
class PromptFeatures(Features):
    """What the prompted tower makes of images, in the text space, every vector of unit length."""

    patches: Tensor  # [B, h, w, D]
    cls: Tensor  # [B, D]
    bridge: Tensor | None = None  # [B, rh * rw, D], row by row

    @classmethod
    def of(cls, encoded: Encoded) -> "PromptFeatures":
        """The tower's output."""
        return cls(encoded.patches.unflatten(1, encoded.grid), encoded.cls, encoded.bridge)

    @property
    def grid(self) -> tuple[int, int]:
        return (self.patches.shape[1], self.patches.shape[2])

    @property
    def tokens(self) -> Tensor:
        """The patches as a sequence, [B, h * w, D]."""
        return self.patches.flatten(1, 2)

    @property
    def dense(self) -> Tensor:
        """[B, D, h, w], unit length."""
        return self.patches.permute(0, 3, 1, 2)


class PromptTuned(TrainedModel):
    """A frozen CLIP ViT with learnt prompts, and a decoder that turns class names into masks.

    Subclasses have a ``decode_head`` and :meth:`score`. Parameters carry the published checkpoints' names.
    """

    activation = "sigmoid"
    file_options = ("heads",)
    transductive = True
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
                raise ValueError(
                    f"{type(self).__name__}: crop: expected at least {plain.patch_size} pixels, got {crop}"
                )
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

    def encode(self, images: Tensor) -> PromptFeatures:
        """The tower's features; sides are enlarged to multiples of the patch, so that they cover the whole image.

        Raises:
            ValueError: fewer patches along a side than the bridge has tokens.
        """
        return PromptFeatures.of(self.backbone.encode(self._enlarged(images).to(self.backbone.dtype)))

    def _enlarged(self, images: Tensor) -> Tensor:
        size = [next_multiple(side, self.patch_size) for side in images.shape[2:]]
        if size == list(images.shape[2:]):
            return images
        return F.interpolate(images, size, mode="bilinear", align_corners=False)

    def why_not_stitched(self) -> str | None:
        return None

    def encode_stitched(self, image: Tensor, crop: int | Size, stride: int | Size, batch_size: int) -> PromptFeatures:
        """Features of the whole image, for one pass of the decoder over it; not published.

        Patches are the means of the windows' over them, the image's embedding is the mean of the windows', and a region
        token is the mean of the windows' tokens over its part of the image, weighted with the area that both share. All
        are brought to unit length again.
        """
        image = self._enlarged(image)
        size = (image.shape[2], image.shape[3])
        windows = window_grid(size, crop, stride) if crop else torch.tensor([[0, 0, *size]])
        features = PromptFeatures.cat([self.encode(crops_of(image, some)) for some in windows.split(batch_size)])

        def whole(maps: Tensor, grid: Size) -> Tensor:
            """[W, D, h, w] -> [1, H' * W', D]"""
            return F.normalize(stitch(maps, windows, size, grid).flatten(1).T[None], dim=-1).to(maps.dtype)

        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        cls, bridge = F.normalize(features.cls.mean(0, keepdim=True), dim=-1), None
        if features.bridge is not None:
            layout = self.backbone.bridge
            assert layout is not None
            bridge = whole(features.bridge.transpose(1, 2).unflatten(2, layout), layout)
        return PromptFeatures(whole(features.dense, grid).unflatten(1, grid), cls, bridge)

    @staticmethod
    @traced("train.loss")
    def mask_losses(logits: Tensor, labels: Labels, focal: float, dice: float) -> dict[str, Tensor]:
        """Weighted focal and dice loss of logits [B, C, h, w]."""
        loss = mask_loss(logits, labels.completed(logits), ignore_index=labels.ignore_index)
        return {"focal": focal * loss.focal, "dice": dice * loss.dice}

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
