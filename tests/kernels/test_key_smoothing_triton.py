"""The Triton backend of key_smoothing: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.kernels.key_smoothing.api import WIDEST_TRITON, key_smoothing

from .interpreter import INTERPRETED, interpreted, run_interpreted, tf32  # noqa: F401  a fixture
from .test_key_smoothing import random_case
from .tolerances import assert_close

triton = pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


OFFICIAL = {"mode": "official", "threshold": 0.95}
OPTIONS = [{}, OFFICIAL]
SHAPES = {  # B, C, N, D: tiles have 16 to 64 of each
    "one": (1, 1, 1, 1),
    "part of a tile": (2, 3, 9, 5),
    "over the edges": (1, 70, 131, 40),
    "few positions": (1, 40, 20, 65),
}


@interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees(shape, options, dtype):
    keys, probs = (x.to(dtype) for x in random_case(*shape))
    if shape[2] > 4:
        keys[0, 3] = 0
    out = key_smoothing(keys, probs, impl="triton", **options)
    assert out.dtype == dtype
    assert_close("key_smoothing", out, key_smoothing(keys.double(), probs.double(), impl="reference", **options))


@interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_the_tensor_cores_rounding(dtype, options, tf32):  # noqa: F811
    """Before the result is rounded to bf16 or fp16, it is as exact as fp32: one product in tf32 would be off by 2^-11.

    Probabilities are fp32 inside the kernel: divided by norms, and summed up.
    """
    from fastzs.kernels.key_smoothing import triton as tiles

    keys, probs = (x.to(dtype) for x in random_case(1, 40, 131, 96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_empty", lambda probs: torch.empty_like(probs, dtype=torch.float32))
        patch.setattr(torch.Tensor, "to", lambda x, *_, **__: x)  # the last rounding is left out
        out = tiles.key_smoothing(keys, probs, options.get("mode", "paper"), options.get("threshold", 1.0))
    assert out.dtype == torch.float32
    assert_close("key_smoothing", out, key_smoothing(keys.double(), probs.double(), impl="reference", **options))


@interpreted
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 40), st.integers(1, 90), st.sampled_from(OPTIONS))
def test_any_size(batch, classes, positions, width, options):
    keys, probs = (x.float() for x in random_case(1, classes, positions, width))
    keys, probs = keys.expand(batch, -1, -1), probs.expand(batch, -1, -1)  # one image again and again: stride 0
    out = key_smoothing(keys, probs, impl="triton", **options)
    assert_close("key_smoothing", out, key_smoothing(keys.double(), probs.double(), impl="reference", **options))


@interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dtypes_mix_and_layouts(options):
    keys, probs = random_case(2, 5, 33, 20)
    keys = keys.to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    probs = probs.float()[:, :, ::2].repeat_interleave(2, 2)[:, :, :33]
    out = key_smoothing(keys, probs, impl="triton", **options)
    assert out.dtype == torch.float32
    assert_close("key_smoothing", out, key_smoothing(keys.double(), probs.double(), impl="reference", **options))


@interpreted
@pytest.mark.parametrize("shape", [(1, 3, 70, 12), (2, 9, 4, 11)], ids=["many positions", "few positions"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options, shape):
    keys, probs = random_case(*shape)
    grad = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(impl, dtype):
        k, p = (x.to(dtype).requires_grad_() for x in (keys, probs))
        return torch.autograd.grad(key_smoothing(k, p, impl=impl, **options), (k, p), grad.to(dtype))

    for mine, wanted in zip(gradients("triton", torch.float32), gradients("reference", torch.float64), strict=True):
        assert_close("key_smoothing.grad", mine, wanted)


@interpreted
def test_not_a_number_stays():
    keys, probs = random_case(1, 2, 5, 4, dtype=torch.float32)
    probs[0, 1, 2] = torch.nan
    for options in OPTIONS:
        got = key_smoothing(keys, probs, impl="triton", **options)
        want = key_smoothing(keys, probs, impl="reference", **options)
        assert torch.equal(got.isnan(), want.isnan()), options


@interpreted
def test_opcheck():
    keys, probs = (x.requires_grad_() for x in random_case(1, 2, 4, 3, dtype=torch.float32))
    torch.library.opcheck(torch.ops.fastzs.key_smoothing_triton, (keys, probs, "official", 0.8))


@interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compile_and_export(options):
    keys, probs = random_case(1, 2, 9, 4, dtype=torch.float32)

    class Program(torch.nn.Module):
        def forward(self, keys, probs):
            return key_smoothing(keys, probs, impl="triton", **options)

    want = Program()(keys, probs)
    exported = torch.export.export(Program(), (keys, probs)).module()
    for program in (torch.compile(Program(), fullgraph=True, backend="aot_eager"), exported):
        assert torch.equal(program(keys, probs), want)


@pytest.mark.skipif(INTERPRETED, reason="there is an interpreter")
def test_reasons():
    keys, probs = torch.ones(1, 5, 4), torch.ones(1, 3, 5)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        key_smoothing(keys, probs, impl="triton")


@interpreted
def test_reasons_in_the_interpreter():
    keys, probs = torch.ones(1, 90, WIDEST_TRITON + 1), torch.ones(1, 3, 90)
    with pytest.raises(RuntimeError, match="1025 wide"):
        key_smoothing(keys, probs, impl="triton")
    with pytest.raises(RuntimeError, match=r"probs is torch\.float64"):
        key_smoothing(keys, probs.double(), impl="triton")


# ---- a wrong kernel is noticed -------------------------------------------------------------------------------------

MUTATIONS = {
    "norms are left out": ("p = p / tl.maximum(tl.sqrt_rn(tl.sum(k * k, 1)), eps)[None, :]", "p = p", {}),
    "one split counts": ("for split in range(splits):", "for split in range(1):", {}),
    "certain positions are smoothed": ("(most < threshold) & (unsure == 0)", "(most < 2)", OFFICIAL),
    "the other axis": ("squares += tl.sum(k * k, 0)\n        else", "squares += 1.0\n        else", OFFICIAL),
}


@interpreted
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from fastzs.kernels.key_smoothing import triton as tiles

    right, wrong, options = MUTATIONS[name]
    source = Path(tiles.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("fastzs.kernels.key_smoothing.mutant", path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(tiles, "key_smoothing", broken.key_smoothing)
    with pytest.raises(AssertionError):
        test_agrees(SHAPES["over the edges"], options, torch.float32)
