from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastzs.kernels.key_smoothing.api import key_smoothing, prompt_denoising

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
    got = key_smoothing(keys, probs, impl="cpu", **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"mode": "official", "threshold": 0.9}, {"weights": "relu"},
                                     {"weights": "softmax", "temperature": 0.3}])  # fmt: skip
def test_gradients(options):
    keys, probs = random_case(1, 2, 5, 3)
    keys.requires_grad_()
    probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda k, p: key_smoothing(k, p, **options), (keys, probs))


def test_nonlinear_weights():
    keys, probs = random_case(1, 2, 6, 3)
    unit = keys / keys.norm(dim=2, keepdim=True)
    cosine = unit @ unit.mT
    relu = probs @ cosine.clamp_min(0)
    torch.testing.assert_close(key_smoothing(keys, probs, weights="relu"), relu)
    soft = probs @ torch.softmax(cosine / 0.5, 2).mT
    torch.testing.assert_close(key_smoothing(keys, probs, weights="softmax", temperature=0.5), soft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_low_precision(dtype, mode):
    keys, probs = (x.to(dtype) for x in random_case(1, 20, 200, 64))
    got = key_smoothing(keys, probs, mode=mode)
    assert got.dtype == dtype
    want = key_smoothing(keys.double(), probs.double(), mode=mode, impl="reference")
    # computed in fp32, rounded once: measured 1.3e-6 of the largest in fp32, half an ulp in bf16 and fp16
    slack = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (got.double() - want).abs().max() <= slack * want.abs().max()


def test_prompt_denoising():
    scores = torch.tensor([[[0.1, 0.5, 0.2], [0.4, 0.3, 0.49], [0.6, 0.0, 0.1]]])
    assert prompt_denoising(scores, 0.5).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keys": torch.ones(2, 5, 4)}, ValueError, r"keys has shape \(2, 5, 4\) and probs \(1, 3, 5\)"),
        ({"keys": torch.ones(1, 6, 4)}, ValueError, "wanted \\[B, N, D\\]"),
        ({"keys": torch.ones(1, 5, 0)}, ValueError, "empty"),
        ({"keys": torch.ones(1, 5, 4, dtype=torch.int64)}, TypeError, "int64"),
        ({"mode": "both"}, ValueError, "mode='both'"),
        ({"weights": "cube"}, ValueError, "weights='cube'"),
        ({"threshold": 0.5}, ValueError, "mode='official'"),
        ({"mode": "official", "weights": "relu"}, ValueError, "mode='paper'"),
        ({"mode": "official", "threshold": float("nan")}, ValueError, "nan"),
        ({"temperature": 0.5}, ValueError, "temperature=0.5"),
        ({"weights": "softmax", "temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"impl": "cpu", "weights": "relu"}, RuntimeError, "every pair"),
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
