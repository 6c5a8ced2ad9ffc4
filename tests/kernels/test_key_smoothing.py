import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastzs.kernels.key_smoothing import pairwise
from fastzs.kernels.key_smoothing.api import key_smoothing, pairs_are_quicker, prompt_denoising
from fastzs.kernels.key_smoothing.operator import linear_gradients

from .tolerances import assert_close

GOLDENS = Path(__file__).parents[1] / "goldens"

VIT = [
    (0, 0.5571, 0.6033),
    (1, 0.6857, 0.6348),
    (2, 0.6151, 0.5918),
]


def random_case(batch, classes, positions, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, positions, width, generator=generator, dtype=dtype)
    probs = torch.rand(batch, classes, positions, generator=generator, dtype=dtype)
    return keys, probs


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(("image", "ks", "pd"), VIT)
def test_golden_vit(image, ks, pd, impl):
    golden = load_file(GOLDENS / "C_maskclip_vit.safetensors")
    logits, keys = golden[f"out64.image{image}.logits"], golden[f"out64.image{image}.k"]
    probs = (100 * logits.flatten(2)).softmax(1)

    def smoothed(probs, threshold):
        return key_smoothing(keys, probs, mode="official", threshold=threshold, impl=impl).view_as(logits)

    def close(got, name):
        want = golden[f"out64.image{image}.{name}"]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)  # measured 3e-15

    denoised = logits.flatten(2).masked_fill(~prompt_denoising(probs, pd)[:, :, None], -100)
    close(denoised.view_as(logits), "refined_pd")
    close(smoothed(probs, ks), "refined_ks")
    close(smoothed(probs, 1.0), "refined_ks1")
    close(smoothed((100 * denoised).softmax(1), ks), "refined_kspd")


def test_paper_is_the_sum_over_cosines():
    keys, probs = random_case(2, 3, 5, 4)
    want = torch.zeros_like(probs)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                cosine = torch.dot(keys[b, i], keys[b, j]) / (keys[b, i].norm() * keys[b, j].norm())
                want[b, :, i] += cosine * probs[b, :, j]
    for impl in ("reference", "auto"):
        torch.testing.assert_close(key_smoothing(keys, probs, impl=impl), want, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 17),
    st.floats(0.2, 1.1),
    st.booleans(),
)
def test_linear_is_pairwise(batch, classes, positions, width, threshold, official):
    keys, probs = random_case(batch, classes, positions, width)
    keys[0, 0] = 0  # a key of length 0 is similar to nothing
    options = {"mode": "official", "threshold": threshold} if official else {}
    want = key_smoothing(keys, probs, impl="reference", **options)
    got = key_smoothing(keys, probs, impl="torch", **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


OPTIONS = [{}, {"mode": "official", "threshold": 0.9}]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("shape", [(1, 2, 5, 3), (2, 9, 4, 11)], ids=["linear", "pairs"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options, shape, impl, monkeypatch):
    monkeypatch.setattr(pairwise, "PIECE", 6)  # a row or two at a time
    keys, probs = random_case(*shape)
    keys.requires_grad_()
    probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda k, p: key_smoothing(k, p, impl=impl, **options), (keys, probs))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_gradients_are_those_of_the_reference(options):
    """What Triton's linear form is differentiated with."""
    keys, probs = random_case(2, 3, 8, 5)
    keys[0, 1] = 0
    grad = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k, p = keys.clone().requires_grad_(), probs.clone().requires_grad_()
    want = torch.autograd.grad(key_smoothing(k, p, impl="reference", **options), (k, p), grad)
    got = linear_gradients(grad, keys, probs, options.get("mode", "paper"), options.get("threshold", 1.0))
    for mine, wanted in zip(got, want, strict=True):
        # the key of length 0 counts as 1e-12 long, and has a gradient to match
        mine, wanted = mine.clone(), wanted.clone()
        if not options:
            torch.testing.assert_close(mine[0, 1], wanted[0, 1].to(mine), rtol=1e-4, atol=0)
            mine[0, 1] = wanted[0, 1] = 0
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 17),
    st.sampled_from([1, 50, pairwise.PIECE]),
)
def test_pieces_of_pairs_are_the_whole(batch, classes, positions, width, piece):
    keys, probs = random_case(batch, classes, positions, width)
    keys[0, 0] = 0
    want = key_smoothing(keys, probs, impl="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "PIECE", piece)
        got = torch.ops.fastzs.key_smoothing_pairwise(keys, probs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_cost_rule():
    """Over pairs where that takes a third fewer operations: 2 N N (D + C) against 4 N D C."""
    for positions, width, classes, pairs in ((196, 2048, 847, True), (200, 768, 171, False), (1024, 768, 20, False)):
        keys, probs = torch.empty(1, positions, width), torch.empty(1, classes, positions)
        assert pairs_are_quicker(keys, probs) == pairs
        assert (2 * positions**2 * (width + classes) < 0.65 * 4 * positions * width * classes) == pairs


MEMORY = """
import sys, torch
from bench.machine import peak_megabytes
from fastzs.ops import key_smoothing

keys, probs = torch.randn(1, 8192, 8), torch.rand(1, 2, 8192)
keys.requires_grad_()

def run():
    key_smoothing(keys, probs).sum().backward()

key_smoothing(keys[:, :64], probs[:, :, :64]).sum().backward()
print(peak_megabytes(run, "cpu"))
"""


@pytest.mark.slow
def test_no_matrix_of_all_pairs():
    """All pairs of 8192 positions are 268 MB. Forward and backward, in a process of its own. Measured: 2."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"FASTZS_IMPL": "auto"}  # the reference has the matrix
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, check=True, env=environment
    )
    assert float(done.stdout) < 10


def test_autocast_changes_nothing():
    keys, probs = random_case(1, 4, 60, 16, dtype=torch.float32)
    for options in OPTIONS:
        want = key_smoothing(keys, probs, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(key_smoothing(keys, probs, **options), want)


def test_opcheck():
    keys, probs = (x.requires_grad_() for x in random_case(2, 3, 7, 5, dtype=torch.float32))
    torch.library.opcheck(torch.ops.fastzs.key_smoothing_pairwise, (keys, probs))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compile_and_export(options):
    keys, probs = random_case(1, 3, 30, 6, dtype=torch.float32)

    class Program(torch.nn.Module):
        def forward(self, keys, probs):
            return key_smoothing(2 * keys, probs, **options)

    want = Program()(keys, probs)
    compiled = torch.compile(Program(), fullgraph=True, backend="aot_eager")
    positions = torch.export.Dim("positions", min=2, max=100)
    exported = torch.export.export(Program(), (keys, probs), dynamic_shapes=({1: positions}, {2: positions})).module()
    for program in (compiled, exported):
        torch.testing.assert_close(program(keys, probs), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exported(keys[:, :9], probs[:, :, :9]), Program()(keys[:, :9], probs[:, :, :9]))
    k = keys.clone().requires_grad_()
    (got,) = torch.autograd.grad(compiled(k, probs).square().sum(), k)
    (wanted,) = torch.autograd.grad(Program()(k, probs).square().sum(), k)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_low_precision(dtype, mode):
    keys, probs = (x.to(dtype) for x in random_case(1, 20, 200, 64))
    got = key_smoothing(keys, probs, mode=mode)
    assert got.dtype == dtype
    want = key_smoothing(keys.double(), probs.double(), mode=mode, impl="reference")
    assert_close("key_smoothing", got, want)


def test_prompt_denoising():
    scores = torch.tensor([[[0.1, 0.5, 0.2], [0.4, 0.3, 0.49], [0.6, 0.0, 0.1]]])
    assert prompt_denoising(scores, 0.5).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keys": torch.ones(2, 5, 4)}, ValueError, r"keys has shape \(2, 5, 4\) and probs \(1, 3, 5\)"),
        ({"keys": torch.ones(1, 6, 4)}, ValueError, "expected \\[B, N, D\\]"),
        ({"keys": torch.ones(1, 5, 0)}, ValueError, "empty"),
        ({"keys": torch.ones(1, 5, 4, dtype=torch.int64)}, TypeError, "int64"),
        ({"mode": "both"}, ValueError, "mode='both'"),
        ({"threshold": 0.5}, ValueError, "mode='official'"),
        ({"mode": "official", "threshold": float("nan")}, ValueError, "nan"),
        ({"impl": "cuda"}, RuntimeError, "no such backend"),
        ({"impl": "gpu"}, ValueError, "impl='gpu'"),
    ],
)
def test_bad_input(change, error, words):
    options = {"keys": torch.ones(1, 5, 4), "probs": torch.ones(1, 3, 5), **change}
    with pytest.raises(error, match=words):
        key_smoothing(options.pop("keys"), options.pop("probs"), **options)


def test_bad_denoising():
    with pytest.raises(ValueError, match="\\(3, 5\\)"):
        prompt_denoising(torch.ones(3, 5), 0.5)
    with pytest.raises(ValueError, match="nan"):
        prompt_denoising(torch.ones(1, 3, 5), float("nan"))


def test_golden_resnet():
    golden = load_file(GOLDENS / "C_maskclip_resnet.safetensors")
    logits = golden["out64.logits"]
    probs = (100 * logits.flatten(2)).softmax(1)
    keys = golden["mid64.layer4"].double().flatten(2).mT @ golden["w.head.k_proj.weight"].double().flatten(1).mT
    keys = keys + golden["w.head.k_proj.bias"].double()
    got = key_smoothing(keys, probs, mode="official", threshold=0.5077).view_as(logits)
    torch.testing.assert_close(got, golden["out64.refined_ks"], rtol=1e-9, atol=1e-11)
