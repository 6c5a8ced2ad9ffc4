"""CLIP-RC: ZegCLIP's idea with regional clues, from tokens that stand for the regions of the picture.

Source: Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024. With g the
picture's embedding, r_l those of the L regions, I those of the patches (all of unit length) and t_c the class's::

    Q_lc = W_q [(r_l + g) * t_c ; t_c] + b        Z = W_z [up(R) ; g ; I] + b       region alignment
    (Q, Z) <- (layer_q(Q ; memory Z), layer_z(Z ; memory Q))   three times, both from the old pair
    S(c, i) = mean over l of Q_lc . Z_i  =  (mean over l of Q_lc) . Z_i

In training a further layer of the same kind has to recover the queries and patches as they were before.
Exact shortcuts: the mean over regions is taken before the product; W_z is applied to the regions before they are
enlarged (both are linear); W_q's half for the text is computed once for a vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip import WeightsError
from fastzs.clip.products import Linear, linear
from fastzs.decoders import DecoderLayer, Layers, RelationDescriptor, scores
from fastzs.models.base import Labels
from fastzs.models.prompt_tuned import PromptFeatures, PromptTuned
from fastzs.models.trained import OWN, count_layers
from fastzs.registry import register
from fastzs.trace import traced


class Recovery(nn.Module):
    """Recovery decoder: one two-stream layer that must give back the queries and patches that entered the decoder."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.decouple_q, self.decouple_v = (
            nn.ModuleList([DecoderLayer(dim, heads, hidden, dropout)]) for _ in range(2)
        )
        self.linear_q_in, self.linear_k_in = Linear(dim, dim), Linear(dim, dim)
        self.linear_q_out, self.linear_k_out = Linear(dim, 2 * dim), Linear(dim, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Q, D], [B, N, D] -> [B, Q, 2 D], [B, N, D]."""
        q, z = self.linear_q_in(queries), self.linear_k_in(features)
        for layer_q, layer_v in zip(self.decouple_q, self.decouple_v, strict=True):
            q, z = layer_q(q, z), layer_v(z, q)
        return self.linear_q_out(q), self.linear_k_out(z)


class ClipRCHead(nn.Module):
    """The trained decoder's parameters, under the published names."""

    def __init__(self, dim: int, layers: int, heads: int, hidden: int, dropout: float, recovery: bool):
        super().__init__()
        self.q_proj = RelationDescriptor(dim)
        self.lateral_proj = Linear(3 * dim, dim)
        self.decoder_q = Layers(DecoderLayer(dim, heads, hidden, dropout), layers)
        self.decoder_v = Layers(DecoderLayer(dim, heads, hidden, dropout), layers)
        self.recovery_decoder = Recovery(dim, heads, hidden, dropout) if recovery else None


class Streams(NamedTuple):
    """The two streams before and after the decoder."""

    visual: Tensor  # r_l + g, [B, L, D]
    queries: Tensor  # Q after the last layer, [B, L * C, D], classes inner
    features: Tensor  # Z after the last layer, [B, N, D]


@register(
    "clip_rc",
    paper="CLIP-RC (Zhang et al., CVPR 2024)",
    does="CLIP with region tokens once over each window, three layers in both directions",
    trained="prompts in a frozen CLIP ViT, a decoder of two streams",
    needs="masks of the seen classes",
    checkpoints=f"published .pth (mmcv), {OWN}",
)
class ClipRC(PromptTuned):
    """CLIP-RC on any CLIP ViT, for pictures of any size, any bridge and vocabularies of any length.

    Args:
        backbone, weights: see :func:`fastzs.clip.load`; the text tower comes from there, too.
        sizes: the vision tower's sizes (see :class:`fastzs.clip.VisionTransformer`), to build it without weights, as
            :meth:`from_pretrained` does; ``weights`` then names the text tower only.
        prompts: prompt tokens of a layer; published: 10 (VOC), 100 (COCO-Stuff).
        deep_prompts: layers after the first with prompts of their own, all if omitted.
        bridge: rows and columns of region tokens; published: (4, 4).
        crop: window side in training and testing; the positions are kept at its grid.
        decoder_layers, decoder_heads, decoder_hidden: published: 3, 8 (64 channels each), 2048 (4 times the width).
        recovery: have the recovery decoder, which is used in training only.
        dropout: in the decoder and on the prompts; published: 0.1.
        seen: the training classes, by name or index, whose scores are lowered by ``calibration`` in testing
            (published: 0.1 for inductive models; leave ``seen`` out for transductive ones).
        double_class_embedding: published: CLS enters with the class embedding added twice, the region tokens with it
            added once.
        imagenet_normalization: published: pictures are normalised with ImageNet's mean and deviation, not CLIP's.
        train_bridge: train the region tokens. Published: they stay as they start, since only parameters with
            "prompt" in their names are trained.
    """

    mark = "decode_head.decoder_q."
    other = "this is a ZegCLIP checkpoint, not CLIP-RC's; read it with fastzs.models.ZegCLIP.from_checkpoint"

    def __init__(
        self,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        sizes: Mapping[str, Any] | None = None,
        prompts: int = 10,
        deep_prompts: int | None = None,
        bridge: Sequence[int] = (4, 4),
        crop: int = 512,
        decoder_layers: int = 3,
        decoder_heads: int | None = None,
        decoder_hidden: int | None = None,
        recovery: bool = True,
        dropout: float = 0.1,
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.1,
        double_class_embedding: bool = True,
        imagenet_normalization: bool = True,
        train_bridge: bool = False,
    ):
        super().__init__(
            backbone=backbone,
            weights=weights,
            sizes=sizes,
            prompts=prompts,
            deep_prompts=deep_prompts,
            bridge=(bridge[0], bridge[1]),
            crop=crop,
            dropout=dropout,
            seen=seen,
            calibration=calibration,
            double_class_embedding=double_class_embedding,
            imagenet_normalization=imagenet_normalization,
        )
        self.bridge = (bridge[0], bridge[1])
        dim = self.backbone.output_dim
        heads, hidden = decoder_heads or max(1, dim // 64), decoder_hidden or 4 * dim
        self.settings.update(decoder_layers=decoder_layers, decoder_heads=heads, decoder_hidden=hidden)
        self.settings.update(bridge=list(bridge), recovery=recovery, train_bridge=train_bridge)
        self.decode_head = ClipRCHead(dim, decoder_layers, heads, hidden, dropout, recovery)
        self.backbone.region_level_bridge.requires_grad_(train_bridge)

    def lateral(self, features: PromptFeatures) -> Tensor:
        """Z before the first layer, [B, N, D]."""
        projection = self.decode_head.lateral_proj
        assert features.bridge is not None
        of_regions, of_picture, of_patches = projection.weight.chunk(3, dim=1)
        regions = linear(features.bridge, of_regions).transpose(1, 2).unflatten(2, self.bridge)  # [B, D, rh, rw]
        regions = F.interpolate(regions, features.grid, mode="bilinear", align_corners=False)
        picture = linear(features.cls, of_picture, projection.bias)
        return linear(features.tokens, of_patches) + regions.flatten(2).transpose(1, 2) + picture[:, None]

    @traced("model.decoder")
    def streams(self, features: PromptFeatures, text: Tensor) -> Streams:
        """Both streams through the decoder."""
        head = self.decode_head
        assert features.bridge is not None
        visual = features.bridge + features.cls[:, None]
        q, z = head.q_proj(visual, text), self.lateral(features)
        for layer_q, layer_v in zip(head.decoder_q.layers, head.decoder_v.layers, strict=True):
            q, z = layer_q(q, z), layer_v(z, q)
        return Streams(visual, q, z)

    @traced("model.decoder")
    def logits(self, streams: Streams, grid: tuple[int, int]) -> Tensor:
        """S, [B, C, h, w]."""
        queries = streams.queries.unflatten(1, (streams.visual.shape[1], -1))  # [B, L, C, D]
        wide = torch.promote_types(queries.dtype, torch.float32)
        return scores(queries.mean(1, dtype=wide), streams.features).unflatten(2, grid)

    def score(self, features: PromptFeatures, text: Tensor) -> Tensor:
        return self.logits(self.streams(features, text), features.grid)

    def loss_parts(
        self,
        images: Tensor,
        labels: Labels,
        text: Tensor,
        *,
        focal: float = 100.0,
        dice: float = 1.0,
        recovery: float = 2.0,
    ) -> dict[str, Tensor]:
        """Weighted losses ``focal``, ``dice``, ``recovery_queries`` and ``recovery_features``.

        Published weights ``focal``, ``dice``, ``recovery``: 100, 1, 2 (VOC; recovery 0 fully supervised) and 200, 3,
        50 (COCO-Stuff; 100, 1.5, 1 fully supervised).
        """
        features = self.encode(images)
        streams = self.streams(features, text)
        out = self.mask_losses(self.logits(streams, features.grid), labels, focal, dice)
        if recovery:
            if self.decode_head.recovery_decoder is None:
                raise ValueError("the model was made without its recovery decoder; use recovery=0 or build it with it")
            queries, patches = self.decode_head.recovery_decoder(streams.queries, streams.features)
            out["recovery_queries"] = recovery * F.l1_loss(queries, self.descriptor(streams.visual, text).detach())
            out["recovery_features"] = recovery * F.l1_loss(patches, features.tokens.detach())
        return out

    @staticmethod
    def descriptor(visual: Tensor, text: Tensor) -> Tensor:
        """[v_l * t_c ; t_c] as it enters W_q, [B, L * C, 2 D], classes inner."""
        relation = visual[:, :, None] * text  # [B, L, C, D]
        return torch.cat([relation, text.expand_as(relation)], dim=-1).flatten(1, 2)

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        options = super()._sizes(state, options)
        decoder = "decode_head.decoder_q.layers."
        regions = len(state["backbone.region_level_bridge"])
        side = math.isqrt(regions)
        bridge = options.setdefault("bridge", (side, side))
        if bridge[0] * bridge[1] != regions:
            raise WeightsError(
                f"the checkpoint has {regions} region tokens, not {bridge[0]} x {bridge[1]}; tell how they are laid "
                "out: bridge=(rows, columns)"
            )
        return {
            "decoder_layers": count_layers(state, decoder),
            "decoder_hidden": len(state[f"{decoder}0.linear1.weight"]),
            "recovery": False,
        } | options

    def _left_out(self, state: Mapping[str, Tensor]) -> set[str]:
        if self.decode_head.recovery_decoder is not None:
            return super()._left_out(state)
        recovery = {name for name in state if name.startswith("decode_head.recovery_decoder.")}
        return recovery | super()._left_out(state)
