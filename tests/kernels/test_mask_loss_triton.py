"""The Triton backend of mask_loss: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.kernels.mask_loss import mask_loss

from .interpreter import INTERPRETED, interpreted, run_interpreted
from .test_mask_loss_backends import TINY, case
from .tolerances import assert_close

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


def check(logits, target, **options):
    mine = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = mask_loss(mine, target, impl="triton", **options)
    reference = mask_loss(exact, target, impl="reference", **options)
    for name in ("focal", "dice"):
        value, wanted = getattr(loss, name), getattr(reference, name)
        assert_close("mask_loss", value, wanted, size=1 if name == "dice" else 1e-30)
        (grad,) = torch.autograd.grad(value, mine, retain_graph=True)
        (grad_wanted,) = torch.autograd.grad(wanted, exact, retain_graph=True)
        assert_close("mask_loss.grad", grad, grad_wanted, size=TINY[grad.dtype])
    with torch.no_grad():
        torch.testing.assert_close(mask_loss(mine, target, impl="triton", **options), loss)


SHAPES = {
    "one pixel": (1, 1, 1, 1, 1, 1),
    "scale 16, two tiles": (1, 7, 2, 5, 32, 80),
    "scale 14": (1, 2, 2, 3, 28, 42),
    "scale 7/3": (2, 2, 3, 6, 7, 14),
    "smaller": (1, 3, 6, 5, 4, 3),
    "one column": (1, 3, 6, 1, 51, 1),
    "one cell a tile": (1, 2, 1, 2, 3, 200),
}


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape):
    logits, target = case(*shape, ignored=0.0 if shape[-1] == 1 else 0.2)
    check(logits, target)


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_anything(data):
    B, C, h, w = (data.draw(st.integers(1, 3)) for _ in range(4))
    scale = data.draw(st.sampled_from([1, 2, 8, 14, 16, 7 / 3]))
    H, W = max(1, round(h * scale)), max(1, round(w * scale))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits, target = case(B, C, h, w, H, W, data.draw(st.sampled_from([0.0, 0.3, 1.0])), dtype)
    if data.draw(st.booleans()):
        logits = logits.to(memory_format=torch.channels_last)
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
    target = target.to(data.draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64])))
    gamma = data.draw(st.sampled_from([2.0, 2.0, 0.0, 1.5]))
    check(logits, target, gamma=gamma)


@interpreted
def test_images_in_several_launches(monkeypatch):
    from fastzs.kernels.mask_loss import triton

    monkeypatch.setattr(triton, "WORKSPACE", 1)
    check(*case(B=3, C=2, h=2, w=3, H=8, W=12))


@interpreted
def test_uint8_labels_of_many_classes():
    logits, target = case(1, 300, 1, 2, 4, 8, ignored=0.0)
    target.clamp_(max=250)[0, 0, 0] = 156
    check(logits, target.to(torch.uint8))
    check(logits, target.to(torch.uint8), ignore_index=-100)


@interpreted
@pytest.mark.parametrize("spread", [0.0, 30.0, 100.0])
def test_extreme_logits(spread):
    logits, target = case(B=1, C=2, H=12, W=16, spread=spread)
    check(logits, target)
    check(-torch.zeros_like(logits), target)


@interpreted
def test_nan_shows():
    logits, target = case(B=1, C=2, H=12, W=16)
    logits[0, 1, 1, 1] = torch.nan
    loss = mask_loss(logits, target, impl="triton")
    assert loss.focal.isnan()
    assert loss.dice.isnan()


@interpreted
def test_reads_and_writes_stay_inside():
    """The interpreter does not notice a read out of bounds, but its NaN or impossible label would show."""
    logits, target = case(B=1, C=2, h=2, w=3, H=16, W=24)
    wide = torch.full((3, 4, 4, 5), torch.nan)
    wide[1:2, 1:3, 1:3, 1:4] = logits
    frame = torch.full((3, 18, 26), 1)
    frame[1:2, 1:-1, 1:-1] = target
    inside = wide[1:2, 1:3, 1:3, 1:4], frame[1:2, 1:-1, 1:-1]
    for a, b in zip(mask_loss(*inside, impl="triton"), mask_loss(logits, target, impl="triton"), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_labels_out_of_range():
    logits, target = case(B=1, C=2, H=12, W=16)
    target[0, 2, 3] = 9
    with pytest.raises(RuntimeError, match="target holds label 9"):
        mask_loss(logits, target, impl="triton")


@interpreted
def test_operator_agrees_with_its_declaration():
    logits, target = case(B=1, C=2, h=2, w=2, H=4, W=4)
    torch.library.opcheck(
        torch.ops.fastzs.mask_sums_triton.default,
        (logits.requires_grad_(), target, 0.25, 2.0, 255, True),
    )
    compiled = torch.compile(lambda z: mask_loss(z, target, impl="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), mask_loss(logits, target, impl="triton"))


MUTATIONS = {
    "the ignore rule is dropped": ("& (label != ignore_index)", "", {}),
    "two corners are swapped": ("cell + 2 * size + 1", "cell + size + 1", {}),
    "the last column is dropped": (
        "inside = exists[:, None] & (x < end[:, None])",
        "inside = x < end[:, None] - 1",
        {},
    ),
    "alpha weighs the wrong side": ("tl.where(hit, alpha, 1.0 - alpha)", "tl.where(hit, 1.0 - alpha, alpha)", {}),
    "a sum is written elsewhere": (
        "tl.store(out + 2 * size, tl.sum(tl.where(inside, overlap, 0.0), 1), mask=exists)",
        "",
        {},
    ),
}


@interpreted
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from fastzs.kernels.mask_loss import triton

    right, wrong, options = MUTATIONS[name]
    source = Path(triton.__file__).read_text()
    assert source.count(right) == 1
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("fastzs.kernels.mask_loss.mutant", mutant)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logits, target = case(B=1, C=2, h=2, w=3, H=8, W=12, ignored=0.0)
    check(logits, target, ignore_index=1, **options)
    monkeypatch.setattr(triton, "mask_sums", module.mask_sums)
    with pytest.raises(AssertionError):
        check(logits, target, ignore_index=1, **options)
