"""csrc/packed_linear.cpp compiled by the tests: broken on purpose, and with the instructions for bytes spelt out."""

import pytest
import torch
import torch.nn.functional as F

from fastzs.kernels.packed_linear import compiled, training
from fastzs.kernels.packed_linear.reference import ACTIVATIONS, packed_linear_reference
from fastzs.kernels.packed_linear.weights import pack_norm, pack_weight

from .mutants import NEEDS_COMPILER, compile_variants
from .test_packed_linear import layers, rand

pytestmark = NEEDS_COMPILER

MUTATIONS = {
    "nothing": [],
    "bytes are not moved back": [("start[c] = -128 *", "start[c] = 0 *")],
    "all rows have the first one's scale": [("+ n + c) * scales[r]", "+ n + c) * scales[0]")],
    "the hidden layer keeps the scales of x": [
        ("scales[r] = to_units<LANES, KIND, ROUNDS>(hid", "to_units<LANES, KIND, ROUNDS>(hid")
    ],
    "a depth counts once": [("k < depth; k += DEPTH)", "k < DEPTH && k < depth; k += DEPTH)")],
    "sums start anew in each depth": [
        ("NATIVE, false>(left, lda, right, n, to, start,", "NATIVE, true>(left, lda, right, n, to, start,")
    ],
    "a panel's columns all start as the first ones": [("start + 4 * c, next)", "start, next)")],
    "the second panel has the first one's bias": [("V::load(layer.bias + n + c)", "V::load(layer.bias + c)")],
    "rows of the last tile are not computed": [
        ("rounded = round_up(rows, ROWS), depth", "rounded = rows / ROWS * ROWS, depth")
    ],
    "the last panel's columns are cut": [
        ("static_cast<int>(layer.outputs - n)", "static_cast<int>(layer.outputs - n) / LANES * LANES")
    ],
    "the residual is forgotten": [("if (residual != nullptr) {", "if (false) {")],
    "backward takes the activation for its slope": [("*= slope<LANES, ROUGH>(", "*= activate<LANES, ROUGH>(")],
    "the hidden layer is not kept": [("if (kept != nullptr) put", "if (false) put")],
    "the residual's gradient is forgotten": [("if (job.residual != nullptr && job.normed != nullptr)", "if (false)")],
    "the mean of a norm has no gradient": [("(g - shift - x * tilt)", "(g - x * tilt)")],
    "the deviation of a norm has no gradient": [("(g - shift - x * tilt)", "(g - shift)")],
    "the variance counts the padding": [("if (n - k < LANES) x =", "if (false) x =")],
    "eps is forgotten": [("/ n + eps)", "/ n)")],
    "a second block is the first": [
        (
            "(a.begin + tiles * block / blocks) * ROWS, end = (a.begin + tiles * (block + 1) / blocks) * ROWS",
            "0, end = tiles / blocks * ROWS",
        )
    ],
}


# What leaves out the functions for bf16, for the compiler's time.
FLOATS_ALONE = [
    *(
        (f"FASTZS_MULTIVERSION(run_{kind}, {kind}_anywhere, {blocks})", "")
        for kind, all_blocks in (
            ("floats", ["OfPairs"]),
            ("bytes", ["OfPairs"]),
            ("pairs", ["OfFloats", "OfPairs", "Narrowing", "Widening"]),
        )
        for blocks in all_blocks
    ),
    ("if (kind == Kind::pairs) return run_pairs(isa, a);", ""),
    ("if (floats && !call.wide) compute<float, BFloat16>(call, out);", ""),
    ("if (!floats && call.wide) compute<BFloat16, float>(call, out);", ""),
    ("if (!floats && !call.wide) compute<BFloat16, BFloat16>(call, out);", ""),
]


def agrees(ops, monkeypatch) -> bool:
    """Whether two layers with all around them, and one alone, are what the reference says, in fp32 and int8."""
    monkeypatch.setattr(torch.ops, "fastzs", ops)
    weights, norms = layers(500, 131, 70)
    x, residual = rand(53, 500, seed=7), rand(53, 70, seed=8)
    x[0] *= 30
    x[1] = 1e-4  # of no variance
    before, after = map(pack_norm, norms)
    for dtype, step in ((torch.float32, 1e-5), (torch.int8, 1 / 127)):
        first, second = (pack_weight(w, b, dtype) for w, b in weights)
        for arguments in (
            (x, first, second, "relu", before, residual, after),
            (x, first, None, "none", None, None, None),
        ):
            out = compiled.run(*arguments, x.dtype)
            right = packed_linear_reference(x.double(), *arguments[1:], torch.float64)
            size = right.abs().amax(1, keepdim=True)
            if not ((out - right).abs() <= step * size).all():
                return False
    return gradients_agree()


def gradients_agree() -> bool:
    """Whether an MLP in training, its gradient and that of a projection are right, in fp32."""
    weights, (norm, _) = layers(100, 131, 100)
    (w1, b1), (w2, b2) = weights
    x, grad, of_hidden = rand(53, 100, seed=7), rand(53, 100, seed=8), rand(53, 131, seed=9)
    first, last, turned_last, turned_first = (
        pack_weight(w, b, torch.float32) for w, b in ((w1, b1), (w2, b2), (w2.t(), None), (w1.t(), None))
    )
    packed = pack_norm(norm)
    out, hidden = training.mlp(x, packed, first, last, "quick_gelu")
    dx = training.mlp_backward(grad, x, packed, hidden, turned_last, turned_first, "quick_gelu")
    given = x.double().requires_grad_()
    between = F.linear(norm.double()(given), w1.double(), b1.double())
    right = given + F.linear(ACTIVATIONS["quick_gelu"](between), w2.double(), b2.double())
    found = [(out, right), (dx, torch.autograd.grad(right, given, grad.double(), retain_graph=True)[0])]
    dx = training.linear_backward(of_hidden, x, packed, turned_first)
    found.append((dx, torch.autograd.grad(between, given, of_hidden.double())[0]))
    return all((mine - exact).abs().max() <= 1e-4 * exact.abs().max() for mine, exact in found)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    without_wide = [("#if defined(__x86_64__)", "#if 0"), ("#define FASTZS_X86_ASM 1", "#define FASTZS_X86_ASM 0")]
    folder = tmp_path_factory.mktemp("mutants")
    return compile_variants(folder, "packed_linear.cpp", list(MUTATIONS.values()), [*without_wide, *FLOATS_ALONE])


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants, monkeypatch):
    assert agrees(mutants[number], monkeypatch) == (number == 0)


SPELT_OUT = "sum += (a & 255) * ((b << 24) >> 24) + ((a >> 8) & 255) * ((b << 16) >> 24) + ((a >> 16) & 255) * ((b << 8) >> 24) + ((a >> 24) & 255) * (b >> 24);"  # noqa: E501


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2_vnni"])
def test_bytes_where_there_are_no_instructions_for_them(isa, tmp_path, monkeypatch):
    """The code for processors with VNNI, its instruction spelt out."""
    needed = "avx512_f" if isa == "avx512_vnni" else "avx2"
    if not torch.cpu.get_capabilities().get(needed):
        pytest.skip(f"this processor has no {needed}")
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    changes = [
        ('asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));', SPELT_OUT),
        ('asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));', SPELT_OUT),
        (",avx512vnni,", ","),
        (",avxvnni", ""),
        ('__builtin_cpu_supports("avx512vnni")', "true"),
        ('__builtin_cpu_supports("avxvnni")', "true"),
    ]
    (ops,) = compile_variants(tmp_path, "packed_linear.cpp", [[]], [*changes, *FLOATS_ALONE])
    assert agrees(ops, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-127, 128, (n, 40), generator=generator).float() for n in (20, 30))
    x[:, 0], weight[:, 0] = 127, -127
    packed = pack_weight(weight, None, torch.int8)
    assert torch.allclose(
        compiled.run(x, packed, None, "none", None, None, None, x.dtype), F.linear(x, weight), rtol=1e-6
    )
