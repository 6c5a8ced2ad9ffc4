"""What all backends of ``mask_loss`` share: the order of the sums, and what labels may be."""

import torch

# The last dimension of the sums. All but LABEL depend on the logits.
FOCAL, PROB, OVERLAP, LABEL = range(4)


def wide(target: torch.Tensor) -> torch.Tensor:
    """The labels as 32-bit integers at least: a Python number beside a narrower tensor wraps around."""
    return target.to(torch.promote_types(target.dtype, torch.int32))


def narrow(target: torch.Tensor, C: int, ignore_index: int) -> torch.Tensor:
    """Labels that were checked, in 16 bits where they fit, once, for kernels that read them for every class.

    At B 16, C 150 and 512 x 512 int64 labels are 5.0e9 bytes read from the caches, int16 labels 1.3e9; narrowing them
    reads 34e6 bytes and writes 8e6 (counted).
    """
    if target.dtype in (torch.uint8, torch.int16):
        return target
    return target.to(torch.int16 if C <= 1 << 15 and -(1 << 15) <= ignore_index < 1 << 15 else torch.int32)


def check_labels(target: torch.Tensor, C: int, ignore_index: int) -> None:
    """Raise RuntimeError if a label is neither a class nor ``ignore_index``."""
    target = wide(target)
    wrong = ((target < 0) | (target >= C)) & (target != ignore_index)
    if target.is_cuda or torch.compiler.is_compiling():
        # Neither a tracer nor a GPU's queue can stop for the value that is wrong.
        message = f"mask_loss: target has labels outside [0, {C}) that are not ignore_index={ignore_index}"
        torch.ops.aten._assert_async.msg(~wrong.any(), message)
    elif wrong.any():
        label = target[wrong][0].item()
        raise RuntimeError(
            f"mask_loss: target holds label {label}; expected labels in [0, {C}) or ignore_index={ignore_index}"
        )
