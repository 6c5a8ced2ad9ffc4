"""ZegCLIP: a prompted CLIP, and a decoder whose queries are the classes' relations to the image.

Source: Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023. With g the
image's embedding, I the patches' (all of unit length) and t_c the class's::

    Q = W_q [g * t_c ; t_c] + b                               relationship descriptor
    Q <- layer_l(Q ; memory I)   for all layers but the last
    S(c, i) = mean over heads of the last layer's scores      = (W_q' Q_c) . (W_k' I_i) / (H sqrt(D / H))

Only these scores leave the last layer, so nothing else of it exists here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastzs.decoders import DecoderLayer, HeadMeanScores, Layers, RelationDescriptor
from fastzs.models.base import Labels
from fastzs.models.prompt_tuned import PromptFeatures, PromptTuned
from fastzs.models.trained import OWN, count_layers
from fastzs.registry import register
from fastzs.trace import traced


class ZegCLIPHead(nn.Module):
    """The trained decoder's parameters, under the published names."""

    def __init__(self, dim: int, layers: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.q_proj = RelationDescriptor(dim)
        self.decoder_1 = Layers(DecoderLayer(dim, heads, hidden, dropout), layers - 1)
        self.decoder_1.layers.append(HeadMeanScores(dim, heads))


@register(
    "zegclip",
    paper="ZegCLIP (Zhou et al., CVPR 2023)",
    does="CLIP once over each window, three cross-attention layers from classes to patches",
    trained="prompts in a frozen CLIP ViT, a decoder",
    needs="masks of the seen classes",
    checkpoints=f"published .pth (mmcv), {OWN}",
)
class ZegCLIP(PromptTuned):
    """ZegCLIP on any CLIP ViT, for images of any size and vocabularies of any length.

    Args:
        backbone, weights: see :func:`fastzs.clip.load`; the text tower comes from there, too.
        sizes: the vision tower's sizes (see :class:`fastzs.clip.VisionTransformer`), to build it without weights, as
            :meth:`from_pretrained` does; ``weights`` then names the text tower only.
        prompts: prompt tokens of a layer; published: 10 (VOC), 100 (COCO-Stuff).
        deep_prompts: layers after the first with prompts of their own, all if omitted.
        crop: window side in training and testing; the positions are kept at its grid.
        decoder_layers, decoder_heads, decoder_hidden: published: 3, 8 (64 channels each), 2048 (4 times the width).
        dropout: in the decoder and on the prompts; published: 0.1.
        seen: the training classes, by name or index, whose scores are lowered by ``calibration`` in testing
            (published: 0.1 for inductive models; leave ``seen`` out for transductive ones).
        double_class_embedding: published: CLS enters with the class embedding added twice.
        imagenet_normalization: published: images are normalised with ImageNet's mean and deviation, not CLIP's.

    Training recipe, losses' weights: systems differ by data set, see :meth:`loss_parts`.
    """

    mark = "decode_head.decoder_1."
    other = "this is a CLIP-RC checkpoint, not ZegCLIP's; read it with fastzs.models.ClipRC.from_checkpoint"

    def __init__(
        self,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        sizes: Mapping[str, Any] | None = None,
        prompts: int = 10,
        deep_prompts: int | None = None,
        crop: int = 512,
        decoder_layers: int = 3,
        decoder_heads: int | None = None,
        decoder_hidden: int | None = None,
        dropout: float = 0.1,
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.1,
        double_class_embedding: bool = True,
        imagenet_normalization: bool = True,
    ):
        super().__init__(
            backbone=backbone,
            weights=weights,
            sizes=sizes,
            prompts=prompts,
            deep_prompts=deep_prompts,
            bridge=None,
            crop=crop,
            dropout=dropout,
            seen=seen,
            calibration=calibration,
            double_class_embedding=double_class_embedding,
            imagenet_normalization=imagenet_normalization,
        )
        dim = self.backbone.output_dim
        heads, hidden = decoder_heads or max(1, dim // 64), decoder_hidden or 4 * dim
        self.settings.update(decoder_layers=decoder_layers, decoder_heads=heads, decoder_hidden=hidden)
        self.decode_head = ZegCLIPHead(dim, decoder_layers, heads, hidden, dropout)

    @traced("model.decoder")
    def score(self, features: PromptFeatures, text: Tensor) -> Tensor:
        head, patches = self.decode_head, features.tokens
        queries = head.q_proj(features.cls[:, None], text)  # [B, C, D]
        *layers, last = head.decoder_1.layers
        for layer in layers:
            queries = layer(queries, patches)
        return last(queries, patches).unflatten(2, features.grid)

    def loss_parts(
        self, images: Tensor, labels: Labels, text: Tensor, *, focal: float = 100.0, dice: float = 1.0
    ) -> dict[str, Tensor]:
        """Weighted losses ``focal`` and ``dice``; published weights: 100 and 1."""
        return self.mask_losses(self.score(self.encode(images), text), labels, focal, dice)

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        options = super()._sizes(state, options)
        decoder = "decode_head.decoder_1.layers."
        return {
            "decoder_layers": count_layers(state, decoder),
            "decoder_hidden": len(state[f"{decoder}0.linear1.weight"]),
        } | options

    def _left_out(self, state: Mapping[str, Tensor]) -> set[str]:
        last = f"decode_head.decoder_1.layers.{len(self.decode_head.decoder_1.layers) - 1}."
        parts = ("multihead_attn.v.", "multihead_attn.proj.", "linear1.", "linear2.", "norm2.", "norm3.")
        dead = {name for name in state if name.startswith(tuple(last + part for part in parts))}
        return dead | super()._left_out(state)
