"""What is trained, by which optimizer, at which rate: a recipe applied to a model."""

from collections.abc import Sequence

import torch
from torch import nn

from fastzs.recipe import Recipe


def choose_trained(model: nn.Module, parts: Sequence[str]) -> None:
    """Train further parameters: all with one of ``parts`` in their names.

    Raises:
        ValueError: a part is in no name.
    """
    for part in parts:
        chosen = [p for name, p in model.named_parameters() if part in name]
        if not chosen:
            tops = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ValueError(f"train: no parameter has {part!r} in its name; the names begin with {', '.join(tops)}")
        for p in chosen:
            p.requires_grad_(True)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over the trained parameters, in groups of one learning rate factor and weight decay each.

    Raises:
        ValueError: nothing is to be trained.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(recipe.factors(name), []).append(p)
    if not groups:
        raise ValueError(f"{type(model).__name__}: no parameter is to be trained")
    listed = [
        {"params": members, "factor": factor, "weight_decay": recipe.weight_decay * decay}
        for (factor, decay), members in groups.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(listed, lr=recipe.lr, momentum=recipe.momentum, fused=True)
    return torch.optim.AdamW(listed, lr=recipe.lr, betas=recipe.betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    """Set the learning rate of every group for ``step``. Returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate(step, group["factor"])
    return max(group["lr"] for group in optimizer.param_groups)


def check_gradients(model: nn.Module) -> None:
    """Refuse parameters that are to be trained and got no gradient.

    Raises:
        ValueError: there are some; the message names them.
    """
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise ValueError(
            f"{len(idle)} parameters are to be trained, but no loss depends on them: {', '.join(idle[:6])}; "
            "build the model without them or freeze them"
        )
