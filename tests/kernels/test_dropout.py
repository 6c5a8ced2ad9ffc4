"""Dropout: which elements are dropped, and the compiled backend against the formula in fp64."""

import platform

import pytest
import torch
import torch.nn.functional as F

from fastzs.kernels.dispatch import watch
from fastzs.kernels.dropout.compiled import MISSING
from fastzs.kernels.dropout.reference import dropout_reference, kept
from fastzs.ops import dropout

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NEEDS_LIBRARY = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BACKENDS = ["reference", pytest.param("cpu", marks=NEEDS_LIBRARY)]
ISAS = ["avx512", "avx2", "portable"] if platform.machine() == "x86_64" else ["portable"]


def inputs(dtype=f32, shape=(2, 3, 37)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def run(x, rate, relu, impl, seed=4):
    """The result and the gradient of x under fixed weights, the same in every dtype."""
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    out = dropout(leaf, rate, relu=relu, impl=impl)
    upstream = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaf, upstream)]


def assert_agrees(x, rate, relu):
    """To two roundings, of the factor and of the product, and the same elements are dropped."""
    exact = run(x.double(), rate, relu, "reference")
    ours = run(x, rate, relu, "cpu")
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.dtype, mine.shape) == (x.dtype, right.shape)
        assert torch.equal(mine == 0, right == 0)
        assert ((mine.double() - right).abs() <= 1.01 * torch.finfo(x.dtype).eps * right.abs()).all()


# ---- the specification ---------------------------------------------------------------------------------------------


def test_reference_is_the_formula():
    x = inputs(f64)
    keep = kept((2, 3, 37), 0.25, torch.tensor(9))
    assert torch.allclose(dropout_reference(x, False, 0.25, torch.tensor(9)), x * keep / 0.75, atol=1e-15)
    assert torch.allclose(dropout_reference(x, True, 0.25, torch.tensor(9)), F.relu(x) * keep / 0.75, atol=1e-15)


def test_bits_are_splitmix_and_murmur():
    """By Python's integers."""
    mask = (1 << 64) - 1
    seed, shape = 123456789012345, (2, 3, 5, 7)
    found = kept(shape, 0.4, torch.tensor(seed))
    for b, h, row, place in ((0, 0, 0, 0), (1, 2, 4, 6), (1, 0, 3, 2)):
        x = seed + (((b * 3 + h) * 5 + row) + 1) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
        y = place + x & 0xFFFFFFFF
        y = (y ^ y >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        y = (y ^ y >> 13 ^ x >> 32) * 0xC2B2AE35 & 0xFFFFFFFF
        y ^= y >> 16
        assert found[b, h, row, place].item() == (y >> 1 >= round(0.4 * 2**31))


def test_share_that_is_dropped():
    dropped = 1 - kept((2, 2, 500, 400), 0.1, torch.tensor(3)).float()
    assert dropped.mean().item() == pytest.approx(0.1, abs=2.4e-3)  # 5 standard deviations
    for along in ((0, 1, 2), (0, 1, 3)):  # columns, rows: their spread is that of a fair draw
        count = dropped.numel() / dropped.mean(along).numel()
        assert dropped.mean(along).std().item() == pytest.approx((0.09 / count) ** 0.5, rel=0.15)
    flat = dropped - dropped.mean()
    for a, b in (  # neighbours in a row, rows, heads, images
        (flat[..., 1:], flat[..., :-1]),
        (flat[:, :, 1:], flat[:, :, :-1]),
        (flat[:, 0], flat[:, 1]),
        (flat[0], flat[1]),
    ):
        assert (a * b).mean().abs().item() / 0.09 < 5 / a.numel() ** 0.5
    assert kept((1, 1, 9, 9), 0.0, torch.tensor(3)).all()


# ---- backends ------------------------------------------------------------------------------------------------------


@NEEDS_LIBRARY
class TestCompiled:
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.9])
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("dtype", [f32, bf16, f16])
    def test_agrees(self, dtype, isa, rate, relu, monkeypatch):
        monkeypatch.setenv("FASTZS_CPU_ISA", isa)
        assert_agrees(inputs(dtype), rate, relu)

    @pytest.mark.parametrize("shape", [(1,), (16,), (500,), (3, 1), (70, 64), (2, 300, 257), (4, 0), (0, 4)])
    def test_sizes(self, shape):
        assert_agrees(inputs(shape=shape), 0.3, True)

    def test_strided(self):
        x = torch.full((5, 40, 2), torch.nan)
        x[..., 0] = inputs(shape=(5, 40))
        assert_agrees(x[..., 0].t(), 0.3, False)
        leaf = inputs(shape=(5, 40)).requires_grad_()
        dropout(leaf, 0.3, impl="cpu").t().contiguous().square().sum().backward()  # a strided gradient

    def test_writes_no_further(self):
        """The last row of a tensor that ends where its storage does, between others of the same storage."""
        base = torch.full((3, 21), 7.0)
        out = dropout(base[1:2], 0.5, impl="cpu")
        assert out.unique().tolist() == [0, 14]
        assert (base == 7).all()

    @pytest.mark.parametrize("relu", [False, True])
    def test_lets_nan_through(self, relu):
        out = dropout(torch.full((40,), torch.nan), 0.2, relu=relu, impl="cpu")
        assert out.isnan().sum() > 20
        leaf = torch.ones(40, requires_grad=True)
        (grad,) = torch.autograd.grad(dropout(leaf, 0.2, relu=relu, impl="cpu"), leaf, torch.full((40,), torch.nan))
        assert grad.isnan().sum() > 20

    def test_result_repeats_to_the_bit_whatever_the_threads(self):
        x = inputs(shape=(3, 200, 401))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            first = run(x, 0.2, True, "cpu")
            torch.set_num_threads(1)
            assert all(torch.equal(a, b) for a, b in zip(first, run(x, 0.2, True, "cpu"), strict=True))
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize(("relu", "numbers"), [(False, [1]), (True, [1, 6])])
    def test_what_is_kept_for_backward(self, relu, numbers):
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        x = torch.randn(2, 3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dropout(x, 0.1, relu=relu, impl="cpu")
        assert saved == numbers

    @pytest.mark.parametrize("relu", [False, True])
    def test_opcheck(self, relu):
        x = inputs(shape=(4, 9)).requires_grad_()
        torch.library.opcheck(torch.ops.fastzs.dropout, (x, relu, 0.1, torch.tensor(1)))

    def test_second_derivative_is_refused(self):
        x = inputs().requires_grad_()
        (grad,) = torch.autograd.grad(dropout(x, 0.1, impl="cpu").square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()

    def test_compiles_in_one_graph(self):
        x = inputs()
        whole = torch.compile(lambda x: dropout(x, 0.0, relu=True, impl="cpu"), fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x), F.relu(x))


@pytest.mark.parametrize("impl", BACKENDS)
def test_nothing_is_dropped_at_rate_0(impl):
    x = inputs()
    assert torch.equal(dropout(x, 0.0, impl=impl), x)
    assert torch.equal(dropout(x, 0.0, relu=True, impl=impl), F.relu(x))


@pytest.mark.parametrize("impl", BACKENDS)
def test_follows_the_generator(impl):
    x = torch.ones(100)
    torch.manual_seed(1)
    one = dropout(x, 0.3, impl=impl)
    assert not torch.equal(one, dropout(x, 0.3, impl=impl))
    torch.manual_seed(1)
    assert torch.equal(one, dropout(x, 0.3, impl=impl))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [f64, f32, bf16])
def test_torch_is_pytorchs_own(dtype, relu):
    x = inputs(dtype)
    ours = run(x, 0.4, relu, "torch")
    leaf = x.clone().requires_grad_()
    torch.manual_seed(4)
    wanted = F.dropout(F.relu(leaf) if relu else leaf, 0.4)
    assert torch.equal(ours[0], wanted)


@pytest.mark.parametrize(("dtype", "rate", "taken"), [(f64, 0.1, "torch"), (f32, 0.0, "torch"), (f32, 0.1, "cpu")])
def test_auto(dtype, rate, taken, monkeypatch):
    """PyTorch's own where the library cannot, and where nothing is dropped: x itself, nothing drawn."""
    monkeypatch.delenv("FASTZS_IMPL", raising=False)
    x, before = inputs(dtype), torch.get_rng_state()
    with watch() as choices:
        out = dropout(x, rate)
    assert choices[0].backend == (taken if MISSING is None else "torch")
    if rate == 0:
        assert out is x
        assert torch.equal(torch.get_rng_state(), before)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(3).int()}, TypeError, "x is torch.int32; expected a floating dtype"),
        ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
        ({"rate": 1.0}, ValueError, "rate=1.0; expected 0 to below 1"),
        ({"rate": -0.1}, ValueError, "rate=-0.1"),
        ({"rate": float("nan")}, ValueError, "rate=nan"),
        ({"impl": "triton"}, RuntimeError, "no such backend"),
        ({"x": torch.ones(3).double(), "impl": "cpu"}, RuntimeError, "x is torch.float64; expected float32"),
        ({"x": torch.ones(3, device="meta"), "impl": "cpu"}, RuntimeError, "x is on meta"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        dropout(**{"x": torch.ones(3), "rate": 0.1} | change)
