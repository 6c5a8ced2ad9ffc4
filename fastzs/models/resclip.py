"""ResCLIP: the last block's attention mixed with earlier blocks', and corrected by the labels of a first pass.

Source: Yang et al., "ResCLIP: Residual Attention for Training-free Dense Vision-language Inference", CVPR 2025, as its
code does it. With S the scores of the base operator, G NACLIP's Gaussian and A_c the mean attention of blocks 5 to 8::

    A   = 2 ((1 - r) softmax(S + G) + r A_c)                       residual cross-correlation self-attention (RCS)
    L   = mode over each patch of argmax softmax(scale PAMR(cos))  labels of a first pass with A
    F   = smoothed rows of [L_i = L_j], weaker where the straight path from i to j leaves the label
    S'  = tau ((1 - s) S + s F), and A again                       semantic feedback refinement (SFR)

Published details that are kept: of the path from i to j only as many points are looked at as lie between i and j along
the longer axis, out of those of the longest path of the grid; rows of F are smoothed as one line, across the ends of
image rows; F is rounded to fp16. The labels depend on the names, so the second pass belongs to :meth:`ResCLIP.score`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.clip import Clip, VisionTransformer
from fastzs.models.base import Features
from fastzs.models.training_free import CHECKPOINTS, Settings, TrainingFree, watched
from fastzs.operators import LastBlock, operator
from fastzs.ops import pixel_text_logits, refine
from fastzs.readout import Readout
from fastzs.registry import register
from fastzs.trace import traced

BLOCKS = (5, 6, 7, 8)
PAIRS = {"naclip": ("kk",), "clearclip": ("qq",), "sclip": ("qq", "kk"), "vanilla": ("qk",)}


@operator("mean", blocks=BLOCKS)
def mean_attention(block: LastBlock) -> Tensor:
    """A_c alone: patches attend as they do on average in blocks 5 to 8."""
    maps = torch.stack(list(block.maps.values())).mean(0)
    return maps[:, :, block.prefix :] @ block.v


@dataclass(frozen=True)
class ResFeatures(Features):
    """What both passes over the last block start from."""

    tokens: Tensor  # [B, P + N, C], before the last block
    maps: Tensor  # [B, heads, P + N, P + N], mean attention of the earlier blocks
    images: Tensor  # [B, 3, H, W], normalised: the guide of the first pass's refinement


@register(
    "resclip",
    paper="ResCLIP (Yang et al., CVPR 2025)",
    does="as naclip, with earlier blocks' attention and a second pass corrected by the first one's labels",
    trained="",
    needs="a CLIP ViT of ten blocks or more",
    checkpoints=CHECKPOINTS,
)
class ResCLIP(TrainingFree):
    """ResCLIP (CVPR 2025) on NACLIP's operator, or on another one's.

    Args:
        clip: weights of a vision transformer with at least ten blocks.
        base: the operator of the first pass: "naclip", "clearclip", "sclip" or "vanilla".
        mix: r, the share of the earlier blocks' attention; published: 0.3 to 0.6, by benchmark.
        feedback: s, the share of the feedback in the scores; published: 0.6 or 0.7.
        strength: tau, the factor of the corrected scores; published: 1.8 to 2.2.
        certain: first-pass labels with a smaller probability count as the first name's; published: 0.1 to 0.5.
        paths: weaken pairs whose straight path leaves their label.
        options: see :class:`TrainingFree`.

    Raises:
        ValueError: a tower without ten blocks, an unknown base, or a number out of range.
    """

    published = Settings("kk+gaussian", True, 336, 224, 112, 0, Readout(scale=40.0))
    takes_regions = False  # earlier blocks' attention knows none

    def __init__(
        self,
        clip: Clip,
        *,
        base: str = "naclip",
        mix: float = 0.3,
        feedback: float = 0.7,
        strength: float = 1.8,
        certain: float = 0.3,
        paths: bool = True,
        **options,
    ):
        super().__init__(clip, **options)
        tower = self.visual
        if not isinstance(tower, VisionTransformer) or len(tower.blocks) <= max(BLOCKS) + 1:
            raise ValueError(f"ResCLIP reads the attention of blocks 5 to 8 of 10 or more, which {clip.backbone} lacks")
        if base not in PAIRS:
            raise ValueError(f"ResCLIP: expected a base of {', '.join(PAIRS)}, got {base!r}")
        for name, value in (("mix", mix), ("feedback", feedback), ("certain", certain)):
            if not 0 <= value <= 1:
                raise ValueError(f"ResCLIP: expected {name} in 0..1, got {value}")
        self.base, self.mix, self.feedback, self.strength = base, mix, feedback, strength
        self.certain, self.paths = certain, paths

    @classmethod
    def why_not_exported(cls) -> str | None:
        return "between its two passes it labels the patches and walks the paths between them, which has no graph"

    def why_not_stitched(self) -> str | None:
        return "ResCLIP wants attention of earlier blocks, which is of single windows"

    @traced("model.tower")
    def encode(self, images: Tensor) -> ResFeatures:
        """Tokens before the last block, and the earlier blocks' mean attention."""
        maps, watch = watched(BLOCKS)
        tower = self.visual
        assert isinstance(tower, VisionTransformer)
        tokens, _ = tower.trunk(self.fitted(images), watch)
        return ResFeatures(tokens, torch.stack(list(maps.values())).mean(0), images)

    def score(self, features: ResFeatures, text: Tensor) -> Tensor:
        """Cosines after the second pass, [B, T, h, w]."""
        tower = self.visual
        assert isinstance(tower, VisionTransformer)
        height, width = self.fitted(features.images).shape[2:]
        grid = (height // tower.patch_size, width // tower.patch_size)
        q, k, v = tower.projections(features.tokens, grid)
        parts = {"q": q, "k": k}
        scores = [parts[a] @ parts[b].mT * q.shape[-1] ** -0.5 for a, b in PAIRS[self.base]]

        def cosines(scores: list[Tensor]) -> Tensor:
            weights = torch.stack([(x + self._near(grid, x)).softmax(-1) for x in scores]).sum(0)
            weights = 2 * ((1 - self.mix) * weights + self.mix * features.maps)
            attended = weights[:, :, tower.prefix :] @ v
            dense = tower.read(tower.finish(features.tokens, attended, self.residual, self.ffn), grid)
            return pixel_text_logits(dense.to(torch.promote_types(dense.dtype, torch.float32)), text)

        first = cosines(scores)
        pairs = zip(first, features.images, strict=True)
        fed = torch.stack([self._fed(maps[None], image, grid, tower.patch_size) for maps, image in pairs])
        fed = F.pad(fed, (tower.prefix, 0, tower.prefix, 0))[:, None].to(q.dtype)  # nothing for CLS
        return cosines([self.strength * ((1 - self.feedback) * x + fed) for x in scores])

    def _near(self, grid: tuple[int, int], like: Tensor) -> Tensor | float:
        """NACLIP's Gaussian for the patches, [P + N, P + N], 0 for CLS; 0 for the other operators."""
        if self.base != "naclip":
            return 0.0
        place = torch.cartesian_prod(*(torch.arange(n, dtype=like.dtype, device=like.device) for n in grid))
        near = torch.exp(-(place[:, None] - place).square().sum(-1) / (2 * self.gaussian**2))
        prefix = like.shape[-1] - len(place)
        return F.pad(near, (prefix, 0, prefix, 0))

    def _fed(self, cosines: Tensor, image: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
        """s F of one image, [N, N], in fp16 as published."""
        assert self.readout is not None
        found = refine(cosines, image.to(cosines.dtype), method="pamr", scale=self.readout.scale)
        assert found.probabilities is not None
        labels = found.labels.long().masked_fill(found.probabilities < self.certain, 0)
        cells = (
            labels[: grid[0] * patch, : grid[1] * patch].unflatten(1, (grid[1], patch)).unflatten(0, (grid[0], patch))
        )
        labels = cells.transpose(1, 2).flatten(2).mode(-1).values  # [h, w], the smallest of equally many
        shared = agreement(labels, self.paths, cosines.dtype)
        size = min(len(shared), int(6 * self.gaussian + 1))
        kernel = _line(size - 1 + size % 2, self.gaussian, shared)
        shared = F.conv1d(shared[:, None], kernel[None, None], padding=len(kernel) // 2)[:, 0]
        shared = shared / (shared.sum(-1, keepdim=True) + 1e-8)
        return self.feedback * (shared / shared.max()).half()


def agreement(labels: Tensor, paths: bool, dtype: torch.dtype) -> Tensor:
    """[N, N] of labels [h, w]: 1 where two patches agree, less where the path between them leaves their label."""
    h, w = labels.shape
    flat = labels.flatten()
    same = (flat[:, None] == flat).to(dtype)
    if not paths:
        return same
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float().to(labels.device)
    apart = (place[:, None] - place).abs().amax(-1)  # [N, N]
    longest = int(apart.max())
    if longest == 0:
        return same
    t = torch.linspace(0, 1, longest + 1, device=labels.device)[:, None, None, None]
    points = (place[:, None] * (1 - t) + place * t).round().long()  # [S, N, N, 2], in fp32, half to even
    met = labels[points[..., 0], points[..., 1]] == flat[:, None]
    looked_at = torch.arange(longest + 1, device=labels.device)[:, None, None] <= apart
    broken = (~met & looked_at).any(0)
    return torch.where(broken, same * torch.exp(-apart.to(dtype) / longest), same)


def _line(size: int, std: float, like: Tensor) -> Tensor:
    """A Gaussian of ``size`` samples whose sum is 1."""
    x = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    kernel = torch.exp(-x.square() / (2 * std**2))
    return kernel / kernel.sum()
