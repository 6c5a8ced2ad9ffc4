"""PEARL: keys turned towards the queries before they are compared, and a Laplacian that refines the cosines.

Source: "PEARL", CVPR 2026. For each head, in fp32 at least, with weights w = |q| / sum |q| over the patches::

    M = (k - sum w k)' (q - sum w q)                    R: the rotation closest to M, by five Newton-Schulz steps
    A = softmax(q (k R)' d^-1/2 + a (k - sum w k) (k - sum w k)' d^-1/2)

Five steps do not converge where singular values are small, so R is not quite a rotation; that is as published. The last
block is bare.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.clip import Clip
from fastzs.models.maskclip import DenseFeatures
from fastzs.models.training_free import CHECKPOINTS, Settings, TrainingFree
from fastzs.operators import LastBlock
from fastzs.readout import Readout
from fastzs.registry import register


@register(
    "pearl",
    paper="PEARL (CVPR 2026)",
    does="windows through CLIP, keys turned to queries in a bare last block, cosines refined by a Laplacian",
    trained="",
    needs="a CLIP ViT",
    checkpoints=CHECKPOINTS,
)
class PEARL(TrainingFree):
    """PEARL (CVPR 2026); windows of 224 pixels at short side 336.

    Args:
        clip: weights of a vision transformer.
        key_weight: a, of the keys' own products; published: 0.08, and 0.3 on Cityscapes and ADE20K.
        options: see :class:`TrainingFree`.
    """

    published = Settings("qk", True, 336, 224, 112, 0, Readout(scale=40.0, refine="laplacian", cells=80))

    def __init__(self, clip: Clip, *, key_weight: float = 0.08, **options):
        super().__init__(clip, dense=self._attend, **options)
        self.key_weight = key_weight

    def score(self, features: DenseFeatures, text: Tensor) -> Tensor:
        """Cosines [B, T, h, w]; the text vectors are brought to unit length once more, as published."""
        return super().score(features, F.normalize(text, dim=-1))

    def _attend(self, block: LastBlock) -> Tensor:
        rows = procrustes(block.q, block.k, block.v, block.prefix, self.key_weight, regions=block.regions)
        return rows[:, :, block.prefix :].to(block.v.dtype)


def procrustes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: int,
    key_weight: float,
    rotation: Callable[[Tensor], Tensor] | None = None,
    regions: Tensor | None = None,
) -> Tensor:
    """Attention with the keys turned towards the queries, [B, heads, L, d] of q, k, v of that shape, fp32 at least.

    Args:
        prefix: tokens before the patches, which have no part in the means.
        key_weight: a.
        rotation: what makes R of M [..., d, d]; :func:`polar` with five steps if omitted.
        regions: int64 [B, h, w]; a patch sees its own region and the tokens before the patches, one of 0 or below sees
            everything.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    lengths = q.norm(dim=-1, keepdim=True)  # [B, H, L, 1]
    lengths = torch.cat([torch.zeros_like(lengths[:, :, :prefix]), lengths[:, :, prefix:]], 2)
    weights = lengths / (lengths.sum(2, keepdim=True) + 1e-6)
    q_mean, k_mean = ((weights * x).sum(2, keepdim=True) for x in (q, k))
    centred = k - k_mean
    turned = k @ (rotation or polar)(centred.mT @ (q - q_mean))
    scores = (q @ turned.mT + key_weight * centred @ centred.mT) * q.shape[-1] ** -0.5
    if regions is not None:
        flat = regions.flatten(1)
        apart = (flat[:, :, None] != flat[:, None]) & (flat[:, :, None] > 0)
        scores[:, :, prefix:, prefix:].masked_fill_(apart[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def polar(m: Tensor, steps: int = 5) -> Tensor:
    """M (M' M)^-1/2 of [..., d, d], by coupled Newton-Schulz steps."""
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    a = m.mT @ m
    norm = torch.linalg.matrix_norm(a, keepdim=True)
    y, z = a / norm + 1e-6 * eye, eye.expand_as(a)
    for _ in range(steps):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return m @ z / norm.sqrt()
