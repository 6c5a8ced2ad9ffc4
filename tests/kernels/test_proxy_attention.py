"""dense_attention(kind="proxy"): published order of work, golden features, and the compiled library on every CPU."""

import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.proxy import published_proxy
from fastzs.kernels.dense_attention.proxy import MISSING
from fastzs.ops import dense_attention
from tests.parity.golden import read

from .mutants import NEEDS_COMPILER, compile_variants

GOLDENS = Path(__file__).parents[1] / "goldens"
NEEDS_LIBRARY = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ISAS = ["avx512_bf16", "avx512", "avx2", "portable"] if platform.machine() == "x86_64" else ["portable"]
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EPS = torch.finfo(f32).eps
GRIDS = [  # of values, of features
    ((5, 5), (10, 10)),
    ((3, 4), (7, 9)),  # not square, no multiple of a panel
    ((4, 6), (4, 6)),  # equal
    ((6, 5), (4, 3)),  # coarser features
    ((1, 1), (8, 8)),
    ((2, 3), (1, 1)),
]


def inputs(grid, size, batch=2, heads=4, dim=16, channels=24, dtype=f64, prefix=1):
    generator = torch.Generator().manual_seed(grid[0] + 10 * size[1])
    v = torch.randn(batch, heads, prefix + grid[0] * grid[1], dim, generator=generator, dtype=f64)
    u = torch.randn(batch, channels, *size, generator=generator, dtype=f64)
    return v.to(dtype), (u + torch.randn(batch, channels, 1, 1, generator=generator, dtype=f64)).to(dtype)


def proxy(v, affinity, grid, **options):
    return dense_attention(v, v, v, "proxy", grid, affinity=affinity, **options)


def bound(v, affinity, beta=1.2, gamma=3.0, floor=None):
    """``[B, 1, N, 1]``: how far an fp32 result may be from fp64's.

    c sqrt(n) eps of the largest value, c = 16, for the D + N products of a score and of a mean, times 1 + gamma, which
    the exponential makes of a score's error; and what a row changes by where a score so close to the mask that fp32
    cannot tell falls on the other side.
    """
    unit = F.normalize(affinity.double().flatten(2), dim=1)
    likeness = unit.transpose(1, 2) @ unit
    shift = (beta * likeness.mean((1, 2)) if floor is None else torch.full((len(v),), floor).double())[:, None, None]
    weights = (gamma * (likeness - 1)).exp() if floor is None else likeness
    near = ((likeness - shift).abs() < 8 * unit.shape[1] ** 0.5 * EPS) * weights
    itself = torch.eye(unit.shape[2], dtype=torch.bool)
    total = (weights * ((likeness >= shift) | itself)).sum(-1)
    rounding = 16 * (unit.shape[1] + unit.shape[2]) ** 0.5 * EPS * (1 + gamma)
    return ((rounding + 2 * near.sum(-1) / total) * v.double().abs().max())[:, None, :, None]


def check(v, affinity, grid, **options):
    got = proxy(v, affinity, grid, impl="cpu", **options)
    want = proxy(v.double(), affinity.double(), grid, impl="reference", **options)
    assert got.dtype == v.dtype
    half = torch.finfo(v.dtype).eps / 2 * want.abs() if v.dtype != f32 else 0
    assert ((got.double() - want).abs() <= bound(v, affinity, **options) + half).all()


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_reference_is_published(grid, size):
    v, affinity = inputs(grid, size)
    for n in range(2):
        want = published_proxy(v[n : n + 1], affinity[n : n + 1], grid, 1.1, 2.5)
        got = proxy(v[n : n + 1], affinity[n : n + 1], grid, beta=1.1, gamma=2.5, impl="reference")
        seen = want.isfinite()  # the others have no score of at least 0
        torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=1e-12)
        assert got.isfinite().all()
        assert seen.any() or size == (1, 1)


def test_reference_goes_through_the_rows_in_blocks(monkeypatch):
    v, affinity = inputs(*GRIDS[1])
    want = proxy(v, affinity, (3, 4))
    monkeypatch.setattr("fastzs.kernels.dense_attention.proxy.ROWS", 10)
    torch.testing.assert_close(proxy(v, affinity, (3, 4)), want, rtol=0, atol=1e-14)


def test_soft_form_by_its_formula():
    """CLIP-DINOiser: f_i = sum_j c_ij f_j / (sum_j c_ij + 1e-6), cosines below 0.2 being 0."""
    v, affinity = inputs((4, 6), (4, 6), batch=1)
    unit = affinity[0].flatten(1) / affinity[0].flatten(1).norm(dim=0)
    cosines = unit.T @ unit
    cosines[cosines < 0.2] = 0
    want = cosines @ v[0, :, 1:] / (cosines.sum(1) + 1e-6)[:, None]
    torch.testing.assert_close(proxy(v, affinity, (4, 6), floor=0.2)[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["T_proxyclip_dino", "T_proxyclip_dinov2"])
@pytest.mark.parametrize(("name", "variant"), [("features", "default"), ("features_thresholds", "thresholds")])
def test_golden_features(case, name, variant):
    """The last block of ProxyCLIP from the tokens that enter it: no residual, no MLP, no q and k."""
    golden = read(GOLDENS / f"{case}.safetensors")
    weights = {name: w.double() for name, w in golden.under("w.visual.").items()}
    block = {n.removeprefix("transformer.resblocks.1."): w for n, w in weights.items()}
    width, heads = golden.config["width"], golden.config["heads"]
    x = golden["mid64.image0.tokens"].double()
    x = F.layer_norm(x, (width,), block["ln_1.weight"], block["ln_1.bias"])
    v = x @ block["attn.in_proj_weight"][2 * width :].T + block["attn.in_proj_bias"][2 * width :]
    v = v.unflatten(2, (heads, -1)).transpose(1, 2)
    options = {k: o for k, o in golden.config["variants"][variant].items() if k in ("beta", "gamma")}
    grid = (golden.config["grid"],) * 2
    x = proxy(v, golden["mid64.image0.vfm"].double(), grid, **options).transpose(1, 2).flatten(2)
    x = x @ block["attn.out_proj.weight"].T + block["attn.out_proj.bias"]
    x = F.layer_norm(x, (width,), weights["ln_post.weight"], weights["ln_post.bias"]) @ weights["proj"]
    size = golden["mid64.image0.vfm"].shape[2:]
    check = golden.check(f"out64.image0.{name}", x.transpose(1, 2).unflatten(2, size))
    assert check.error < 3e-6  # tokens, features and the result are stored in fp32


@NEEDS_LIBRARY
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_instruction_sets(grid, size, isa, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    v, affinity = inputs(grid, size, dtype=f32)
    check(v, affinity, grid)
    check(v, affinity, grid, beta=0.8, gamma=5.0)
    check(v, affinity, grid, floor=0.2)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [bf16, f16])
def test_low_precision(dtype):
    v, affinity = inputs((5, 5), (10, 10), dtype=f32)
    check(v.to(dtype), affinity.to(dtype), (5, 5))


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=NEEDS_LIBRARY)])
@pytest.mark.parametrize("value", [1.0, -3.0])
def test_a_uniform_picture_has_no_nan(value, impl):
    """Where every score is below 0 each patch sees itself: the values, interpolated."""
    v, affinity = inputs((3, 4), (7, 9), dtype=f32)
    got = proxy(v, torch.full_like(affinity, value), (3, 4), impl=impl)
    values = v[:, :, 1:].transpose(2, 3).flatten(0, 1).unflatten(2, (3, 4))
    want = F.interpolate(values, (7, 9), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, want.unflatten(0, (2, 4)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=NEEDS_LIBRARY)])
def test_features_of_zero_see_everything_alike(impl):
    v, affinity = inputs((3, 4), (3, 4), dtype=f32)
    got = proxy(v, torch.zeros_like(affinity), (3, 4), impl=impl)
    torch.testing.assert_close(got, v[:, :, 1:].mean(2, keepdim=True).expand_as(got), rtol=0, atol=1e-5)


@NEEDS_LIBRARY
def test_threads_change_nothing():
    v, affinity = inputs((5, 5), (10, 10), dtype=f32)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            answers.append(proxy(v, affinity, (5, 5), impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*answers)


def test_gradients_go_through_the_reference():
    v, affinity = inputs((3, 4), (7, 9), dtype=f32)
    v.requires_grad_()
    proxy(v, affinity, (3, 4)).sum().backward()
    assert v.grad is not None
    assert v.grad[:, :, 1:].abs().sum() > 0
    with pytest.raises(RuntimeError, match="gradient"):
        proxy(v, affinity, (3, 4), impl="cpu")


@NEEDS_LIBRARY
def test_compiles_without_a_break():
    v, affinity = inputs((3, 4), (7, 9), dtype=f32)
    run = torch.compile(lambda v, u: proxy(v, u, (3, 4)), fullgraph=True, backend="eager")
    assert torch.equal(run(v, affinity), proxy(v, affinity, (3, 4)))


def test_bad_input():
    v, affinity = inputs((3, 4), (7, 9), dtype=f32)
    bad = affinity.clone()
    bad[1, 3, 2, 2] = float("nan")
    for options, message in (
        ({}, "pass affinity="),
        ({"affinity": affinity[:1]}, r"\[2, D, H', W'\]"),
        ({"affinity": affinity[0]}, r"\[2, D, H', W'\]"),
        ({"affinity": affinity[:, :, :0]}, "none of them 0"),
        ({"affinity": affinity.long()}, "int64"),
        ({"affinity": affinity.to("meta")}, "meta"),
        ({"affinity": bad}, "NaN"),
        ({"affinity": affinity, "gamma": 0.0}, "gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_attention(v, v, v, "proxy", (3, 4), **options)
    with pytest.raises(ValueError, match="only by kind='proxy'"):
        dense_attention(v, v, v, "kk", (3, 4), affinity=affinity)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        proxy(v[:, :1], affinity, (3, 4), impl="cpu")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        proxy(v, affinity, (3, 4), impl="triton")


MUTATIONS = {
    "nothing": [],
    "the diagonal is masked too": [("M::splat(INFINITY) : s;", "s : s;")],
    "the mask is strict": [("score >= job.shift ?", "score > job.shift + 0.1f ?")],
    "nothing is masked": [("score >= job.shift ?", "score >= -2.0f ?")],
    "gamma is forgotten": [("(s - 1.0f) * job.gamma", "(s - 1.0f)")],
    "the higher line gets nothing": [("if (up > 0.0f && low + 1 < job.nodes_y)", "if (false)")],
    "the higher column gets nothing": [("if (up > 0.0f && low + 1 < job.nodes_x)", "if (false)")],
    "rows are not divided by their sum": [("share = 1.0f / part.total[r + k];", "share = 1.0f / part.total[r];")],
    "one panel of keys is left out": [
        ("panel * PANEL < job.patches; ++panel)", "panel * PANEL + PANEL < job.patches; ++panel)")
    ],
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    changes = list(MUTATIONS.values())
    return compile_variants(tmp_path_factory.mktemp("mutants"), "proxy_attention.cpp", changes, (), "-O0")


@pytest.mark.slow
@NEEDS_COMPILER[1]
@NEEDS_LIBRARY
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants, monkeypatch):
    monkeypatch.setattr(torch.ops.fastzs, "proxy_attention", mutants[number].proxy_attention)
    cases = [(*inputs((3, 4), (7, 9), dtype=f32), (3, 4))]
    cases.append((cases[0][0], torch.ones_like(cases[0][1]), (3, 4)))

    def agrees():
        try:
            for case in cases:
                check(*case)
        except AssertionError:
            return False
        return True

    assert agrees() == (number == 0)
