"""Attention with dropout: the compiled backend against the formula in fp64."""

import platform

import pytest
import torch
import torch.nn.functional as F

from fastzs.kernels.dispatch import watch
from fastzs.kernels.dropout.reference import kept
from fastzs.kernels.dropout_attention.compiled import MISSING
from fastzs.kernels.dropout_attention.reference import dropout_attention_reference
from fastzs.ops import dropout_attention

from .attention_bounds import assert_within, attention_errors

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING)))]
ISAS = ["avx512_bf16", "avx512", "avx2", "portable"] if platform.machine() == "x86_64" else ["portable"]


def inputs(dtype=f32, queries=70, keys=53, dim=24, heads=3):
    g = torch.Generator().manual_seed(5)
    shapes = ((2, heads, queries, dim), (2, heads, keys, dim), (2, heads, keys, dim))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def run(tensors, dropout, impl, seed=4, rounded=None):
    """The result and the gradients of q, k and v under fixed weights, which are rounded to the dtype ``rounded``."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    torch.manual_seed(seed)
    out = dropout_attention(*leaves, dropout, impl=impl)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=f64).to(rounded or out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_agrees(tensors, dropout, impl="cpu"):
    """Within what the roundings allow of the reference in fp64, with the same weights dropped."""
    exact = run([t.double() for t in tensors], dropout, "reference", rounded=tensors[0].dtype)
    ours = run(tensors, dropout, impl)
    q, k, v = (t.double() for t in tensors)
    torch.manual_seed(4)
    seed = torch.randint(1 << 62, ())  # as the op draws it
    keep = kept((*q.shape[:3], k.shape[2]), dropout, seed) / (1 - dropout) if dropout else 1.0
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(6), dtype=f64).to(tensors[0].dtype)
    allowed = attention_errors(q, k, v, upstream.double(), tensors[0].dtype, scale=q.shape[3] ** -0.5, kept=keep)
    for name, mine, right in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert mine.dtype == tensors[0].dtype, name
        assert_within(name, mine, right, allowed[name])


# ---- the specification ---------------------------------------------------------------------------------------------


def test_reference_is_the_formula():
    q, k, v = inputs(f64)
    seed = torch.tensor(9)
    keep = kept((2, 3, 70, 53), 0.25, seed)
    expected = (torch.softmax(q @ k.transpose(2, 3) * 0.3, -1) * keep / 0.75) @ v
    assert torch.allclose(dropout_attention_reference(q, k, v, 0.3, 0.25, seed), expected, atol=1e-14)


# ---- backends ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
class TestCompiled:
    @pytest.mark.parametrize("dropout", [0.0, 0.1, 0.9])
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("dtype", [f32, bf16, f16])
    def test_agrees(self, dtype, isa, dropout, monkeypatch):
        monkeypatch.setenv("FASTZS_CPU_ISA", isa)
        assert_agrees(inputs(dtype), dropout)

    @pytest.mark.parametrize(("queries", "keys"), [(1, 2), (1, 500), (13, 2), (400, 33), (97, 800)])
    @pytest.mark.parametrize("dim", [8, 64, 128])
    def test_sizes(self, dim, queries, keys):
        assert_agrees(inputs(queries=queries, keys=keys, dim=dim, heads=2), 0.3)

    def test_strided_inputs(self):
        """As projections give them, and a slice with other numbers between."""
        base = torch.full((2, 40, 3, 2, 20), torch.nan)
        base[..., :16] = torch.randn(2, 40, 3, 2, 16)
        assert_agrees([x[..., :16] for x in base.permute(2, 0, 3, 1, 4)], 0.2)

    def test_large_scores(self):
        q, k, v = inputs(dim=16)
        assert_agrees([30 * q, k, v], 0.2)

    def test_result_repeats_to_the_bit_whatever_the_threads(self):
        tensors = inputs(queries=200)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            first = run(tensors, 0.2, "cpu")
            torch.set_num_threads(1)
            assert all(torch.equal(a, b) for a, b in zip(first, run(tensors, 0.2, "cpu"), strict=True))
        finally:
            torch.set_num_threads(threads)

    def test_joins_heads_without_a_copy(self):
        for x in run(inputs(), 0.1, "cpu"):
            assert x.transpose(1, 2).is_contiguous()

    def test_keeps_no_map(self):
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        tensors = [x.requires_grad_() for x in inputs(queries=64, keys=64, dim=8)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dropout_attention(*tensors, 0.1, impl="cpu")
        assert max(saved) == tensors[0].numel()

    def test_opcheck(self):
        tensors = [x.requires_grad_() for x in inputs(queries=9, keys=5, dim=8)]
        torch.library.opcheck(torch.ops.fastzs.dropout_attention, (*tensors, 0.3, 0.1, torch.tensor(1)))

    def test_second_derivative_is_refused(self):
        tensors = [x.requires_grad_() for x in inputs()]
        out = dropout_attention(*tensors, 0.1, impl="cpu")
        (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()

    def test_compiles_in_one_graph(self):
        tensors = inputs(queries=9, keys=5, dim=8)
        whole = torch.compile(lambda *x: dropout_attention(*x, 0.0, impl="cpu"), fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(*tensors), dropout_attention(*tensors, 0.0, impl="cpu"))


@pytest.mark.parametrize("impl", BACKENDS)
def test_without_dropout_it_is_attention(impl):
    q, k, v = inputs()
    wide = [t.double() for t in (q, k, v)]
    allowed = attention_errors(*wide, torch.zeros_like(wide[0]), f32, scale=q.shape[3] ** -0.5)
    expected = F.scaled_dot_product_attention(*wide)
    assert_within("out", dropout_attention(q, k, v, 0.0, impl=impl), expected, allowed["out"])


@pytest.mark.parametrize("impl", BACKENDS)
def test_follows_the_generator(impl):
    q, k, v = inputs()
    torch.manual_seed(1)
    one = dropout_attention(q, k, v, 0.3, impl=impl)
    assert not torch.equal(one, dropout_attention(q, k, v, 0.3, impl=impl))
    torch.manual_seed(1)
    assert torch.equal(one, dropout_attention(q, k, v, 0.3, impl=impl))


@pytest.mark.parametrize("impl", BACKENDS)
def test_no_queries(impl):
    _, k, v = inputs(dim=8)
    leaves = [t.requires_grad_() for t in (torch.empty(2, 3, 0, 8), k, v)]
    out = dropout_attention(*leaves, 0.3, impl=impl)
    assert out.shape == (2, 3, 0, 8)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_library_itself_refuses_no_keys():
    """A division by their number ended the process."""
    q, _, _ = inputs(dim=8)
    none = torch.empty(2, 3, 0, 8)
    with pytest.raises(RuntimeError, match="there are no keys"):
        torch.ops.fastzs.dropout_attention(q, none, none, 0.3, 0.1, torch.tensor(1))


# ---- PyTorch's own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f64, f32, bf16])
def test_torch_is_scaled_dot_product_attention(dtype):
    q, k, v = inputs(dtype)
    torch.manual_seed(3)
    ours = dropout_attention(q, k, v, 0.4, impl="torch")
    torch.manual_seed(3)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, dropout_p=0.4))


@pytest.mark.parametrize(("dtype", "dim"), [(f64, 16), (f32, 10)])
def test_auto_takes_torch_where_the_library_cannot(dtype, dim, monkeypatch):
    monkeypatch.delenv("FASTZS_IMPL", raising=False)
    with watch() as choices:
        dropout_attention(*inputs(dtype, dim=dim), 0.1)
    assert choices[0].backend == "torch"


@pytest.mark.parametrize("impl", [*BACKENDS, "torch"])
def test_evaluation_leaves_the_generator_alone(impl):
    q, k, v = inputs(dim=16)
    before = torch.get_rng_state()
    out = dropout_attention(q, k, v, 0.0, impl=impl)
    assert torch.equal(torch.get_rng_state(), before)
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.ones(2, 3, 5, 8)}, ValueError, r"\[2, 3, 4, 8\], \[2, 3, 5, 8\], \[2, 3, 4, 8\]; expected"),
        ({"q": torch.ones(3, 4, 8)}, ValueError, r"\[3, 4, 8\]"),
        ({"v": torch.ones(2, 3, 4, 8).half()}, TypeError, "v is torch.float16; expected torch.float32"),
        ({"q": torch.ones(2, 3, 4, 8).int()}, TypeError, "q is torch.int32"),
        ({"k": torch.ones(2, 3, 4, 8, device="meta")}, ValueError, "k is on meta, q on cpu"),
        (dict.fromkeys("kv", torch.ones(2, 3, 0, 8)), ValueError, r"\[2, 3, 0, 8\]; expected at least 1 key"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0; expected 0 to below 1"),
        ({"dropout": -0.1}, ValueError, "dropout=-0.1"),
        ({"dropout": float("nan")}, ValueError, "dropout=nan"),
        ({"impl": "triton"}, RuntimeError, "no such backend"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 4, 8), "v": torch.ones(2, 3, 4, 8), "dropout": 0.1}
    with pytest.raises(error, match=words):
        dropout_attention(**arguments | change)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_odd_heads_are_for_the_reference():
    tensors = inputs(dim=10)
    with pytest.raises(RuntimeError, match="heads have size 10"):
        dropout_attention(*tensors, 0.1, impl="cpu")
    assert dropout_attention(*tensors, 0.1).shape == tensors[0].shape
