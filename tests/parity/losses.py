"""``F_losses``: focal and dice of low-resolution logits, and their gradients separately."""

from collections.abc import Iterator

import torch

from fastzs.ops import mask_loss
from tests.parity.golden import DTYPES, Check, Golden


def losses(golden: Golden) -> Iterator[Check]:
    weights = {"loss_mask": golden.config["mask_weight"], "loss_dice": golden.config["dice_weight"]}
    alpha, gamma = golden.config["alpha"], golden.config["gamma"]
    variants = [name.removesuffix(".in.labels") for name in golden.tensors if name.endswith(".in.labels")]
    for variant in variants:
        for dtype in DTYPES:
            logits = golden["in.logits"].to(dtype).requires_grad_()
            loss = mask_loss(logits, golden[f"{variant}.in.labels"], alpha=alpha, gamma=float(gamma))
            for name, value in zip(("loss_mask", "loss_dice"), loss, strict=True):
                value = weights[name] * value
                (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
                yield golden.check(f"{variant}.loss64.{name}", value)
                yield golden.check(f"{variant}.grad64.{name}", gradient, gradient=True)


RUNNERS = {"F_losses": losses}
