"""``pixel_text_logits`` in Triton: product and norm from one pass over the channels.

A program owns some classes times some pixels. Each tile of features it loads goes into the matrix product and,
squared, into the pixels' norms, which divide the product at the end. All sums are fp32.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# (it does not know that a grid launches a kernel)

import torch
import triton
import triton.language as tl

from ..triton_runtime import interpreted
from .common import SMALLEST_NORM

PIXELS = 64
# By the bytes of a number of the text: classes at most, channels of a step, warps. Larger tiles spill registers on
# one of sm_80, sm_90 and sm_100, for which tests/kernels/test_pixel_text_logits_triton.py compiles these.
TILES = {2: (128, 32, 4), 4: (64, 16, 8)}


@triton.jit(do_not_specialize=["features_stride_y", "C", "w"])
def pixel_text_logits_fwd_kernel(
    features_ptr,  # [B, D, h, w]
    text_ptr,  # [C, D]
    out_ptr,  # [B, C, h * w]
    features_stride_b,
    features_stride_d,
    features_stride_y,
    features_stride_x,
    text_stride_c,
    text_stride_d,
    C,
    D,
    w,
    pixels,
    scale,
    smallest_norm,
    CLASSES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FLAT: tl.constexpr,  # pixel n lies at n * features_stride_x
    UPCAST: tl.constexpr,
):
    c = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)  # [CLASSES]
    n = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)  # [PIXELS]
    b = tl.program_id(2).to(tl.int64)
    if FLAT:
        pixel = n.to(tl.int64) * features_stride_x
    else:
        pixel = (n // w).to(tl.int64) * features_stride_y + (n % w).to(tl.int64) * features_stride_x
    features = features_ptr + b * features_stride_b + pixel[None, :]  # [1, PIXELS]
    text = text_ptr + c[:, None].to(tl.int64) * text_stride_c  # [CLASSES, 1]

    dot = tl.zeros([CLASSES, PIXELS], tl.float32)
    squares = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for start in range(0, D, CHANNELS):
        d = start + tl.arange(0, CHANNELS)  # [CHANNELS]
        at = d.to(tl.int64)
        f = tl.load(
            features + at[:, None] * features_stride_d, mask=(d < D)[:, None] & (n < pixels)[None, :], other=0.0
        )  # [CHANNELS, PIXELS]
        t = tl.load(
            text + at[None, :] * text_stride_d, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0
        )  # [CLASSES, CHANNELS]
        f32 = f.to(tl.float32)
        squares += f32 * f32
        if UPCAST:
            dot = tl.dot(t.to(tl.float32), f32, dot, input_precision="ieee")
        else:
            dot = tl.dot(t, f.to(t.dtype), dot, input_precision="ieee")

    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, 0)), smallest_norm)  # [PIXELS]
    dot *= (scale / norm)[None, :]
    out = out_ptr + (b * C + c[:, None]) * pixels + n[None, :]  # [CLASSES, PIXELS]
    tl.store(out, dot, mask=(c < C)[:, None] & (n < pixels)[None, :])


def pixel_text_logits(features: torch.Tensor, text: torch.Tensor, scale: float) -> torch.Tensor:
    """``pixel_text_logits`` as in ``operator.py``."""
    B, D, h, w = features.shape
    C = text.shape[0]
    # The interpreter multiplies the bits of bf16 as integers and cuts what it rounds to bf16: it gets fp32 instead.
    upcast = interpreted()
    out = features.new_empty((B, C, h, w), dtype=torch.float32 if upcast else text.dtype)
    if out.numel() > 0:
        most_classes, channels, warps = TILES[text.element_size()]
        classes = min(max(triton.next_power_of_2(C), 16), most_classes)
        # Neighbouring programs share the pixels, whose features the second one then finds in the cache.
        grid = triton.cdiv(C, classes), triton.cdiv(h * w, PIXELS), B
        with torch.cuda.device(features.device.index if features.is_cuda else -1):
            pixel_text_logits_fwd_kernel[grid](
                features,
                text,
                out,
                *features.stride(),
                *text.stride(),
                C,
                D,
                w,
                h * w,
                scale,
                SMALLEST_NORM,
                CLASSES=classes,
                PIXELS=PIXELS,
                CHANNELS=channels,
                FLAT=h == 1 or features.stride(2) == w * features.stride(3),
                UPCAST=upcast,
                num_warps=warps,
                num_stages=3,
                enable_fp_fusion=True,
            )
    return out.to(text.dtype)
