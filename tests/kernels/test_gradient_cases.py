"""Every backend of every op, with each choice of inputs that want a gradient, against the fp64 reference.

A backward may take a shortcut where some gradients are not asked for. Whatever is asked for must come out the same.
"""

import itertools

import pytest
import torch

from fastzs.kernels.bridged_attention.compiled import MISSING
from fastzs.ops import (
    TokenLayout,
    bridged_attention,
    dropout_attention,
    key_smoothing,
    mask_loss,
    pixel_text_logits,
    pixel_text_mask_loss,
)

from .interpreter import INTERPRETED, run_interpreted

EPS = torch.finfo(torch.float32).eps
GPU = torch.cuda.is_available() and not INTERPRETED
LAYOUT = TokenLayout(1, (5, 4), (2, 2))
HEADS = (2, 2, LAYOUT.length, 16)
TARGET = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(3))


def _bridged(impl, q, k, v, pk, pv):
    return bridged_attention(q, k, v, LAYOUT, prompt_kv=(pk, pv), impl=impl)


def _bridged_alone(impl, q, k, v):
    return bridged_attention(q, k, v, LAYOUT, impl=impl)


def _dropped(impl, q, k, v):
    torch.manual_seed(7)
    return dropout_attention(q, k, v, 0.3, impl=impl)


def _pixel_text(impl, features, text):
    return pixel_text_logits(features, text, 10.0, impl=impl)


def _mask_loss(impl, logits):
    return torch.stack(mask_loss(logits, TARGET.to(logits.device), impl=impl))


def _pixel_text_loss(impl, features, text):
    return torch.stack(pixel_text_mask_loss(features, text, TARGET.to(text.device), 10.0, impl=impl))


def _smoothed(impl, keys, probs):
    return key_smoothing(keys, probs, impl=impl)


FEATURES, TEXT = (2, 24, 4, 4), (3, 24)
OPS = {  # call, shapes of the inputs, longest sum, backends of the CPU and of GPUs
    "bridged_attention": (_bridged, [HEADS, HEADS, HEADS, (1, 2, 3, 16), (1, 2, 3, 16)], 50, ("cpu", "split"), ()),
    "bridged_attention without prompts": (_bridged_alone, [HEADS, HEADS, HEADS], 50, ("cpu", "split"), ()),
    "dropout_attention": (_dropped, [HEADS, HEADS, HEADS], 25, ("cpu",), None),
    "pixel_text_logits": (_pixel_text, [FEATURES, TEXT], 32, ("cpu",), ("cuda",)),
    "mask_loss": (_mask_loss, [(2, 3, 4, 4)], 768, ("cpu",), ("cuda",)),
    "pixel_text_mask_loss": (_pixel_text_loss, [FEATURES, TEXT], 768, ("cpu",), ("cuda",)),
    "key_smoothing": (_smoothed, [(2, 40, 24), (2, 3, 40)], 64, ("torch",), ("torch",)),
}


def cases():
    for op, (_, shapes, _, on_cpu, on_gpu) in OPS.items():
        wanted = [c for n in range(1, len(shapes) + 1) for c in itertools.combinations(range(len(shapes)), n)]
        if GPU or INTERPRETED:
            backends = () if on_gpu is None else ("triton", *(on_gpu if GPU else ()))
        else:
            backends = ("reference", *on_cpu)
        for impl in backends:
            for which in wanted:
                marks = [pytest.mark.gpu] if GPU else []
                if impl == "cpu" and MISSING is not None:
                    marks = [pytest.mark.skip(reason=MISSING)]
                yield pytest.param(op, impl, which, marks=marks, id=f"{op}-{impl}-{''.join(map(str, which))}")


def gradients(call, tensors, which, impl):
    """The result, and the gradients of the inputs ``which`` under fixed weights; the other inputs want none."""
    leaves = [t.detach().clone().requires_grad_(n in which) for n, t in enumerate(tensors)]
    out = call(impl, *leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, [leaves[n] for n in which], weights.to(out))]


@pytest.mark.parametrize(("op", "impl", "which"), cases())
def test_each_choice_of_gradients(op, impl, which):
    """Within 8 sqrt(n) eps of the largest magnitude, for the two or three products in a row that a backward is."""
    call, shapes, n, _, _ = OPS[op]
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(shape, generator=generator).to("cuda" if GPU else "cpu") for shape in shapes]
    found = gradients(call, tensors, which, impl)
    exact = gradients(call, [t.double() for t in tensors], which, "reference")
    for name, mine, right in zip(("out", *which), found, exact, strict=True):
        error = (mine.double() - right).abs().max().item()
        assert error <= 8 * n**0.5 * EPS * right.abs().max().item(), (name, error)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__)
