"""ZegCLIP and CLIP-RC with parts taken out, for the experiments that ask what each part brings."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip.prompted import Encoded, PromptedVisionTransformer
from fastzs.models import ClipRC, ZegCLIP
from fastzs.models.clip_rc import Streams
from fastzs.vocabulary import Vocabulary


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

    def decode(self, encoded: Encoded, text: Tensor) -> Tensor:
        queries = self.decode_head.q_proj(text).expand(len(encoded.cls), -1, -1)  # [B, C, D]
        *layers, last = self.decode_head.decoder_1.layers
        for layer in layers:
            queries = layer(queries, encoded.patches)
        return last(queries, encoded.patches).unflatten(2, encoded.grid)

    def losses(
        self, images: Tensor, target: Tensor, vocabulary: Vocabulary | Tensor, **options: Any
    ) -> dict[str, Tensor]:
        """As :meth:`ZegCLIP.losses`; with exclusive classes the cross-entropy, whose ``total`` is its only part."""
        if not self.exclusive:
            return super().losses(images, target, vocabulary, **options)
        batch = self.training_batch(images, target, vocabulary, options.get("seen"), False, 255)
        logits = self.decode(batch.encoded, batch.text)
        size = [batch.target.shape[1], batch.target.shape[2]]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return {"total": F.cross_entropy(logits, batch.target.long(), ignore_index=255)}


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

    def encode(self, images: Tensor) -> Encoded:
        encoded = super().encode(images)
        maps = encoded.patches.transpose(1, 2).unflatten(2, encoded.grid)  # [B, D, h, w]
        regions = F.adaptive_avg_pool2d(maps, self.bridge).flatten(2).transpose(1, 2)
        return encoded._replace(bridge=F.normalize(regions, dim=-1))


class WithoutAlignment(ClipRC):
    """CLIP-RC without its region alignment: queries from the picture's embedding alone, the patches as they are.

    The bridge still passes between the patches of a region in the tower.
    """

    def streams(self, encoded: Encoded, text: Tensor) -> Streams:
        head = self.decode_head
        visual = encoded.cls[:, None]  # [B, 1, D]
        q, z = head.q_proj(visual, text), encoded.patches
        for layer_q, layer_v in zip(head.decoder_q.layers, head.decoder_v.layers, strict=True):
            q, z = layer_q(q, z), layer_v(z, q)
        return Streams(visual, q, z)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.decode_head.lateral_proj.requires_grad_(False)  # nothing passes through it
