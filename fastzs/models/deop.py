"""DeOP: mask proposals are named by one pass of CLIP over the whole image, whose last layers keep patches apart.

Source: Han et al., "Open-Vocabulary Semantic Segmentation with Decoupled One-Pass Network", ICCV 2023, and its code.

- A MaskFormer, trained first (stage "proposals"), gives masks m_q of any classes.
- *Generalised patch severance*: in the tower's layers ``severed`` attention is replaced; "mask", the released form,
  takes each token's own value times s_l = sum_q sigmoid(m_q) at its patch (100 for CLS); "identity" the value itself;
  "similarity" softmax_l'(sum_q sigma_ql sigma_ql') v_l'. F are the unit vectors of the patches.
- *Classification anchors*: learnt queries e_q, one DETR layer over F, then an attention whose map, times sigmoid(m_q)
  at the patches, pools the raw channels of F head by head: r_q, of unit length.
- logits = 100 r_q . [t_1..t_C; b], b learnt; the score of class c is sum_q softmax(logits_q)_c sigmoid(m_q(p)).

Training sums masks times probabilities to one map of C + 1 channels, without matching: focal and dice losses of
sigmoid(3 u - 3). Trained are the anchors, b and what is added to positions in the tower, which is frozen otherwise.

As in the two-stage systems here, the sigmoid of masks is taken in testing before they are enlarged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip import VisionTransformer, WeightsError
from fastzs.decoders.maskformer import COARSEST, STRIDE, MaskFormer, QueryLayer, sine_position
from fastzs.models import deop_files
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD, Features, Labels, join
from fastzs.models.matching import matched_losses
from fastzs.models.trained import OWN, TrainedModel
from fastzs.models.two_stage import clip_vit
from fastzs.models.words import wide
from fastzs.registry import register
from fastzs.trace import span, traced
from fastzs.windows import next_multiple

LOGIT_SCALE = 100.0
CLS_SHARE = 100.0  # s of CLS in severance by masks, as published, whatever the number of queries
SHARPNESS = 3.0  # of the summed map in training
ALPHA, GAMMA, CLAMP = 0.25, 2.0, 1e-4  # of the focal loss

Severance = Literal["mask", "identity", "similarity"]


@dataclass(frozen=True)
class AnchorFeatures(Features):
    """Mask proposals and the vectors that name them."""

    masks: Tensor  # [B, Q, h, w] logits, fp32 at least
    anchors: Tensor  # r, [B, Q, D], of unit length


class SeveredTower(nn.Module):
    """CLIP's vision transformer with learnt additions to positions, and severed attention in some layers.

    Args:
        tower: of CLIP, frozen.
        added: blocks whose input has an addition of its own, beside the first one's.
        severed: blocks whose attention is replaced.
        side: rows and columns of the additions' grid; published: 24, of 384 pixels.
    """

    def __init__(self, tower: VisionTransformer, added: Sequence[int], severed: Sequence[int], side: int):
        super().__init__()
        layers = len(tower.blocks)
        for what, given in (("added", added), ("severed", severed)):
            if any(not 0 <= i < layers for i in given):
                raise ValueError(f"DeOP: {what} blocks {list(given)}; expected numbers from 0 to {layers - 1}")
        self.tower = tower.requires_grad_(False)
        self.tower.position_mode = "bicubic"
        self.added, self.severed = tuple(added), frozenset(severed)
        shape, std = (1 + side * side, tower.width), tower.width**-0.5
        self.first = nn.Parameter(torch.randn(shape) * std)
        self.more = nn.ParameterList(nn.Parameter(torch.randn(shape) * std) for _ in added)

    def forward(self, images: Tensor, masks: Tensor, severance: Severance) -> tuple[Tensor, tuple[int, int]]:
        """Patches' vectors [B, h * w, D], not normalised, and the grid.

        Args:
            images: [B, 3, H, W], sides multiples of the patches'.
            masks: logits of the proposals at the grid, [B, Q, h, w].
        """
        tokens, grid = self.tower.embed(images)
        tokens = self.tower.ln_pre(tokens + resized(self.first, grid))
        for i, block in enumerate(self.tower.blocks):
            if i in self.added:
                tokens = tokens + resized(self.more[self.added.index(i)], grid)
            if i not in self.severed:
                tokens = block(tokens)
                continue
            (v,) = block.attn.project(block.ln_1(tokens), "v")  # [B, heads, L, d]
            tokens = block.add_mlp(tokens + block.attn.merge(severed(v, masks.sigmoid(), severance)))
        return self.tower.ln_post(tokens[:, 1:]) @ self.tower.proj, grid


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A positional table [1 + n * n, C] for another grid (bicubic), [1 + h * w, C]."""
    side = math.isqrt(len(table) - 1)
    if grid == (side, side):
        return table
    patches = F.interpolate(wide(table[1:].T.reshape(1, -1, side, side)), grid, mode="bicubic")
    return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])


def severed(v: Tensor, masks: Tensor, severance: Severance) -> Tensor:
    """What takes the place of attention over values v [B, heads, 1 + h * w, d], for masks [B, Q, h, w] from 0 to 1."""
    if severance == "identity":
        return v
    flat = masks.flatten(2).to(v.dtype)  # [B, Q, N]
    if severance == "mask":
        share = F.pad(flat.sum(1), (1, 0), value=CLS_SHARE)  # [B, 1 + N]
        return v * share[:, None, :, None]
    flat = F.pad(flat, (1, 0), value=1.0)
    return (flat.mT @ flat).softmax(-1)[:, None] @ v


class Anchors(nn.Module):
    """From the patches' unit vectors to one unit vector for each mask.

    Args:
        dim, heads, hidden, layers: of the DETR layers; published: 512, 8, 1024, 1.
        queries: as many as there are masks.
    """

    def __init__(self, dim: int, heads: int, hidden: int, layers: int, queries: int):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.layers = nn.ModuleList(QueryLayer(dim, heads, hidden, 0.0) for _ in range(layers))
        self.among = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.among_norm = nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)

    @traced("model.decoder")
    def forward(self, features: Tensor, masks: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Anchors r [B, Q, D], and the states [B, Q, D] of the layers before.

        Args:
            features: unit vectors of the patches, [B, D, h, w].
            masks: [B, Q, h, w], from 0 to 1.
        """
        position = sine_position(features).flatten(2).mT.to(features.dtype)  # [1, N, D]
        patches = features.flatten(2).mT  # [B, N, D]
        query = self.queries.expand(len(features), -1, -1)
        x, states = torch.zeros_like(query), []
        for layer in self.layers:
            x = layer(x, query, patches, position)
            states.append(x)
        q = x + query
        x = self.among_norm(x + self.among(q, q, x, need_weights=False)[0])
        q, k = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(x + query), self.key(patches + position))
        )
        heat = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) * masks.flatten(2)[:, None]  # [B, H, Q, N]
        pooled = heat @ patches.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, Q, d]
        return F.normalize(pooled.transpose(1, 2).flatten(2), dim=-1), states


@register(
    "deop",
    paper="DeOP (Han et al., ICCV 2023)",
    does="a ResNet proposes masks, CLIP once over the image names them",
    trained="a MaskFormer (ResNet), then anchors; CLIP is frozen",
    needs="masks of the seen classes; SciPy in training",
    checkpoints=f"published .pth (detectron2), {OWN}",
)
class DeOP(TrainedModel):
    """DeOP on any CLIP ViT, for images of any size and vocabularies of any length.

    Args:
        backbone, weights: of CLIP, see :func:`fastzs.clip.load`; published: ViT-B-16 of OpenAI.
        sizes: CLIP's vision tower's sizes, to build it without weights, as :meth:`from_pretrained` does.
        size: the shorter side of images in testing; published: 512.
        resnet, pretrained, proposals: see :class:`fastzs.decoders.maskformer.MaskFormer`.
        severance: what takes the place of attention in ``severed`` blocks: "mask", "identity" or "similarity".
        severed: numbers of these blocks; the last one if omitted.
        added: numbers of the blocks with positions of their own; published: 1 to 5.
        added_side: rows of the grid of added positions; published: 24.
        anchor_layers, anchor_heads, anchor_hidden: of the anchors' DETR layers; published: 1, 8, 1024.
        stage: what is trained: "proposals" (the MaskFormer, with embeddings named as in zsseg) or "anchors".
        seen, calibration: the training classes, and what they lose where labels are decided; published: 0.
    """

    activation = "none"
    crop = stride = None  # whole images

    def __init__(
        self,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        sizes: Mapping[str, Any] | None = None,
        size: int = 512,
        resnet: str = "resnet101",
        pretrained: str | None = "IMAGENET1K_V1",
        proposals: Mapping[str, Any] | None = None,
        severance: Severance = "mask",
        severed: Sequence[int] | None = None,
        added: Sequence[int] = (1, 2, 3, 4, 5),
        added_side: int = 24,
        anchor_layers: int = 1,
        anchor_heads: int = 8,
        anchor_hidden: int = 1024,
        stage: Literal["proposals", "anchors"] = "anchors",
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.0,
    ):
        if severance not in ("mask", "identity", "similarity") or stage not in ("proposals", "anchors"):
            raise ValueError(
                "DeOP: severance must be 'mask', 'identity' or 'similarity' and stage 'proposals' or 'anchors', got "
                f"{severance!r} and {stage!r}"
            )
        clip, tower, sizes = clip_vit("DeOP", backbone, weights, sizes)
        if sizes.get("variant"):
            raise ValueError(f"DeOP: {backbone} is not CLIP's own vision transformer, whose positions its tables join")
        super().__init__(
            backbone=backbone,
            weights=weights,
            clip=clip,
            text_dim=sizes["output_dim"],
            seen=seen,
            calibration=calibration,
        )
        dim = self.text_dim
        severed = [sizes["layers"] - 1] if severed is None else list(severed)
        self.maskformer = MaskFormer(resnet, pretrained, **(proposals or {}))
        self.project = nn.Linear(self.maskformer.width, dim)
        self.tower = SeveredTower(tower or VisionTransformer(**sizes), added, severed, added_side)
        self.anchors = Anchors(dim, anchor_heads, anchor_hidden, anchor_layers, len(self.maskformer.queries))
        self.no_object = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        self.severance: Severance = severance
        self.short_side = size
        own = clip is not None and self.weights not in ("openai", "random")
        self.mean, self.std = (clip.mean, clip.std) if own and clip else (IMAGENET_MEAN, IMAGENET_STD)
        self.settings.update(
            sizes=dict(sizes), size=size, resnet=resnet, pretrained=None, proposals=dict(proposals or {}),
            severance=severance, severed=severed, added=list(added), added_side=added_side,
            anchor_layers=anchor_layers, anchor_heads=anchor_heads, anchor_hidden=anchor_hidden, stage=stage,
        )  # fmt: skip
        self.stage = stage
        for name, parameter in self.named_parameters():
            if name.startswith("tower.tower."):
                continue
            shared = name == "no_object"
            parameter.requires_grad_(shared or (stage == "proposals") == name.startswith(("maskformer", "project")))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.stage == "anchors":
            self.maskformer.eval()
        return self

    def encode(self, images: Tensor) -> AnchorFeatures:
        sides = [next_multiple(side, STRIDE) // STRIDE for side in images.shape[2:]]
        images, masks = self.propose(images.to(next(self.parameters()).dtype))
        anchors = self.name(images, masks)
        return AnchorFeatures(wide(masks)[:, :, : sides[0], : sides[1]], anchors)

    @torch.no_grad()
    def propose(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images padded with zeros to the tower's grid, and the proposals' logits [B, Q, H / 4, W / 4]."""
        whole = math.lcm(COARSEST, self.tower.tower.patch_size)
        images = F.pad(images, (0, -images.shape[3] % whole, 0, -images.shape[2] % whole))
        return images, self.maskformer(images).masks[-1]

    def name(self, images: Tensor, masks: Tensor) -> Tensor:
        """Anchors r [B, Q, D] of proposals [B, Q, H / 4, W / 4] of padded images."""
        patch = self.tower.tower.patch_size
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        with span("model.tower"):
            found, _ = self.tower(images, F.interpolate(masks, grid, mode="bilinear"), self.severance)
        features = F.normalize(found, dim=-1).mT.unflatten(2, grid)
        return self.anchors(features, F.interpolate(masks.sigmoid(), grid, mode="bilinear"))[0]

    def compare(self, anchors: Tensor, text: Tensor) -> Tensor:
        """Logits [B, Q, T + 1], the last for "no object"."""
        return LOGIT_SCALE * wide(anchors) @ wide(torch.cat([text, F.normalize(self.no_object, dim=-1)])).T

    def decode(
        self, features: AnchorFeatures, text: Tensor, *, groups: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Scores [B, C, ceil(H / 4), ceil(W / 4)], fp32 at least, not negative; see the base."""
        logits = self.compare(features.anchors, self.prepare_text(text))
        classes, nothing = logits[..., :-1], logits[..., -1:]
        classes = join(classes.mT[..., None], groups)[..., 0].mT
        share = torch.cat([classes, nothing], dim=-1).softmax(-1)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", share, features.masks.sigmoid().to(share.dtype))

    def loss_parts(
        self, images: Tensor, labels: Labels, text: Tensor, *, focal: float | None = None, dice: float | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses of the stage; published weights of focal and dice: 20 and 1, and for anchors 2 and 0.8."""
        if self.stage == "proposals":
            found = self.maskformer(images.to(text.dtype))
            logits = self.compare(F.normalize(self.project(found.embeddings), dim=-1), text)
            weights = {"focal": 20.0 if focal is None else focal, "dice": 1.0 if dice is None else dice}
            parts = matched_losses(logits, found.masks, labels.target, ignore_index=labels.ignore_index, **weights)
            return {name: value for name, value in parts.items() if name != "total"}
        images, masks = self.propose(images.to(text.dtype))
        target = labels.target
        target = F.pad(
            target,
            (0, images.shape[3] - target.shape[2], 0, images.shape[2] - target.shape[1]),
            value=labels.ignore_index,
        )
        share = self.compare(self.name(images, masks), text).softmax(-1)
        found_focal, found_dice = summed_losses(masks, share, target, labels.ignore_index)
        return {
            "focal": (2.0 if focal is None else focal) * found_focal,
            "dice": (0.8 if dice is None else dice) * found_dice,
        }

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> Self:
        """Read a published checkpoint (detectron2's ``.pth``), or a safetensors file with the same names.

        Sizes come from the tensors; heads have 64 channels, as in every CLIP, unless ``sizes`` says otherwise. The
        text's learnt prefix is not read: names are put into templates. What only the first stage uses starts anew.

        Raises:
            WeightsError: see :meth:`TrainedModel.from_checkpoint`.
        """
        return super().from_checkpoint(path, **options)

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if not deop_files.recognised(state):
            raise WeightsError(
                f"{path}: is no checkpoint of DeOP (no CLIP with positions of its own and anchors in it)"
            )

    @classmethod
    def _used(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return deop_files.renamed(state)

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        return deop_files.sizes(state) | options


@traced("train.loss")
def summed_losses(masks: Tensor, share: Tensor, target: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of the summed map u_c = sum_q share_qc sigmoid(m_q), at the labels' size; see the module.

    Args:
        masks: logits [B, Q, h, w].
        share: probabilities [B, Q, C + 1], the last of "no object", to which ignored pixels belong.
        target: labels [B, H, W].
    """
    enlarged = F.interpolate(masks, target.shape[1:], mode="bilinear").sigmoid()
    p = (SHARPNESS * torch.einsum("bqc,bqhw->bchw", share, enlarged.to(share.dtype)) - SHARPNESS).sigmoid()
    classes = share.shape[-1] - 1
    wanted = F.one_hot(target.masked_fill(target == ignore_index, classes), classes + 1).movedim(-1, 1).to(p.dtype)
    right = torch.where(wanted > 0, p, 1 - p)
    weight = torch.where(wanted > 0, ALPHA, 1 - ALPHA)
    focal = -(weight * (1 - right) ** GAMMA * right.clamp(CLAMP, 1 - CLAMP).log()).mean()
    p, wanted = p[:, :classes].flatten(1), wanted[:, :classes].flatten(1)
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    return focal, dice.mean()
