"""A first Triton kernel of one line: whether kernels compile and run on a device at all."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (it does not know that a grid launches a kernel)
import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1.0)


def run(device: torch.device) -> None:
    """Raise whatever Triton raises there, or RuntimeError if the result is wrong."""
    x = torch.ones(1, device=device)
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        probe_kernel[(1,)](x, num_warps=1, enable_fp_fusion=True)
    if x.item() != 2.0:
        raise RuntimeError(f"1 + 1 is {x.item()} on {device}")
