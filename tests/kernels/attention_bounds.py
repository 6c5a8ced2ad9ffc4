"""How far attention in fp32 (or stored in bf16 or fp16) may lie from fp64, element by element, by error propagation.

Every operation of softmax(scale q k' + bias) v and of its gradient is followed to first order: what it rounds, and what
the errors of its operands do to it. Independent errors add as squares; those that a whole row shares (of its
log-sum-exp, of D = sum of do * out) add as they are. With w the weights, eps the step of the dtype that sums, and u
half a step of the dtype that stores::

    score       eps sqrt(d) max(|s|, scale sqrt(q^2 k'^2))        a sum of d products
    weight      w (score's, exponential's, u)                     a row's log-sum-exp besides
    out         w's against v,  eps sqrt(N),  u                   a sum of N products
    ds          w (dp - D):  w's, dp's and D's
    dq, dk, dv  ds against k and q, w against do; sums of N or of Q products
"""

import math

import torch
from torch import Tensor

from .tolerances import f32, f64, stored

C = 4.0  # times the propagated errors, which are taken as standard deviations
EXPONENTIAL = 4.0  # steps that an exponential of this package may be off
SMALLEST = 1e-30  # weights below it may be flushed to zero


def attention_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    *,
    scale: float,
    bias: Tensor | float = 0.0,
    kept: Tensor | float = 1.0,
    rounded_scores: bool = False,
) -> dict[str, Tensor]:
    """Allowed absolute errors of ``out``, ``dq``, ``dk`` and ``dv``, each shaped like what it bounds.

    Args:
        q, k, v: fp64 [B, H, L, d], every key that any query may see.
        upstream: fp64, the gradient of out.
        dtype: of the inputs and results.
        scale: of the scores.
        bias: added to the scores; -inf hides a key.
        kept: what dropout multiplies the weights by, 0 or 1 / (1 - dropout).
        rounded_scores: scores are stored in ``dtype``, as PyTorch's products are.
    """
    eps, u = torch.finfo(f64 if dtype == f64 else f32).eps, stored(dtype)
    least = torch.finfo(dtype).smallest_normal * u  # what storing a number below the normal ones may be off
    root, rows, keys = (math.sqrt(n) for n in (q.shape[-1], q.shape[-2], k.shape[-2]))

    def size(products: Tensor, a: Tensor, b: Tensor) -> Tensor:  # of the partial sums of a @ b
        return torch.maximum(products.abs(), (a.square() @ b.square()).sqrt())

    dots = q @ k.mT * scale
    scores = dots + bias
    score_error = eps * root * size(dots, q * scale, k.mT) + (u * dots.abs() if rounded_scores else 0.0)
    p = scores.softmax(-1)
    lse = scores.logsumexp(-1, keepdim=True)
    weight = (score_error.square() + (EXPONENTIAL * eps) ** 2 + u**2).sqrt()  # relative
    row = (p * score_error).square().sum(-1, keepdim=True).sqrt() + eps * (EXPONENTIAL + lse.abs())
    w = p * kept
    w_error = w * weight + least
    out = w @ v
    own = eps * keys * size(out, w, v) + u * out.abs()  # of the sum and of storing it
    out_error = (w_error.square() @ v.square()).sqrt() + row * out.abs() + own

    dp = upstream @ v.mT
    dp_error = eps * root * size(dp, upstream, v.mT)
    products = upstream * out
    d = products.sum(-1, keepdim=True)
    from_weights = (w_error * dp).square().sum(-1, keepdim=True) + (row * d).square()
    d_error = ((upstream * own).square().sum(-1, keepdim=True) + from_weights).sqrt()
    d_error = d_error + eps * root * torch.maximum(d.abs(), products.square().sum(-1, keepdim=True).sqrt())
    t = kept * dp - d
    ds = p * t
    own = (ds * weight).square() + (p * kept * dp_error).square() + (u * ds + least).square()
    shared = (p * d_error).square() + (ds * row).square()
    dq, dk, dv = ds @ k * scale, ds.mT @ q * scale, w.mT @ upstream
    dq_error = (own @ k.square()).sqrt() * abs(scale) + d_error * (p @ k).abs() * abs(scale) + row * dq.abs()
    dk_error = ((own + shared).mT @ q.square()).sqrt() * abs(scale)
    dv_error = ((w_error.square() + (w * row).square()).mT @ upstream.square()).sqrt()
    dq_error = dq_error + eps * keys * size(dq, ds * scale, k) + u * dq.abs()
    dk_error = dk_error + eps * rows * size(dk, ds.mT * scale, q) + u * dk.abs()
    dv_error = dv_error + eps * rows * size(dv, w.mT, upstream) + u * dv.abs()
    found = {"out": out_error, "dq": dq_error, "dk": dk_error, "dv": dv_error}
    return {name: C * (error + least) + SMALLEST for name, error in found.items()}


def assert_within(name: str, actual: Tensor, reference: Tensor, allowed: Tensor) -> None:
    """Fail unless every element of ``actual`` lies within ``allowed`` of ``reference``."""
    assert actual.shape == reference.shape, f"{name}: expected shape {list(reference.shape)}, got {list(actual.shape)}"
    assert actual.isfinite().all(), f"{name}: result is not finite"
    if actual.numel():
        share = (actual.double() - reference).abs() / allowed
        worst = share.max().item()
        assert worst <= 1, f"{name}: an error is {worst:.3g} times what its roundings allow"


def dense_attention_error(
    q: Tensor, k: Tensor, v: Tensor, kind: str, grid: tuple[int, int], dtype: torch.dtype, std: float = 5.0
) -> Tensor:
    """Allowed absolute error of ``dense_attention`` of fp64 q, k, v [B, H, prefix + N, d], [B, H, N, d]."""
    prefix = q.shape[-2] - grid[0] * grid[1]
    if kind == "identity":
        return torch.full_like(v[..., prefix:, :], SMALLEST)
    pairs = {"qk": "qk", "qq": "qq", "kk": "kk", "vv": "vv", "qq+kk": "qqkk", "kk+gaussian": "kk"}[kind]
    by_name = {"q": q, "k": k, "v": v}
    bias = torch.zeros(grid[0] * grid[1], k.shape[-2], dtype=f64, device=q.device)
    if kind == "kk+gaussian":
        place = torch.cartesian_prod(*(torch.arange(n, dtype=f64) for n in grid)).to(q.device)
        bias[:, prefix:] = torch.exp(-torch.cdist(place, place).square() / (2 * std**2))
    total = torch.zeros_like(v[..., prefix:, :])
    for a, b in zip(pairs[::2], pairs[1::2], strict=True):
        rows, keys = by_name[a][..., prefix:, :], by_name[b]
        scale = q.shape[-1] ** -0.5
        nothing = torch.zeros_like(rows)
        total = total + attention_errors(rows, keys, v, nothing, dtype, scale=scale, bias=bias)["out"]
    return total
