"""ZegCLIP and CLIP-RC with parts taken out, for the experiments that ask what each part brings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip.prompted import PromptedVisionTransformer
from fastzs.losses import pixel_cross_entropy
from fastzs.models import ClipRC, ZegCLIP
from fastzs.models.base import Labels
from fastzs.models.clip_rc import Streams
from fastzs.models.prompt_tuned import PromptFeatures


class OneStage(ZegCLIP):
    """ZegCLIP's one-stage baseline: the decoder's queries are made of the text alone, W t + b (its Figure 2, left).

    Args:
        exclusive: classes compete (softmax, cross-entropy over the pixels that have a label) instead of each being
            asked for by itself (sigmoid, focal and dice loss).
        options: see :class:`ZegCLIP`.
    """

    def __init__(self, *, exclusive: bool, **options: Any):
        super().__init__(**options)
        dim = self.backbone.output_dim
        self.exclusive = exclusive
        self.settings.update(exclusive=exclusive)
        self.decode_head.q_proj = nn.Linear(dim, dim)  # type: ignore[assignment]
        if exclusive:
            self.activation = "softmax"

    def score(self, features: PromptFeatures, text: Tensor) -> Tensor:
        queries = self.decode_head.q_proj(text).expand(len(features), -1, -1)  # [B, C, D]
        *layers, last = self.decode_head.decoder_1.layers
        for layer in layers:
            queries = layer(queries, features.tokens)
        return last(queries, features.tokens).unflatten(2, features.grid)

    def loss_parts(self, images: Tensor, labels: Labels, text: Tensor, **options: Any) -> dict[str, Tensor]:
        """As of ZegCLIP; with exclusive classes the cross-entropy."""
        if not self.exclusive:
            return super().loss_parts(images, labels, text, **options)
        logits = self.score(self.encode(images), text)
        return {"cross_entropy": pixel_cross_entropy(logits, labels.target, labels.ignore_index)}


class WithoutBridge(ClipRC):
    """CLIP-RC whose regions are means of their patches' features, instead of tokens that the tower carries along."""

    def __init__(self, *, bridge: Sequence[int] = (4, 4), **options: Any):
        super().__init__(bridge=bridge, **options)
        held = self.backbone
        self.backbone = PromptedVisionTransformer(
            prompts=held.prompts,
            deep_prompts=held.deep_prompts,
            prompt_dropout=held.prompt_dropout,
            double_class_embedding=self.settings["double_class_embedding"],
            **self.sizes,
        )
        self.backbone.load_state_dict(held.state_dict(), strict=False)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_("prompt" in name)

    def encode(self, images: Tensor) -> PromptFeatures:
        features = super().encode(images)
        regions = F.adaptive_avg_pool2d(features.dense, self.bridge).flatten(2).transpose(1, 2)
        return replace(features, bridge=F.normalize(regions, dim=-1))


class WithoutAlignment(ClipRC):
    """CLIP-RC without its region alignment: queries from the picture's embedding alone, the patches as they are.

    The bridge still passes between the patches of a region in the tower.
    """

    def streams(self, features: PromptFeatures, text: Tensor) -> Streams:
        head = self.decode_head
        visual = features.cls[:, None]  # [B, 1, D]
        q, z = head.q_proj(visual, text), features.tokens
        for layer_q, layer_v in zip(head.decoder_q.layers, head.decoder_v.layers, strict=True):
            q, z = layer_q(q, z), layer_v(z, q)
        return Streams(visual, q, z)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.decode_head.lateral_proj.requires_grad_(False)  # nothing passes through it
