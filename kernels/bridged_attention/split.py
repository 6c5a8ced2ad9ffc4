"""``bridged_attention`` by groups of rows, on the attention that PyTorch has for the processor, or xformers'.

Prefix and patch rows share their keys, so they are one unmasked attention; the one further key of a patch, its
region's bridge token, is merged in through the logarithm of the softmax's denominator. The bridge rows are a small
batched attention over their regions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import xformers
from .common import with_prompts
from .layout import TokenLayout

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _spread(x: Tensor, layout: TokenLayout) -> Tensor:
    """Bridge tokens [B, H, R, d] against :meth:`TokenLayout.cells`: [B, H, rh, 1, rw, 1, d]."""
    assert layout.bridge is not None
    return x.unflatten(2, layout.bridge)[:, :, :, None, :, None]


def _sum_cells(x: Tensor) -> Tensor:
    """[B, H, rh, ch, rw, cw, d] -> [B, H, R, d]."""
    return x.sum((3, 5)).flatten(2, 3)


class _SharedRows(torch.autograd.Function):
    """Prefix and patch rows; each patch sees its region's bridge token besides the shared keys.

    With o, l the output and log-sum-exp over the shared keys, s the score of the bridge key and u its value, the
    merged row is o + sigmoid(s - l) (u - o), its log-sum-exp log(e^l + e^s). Backward, the weights of the shared
    keys are exp(score - merged log-sum-exp), so the attention's own backward is right only with the *merged*
    output and log-sum-exp, and dq must get the bridge key's part added.
    """

    @staticmethod
    def forward(ctx, q, k, v, bridge_k, bridge_v, prefix, grid, bridge, scale, by_xformers):
        layout = TokenLayout(prefix, grid, bridge)
        if by_xformers:
            out, lse = xformers.attention(q, k, v, scale)
        else:
            out, lse = flash(q, k, v, 0.0, False, attn_mask=None, scale=scale)  # [B, H, S, d], [B, H, S]
        score = _bridge_scores(q, bridge_k, layout, scale)
        cells = layout.cells(lse[:, :, prefix:])
        weight = torch.sigmoid(score - cells).unsqueeze(-1)
        rows = layout.cells(out[:, :, prefix:])
        rows.copy_(torch.lerp(rows.to(lse.dtype), _spread(bridge_v, layout).to(lse.dtype), weight))
        cells.copy_(torch.logaddexp(cells, score))
        ctx.save_for_backward(q, k, v, bridge_k, bridge_v, out, lse)
        ctx.layout, ctx.scale, ctx.by_xformers = layout, scale, by_xformers
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, bridge_k, bridge_v, out, lse = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        if ctx.by_xformers:
            dq, dk, dv = xformers.attention_backward(grad, q, k, v, out, lse, scale)
        else:
            dq, dk, dv = flash_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=None, scale=scale)
        patches = slice(layout.prefix, None)
        g = layout.cells(grad[:, :, patches]).to(lse.dtype)
        o = layout.cells(out[:, :, patches]).to(lse.dtype)
        weight = _bridge_scores(q, bridge_k, layout, scale) - layout.cells(lse[:, :, patches])
        weight = weight.exp_().unsqueeze(-1)
        d_bridge_v = _sum_cells(weight * g).to(v.dtype)
        u = _spread(bridge_v, layout).to(lse.dtype)
        d_score = weight * (g * (u - o)).sum(-1, keepdim=True) * scale
        d_bridge_k = _sum_cells(d_score * layout.cells(q[:, :, patches])).to(k.dtype)
        rows = layout.cells(dq[:, :, patches])
        rows += (d_score * _spread(bridge_k, layout)).to(dq.dtype)
        return dq, dk, dv, d_bridge_k, d_bridge_v, *(None,) * 5


def _bridge_scores(q: Tensor, bridge_k: Tensor, layout: TokenLayout, scale: float) -> Tensor:
    """Score of every patch with its region's token, [B, H, rh, ch, rw, cw], in fp32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = layout.cells(q[:, :, layout.prefix :]).to(wide)
    return (rows * _spread(bridge_k, layout).to(wide)).sum(-1) * scale


def _bridge_rows(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, scale: float) -> Tensor:
    """Bridge rows [B, H, R, d]: each token attends to itself and to the patches of its region."""
    patches, own = slice(layout.prefix, layout.shared), slice(layout.shared, None)

    def seen(x: Tensor) -> Tensor:
        cells = layout.cells(x[:, :, patches]).transpose(3, 4).flatten(4, 5).flatten(2, 3)  # [B, H, R, m, d]
        return torch.cat([x[:, :, own].unsqueeze(3), cells], dim=3).flatten(1, 2)  # [B, H * R, 1 + m, d]

    rows = q[:, :, own].flatten(1, 2).unsqueeze(2)  # [B, H * R, 1, d]
    out = F.scaled_dot_product_attention(rows, seen(k), seen(v), scale=scale)
    return out.squeeze(2).unflatten(1, (q.shape[1], -1))


def bridged_attention_split(
    q: Tensor,  # [B, H, L, d]
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    prompt_kv: tuple[Tensor, Tensor] | None,  # [1 or B, H, P, d] each
    scale: float,
    by_xformers: bool = False,
) -> Tensor:  # [B, H, L, d]
    """See :func:`fastzs.ops.bridged_attention`; without a bridge nothing is merged, and PyTorch's attention serves."""
    shared, own = slice(None, layout.shared), slice(layout.shared, None)
    keys, values = with_prompts(prompt_kv, k[:, :, shared], v[:, :, shared])
    if layout.bridge is None:
        return F.scaled_dot_product_attention(q, keys, values, scale=scale)
    bridge_k, bridge_v = k[:, :, own], v[:, :, own]
    order = (layout.prefix, layout.grid, layout.bridge)
    rows = _SharedRows.apply(q[:, :, shared], keys, values, bridge_k, bridge_v, *order, scale, by_xformers)
    both = (rows, _bridge_rows(q, k, v, layout, scale))
    # In memory [B, L, H, d], so that joining the heads afterwards is a view.
    return torch.cat([part.transpose(1, 2) for part in both], dim=1).transpose(1, 2)
