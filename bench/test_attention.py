"""bridged_attention against what PyTorch and others do under CLIP-RC's mask; dense_attention and dropout_attention.

    pytest bench/test_attention.py --benchmark-only -s                         # the CPU
    pytest bench/test_attention.py --benchmark-only -s -m "full and not gpu"   # bf16 and fp16, other kinds
    pytest bench/test_attention.py --benchmark-only -s -m gpu                  # a GPU

12 heads of 64, 1051 tokens: CLS, 10 prompts, 32 x 32 patches, a bridge of 4 x 4. Speeds are against
scaled_dot_product_attention with the dense mask, round by round; that without any mask computes something else and
is the bar nobody can pass by much. ``layer`` adds the projections around, as the published code has them in
nn.MultiheadAttention. Each line says whether impl="auto" takes the backend, and why not.

dropout_attention is that of CLIP-RC's decoder, 8 heads of 64, the queries of 171 classes and 16 regions over 32 x 32
patches. Draws differ, so it is judged without dropout here and with it in tests/kernels/test_dropout_attention.py.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from fastzs.clip.vision import Attention
from fastzs.kernels.dispatch import watch
from fastzs.ops import TokenLayout, bridged_attention, dense_attention, dropout_attention

from .rivals import Contest, Rival, Unavailable, compete

LAYOUT = TokenLayout(11, (32, 32), (4, 4))
HEADS, DIM = 12, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("cpu", "triton", "split", "reference")
# Wanted of impl="auto" over SDPA with the dense mask, on CPUs (bf16: where one instruction multiplies it), forward and
# forward + backward; on GPUs, and of unmasked SDPA.
TARGETS = {("cpu", "fp32"): (1.3, 1.3), ("cpu", "bf16"): (4.0, 2.5), ("cuda", "bf16"): (1.2, 1.2)}
NO_MASK = "SDPA, no mask (the bar)"
HEADLINE = "kk+gaussian", "fp32"  # of dense_attention
DROPOUT, QUERIES = 0.1, 171 * 16
full = pytest.mark.full
CPU_DTYPES = ["fp32", pytest.param("bf16", marks=full)]
CPU = [pytest.param("fp32", False, marks=pytest.mark.quick, id="fp32-forward")]
CPU += [pytest.param("fp32", True, id="fp32-forward+backward")]
CPU += [
    pytest.param(dtype, backward, marks=full, id=f"{dtype}-forward{'+backward' * backward}")
    for dtype in ("bf16", "fp16")
    for backward in (False, True)
]
KINDS = [pytest.param("kk", marks=full), pytest.param("qq+kk", marks=full), "kk+gaussian"]
RIVALS = (
    "SDPA, dense mask", NO_MASK, "FlexAttention", "xformers", "fastzs", *(f"fastzs {impl}" for impl in BACKENDS)
)  # fmt: skip


def qkv(batch, length, device, seed, dtype):
    """As a tower gives them: views of [B, L, 3, H, d]."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, length, 3, HEADS, DIM, generator=generator).to(device, dtype)
    return base.permute(2, 0, 3, 1, 4).unbind(0)


@functools.cache
def additive_mask(device, dtype):
    seen = LAYOUT.dense_mask(device=device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)


def with_dense_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive_mask(q.device, q.dtype))


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def block_mask(device):
    from torch.nn.attention.flex_attention import create_block_mask

    seen = LAYOUT.dense_mask(device=device)
    return create_block_mask(lambda b, h, i, j: seen[i, j], None, None, LAYOUT.length, LAYOUT.length, device=device)


def flex(q, k, v):
    try:
        return compiled_flex()(q, k, v, block_mask=block_mask(q.device))
    except (NotImplementedError, RuntimeError) as problem:
        raise Unavailable(f"FlexAttention: {str(problem).splitlines()[0]}") from problem


def xformers(q, k, v):
    try:
        from xformers.ops import memory_efficient_attention

        mask = additive_mask(q.device, q.dtype)
        padded = F.pad(mask, (0, -mask.shape[1] % 8))[:, : mask.shape[1]]  # rows it takes start on 16 bytes
        bias = padded.expand(q.shape[0], HEADS, *mask.shape)
        return memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=bias).transpose(1, 2)
    except (ImportError, NotImplementedError, RuntimeError) as problem:
        raise Unavailable(f"xformers: {str(problem).splitlines()[0]}") from problem


def under(impl):
    def run(q, k, v):
        try:
            return bridged_attention(q, k, v, LAYOUT, impl=impl)
        except RuntimeError as problem:
            raise Unavailable(str(problem)) from problem

    return run


def with_gradients(function):
    """Output and gradients of q, k and v, for a gradient of the output that does not change."""

    def run(q, k, v):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = function(*leaves)
        try:
            return out, *torch.autograd.grad(out, leaves, weights(out.shape, q.dtype, q.device))
        except NotImplementedError as problem:
            raise Unavailable(str(problem)) from problem

    return run


@functools.cache  # made in the warm-up: in a timed call it would be a part of every rival's time
def weights(shape, dtype, device):
    """A gradient of the output."""
    return torch.linspace(-1, 1, shape.numel(), device=device, dtype=torch.float64).view(shape).to(dtype)


def attention(dtype, backward, batch, device):
    """The contest of the ops."""
    functions = {"SDPA, dense mask": with_dense_mask, NO_MASK: F.scaled_dot_product_attention}
    functions |= {"FlexAttention": flex, "xformers": xformers, "fastzs": under("auto")}
    functions |= {f"fastzs {impl}": under(impl) for impl in BACKENDS}
    change = with_gradients if backward else (lambda function: function)
    rivals = {name: Rival(change(function), DTYPES[dtype]) for name, function in functions.items()}
    rivals[NO_MASK].answer = change(with_dense_mask)  # it computes something else
    cost = batch * HEADS * LAYOUT.length**2 * DIM
    return Contest(
        f"bridged_attention {dtype}, {'forward + backward' if backward else 'forward'}, B {batch}, {device}",
        device,
        lambda seed, dtype: qkv(batch, LAYOUT.length, device, seed, dtype),
        rivals,
        change(lambda q, k, v: bridged_attention(q, k, v, LAYOUT, impl="reference")),
        nbytes=(8 if backward else 4) * batch * LAYOUT.length * HEADS * DIM * DTYPES[dtype].itemsize,
        operations=(14 if backward else 4) * cost,
        info={"op": "bridged_attention", "headline": dtype == "fp32" and not backward},
        seconds=10,
    )


def layer(dtype, batch, device):
    """The contest of the layer: projections, attention, output projection; forward."""
    torch.manual_seed(0)
    published = torch.nn.MultiheadAttention(HEADS * DIM, HEADS).requires_grad_(False)
    mine = Attention(HEADS * DIM, HEADS).requires_grad_(False)
    mine.load_state_dict(published.state_dict())
    right = copy.deepcopy(mine).to(DTYPES[dtype]).double()
    published.to(device, DTYPES[dtype])
    mine.to(device, DTYPES[dtype])

    def theirs(x):
        x = x.transpose(0, 1)  # [L, B, C], as the published tower has it
        mask = additive_mask(x.device, x.dtype)
        return published(x, x, x, need_weights=False, attn_mask=mask)[0].transpose(0, 1)

    def ours(layer, impl):
        def run(x):
            q, k, v = layer.project(x)
            return layer.merge(bridged_attention(q, k, v, LAYOUT, impl=impl))

        return run

    def tokens(seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, LAYOUT.length, HEADS * DIM, generator=generator).to(device, dtype),)

    size = HEADS * DIM
    return Contest(
        f"attention layer {dtype}, forward, B {batch}, {device}",
        device,
        tokens,
        {"nn.MultiheadAttention": Rival(theirs, DTYPES[dtype]), "fastzs": Rival(ours(mine, "auto"), DTYPES[dtype])},
        ours(right, "reference"),
        nbytes=(2 * batch * LAYOUT.length * size + 4 * size * size) * DTYPES[dtype].itemsize,
        operations=batch * (8 * LAYOUT.length * size * size + 4 * LAYOUT.length**2 * size),
        info={"op": "attention layer"},
    )


def last_block(dtype, kind, device):
    """The contest of dense_attention, with ViT-B/16's tokens of a picture of 512 x 512."""

    def kinds(impl):
        return lambda q, k, v: dense_attention(q, k, v, kind, LAYOUT.grid, impl=impl)

    return Contest(
        f"dense_attention {kind}, {dtype}, {device}",
        device,
        lambda seed, dtype: qkv(1, 1 + LAYOUT.patches, device, seed, dtype),
        {"reference": Rival(kinds("reference"), DTYPES[dtype]), "fastzs": Rival(kinds("auto"), DTYPES[dtype])},
        kinds("reference"),
        nbytes=4 * LAYOUT.patches * HEADS * DIM * DTYPES[dtype].itemsize,
        operations=4 * HEADS * LAYOUT.patches**2 * DIM * (2 if kind == "qq+kk" else 1),
        info={"op": "dense_attention", "headline": (kind, dtype) == HEADLINE},
    )


def published_dropout(q, k, v, dropout):
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
    return F.dropout(weights, dropout) @ v


def decoder(dtype):
    """The contest of dropout_attention, forward and backward; on CPUs only, where it is used."""

    def inputs(seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        sizes = (QUERIES, LAYOUT.patches, LAYOUT.patches)
        return tuple(torch.randn(1, n, 8, 64, generator=generator).to(dtype).transpose(1, 2) for n in sizes)

    def rival(function):
        run, answer = (
            with_gradients(lambda q, k, v, dropout=dropout: function(q, k, v, dropout)) for dropout in (DROPOUT, 0.0)
        )
        return Rival(run, DTYPES[dtype], answer=answer)

    cost = 8 * QUERIES * LAYOUT.patches * 64
    return Contest(
        f"dropout_attention {dtype}, forward + backward, cpu",
        "cpu",
        inputs,
        {
            "published": rival(published_dropout),
            "SDPA": rival(lambda q, k, v, dropout: F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)),
            "torch.compile": rival(torch.compile(published_dropout, dynamic=False)),
            "fastzs": rival(dropout_attention),
        },
        with_gradients(F.scaled_dot_product_attention),
        nbytes=8 * (QUERIES + LAYOUT.patches) * 512 * DTYPES[dtype].itemsize,
        operations=14 * cost,
        info={"op": "dropout_attention", "headline": dtype == "fp32"},
    )


def standing(impl, dtype, device):
    """Whether "auto" takes the backend, and why not."""
    q, k, v = qkv(1, LAYOUT.length, device, 0, DTYPES[dtype])
    with watch() as choices:
        bridged_attention(q, k, v, LAYOUT)
    (choice,) = choices
    if impl == choice.backend:
        return "auto takes it"
    reason = choice.reasons.get(impl, "no such backend")
    return f"auto leaves it: {reason or f'measured slower than {choice.backend} (kernels/bridged_attention/api.py)'}"


def bench(benchmark, rival, dtype, backward, batch, device):
    row = compete(benchmark, rival, attention, dtype, backward, batch, device)
    line = f"\n{row['group']}, {rival}: {1e3 * row['median seconds']:.1f} ms, {row['faster']:.2f}x"
    wanted = TARGETS.get((device, dtype))
    if rival == "fastzs" and wanted:
        line += f" (wanted {wanted[backward]}x)"
    if rival.startswith("fastzs "):
        line += f"; {standing(rival.removeprefix('fastzs '), dtype, device)}"
    print(line)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("dtype", "backward"), CPU)
def test_cpu(benchmark, dtype, backward, rival):
    bench(benchmark, rival, dtype, backward, 1, "cpu")


@pytest.mark.parametrize("rival", ["nn.MultiheadAttention", "fastzs"])
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_layer_cpu(benchmark, dtype, rival):
    row = compete(benchmark, rival, layer, dtype, 1, "cpu")
    print(f"\n{row['group']}, {rival}: {1e3 * row['median seconds']:.1f} ms, {row['faster']:.2f}x")


@pytest.mark.parametrize("rival", ["reference", "fastzs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_last_block_cpu(benchmark, dtype, kind, rival):
    row = compete(benchmark, rival, last_block, dtype, kind, "cpu")
    print(f"\n{row['group']}, {rival}: {1e3 * row['median seconds']:.1f} ms, {row['faster']:.2f}x")


@pytest.mark.parametrize("rival", ["published", "SDPA", "torch.compile", "fastzs"])
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_decoder_cpu(benchmark, dtype, rival):
    row = compete(benchmark, rival, decoder, dtype)
    print(f"\n{row['group']}, {rival}: {1e3 * row['median seconds']:.1f} ms, {row['faster']:.2f}x")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu(benchmark, dtype, backward, rival):
    bench(benchmark, rival, dtype, backward, 8, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", ["nn.MultiheadAttention", "fastzs"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layer_gpu(benchmark, dtype, rival):
    row = compete(benchmark, rival, layer, dtype, 8, "cuda")
    print(f"\n{row['group']}, {rival}: {1e3 * row['median seconds']:.1f} ms, {row['faster']:.2f}x")
