"""packed_linear: what int8, bf16 and fp32 weights give, on every instruction set, against fp64."""

import platform

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastzs.kernels.packed_linear.compiled import MISSING
from fastzs.kernels.packed_linear.reference import ACTIVATIONS
from fastzs.kernels.packed_linear.training import linear_backward, mlp, mlp_backward, pack_now
from fastzs.kernels.packed_linear.weights import pack_norm, pack_weight, unpack_weight
from fastzs.ops import packed_linear

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
NEEDS_LIBRARY = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
X86 = ["avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "portable"]
ISAS = X86 if platform.machine() == "x86_64" else ["portable"]
# rows, inputs, outputs: blocks of 48 rows, tiles of 6, panels of 64 outputs, 384 units of depth
SHAPES = [(1, 1, 1), (5, 3, 70), (50, 64, 64), (97, 130, 129), (7, 1700, 65), (0, 8, 8)]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(inputs, hidden, outputs):
    """Weights and biases of two layers, norms before and after, in fp32."""
    sizes = ((hidden, inputs), (outputs, hidden))
    weights = [(rand(n, k, seed=n + k) * k**-0.5, rand(n, seed=n) * 0.3) for n, k in sizes]
    norms = []
    for n in (inputs, outputs):
        norm = nn.LayerNorm(n)
        norm.weight.data, norm.bias.data = 1 + 0.2 * rand(n, seed=1), 0.1 * rand(n, seed=2)
        norms.append(norm)
    return weights, norms


def product_error(x, weight, dtype):
    """Variance of an error of ``x w^T`` [rows, outputs] from rounding both to ``dtype`` and summing, all in fp64.

    A rounding to steps of s has the variance s^2 / 12. With int8 a row's step is a 127th of its largest magnitude, as
    is a channel's; with bf16 a step is at most 2^-7 of the number; an fp32 sum of n products is off by sqrt(n) eps.
    """
    if dtype == torch.int8:
        row, channel = x.abs().amax(1, keepdim=True) / 127, weight.abs().amax(1) / 127
        noise = row**2 * weight.square().sum(1) + channel**2 * x.square().sum(1, keepdim=True)
        noise = noise + x.shape[1] * row**2 * channel**2 / 12
        return noise / 12
    squares = x.square() @ weight.square().T
    step = 2.0**-7 if dtype == bf16 else torch.finfo(f32).eps
    return 2 * squares * step**2 / 12 + squares * torch.finfo(f32).eps ** 2 * x.shape[1]


@NEEDS_LIBRARY
class TestCompiled:
    @pytest.fixture(params=ISAS, autouse=True)
    def isa(self, request, monkeypatch):
        monkeypatch.setenv("FASTZS_CPU_ISA", request.param)

    @pytest.mark.parametrize("dtype", [torch.int8, bf16, f32], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_errors_are_those_of_rounding(self, shape, dtype):
        rows, inputs, outputs = shape
        x, weight, bias = rand(rows, inputs, seed=3), rand(outputs, inputs, seed=4), rand(outputs, seed=5)
        out = packed_linear(x, pack_weight(weight, bias, dtype), impl="cpu")
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert (out.dtype, out.shape) == (f32, (rows, outputs))
        if rows:
            deviation = (
                product_error(x.double(), weight.double(), dtype).sqrt() + 2 * torch.finfo(f32).eps * exact.abs()
            )
            assert ((out - exact).abs() <= 6 * deviation + 1e-30).all()  # of 1e4 numbers none beyond 6 deviations

    @pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
    def test_int8_is_exact_on_bytes(self, shape):
        """Rows and channels whose largest magnitude is 127 are their own bytes."""
        rows, inputs, outputs = shape
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(-127, 128, (rows, inputs), generator=generator).float()
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator).float()
        x[:, 0], weight[:, -1] = 127, -127
        bias = rand(outputs).round()
        out = packed_linear(x, pack_weight(weight, bias, torch.int8), impl="cpu")
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert ((out - exact).abs() <= 3 * torch.finfo(f32).eps * exact.abs() + 1e-30).all()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.int8, bf16, f32], ids=str)
    def test_everything_around(self, dtype, x_dtype, activation):
        """Two layers, norms, residual: as the reference, up to steps that round the other way."""
        weights, norms = layers(100, 131, 70)
        first, second = (pack_weight(w, b, dtype) for w, b in weights)
        x, residual = rand(53, 100, seed=7).to(x_dtype), rand(53, 70, seed=8).to(x_dtype)
        options = {"activation": activation, "residual": residual}
        options |= {"before": pack_norm(norms[0]), "after": pack_norm(norms[1])}
        out = packed_linear(x, first, second, impl="cpu", **options)
        right = packed_linear(
            x.double(), first, second, impl="reference", **(options | {"residual": residual.double()})
        )
        # results are normalised, of size 1; a step of the hidden layer is a 127th or a 128th of it; erf is within 5e-7
        summed = 131**0.5 * (torch.finfo(f32).eps + (5e-7 if "gelu" in activation else 0))
        step = {torch.int8: 1 / 127, bf16: 1 / 128, f32: summed}[dtype]
        stored = (torch.finfo(bf16).eps if x_dtype == bf16 else 0.0) * right.abs()
        off = out.double() - right
        assert (off.abs() <= step + stored / 2).all()
        assert off.square().mean() <= (step**2 + stored.square().mean()) / 12

    @pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
    @pytest.mark.parametrize("dtype", [bf16, f32], ids=str)
    def test_an_activation_from_far_below_zero_to_far_above(self, dtype, activation):
        """Of one number times one. bf16: exponentials are within 8e-5, inverses within 2^-14; fp32: within 4e-7."""
        x = torch.cat([torch.linspace(-40, 40, 16001), torch.linspace(-2, 2, 4001), torch.tensor([-1e4, 1e4])])
        x = x.bfloat16().float()[:, None]
        out = packed_linear(x, pack_weight(torch.ones(1, 1), None, dtype), activation=activation, impl="cpu")
        right = ACTIVATIONS[activation](x.double())
        relative = 8e-5 + 2**-14 if dtype == bf16 else 2e-6
        # erf is within 3e-7, and what becomes of the smallest numbers is not asked
        assert ((out - right).abs() <= relative * right.abs() + 1e-6 * x.abs()).all()

    def test_a_row_of_zeros_gives_the_bias(self):
        bias = rand(9)
        out = packed_linear(torch.zeros(3, 5), pack_weight(rand(9, 5), bias, torch.int8), impl="cpu")
        assert torch.equal(out, bias.expand(3, 9))

    def test_a_channel_of_zeros_gives_its_bias(self):
        weight, bias = rand(9, 5), rand(9)
        weight[4] = 0
        out = packed_linear(rand(3, 5), pack_weight(weight, bias, torch.int8), impl="cpu")
        assert (out[:, 4] == bias[4]).all()

    @pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.int8, bf16, f32], ids=str)
    def test_a_strange_row_spoils_no_other(self, dtype, strange):
        x, packed = rand(20, 33), pack_weight(rand(9, 33, seed=1), None, dtype)
        right = packed_linear(x, packed, impl="cpu")
        x[7, 3] = strange
        out = packed_linear(x, packed, impl="cpu")
        assert not out[7].isfinite().any()
        assert dtype != torch.int8 or out[7].isnan().all()
        right[7] = out[7] = 0
        assert torch.equal(out, right)

    def test_threads_change_nothing(self):
        x, packed = rand(301, 40), pack_weight(rand(70, 40, seed=1), None, torch.int8)
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(packed_linear(x, packed, impl="cpu"))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


# ---- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bf16, f32], ids=str)
def test_packing_keeps_the_weights(dtype):
    weight, bias = rand(70, 33).to(dtype), rand(70)
    unpacked = unpack_weight(pack_weight(weight, bias, dtype))
    assert torch.equal(unpacked[0], weight.double())
    assert torch.equal(unpacked[1], bias.double())


def test_int8_weights_are_off_by_half_a_step():
    weight = rand(70, 33)
    found = unpack_weight(pack_weight(weight, None, torch.int8))[0]
    assert ((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.500001).all()


def test_int8_weights_take_a_quarter():
    packed = pack_weight(rand(768, 768), None, torch.int8)
    assert packed.panels.nbytes * 4 == 768 * 768 * 4


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_strange_weights_are_refused(strange):
    weight = rand(9, 5)
    weight[3, 2] = strange
    with pytest.raises(ValueError, match="1 of 9 output channels, the first is 3"):
        pack_weight(weight, None, torch.int8)
    with pytest.raises(ValueError, match="finite"):
        pack_weight(rand(9, 5), torch.full((9,), strange), torch.int8)


def test_too_many_inputs_are_refused():
    with pytest.raises(ValueError, match="65536 inputs, got 65537"):
        pack_weight(torch.zeros(1, 65537), None, torch.int8)


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_wrong_arguments():
    first, other = pack_weight(rand(9, 5), None, f32), pack_weight(rand(5, 9), None, torch.int8)
    x = rand(3, 5)
    with pytest.raises(ValueError, match=r"expected x \[..., 5\], got \[3, 4\]"):
        packed_linear(rand(3, 4), first)
    with pytest.raises(
        ValueError, match=r"expected a second layer of 9 inputs in torch\.float32, got 9 in torch\.int8"
    ):
        packed_linear(x, first, other)
    with pytest.raises(ValueError, match="activation='tanh'"):
        packed_linear(x, first, activation="tanh")
    with pytest.raises(ValueError, match=r"expected before \[2, 5\]"):
        packed_linear(x, first, before=pack_norm(nn.LayerNorm(9)))
    with pytest.raises(ValueError, match=r"expected residual \[3, 9\]"):
        packed_linear(x, first, residual=rand(3, 5))
    with pytest.raises(RuntimeError, match="it has no gradient"):
        packed_linear(x, first, residual=rand(3, 9).requires_grad_(), impl="cpu")
    with pytest.raises(RuntimeError, match="it has no gradient"):
        packed_linear(x.requires_grad_(), first, impl="cpu")


@NEEDS_LIBRARY
def test_opcheck():
    weights, norms = layers(20, 30, 10)
    first, second = (pack_weight(w, b, torch.int8) for w, b in weights)
    table = pack_norm(norms[0]).table
    arguments = (rand(4, 20), table, 1e-5, first.panels, first.columns, 30, 1, second.panels, second.columns, 10)
    torch.library.opcheck(torch.ops.fastzs.packed_linear, (*arguments, rand(4, 10), None, 0.0, True))


@NEEDS_LIBRARY
class TestTraining:
    @pytest.fixture(params=ISAS, autouse=True)
    def isa(self, request, monkeypatch):
        monkeypatch.setenv("FASTZS_CPU_ISA", request.param)

    @pytest.mark.parametrize("of", [f32, bf16], ids=str)
    @pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (70, 3), (64, 64), (129, 131), (65, 1100)], ids=str)
    def test_packs_as_for_inference(self, shape, dtype, of):
        weight, bias = rand(*shape, seed=4).to(of), rand(shape[0], seed=5)
        right = pack_weight(weight, bias, dtype)
        whole = torch.full((shape[0], shape[1] + 5), torch.nan, dtype=of)
        whole[:, 2:-3] = weight
        for mine in (
            pack_now(weight, bias, dtype),
            pack_now(whole[:, 2:-3], bias, dtype),
            pack_now(weight.t().contiguous(), bias, dtype, turned=True),
            pack_now(weight.t(), bias, dtype, turned=True),
        ):
            assert torch.equal(mine.panels, right.panels)
            assert torch.equal(mine.columns, right.columns)
            assert mine[2:] == right[2:]

    @pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
    @pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
    def test_an_mlp_and_its_gradient(self, dtype, activation):
        weights, (norm, _) = layers(100, 131, 100)
        (w1, b1), (w2, b2) = weights
        x, grad = rand(53, 100, seed=7), rand(53, 100, seed=8)
        out, hidden = mlp(x, pack_norm(norm), pack_now(w1, b1, dtype), pack_now(w2, b2, dtype), activation)
        turned = [pack_now(w, None, dtype, turned=True) for w in (w2, w1)]
        dx = mlp_backward(grad, x, pack_norm(norm), hidden, *turned, activation)
        assert (out.dtype, hidden.dtype, dx.dtype) == (f32, dtype, f32)
        given = x.double().requires_grad_()
        between = F.linear(norm.double()(given), w1.double(), b1.double())
        right = given + F.linear(ACTIVATIONS[activation](between), w2.double(), b2.double())
        (right_dx,) = torch.autograd.grad(right, given, grad.double())
        # two sums of up to 131 numbers; in bf16 their operands, three in a row, are rounded by up to half a step of
        # 2^-7, and the hidden layer, which backward starts from, too; erf is within 5e-7
        summed = 2 * 131**0.5 * (torch.finfo(f32).eps + 5e-7)
        step = 4 * 2.0**-7 if dtype == bf16 else summed
        for mine, exact in ((hidden, between), (out, right), (dx, right_dx)):
            off = (mine.double() - exact).detach()
            assert off.abs().max() <= step * exact.abs().max()
            assert off.square().mean() <= step**2 / 12 * exact.square().mean() + summed**2

    @pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
    def test_the_gradient_behind_a_norm(self, dtype):
        weights, (norm, _) = layers(100, 131, 100)
        weight, x, grad = weights[0][0], rand(53, 100, seed=7), rand(53, 131, seed=8).to(dtype)
        dx = linear_backward(grad, x, pack_norm(norm), pack_now(weight, None, dtype, turned=True))
        given = x.double().requires_grad_()
        (right,) = torch.autograd.grad(F.linear(norm.double()(given), weight.double()), given, grad.double())
        # a sum of 131 numbers, weights rounded by half a step of 2^-7, and a norm's few sums of 100
        step = 3 * 131**0.5 * torch.finfo(f32).eps + (2.0**-8 if dtype == bf16 else 0)
        assert dx.dtype == f32
        assert (dx - right).abs().max() <= step * right.abs().max()

    @pytest.mark.parametrize(("of", "to"), [(f32, bf16), (bf16, f32)], ids=["narrower", "wider"])
    def test_results_of_another_dtype(self, of, to):
        x, residual, weight = rand(53, 100, seed=7).to(of), rand(53, 70, seed=8).to(to), rand(70, 100) / 10
        out = packed_linear(x, pack_weight(weight, None, bf16), residual=residual, dtype=to, impl="cpu")
        exact = x.bfloat16().double() @ weight.bfloat16().double().T + residual.double()
        assert out.dtype == to
        allowed = 100**0.5 * torch.finfo(f32).eps + (torch.finfo(bf16).eps / 2 if to == bf16 else 0)
        assert ((out - exact).abs() <= allowed * (exact.abs() + 1)).all()
