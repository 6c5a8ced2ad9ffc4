"""Attention pools: one learnt query reads all tokens. SigLIP's and PE's, and CoCa's.

Sources: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (SigLIP), 2023; Bolya et al., "Perception Encoder",
2025; Yu et al., "CoCa", 2022. That a patch can go to the text space by the way of the values alone is what Zhou et al.
(MaskCLIP, 2022) do with the pool of CLIP's ResNets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip.packable import Packable


class AttentionPool(Packable):
    """``y = out(softmax(query . key(x)) value(x))``, then ``y + mlp(norm(y))`` where there is an MLP.

    The published modules make the query of a learnt vector by weights alone; here it is stored as it comes out.

    Args:
        width_in, width: of the tokens, and of what is given.
        heads: of the attention.
        mlp_width: hidden width of the MLP; 0: there is none.
        tanh_gelu: the tanh approximation of GELU in the MLP.
        norm_tokens: a LayerNorm of the tokens comes first.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        heads: int,
        mlp_width: int,
        tanh_gelu: bool,
        norm_tokens: bool,
        norm_eps: float,
    ):
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(width_in, eps=norm_eps) if norm_tokens else nn.Identity()
        self.query = nn.Parameter(width**-0.5 * torch.randn(width))
        self.key, self.value = nn.Linear(width_in, width), nn.Linear(width_in, width)
        self.out = nn.Linear(width, width)
        self.norm = self.mlp = None
        if mlp_width:
            self.norm = nn.LayerNorm(width, eps=norm_eps)
            gelu = nn.GELU("tanh" if tanh_gelu else "none")
            self.mlp = nn.Sequential(nn.Linear(width, mlp_width), gelu, nn.Linear(mlp_width, width))

    def _after(self, y: Tensor) -> Tensor:
        y = self.out(y)
        return y if self.mlp is None or self.norm is None else y + self.mlp(self.norm(y))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, C] -> one vector each, [B, D]."""
        x = self.norm_in(tokens)
        k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.key(x), self.value(x)))
        q = self.query.view(1, self.heads, 1, -1).expand(len(x), -1, -1, -1)
        return self._after(F.scaled_dot_product_attention(q, k, v).flatten(1))

    def read(self, tokens: Tensor) -> Tensor:
        """What the pool gives if it sees one token alone, for each: [B, L, C] -> [B, L, D]."""
        return self._after(self.value(self.norm_in(tokens)))
