"""The specification of ``mask_loss`` in plain PyTorch: four sums per image and class, then the two losses.

Focal loss: Lin et al. 2017, equation 5. Dice loss: Milletari et al. 2016 with the smoothing and the plain
(unsquared) denominator of the MaskFormer family, which ZegCLIP and CLIP-RC train with.
"""

import torch
import torch.nn.functional as F

from .common import check_labels, wide


def mask_sums_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    gamma: float,
    ignore_index: int,
) -> torch.Tensor:
    """Sums over the pixels of an image, for every class.

    With z the logits ``[B, C, h, w]`` interpolated to the pixels of the target ``[B, H, W]``, p = sigmoid(z) and
    y = 1 where the target is the class, else 0: the focal loss, p, p * y and y, summed to ``[B, C, 4]`` in fp32
    (fp64 for fp64 logits). Pixels labelled ``ignore_index`` have y = 0 for every class.
    """
    C = logits.shape[1]
    check_labels(target, C, ignore_index)
    if logits.dtype != torch.float64:
        logits = logits.float()
    z = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)  # [B, C, H, W]
    target = wide(target)
    counted = (target != ignore_index).unsqueeze(1)  # [B, 1, H, W]
    classes = torch.arange(C, device=target.device).view(1, C, 1, 1)
    y = (target.unsqueeze(1) == classes) & counted  # [B, C, H, W]

    # With u = -z on the class and u = z off it, 1 - p_t = sigmoid(u) and the cross entropy is softplus(u).
    u = torch.where(y, -z, z)
    focal = torch.exp(gamma * F.logsigmoid(u)) * -F.logsigmoid(-u)
    focal = torch.where(y, alpha, 1 - alpha) * focal
    p = torch.sigmoid(z)
    return torch.stack([focal, p, p * y, y.to(p.dtype)], -1).sum((2, 3))
