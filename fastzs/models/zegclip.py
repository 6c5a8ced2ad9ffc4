"""ZegCLIP: a prompted CLIP, and a decoder whose queries are the classes' relations to the picture.

Source: Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023. With g the
picture's embedding, I the patches' (all of unit length) and t_c the class's::

    Q = W_q [g * t_c ; t_c] + b                               relationship descriptor
    Q <- layer_l(Q ; memory I)   for all layers but the last
    S(c, i) = mean over heads of the last layer's scores      = (W_q' Q_c) . (W_k' I_i) / (H sqrt(D / H))

Only these scores leave the last layer, so nothing else of it exists here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fastzs.clip.prompted import Encoded
from fastzs.decoders import DecoderLayer, HeadMeanScores, Layers, RelationDescriptor
from fastzs.models.prompt_tuned import PromptTuned
from fastzs.models.trained import count_layers
from fastzs.trace import traced
from fastzs.vocabulary import Vocabulary


class ZegCLIPHead(nn.Module):
    """The trained decoder's parameters, under the published names."""

    def __init__(self, dim: int, layers: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.q_proj = RelationDescriptor(dim)
        self.decoder_1 = Layers(DecoderLayer(dim, heads, hidden, dropout), layers - 1)
        self.decoder_1.layers.append(HeadMeanScores(dim, heads))


class ZegCLIP(PromptTuned):
    """ZegCLIP on any CLIP ViT, for pictures of any size and vocabularies of any length.

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
        imagenet_normalization: published: pictures are normalised with ImageNet's mean and deviation, not CLIP's.

    Training recipe, losses' weights: systems differ by data set, see :meth:`losses`.
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
    def decode(self, encoded: Encoded, text: Tensor) -> Tensor:
        """Logits [B, C, h, w] of the classes with text vectors [C, D]."""
        head = self.decode_head
        queries = head.q_proj(encoded.cls[:, None], text)  # [B, C, D]
        *layers, last = head.decoder_1.layers
        for layer in layers:
            queries = layer(queries, encoded.patches)
        return last(queries, encoded.patches).unflatten(2, encoded.grid)

    def losses(
        self,
        images: Tensor,
        target: Tensor,
        vocabulary: Vocabulary | Tensor,
        *,
        seen: Sequence[str] | Sequence[int] | None = None,
        transductive: bool | Literal["honest"] = False,
        ignore_index: int = 255,
        focal: float = 100.0,
        dice: float = 1.0,
    ) -> dict[str, Tensor]:
        """Weighted training losses ``focal``, ``dice`` and their sum ``total``, scalars.

        Args:
            images: [B, 3, H, W], normalised.
            target: integer labels [B, H', W'] of the whole vocabulary, or ``ignore_index``.
            vocabulary: all classes, or their text vectors [C, D].
            seen: the classes whose labels may be used; all (fully supervised) if omitted.
            transductive: pixels of the other classes are trained with the model's own best unseen class, instead of
                counting as no class; "honest" does not tell these pixels from ignored ones, see
                :func:`fastzs.losses.honest_target`.
            focal, dice: weights; published: 100 and 1.

        Raises:
            ValueError: seen classes that are not in the vocabulary, labels out of range.
        """
        batch = self.training_batch(images, target, vocabulary, seen, transductive, ignore_index)
        out = batch.mask_losses(self.decode(batch.encoded, batch.text), focal, dice)
        return out | {"total": out["focal"] + out["dice"]}

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
