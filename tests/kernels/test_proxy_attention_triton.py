"""The Triton backend of dense_attention(kind="proxy") in Triton's interpreter; test_machine_code.py compiles it."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastzs.kernels.dense_attention.proxy import joined, resampled
from fastzs.kernels.dispatch import watch

from .attention_bounds import SMALLEST, C, assert_within, attention_errors
from .interpreter import INTERPRETED, interpreted, run_interpreted
from .test_proxy_attention import inputs, proxy
from .tolerances import stored

pytest.importorskip("triton")

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EPS = torch.finfo(f32).eps


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


def proxy_error(v, affinity, grid, dtype, beta=1.2, gamma=3.0, floor=None):
    """Allowed absolute error ``[B, H, N, d]`` for fp64 ``v`` and ``affinity``, the values stored in ``dtype``.

    As of other attention, and besides: of the values, which are interpolated and stored; and what a row changes by
    where a score is so close to the mask that fp32 cannot tell on which side it is.
    """
    u, root = stored(dtype), math.sqrt(affinity.shape[1])
    unit = F.normalize(affinity.flatten(2), dim=1).mT[:, None]  # [B, 1, N, E]
    values, sizes = (resampled(joined(x, grid, f64), grid, affinity.shape[2:])[:, None] for x in (v, v.abs()))
    scores = unit @ unit.mT
    shift = beta * scores.mean((2, 3), keepdim=True) if floor is None else floor
    itself = torch.eye(unit.shape[2], dtype=torch.bool, device=v.device)
    kept = (scores >= shift) | itself
    if floor is None:
        bias = torch.zeros_like(scores).masked_fill(~kept, -torch.inf)
        weights = (gamma * scores + bias).softmax(-1)
        error = attention_errors(unit, unit, values, 0 * values, dtype, scale=gamma, bias=bias)["out"]
        near = (gamma * scores - (gamma * scores + bias).logsumexp(-1, keepdim=True)).exp()
    else:
        total = (scores * kept).sum(-1, keepdim=True) + 1e-6
        weights, near = scores * kept / total, scores / total
        exact = weights @ values
        score = EPS * root * torch.maximum(scores.abs(), (unit.square() @ unit.square().mT).sqrt()) * kept / total
        partial = (weights.square() @ values.square()).sqrt()
        error = ((score.square() + (u * weights).square()) @ values.square()).sqrt() + u * exact.abs()
        error = error + score.norm(dim=-1, keepdim=True) * exact.abs()
        error = C * (error + EPS * math.sqrt(unit.shape[2]) * torch.maximum(exact.abs(), partial)) + SMALLEST
    stores = (4 * EPS * sizes + u * values.abs()).square()
    near = near.abs() * ((scores - shift).abs() < 8 * root * EPS) * ~itself
    error = error + C * (weights.square() @ stores).sqrt() + 2 * near.sum(-1, keepdim=True) * values.abs().max()
    return error[:, 0].unflatten(2, (v.shape[1], v.shape[3])).transpose(1, 2)


def check(v, affinity, grid, **options):
    """As close to the reference in fp64 as the roundings allow."""
    wide = v.double(), affinity.double()
    ours = proxy(v, affinity, grid, impl="triton", **options)
    assert ours.dtype == v.dtype
    exact = proxy(*wide, grid, impl="reference", **options)
    assert_within("proxy", ours, exact, proxy_error(*wide, grid, v.dtype, **options))


def case(dtype=f32, size=(12, 13), affinity_dtype=None, device="cpu"):
    """156 patches, 70 channels of features and 3 x 50 of values: no multiples of a tile, and more than one of each."""
    v, affinity = inputs((5, 6), size, heads=3, dim=50, channels=70)
    return v.to(device, dtype), affinity.to(device, affinity_dtype or dtype), (5, 6)


@interpreted
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_dtypes(dtype):
    check(*case(dtype))
    check(*case(dtype), floor=0.2)


@interpreted
@pytest.mark.parametrize(("dtype", "affinity_dtype"), [(f32, f16), (bf16, f32)])
def test_features_of_another_dtype(dtype, affinity_dtype):
    check(*case(dtype, (5, 7), affinity_dtype), beta=0.8, gamma=5.0)


@interpreted
@pytest.mark.parametrize(("grid", "size"), [((5, 5), (10, 10)), ((6, 5), (4, 3)), ((1, 1), (8, 8)), ((2, 3), (1, 1))])
def test_shapes(grid, size):
    v, affinity = inputs(grid, size, dtype=f32)
    check(v, affinity.to(memory_format=torch.channels_last), grid)


@interpreted
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_a_patch_always_sees_itself(dtype):
    """All features equal, a shift that no score reaches, features of 0 with weights that would underflow."""
    v, affinity, grid = case(dtype, (5, 7))
    check(v, torch.ones_like(affinity), grid)
    check(v, affinity, grid, beta=1000.0)
    check(v, torch.zeros_like(affinity), grid, gamma=200.0)
    check(v, torch.zeros_like(affinity), grid, floor=0.2)


@interpreted
def test_auto_takes_it_where_tensor_cores_do():
    for dtype, want in ((f32, "reference"), (bf16, "triton")):
        with watch() as choices:
            proxy(*case(dtype, (2, 2)))  # 150 channels: not for the compiled library
        assert [choice.backend for choice in choices] == [want]


@interpreted
def test_what_it_cannot_take():
    v, affinity, grid = case()
    for a, b, reason in (
        (v.double(), affinity, "v is torch.float64"),
        (v, affinity.double(), "affinity is torch.float64"),
        (v, affinity.clone().requires_grad_(), "gradient"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            proxy(a, b, grid, impl="triton")


@interpreted
def test_operator():
    features, values, row = torch.randn(2, 6, 5), torch.randn(2, 6, 7), torch.ones(2, 6)
    torch.library.opcheck(
        torch.ops.fastzs.proxy_attention_triton, (features, row, row, values, torch.zeros(2), 3.0, None)
    )


MUTATIONS = {
    "nothing": ("", ""),
    "another patch sees itself": ("== key[None, :])", "== (key ^ 1)[None, :])"),
    "a chunk of values is another's": ("c = tl.program_id(1) * CHUNK +", "c = 0 * CHUNK +"),
    "the last step of a similarity is left out": ("range(0, E, STEP)", "range(0, E - STEP, STEP)"),
    "keys keep their length": ("* unit[None, :]", "* 1.0"),
}


@interpreted
@pytest.mark.parametrize("name", MUTATIONS)
def test_only_the_unbroken_kernel_agrees(name, tmp_path, monkeypatch):
    from fastzs.kernels.dense_attention import proxy_triton

    right, wrong = MUTATIONS[name]
    source = Path(proxy_triton.__file__).read_text()
    assert right in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("fastzs.kernels.dense_attention.broken", path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(proxy_triton, "attention", broken.attention)
    v, affinity, grid = case(bf16)

    def agrees():
        try:
            check(v, affinity, grid)
            check(v, affinity, grid, beta=1000.0)
        except AssertionError:
            return False
        return True

    assert agrees() == (name == "nothing")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("floor", [None, 0.2])
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_on_a_gpu(dtype, floor):
    check(*case(dtype, (42, 42), device="cuda"), floor=floor)
