"""Attention of csrc compiled by the tests: broken on purpose, and with the bf16 instruction spelt out.

Broken, its comparison with the reference must fail. Spelt out, the code for processors that multiply pairs of bf16
numbers runs on those that do not.
"""

import pytest
import torch

from fastzs.kernels.bridged_attention.reference import bridged_attention_reference
from fastzs.kernels.dense_attention.reference import dense_attention as dense_reference
from fastzs.kernels.dropout_attention.reference import dropout_attention_reference
from fastzs.ops import TokenLayout

from .attention_bounds import assert_within
from .mutants import NEEDS_COMPILER, compile_variants
from .test_bridged_attention import NAMES, bounds, inputs
from .tolerances import errors

pytestmark = NEEDS_COMPILER

OPS = ("bridged_attention", "dense_attention", "dropout_attention")
SOURCES = ["attention_forward.cpp", "attention_backward.cpp", *(f"{op}.cpp" for op in OPS)]

MUTATIONS = {
    "nothing": [],
    "the bridge key does not count": [("V::template exp2<false>(V::splat(s.own[r] - s.top[r]))[0]", "0")],
    "sums of weights may be too large": [("total >= LEAST && total <= MOST;", "total >= LEAST;")],
    "sums of weights may be too small": [("total >= LEAST && total <= MOST;", "total <= MOST;")],
    "the padding counts": [(": V::splat(-INFINITY);", ": sum[r][v];")],
    "a bridge row does not see itself": [
        (
            "top = -INFINITY;\n    for (int64_t n = 0; n <= cell; ++n)",
            "top = -INFINITY; for (int64_t n = 0; n < cell; ++n)",
        ),
        ("n <= cell; ++n) {\n      const float p", "n < cell; ++n) {\n      const float p"),
    ],
    "the padding has gradients": [("if (real < NV * LANES)", "if (false)")],
    "gradients of keys forget the prompts": [("(in.prompts + key) * columns;", "key * columns;")],
    "delta is left out": [("(dweight - V::broadcast(delta + r))", "dweight")],
    "nearness of rows is that to the first": [("near_rows[row < y ? y - row : row - y]", "near_rows[row]")],
    "every block of keys is dropped alike": [("h, token), key,", "h, token), key % BACKWARD_KEYS,")],
    "kept weights are not enlarged": [("in.dropout.enlarged / s.total[r];", "1.0f / s.total[r];")],
    "dropped weights are not in the sum": [
        (
            "V::store(of, V::load(of) + p[r][v]);",
            "const auto keep = kept<LANES>(in.bits(b, h, first + tile + r), from + k + v * LANES, in.dropout.least);"
            "V::store(of, V::load(of) + (F)((typename V::I)p[r][v] & keep));",
        )
    ],
}
LAYOUT, PROMPTS = TokenLayout(1, (7, 8), (3, 3)), 4  # 61 keys: no number of rows of a tile divides them
OPTIONS = (1, 7, 8, 3, 3, 0.2)


def only(dtype):
    """Changes that leave out the functions for other dtypes, for the compiler's time."""
    for name, scalar in (("Float", "float"), ("BFloat16", "BFloat16"), ("Half", "Half")):
        if scalar != dtype:
            yield f"case ScalarType::{name}: ", "// "
            yield f"FASTZS_MULTIVERSION(run_forward, forward_floats, Forward<{scalar}>)", ""
            yield f"FASTZS_MULTIVERSION(run_backward, backward_floats, Backward<{scalar}>)", ""


def bridged(ops, tensors, weights):
    """Output and gradients by the operators of a library."""
    out, lse = ops.bridged_attention(*tensors, *OPTIONS)
    grads = ops.bridged_attention_backward(weights, *tensors, out, lse, *OPTIONS)
    return [out, *grads[:3], *(g.sum(0, keepdim=True) for g in grads[3:])]


def bridged_by_reference(tensors, weights):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = bridged_attention_reference(*leaves[:3], LAYOUT, (leaves[3], leaves[4]), OPTIONS[-1])
    return [out, *torch.autograd.grad(out, leaves, weights)]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    portable = ("#if defined(__x86_64__)", "#if 0")
    without_pairs = [
        ("void run_forward_pairs(const Forward<BFloat16>& a) { run_forward(Isa::portable, a); }", ""),
        ("void run_backward_pairs(const Backward<BFloat16>& a) { run_backward(Isa::portable, a); }", ""),
    ]
    everywhere = [portable, *without_pairs, *only("float")]
    folder = tmp_path_factory.mktemp("mutants")
    return compile_variants(folder, SOURCES, list(MUTATIONS.values()), everywhere)


def dropped(ops) -> float:
    """The largest error of dropout_attention's output and gradients."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1, 2, n, 16, generator=generator) for n in (30, 400, 400)]
    weights = torch.randn(tensors[0].shape, generator=generator)
    options = (0.25, 0.3, torch.tensor(8))
    out, lse = ops.dropout_attention(*tensors, *options)
    ours = [out, *ops.dropout_attention_backward(weights, *tensors, out, lse, *options)]
    leaves = [t.double().requires_grad_() for t in tensors]
    exact = dropout_attention_reference(*leaves, *options)
    wanted = [exact, *torch.autograd.grad(exact, leaves, weights.double())]
    return max(errors(mine, right)[0] for mine, right in zip(ours, wanted, strict=True))


def far_from_zero(ops) -> float:
    """The largest error where all scores of one query are below -190, and some of another above 190."""
    q, k = torch.zeros(1, 1, 61, 16), torch.zeros(1, 1, 61, 16)
    k[0, 0, :, 0], k[0, 0, :, 1], k[0, 0, 50:54, 2] = torch.linspace(-2, 2, 61), 1, 10
    q[0, 0, 5, :2], q[0, 0, 6, 2] = torch.tensor([1, -200]), 20
    v = torch.randn(1, 1, 61, 16, generator=torch.Generator().manual_seed(2))
    out, _ = ops.dropout_attention(q, k, v, 1.0, 0.0, torch.tensor(8))
    return errors(out, (q.double() @ k.double().mT).softmax(-1) @ v.double())[0]


def agrees(ops) -> bool:
    tensors = inputs(LAYOUT, PROMPTS, torch.float32)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))
    exact = bridged_by_reference([t.double() for t in tensors], weights.double())
    ours = bridged(ops, tensors, weights)
    q, k, v = (t[:, :, : LAYOUT.shared] for t in tensors[:3])
    near = ops.dense_attention(k, k, v, *LAYOUT.grid, 32**-0.5, 2.0)
    exact.append(dense_reference(*(t.double() for t in (q, k, v)), "kk+gaussian", LAYOUT.grid, 2.0))
    largest = max(errors(mine, wanted)[0] for mine, wanted in zip([*ours, near], exact, strict=True))
    return max(largest, dropped(ops)) < 2e-6 and far_from_zero(ops) < 1e-4


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants):
    assert agrees(mutants[number]) == (number == 0)


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_f"), reason="the code for bf16 pairs needs AVX-512")
def test_bf16_pairs(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTZS_CPU_ISA", raising=False)
    instruction = 'asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));'
    spelt_out = "sum += (F)(a << 16) * (F)(b << 16); sum += (F)(a & -65536) * (F)(b & -65536);"
    everywhere = [
        (instruction, spelt_out),
        (
            'asm("vcvtneps2bf16 %1, %0" : "=v"(v) : "v"(x));',
            "v = __builtin_convertvector(Simd<16>::round_bf16(x), Simd<16>::S);",
        ),
        (
            'asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(v) : "v"(high), "v"(low));',
            "const Simd<16>::S halves[] = {__builtin_convertvector(Simd<16>::round_bf16(low), Simd<16>::S), "
            "__builtin_convertvector(Simd<16>::round_bf16(high), Simd<16>::S)};"
            "__builtin_memcpy(&v, halves, sizeof v);",
        ),
        (",avx512bf16,", ","),
        ('__builtin_cpu_supports("avx512bf16")', "true"),
        ("#if defined(__x86_64__)\n#define FASTZS_MULTIVERSION", "#if 0\n#define FASTZS_MULTIVERSION"),
        *only("BFloat16"),
    ]
    (ops,) = compile_variants(tmp_path, SOURCES, [[]], everywhere)
    tensors = inputs(LAYOUT, PROMPTS, torch.bfloat16)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = bridged_by_reference([t.double() for t in tensors], weights.double())
    allowed = bounds(tensors, LAYOUT, weights, torch.bfloat16, scale=OPTIONS[-1])
    for name, mine, wanted in zip(NAMES, bridged(ops, tensors, weights), exact, strict=True):
        assert_within(name, mine, wanted, allowed[name])
