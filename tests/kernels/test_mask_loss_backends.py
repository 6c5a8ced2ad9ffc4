"""Every backend of mask_loss against the fp64 reference, through the sums, the losses and the gradients."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.kernels.mask_loss import mask_loss
from fastzs.kernels.mask_loss.compiled import MISSING
from fastzs.kernels.mask_loss.reference import mask_sums_reference

from .tolerances import assert_close

cpu_missing = MISSING["cpu"]
pytestmark = pytest.mark.skipif(cpu_missing is not None, reason=str(cpu_missing))

# What counts as 0 in a gradient: e^-86 is the least exponential the kernels form, and an fp16 gradient loses digits
# below fp16's smallest normal number.
TINY = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: torch.finfo(torch.float16).tiny}
ISAS = ["avx512", "avx2", "portable"]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", request.param)


def case(B=2, C=4, h=3, w=4, H=24, W=32, ignored=0.2, dtype=torch.float32, seed=0, spread=4.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, C, h, w, generator=g, dtype=torch.float64) * spread - 1).to(dtype)
    target = torch.randint(0, C, (B, H, W), generator=g)
    target[torch.rand(target.shape, generator=g) < ignored] = 255
    return logits, target


def check(logits, target, **options):
    """Losses and gradients of the CPU backend, for both losses, against the fp64 reference."""
    mine = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = mask_loss(mine, target, impl="cpu", **options)
    reference = mask_loss(exact, target, impl="reference", **options)
    for name in ("focal", "dice"):
        value, wanted = getattr(loss, name), getattr(reference, name)
        assert value.dtype == torch.float32
        # Dice is 1 minus a ratio, so it is as exact as a number near 1, however small it is.
        assert_close("mask_loss", value, wanted, size=1 if name == "dice" else 1e-30)
        (grad,) = torch.autograd.grad(value, mine, retain_graph=True)
        (grad_wanted,) = torch.autograd.grad(wanted, exact, retain_graph=True)
        assert grad.dtype == logits.dtype
        assert_close("mask_loss.grad", grad, grad_wanted, size=TINY[grad.dtype])
    with torch.no_grad():
        torch.testing.assert_close(mask_loss(mine, target, impl="cpu", **options), loss, rtol=1e-6, atol=1e-6)


SHAPES = {
    "one pixel": (1, 1, 1, 1, 1, 1),
    "scale 16": (2, 3, 4, 3, 64, 48),
    "scale 14": (1, 3, 3, 5, 42, 70),
    "scale 8": (1, 3, 5, 3, 40, 24),
    "scale 7/3": (2, 3, 6, 9, 14, 21),
    "same size": (1, 3, 5, 7, 5, 7),
    "smaller": (1, 3, 9, 8, 4, 3),
    "one row": (1, 3, 1, 6, 1, 51),
    "one column": (1, 3, 6, 1, 51, 1),
    "more than 255 classes": (1, 300, 2, 2, 20, 20),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape):
    logits, target = case(*shape, ignored=0.0 if shape[-1] == 1 else 0.2)
    check(logits, target, ignore_index=255 if shape[1] < 255 else 299)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_dtypes(dtype, labels):
    logits, target = case(dtype=dtype)
    check(logits, target.to(labels))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_focal_options(gamma, alpha):
    check(*case(), gamma=gamma, alpha=alpha)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_anything(data):
    size = st.integers(1, 5)
    B, C, h, w = (data.draw(size) for _ in range(4))
    scale = data.draw(st.sampled_from([1, 2, 8, 14, 16, 7 / 3]))
    H, W = max(1, round(h * scale)), max(1, round(w * scale))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits, target = case(B, C, h, w, H, W, data.draw(st.sampled_from([0.0, 0.3, 1.0])), dtype, data.draw(size))
    if data.draw(st.booleans()):
        target[target == 0] = 255  # an absent class
    layout = data.draw(st.sampled_from(["contiguous", "channels last", "every other", "broadcast"]))
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "every other":
        logits = torch.stack([logits, torch.full_like(logits, torch.nan)], -1).flatten(3)[..., ::2]
        target = torch.stack([target, torch.full_like(target, -7)], -1).flatten(2)[..., ::2]
    elif layout == "broadcast":
        logits = logits[:, :1].expand(-1, C, -1, -1)
        target = target[:1].expand(B, -1, -1)
    check(logits, target)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 100.0])
def test_extreme_logits(spread):
    logits, target = case(spread=spread)
    check(logits, target)
    check(torch.where(logits > 0, 100.0, -100.0), target)
    check(torch.zeros_like(logits), target)
    check(-torch.zeros_like(logits), target)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_show(bad):
    logits, target = case()
    logits[1, 2, 1, 1] = bad
    logits.requires_grad_()
    loss = mask_loss(logits, target, impl="cpu")
    assert loss.focal.isnan()
    assert loss.dice.isnan()
    (grad,) = torch.autograd.grad(loss.focal, logits)
    assert grad[1, 2].isnan().all()


def test_bitwise_repeatable():
    """The same bits again, with any number of threads, and for an image whatever else is in the batch."""
    logits, target = case(B=3, C=5, h=7, w=6, H=56, W=90)
    run = lambda z, t: torch.ops.fastzs.mask_sums(z, t, 0.25, 2.0, 255, True)  # noqa: E731
    sums, nodes = run(logits, target)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            again = run(logits, target)
            assert torch.equal(again[0], sums)
            assert torch.equal(again[1], nodes)
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([2, 0, 1])
    permuted = run(logits[order], target[order])
    assert torch.equal(permuted[0], sums[order])
    assert torch.equal(permuted[1], nodes[order])


def test_reads_and_writes_stay_inside():
    """Inputs in the middle of NaN and of labels that do not exist: nothing around them is read into the result."""
    logits, target = case(B=1, C=3, h=3, w=5, H=24, W=40)
    wide = torch.full((3, 5, 5, 7), torch.nan)
    wide[1:2, 1:4, 1:4, 1:6] = logits
    frame = torch.full((3, 26, 42), 1000)
    frame[1:2, 1:-1, 1:-1] = target
    inside = wide[1:2, 1:4, 1:4, 1:6], frame[1:2, 1:-1, 1:-1]
    for a, b in zip(mask_loss(*inside, impl="cpu"), mask_loss(logits, target, impl="cpu"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("label", [4, 254, 256, -1, -(2**31), 2**31 - 1])
def test_label_out_of_range(label):
    logits, target = case()
    target[1, 2, 3] = label
    with pytest.raises(RuntimeError, match=f"target holds label {label}; expected labels in"):
        mask_loss(logits, target, impl="cpu")


def test_operator_agrees_with_its_declaration():
    logits, target = case()
    for z, with_nodes in ((logits, False), (logits.clone().requires_grad_(), True)):
        torch.library.opcheck(torch.ops.fastzs.mask_sums.default, (z, target, 0.25, 2.0, 255, with_nodes))
    sums, nodes = torch.ops.fastzs.mask_sums(logits, target, 0.25, 2.0, 255, True)
    torch.testing.assert_close(sums, mask_sums_reference(logits, target, 0.25, 2.0, 255), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.fastzs.mask_sums_backward.default, (sums, nodes, logits.bfloat16()))


def test_compiles_as_one_graph():
    logits, target = case()
    logits.requires_grad_()

    def objective(z):
        loss = mask_loss(z, target, impl="cpu")
        return 100 * loss.focal + loss.dice

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), objective(logits))
    (grad,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(grad, torch.autograd.grad(objective(logits), logits)[0])


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, logits, target):
            return mask_loss(logits, target, impl="cpu")

    inputs = case()
    exported = torch.export.export(Loss(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), Loss()(*inputs))


def test_second_derivative_raises():
    logits, target = case()
    logits.requires_grad_()
    loss = mask_loss(logits, target, impl="cpu")
    (grad,) = torch.autograd.grad(loss.focal, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_autocast_and_half_precision_gradients():
    logits, target = case(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(logits, target)


def test_explicit_cpu_says_why_not():
    logits, target = case()
    with pytest.raises(RuntimeError, match=r"cannot run: the logits are torch\.float64"):
        mask_loss(logits.double(), target, impl="cpu")


def test_environment_switches_the_backend(monkeypatch):
    logits, target = case()
    monkeypatch.setenv("FASTZS_IMPL", "reference")
    loss = mask_loss(logits, target)
    monkeypatch.delenv("FASTZS_IMPL")
    exact = mask_loss(logits, target, impl="reference")
    assert loss == exact
    assert os.environ.get("FASTZS_IMPL") is None
