"""The blocks of a vision transformer: CLIP's own, and the forms that later towers gave them.

Sources: Radford et al., 2021 (CLIP's block); Sun et al., "EVA-CLIP", 2023 (rotary positions, gated MLP with a norm
inside, a norm before attention's output projection, norms after attention and MLP); Chen et al., "ViTamin", 2024
(gated MLP with GELU).
"""

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip import frozen, frozen_packed
from fastzs.clip.frozen import QUICK_GELU
from fastzs.clip.packable import Packable
from fastzs.clip.plain import plain
from fastzs.clip.products import Linear, linear, takes
from fastzs.trace import traced


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation OpenAI trained CLIP with.

    Written as silu(1.702 x) / 1.702, it keeps one tensor for backward instead of two.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(QUICK_GELU * x).mul_(1 / QUICK_GELU)


def quick_gelu_mlp(x: Tensor, first: nn.Linear, last: nn.Linear) -> Tensor:
    """``last(quick_gelu(first(x)))`` of tokens [B, L, C], on a GPU and without a gradient.

    quick_gelu(h) is silu(1.702 h) / 1.702, and a product may have any factor: the factors go into the two products, and
    silu works in place. The hidden layer is read and written once between them, 2 times its 4 B L C numbers, where
    three passes, as :class:`QuickGELU` makes them, are 6 times. For 8 windows of 1025 tokens through ViT-B/16 in bf16
    that is 1.2 GB in place of 3.6 (counted; 0.5 ms less on an H200, estimated).
    """
    rows = x.flatten(0, -2)
    hidden = torch.addmm(first.bias * QUICK_GELU, rows, first.weight.t(), alpha=QUICK_GELU)
    out = torch.addmm(last.bias, F.silu(hidden, inplace=True), last.weight.t(), alpha=1 / QUICK_GELU)
    return out.view(*x.shape[:-1], -1)


class Rotation(NamedTuple):
    """Rotary positions of the patches: each pair of channels (2 i, 2 i + 1) of q and k is turned by an angle."""

    sin: Tensor  # [h * w, d], each angle twice
    cos: Tensor  # [h * w, d]
    first: int  # tokens before the patches, which are not turned

    def __call__(self, x: Tensor) -> Tensor:
        """Heads [B, H, L, d] of all tokens, those of the patches turned."""
        last = self.first + len(self.sin)
        patches = x[:, :, self.first : last]
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
        turned = patches * self.cos + turned * self.sin
        return torch.cat([x[:, :, : self.first], turned, x[:, :, last:]], dim=2)


class Attention(nn.Module):
    """Multi-head self-attention with separate access to queries, keys and values.

    Args:
        norm_eps: of a LayerNorm before the output projection (EVA-02); there is none if ``None``.
    """

    def __init__(self, width: int, heads: int, norm_eps: float | None = None):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.norm = None if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def project(self, x: Tensor, which: Literal["q", "k", "v", "kv", "qkv"] = "qkv") -> tuple[Tensor, ...]:
        """Queries, keys and values of ``x`` [B, L, C], as asked, each [B, heads, L, C / heads]."""
        width = x.shape[-1]
        first, last = "qkv".index(which[0]), "qkv".index(which[-1]) + 1
        rows = slice(first * width, last * width)
        y = linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        y = y.unflatten(-1, (len(which), self.heads, width // self.heads))  # [B, L, n, H, d]
        return y.permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def sources(self) -> list[Tensor]:
        """What :meth:`project` computes with, for those who keep what it gave."""
        return [self.in_proj_weight, self.in_proj_bias]

    def merge(self, heads: Tensor) -> Tensor:
        """Output projection of per-head results [B, heads, L, d] -> [B, L, C]."""
        joined = heads.transpose(1, 2).flatten(2)
        return self.out_proj(joined if self.norm is None else self.norm(joined))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class GatedMlp(nn.Module):
    """``c_proj(norm(activation(gate(x)) * c_fc(x)))``, the norm there or before all, or none.

    Args:
        gate: "silu" (EVA-02's SwiGLU) or "gelu" (ViTamin's GeGLU).
        norm: "hidden", "input" or None: what the LayerNorm is of.
    """

    def __init__(self, width: int, hidden: int, gate: str, norm: str | None, norm_eps: float):
        super().__init__()
        sizes = {"hidden": hidden, "input": width}
        self.norm_of = norm
        self.norm = None if norm is None else nn.LayerNorm(sizes[norm], eps=norm_eps)
        self.gate = Linear(width, hidden)
        self.act = {"silu": nn.SiLU, "gelu": nn.GELU}[gate]()
        self.c_fc = Linear(width, hidden)
        self.c_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None and self.norm_of == "input":
            x = self.norm(x)
        x = self.act(self.gate(x)) * self.c_fc(x)
        return self.c_proj(self.norm(x) if self.norm is not None and self.norm_of == "hidden" else x)


def plain_mlp(width: int, hidden: int, activation: nn.Module) -> nn.Sequential:
    """``c_proj(activation(c_fc(x)))``."""
    mlp = nn.Sequential()
    mlp.add_module("c_fc", Linear(width, hidden))
    mlp.add_module("gelu", activation)
    mlp.add_module("c_proj", Linear(hidden, width))
    return mlp


class Block(Packable):
    """Transformer block.

    Args:
        tanh_gelu: the tanh approximation of GELU.
        gate, mlp_norm: a :class:`GatedMlp` with these arguments instead of the plain one.
        attention_norm: see :class:`Attention`.
        norm_last: norms of what attention and MLP give instead of what they take (EVA-02-E).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        quick_gelu: bool,
        norm_eps: float,
        *,
        tanh_gelu: bool = False,
        gate: str | None = None,
        mlp_norm: str | None = None,
        attention_norm: bool = False,
        norm_last: bool = False,
    ):
        super().__init__()
        self.norm_last = norm_last
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, norm_eps if attention_norm else None)
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)
        if gate is not None:
            self.mlp = GatedMlp(width, mlp_width, gate, mlp_norm, norm_eps)
        else:
            gelu = QuickGELU() if quick_gelu else nn.GELU("tanh" if tanh_gelu else "none")
            self.mlp = plain_mlp(width, mlp_width, gelu)

    def seen(self, x: Tensor) -> Tensor:
        """What attention is given of tokens x [B, L, C]."""
        return x if self.norm_last else self.ln_1(x)

    def project(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, ...]:
        """Queries, keys and values of tokens [B, L, C] before their norm, each [B, heads, L, C / heads]."""
        if self.training and not self.norm_last and frozen.passes_through(x, self.ln_1, self.attn):
            qkv = frozen.projections(x, self.ln_1, self.attn.in_proj_weight, self.attn.in_proj_bias)
            q, k, v = (y.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2) for y in qkv)
        else:
            q, k, v = self.attn.project(self.seen(x))
        return (q, k, v) if rotation is None else (rotation(q), rotation(k), v)

    def given(self, heads: Tensor) -> Tensor:
        """What attention gives to tokens, [B, L, C], of its results per head [B, heads, L, C / heads]."""
        attended = self.attn.merge(heads)
        return self.ln_1(attended) if self.norm_last else attended

    def add_attended(self, x: Tensor, heads: Tensor) -> Tensor:
        """Tokens [B, L, C] plus what attention gave them, per head [B, heads, L, C / heads]."""
        alone = not self.norm_last and self.attn.norm is None
        if self.training and alone and frozen.passes_through(heads, self.attn.out_proj) and takes(x):
            return frozen_packed.add_attended(x, heads.transpose(1, 2).flatten(2), self.attn.out_proj)
        attended = self.given(heads)
        return attended.add_(x) if attended.dtype == x.dtype else x + attended

    def add_mlp(self, x: Tensor) -> Tensor:
        """Tokens [B, L, C] plus what the MLP makes of them."""
        if self.norm_last:
            return x + self.ln_2(self.mlp(x))
        if self.training and isinstance(self.mlp, nn.Sequential) and frozen.passes_through(x, self.ln_2, self.mlp):
            first, gelu, last = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(self.mlp))
            if isinstance(gelu, QuickGELU) or cast(nn.GELU, gelu).approximate == "none":
                return frozen.mlp(x, self.ln_2, first, last, isinstance(gelu, QuickGELU))
        y, mlp = self.ln_2(x), self.mlp
        if isinstance(mlp, nn.Sequential) and isinstance(mlp[1], QuickGELU) and _on_gpu(x) and plain(mlp):
            return x + quick_gelu_mlp(y, cast(nn.Linear, mlp[0]), cast(nn.Linear, mlp[2]))
        return x + mlp(y)

    @traced("model.tower.block")
    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.project(x, rotation)
        x = self.add_attended(x, F.scaled_dot_product_attention(q, k, v))
        return self.add_mlp(x)


def _on_gpu(x: Tensor) -> bool:
    """Whether tokens are on a GPU, and no gradient is wanted."""
    return x.is_cuda and not torch.is_grad_enabled()


class Transformer(nn.Module):
    """The blocks, under the name the published state dicts give them."""

    def __init__(self, layers: int, *block, **options):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*block, **options) for _ in range(layers))
