"""csrc/bridged_attention.cpp compiled by the tests: broken on purpose, and with the bf16 instruction spelt out.

Broken, its comparison with the reference must fail. Spelt out, the code for processors that multiply pairs of bf16
numbers runs on those that do not.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastzs.kernels.bridged_attention.reference import bridged_attention_reference
from fastzs.kernels.dense_attention.reference import dense_attention as dense_reference
from fastzs.ops import TokenLayout

from .test_bridged_attention import errors, inputs

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]

MUTATIONS = {
    "nothing": ("", ""),
    "the bridge key does not count": ("s.total[r] = 1;", "s.total[r] = 0;"),
    "the running sum is not shrunk": ("s.total[r] * shrunk +", "s.total[r] +"),
    "the padding counts": ("s.scores[r * SCORE_STRIDE + k] = -INFINITY;", ";"),
    "a bridge row does not see itself": (
        "for (int64_t n = 0; n <= cell; ++n) {",
        "for (int64_t n = 0; n < cell; ++n) {",
    ),
    "the padding has gradients": ("r < rows ? real : 0;", "r < rows ? n : 0;"),
    "gradients of keys forget the prompts": ("(in.prompts + key) * columns;", "key * columns;"),
    "delta is left out": ("(V::load(dscores + k) - delta)", "V::load(dscores + k)"),
    "nearness of rows is that to the first": ("near_rows[row < y ? y - row : row - y]", "near_rows[row]"),
}
LAYOUT, PROMPTS = TokenLayout(1, (7, 8), (3, 3)), 3
OPTIONS = (1, 7, 8, 3, 3, 0.2)


def compile_library(folder, texts, headers):
    """Load one library of several variants of the source, each with operators in a namespace of its own."""
    for path in CSRC.glob("*.h"):
        text = path.read_text()
        for right, wrong in headers:
            text = text.replace(right, wrong)
        (folder / path.name).write_text(text)
    source = (CSRC / "bridged_attention.cpp").read_text()
    opening = "namespace fastzs::bridged_attention {\nnamespace {\n"
    includes, body = source.split(opening)
    whole = includes
    for name, change in texts.items():
        text = change(body).replace("}  // namespace\n}  // namespace fastzs::", "}}  // namespace fastzs::")
        for library in ("(fastzs, m)", "(fastzs, CPU, m)"):
            text = text.replace(library, library.replace("fastzs", f"fastzs_{name}"))
        text = text.replace("&fastzs::bridged_attention::", f"&fastzs::bridged_attention::{name}::")
        whole += f"namespace fastzs::bridged_attention {{ namespace {name} {{\n{text}"
    (folder / "attention.cpp").write_text(whole)
    library, torch_folder = folder / "attention.so", Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    places = [f"-I{folder}", f"-I{torch_folder}/include", str(folder / "attention.cpp"), f"-L{torch_folder}/lib"]
    subprocess.run([*command, *places, "-ltorch_cpu", "-o", str(library)], check=True)
    torch.ops.load_library(str(library))
    return [getattr(torch.ops, f"fastzs_{name}") for name in texts]


def only(dtype, text):
    """Without the functions for other dtypes, for the compiler's time."""
    others = "|".join({"float", "BFloat16", "Half"} - {dtype})
    return re.sub(rf"^.*(Forward|Backward)<({others})>.*\n", "", text, flags=re.MULTILINE)


def cases(dtype):
    return {
        "float": [("case ScalarType::BFloat16: ", "// "), ("case ScalarType::Half: ", "// ")],
        "BFloat16": [("case ScalarType::Float: ", "// "), ("case ScalarType::Half: ", "// ")],
    }[dtype]


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
    def change(right, wrong):
        def apply(text):
            assert not right or text.count(right) in (1, 2), right
            return only("float", text.replace(right, wrong) if right else text)

        return apply

    texts = {f"mutant{n}": change(*mutation) for n, mutation in enumerate(MUTATIONS.values())}
    portable = [("#if defined(__x86_64__)", "#if 0")]
    folder = tmp_path_factory.mktemp("mutants")
    return compile_library(folder, texts, [*portable, *cases("float")])


def agrees(ops) -> bool:
    tensors = inputs(LAYOUT, PROMPTS, torch.float32)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))
    exact = bridged_by_reference([t.double() for t in tensors], weights.double())
    ours = bridged(ops, tensors, weights)
    q, k, v = (t[:, :, : LAYOUT.shared] for t in tensors[:3])
    near = ops.dense_attention(k, k, v, *LAYOUT.grid, 32**-0.5, 2.0)
    exact.append(dense_reference(*(t.double() for t in (q, k, v)), "kk+gaussian", LAYOUT.grid, 2.0))
    return all(errors(mine, wanted)[0] < 2e-6 for mine, wanted in zip([*ours, near], exact, strict=True))


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants):
    assert agrees(mutants[number]) == (number == 0)


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_f"), reason="the code for bf16 pairs needs AVX-512")
def test_bf16_pairs(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTZS_CPU_ISA", raising=False)
    instruction = 'asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));'
    assert instruction in (CSRC / "bridged_attention.h").read_text()
    spelt_out = "sum += (F)(a << 16) * (F)(b << 16); sum += (F)(a & -65536) * (F)(b & -65536);"
    headers = [(instruction, spelt_out), ('__builtin_cpu_supports("avx512bf16")', "true"), *cases("BFloat16")]
    headers.append(("#if defined(__x86_64__)\n#define FASTZS_MULTIVERSION", "#if 0\n#define FASTZS_MULTIVERSION"))
    texts = {"pairs": lambda text: only("BFloat16", text.replace(",avx512bf16", ""))}
    (ops,) = compile_library(tmp_path, texts, headers)
    tensors = inputs(LAYOUT, PROMPTS, torch.bfloat16)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = bridged_by_reference([t.double() for t in tensors], weights.double())
    eager = bridged_by_reference(tensors, weights)
    for mine, theirs, wanted in zip(bridged(ops, tensors, weights), eager, exact, strict=True):
        for mine_error, eager_error in zip(errors(mine, wanted), errors(theirs, wanted), strict=True):
            assert mine_error <= 2 * eager_error + torch.finfo(torch.bfloat16).eps
