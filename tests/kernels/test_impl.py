"""An explicit ``impl`` of any op runs that backend and no other, or raises with the reason: it never falls back."""

import inspect

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastzs import ops
from fastzs.kernels.dispatch import BACKENDS
from fastzs.kernels.packed_linear.weights import pack_weight

OPS = [name for name in ops.__all__ if "impl" in getattr(inspect.unwrap(getattr(ops, name)), "__annotations__", ())]


def call(name: str, impl: str) -> object:
    """A small call on the CPU."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    logits, target = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 8, 8))
    text, features = torch.randn(3, 16), torch.randn(1, 16, 4, 4)
    calls = {
        "bridged_attention": lambda: ops.bridged_attention(q, k, v, ops.TokenLayout(0, (4, 4), (2, 2)), impl=impl),
        "dense_attention": lambda: ops.dense_attention(q, k, v, "kk", (4, 5), impl=impl),
        "dropout": lambda: ops.dropout(features, 0.5, impl=impl),
        "dropout_attention": lambda: ops.dropout_attention(q, k, v, 0.5, impl=impl),
        "key_smoothing": lambda: ops.key_smoothing(torch.randn(1, 20, 16), torch.rand(1, 3, 20), impl=impl),
        "label_map": lambda: ops.label_map(logits, [(0, 0, 8, 8)], (8, 8), impl=impl),
        "mask_loss": lambda: ops.mask_loss(logits, target, impl=impl),
        "packed_linear": lambda: ops.packed_linear(
            torch.randn(5, 16), pack_weight(torch.randn(32, 16), None, torch.float32), impl=impl
        ),
        "pixel_text_logits": lambda: ops.pixel_text_logits(features, text, impl=impl),
        "pixel_text_mask_loss": lambda: ops.pixel_text_mask_loss(features, text, target, impl=impl),
        "refine": lambda: ops.refine(logits, torch.rand(3, 8, 8), impl=impl),
    }
    return calls[name]()


def kernels(name: str, impl: str) -> set[str]:
    """The operators that a call runs, those inside others too."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        call(name, impl)
    return {event.key for event in recorded.key_averages() if "::" in event.key}


@pytest.mark.parametrize("name", OPS)
def test_never_falls_back(name, monkeypatch):
    monkeypatch.delenv("FASTZS_IMPL", raising=False)
    ran: dict[str, set[str]] = {}
    for impl in BACKENDS:
        try:
            call(name, impl)
        except RuntimeError as error:
            assert f"impl={impl!r} cannot run: " in str(error)  # noqa: PT017 - some backends run, others must not
        else:
            ran[impl] = kernels(name, impl)
    assert "reference" in ran
    for impl, found in ran.items():
        for preferred in ("reference", "cpu"):  # a preference of the whole program is for "auto" only
            monkeypatch.setenv("FASTZS_IMPL", preferred)
            if name != "pixel_text_mask_loss":  # its impl is of the loss; the logits in it are "auto"
                assert kernels(name, impl) == found, preferred
        monkeypatch.delenv("FASTZS_IMPL")
    assert len({frozenset(found) for found in ran.values()}) == len(ran), "two backends run the same"
    if "cpu" in ran:
        compiled = ran["cpu"] - ran["reference"]
        assert any(key.startswith("fastzs::") for key in compiled), compiled


def test_every_op_is_here():
    assert len(OPS) == 11
