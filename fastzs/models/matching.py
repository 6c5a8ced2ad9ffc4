"""Training of mask proposals: every class of an image is given the proposal that fits it best, one to one.

Source: MaskFormer (Cheng et al., NeurIPS 2021), section 3.2, after DETR. The cost of giving class c to proposal q is

    - p_q(c) + w_f focal(m_q, y_c) + w_d dice(m_q, y_c)

with masks compared at the proposals' resolution; the cheapest assignment is SciPy's. The matched proposals are then
trained towards their class and its mask at the labels' resolution, all others towards "no object". Pixels of ignored
labels belong to no mask, as published. Every decoder layer is matched and trained on its own (deep supervision).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.needed import needed
from fastzs.ops import mask_loss
from fastzs.trace import traced

NO_OBJECT = 0.1  # weight of "no object" in the cross-entropy
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


@traced("train.loss")
def matched_losses(
    logits: Tensor, masks: Tensor, target: Tensor, *, ignore_index: int = 255, focal: float = 20.0, dice: float = 1.0
) -> dict[str, Tensor]:
    """Weighted losses ``class``, ``focal`` and ``dice``, scalars, summed over the L layers.

    An image with more classes than there are proposals is trained on its largest classes.

    Args:
        logits: [L, B, Q, C + 1], the last for "no object".
        masks: [L, B, Q, h, w] logits.
        target: integer labels [B, H, W] in [0, C) or ``ignore_index``.
        focal, dice: weights, in the matching as in the loss; published: 20 and 1.
    """
    layers, pictures, queries = logits.shape[:3]
    nothing = logits.shape[-1] - 1
    wanted = torch.full((layers, pictures, queries), nothing, device=logits.device)
    layer = torch.arange(layers, device=logits.device)[:, None]
    count, mask_losses = 0, []
    for b, labels in enumerate(target):
        classes, pixels = labels[labels != ignore_index].long().unique(return_counts=True)
        classes = classes[pixels.argsort(descending=True, stable=True)[:queries]]  # [N]
        if len(classes) == 0:
            continue
        small = F.interpolate(labels[None, None].float(), masks.shape[3:], mode="nearest")[0, 0]
        here = small == classes[:, None, None]  # [N, h, w]
        chosen = torch.stack(
            [assign(*both, classes, here, focal, dice) for both in zip(logits[:, b], masks[:, b], strict=True)]
        )  # [L, N]
        wanted[layer, b, chosen] = classes
        place = torch.full((nothing + 1,), -1, device=labels.device)
        place[classes] = torch.arange(len(classes), device=labels.device)
        nth = place[torch.where(labels == ignore_index, nothing, labels.long())]  # [H, W]
        loss = mask_loss(masks[layer, b, chosen], nth.expand(layers, -1, -1), ignore_index=-1)
        mask_losses.append(torch.stack([loss.focal, loss.dice]) * layers * len(classes))
        count += len(classes)
    weight = torch.ones(nothing + 1, device=logits.device)
    weight[nothing] = NO_OBJECT
    by_layer = zip(logits.flatten(1, 2).float(), wanted.flatten(1), strict=True)
    out = {"class": torch.stack([F.cross_entropy(mine, classes, weight) for mine, classes in by_layer]).sum()}
    # without any class the masks still take part, with gradients of zero, for devices that wait for each other's
    of_masks = torch.stack(mask_losses).sum(0) / count if count else masks.sum().float() * torch.zeros_like(weight[:2])
    return out | {"focal": focal * of_masks[0], "dice": dice * of_masks[1]}


@torch.no_grad()
def assign(logits: Tensor, masks: Tensor, classes: Tensor, here: Tensor, focal: float, dice: float) -> Tensor:
    """The proposals of one image and layer that its classes get at the least cost together, int64 [N].

    Args:
        logits: [Q, C + 1].
        masks: [Q, h, w] logits.
        classes: [N], at most Q.
        here: bool [N, h, w], where each class is.
    """
    optimize = needed("scipy.optimize", "SciPy", "proposals that are matched in training", "two-stage")
    m, y = masks.flatten(1).float(), here.flatten(1).float()  # [Q, hw], [N, hw]
    p = m.sigmoid()
    inside = ALPHA * (1 - p) ** GAMMA * F.softplus(-m)
    outside = (1 - ALPHA) * p**GAMMA * F.softplus(m)
    focal_cost = (inside @ y.T + outside @ (1 - y).T) / m.shape[1]  # [Q, N]
    dice_cost = 1 - (2 * p @ y.T + 1) / (p.sum(1)[:, None] + y.sum(1) + 1)
    cost = focal * focal_cost + dice * dice_cost - logits.float().softmax(1)[:, classes]
    # numbers that are not finite are for the loss to show: here they must not stop the matching
    cost = cost.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return torch.as_tensor(optimize.linear_sum_assignment(cost.T.cpu().numpy())[1], device=masks.device)
