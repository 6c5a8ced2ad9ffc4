"""The one table of tolerances, per op and dtype, and the comparison that uses it.

An entry bounds the error of a result against the fp64 reference on the same (already rounded) inputs, as a
share of the largest magnitude of the reference: (largest error, root mean square error). The comment beside
it is the worst value measured over the tests when it was set. A change for speed never widens an entry.
"""

import torch

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

TOLERANCES = {
    "pixel_text_logits": {
        f64: (1e-15, 3e-16),  # 5.3e-16, 1.3e-16
        f32: (4e-7, 1.2e-7),  # 2.1e-7, 5.8e-8
        bf16: (8e-3, 2e-3),  # 4.9e-3, 1.2e-3
        f16: (1e-3, 2e-4),  # 5.9e-4, 1.1e-4
    },
    "key_smoothing": {
        f32: (8e-7, 1.7e-7),  # 4.2e-7, 8.6e-8
        bf16: (3.9e-3, 2e-3),  # 3.6e-3, 1.1e-3: half a rounding step is 3.9e-3
        f16: (5e-4, 2.5e-4),  # 4.3e-4, 1.4e-4: half a rounding step is 4.9e-4
    },
    "mask_loss": {
        f32: (1e-6, 1e-6),  # 4.3e-7, 4.3e-7
        f64: (2e-15, 1e-15),  # 6.3e-16, 4.1e-16
    },
    "mask_loss.grad": {
        f32: (1.2e-6, 8e-7),  # 8.9e-7, 5.2e-7
        bf16: (4e-3, 4e-3),  # 3.6e-3, 1.3e-3: half a rounding step is 3.9e-3
        f16: (5e-4, 5e-4),  # 4.8e-4, 2.4e-4: half a rounding step is 4.9e-4
        f64: (2e-15, 1e-15),  # 6.3e-16, 4.1e-16
    },
}


def errors(actual: torch.Tensor, reference: torch.Tensor, size: float = 0.0) -> tuple[float, float]:
    """Largest and root-mean-square error as shares of the reference's largest magnitude, at least ``size``.

    Where both are 0 the errors are taken as they are.
    """
    size = max(reference.abs().max().item(), size) or 1.0
    off = (actual.detach().double() - reference.detach().double()) / size
    return off.abs().max().item(), off.square().mean().sqrt().item()


def assert_close(op: str, actual: torch.Tensor, reference: torch.Tensor, size: float = 0.0) -> None:
    """Fail unless ``actual`` is finite, shaped as ``reference`` and within the table's entry for its dtype."""
    assert actual.shape == reference.shape, f"{op}: shape {list(actual.shape)}, wanted {list(reference.shape)}"
    assert actual.isfinite().all(), f"{op}: result is not finite"
    if reference.numel() == 0:
        return
    entry = TOLERANCES[op][actual.dtype]
    seen = errors(actual, reference, size)
    assert all(a <= b for a, b in zip(seen, entry, strict=True)), f"{op}: errors (max, rms) {seen}, allowed {entry}"
