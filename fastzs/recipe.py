"""The settings of a training, and the learning rate at each step. This module does not import torch."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

# ruff: noqa: RUF009 - _option makes a field

Setting = Literal["inductive", "transductive", "transductive-honest", "supervised"]


def _option(default: Any, help: str, *, decisive: bool = True) -> Any:
    """A field with its help text; ``decisive`` if another value makes it another training."""
    about = {"help": help, "decisive": decisive}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training but the model and the data. What a field means is its ``help``.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    setting: Setting = _option(
        "inductive",
        "labels used: 'inductive' those of the seen classes; 'transductive' as published: also where the other "
        "classes are, which get the model's own labels; 'transductive-honest': the same for every pixel without a "
        "seen label, if the model is sure of it; 'supervised' all",
    )
    max_steps: int = _option(20_000, "optimizer steps")
    batch_size: int = _option(16, "images of a step, over all devices and accumulated parts")
    accumulate: int = _option(1, "parts in which each device computes its share of a batch")
    optimizer: Literal["adamw", "sgd"] = _option("adamw", "AdamW, or SGD with momentum")
    lr: float = _option(2e-5, "learning rate, before the groups' factors")
    weight_decay: float = _option(0.01, "weight decay, before the groups' factors")
    momentum: float = _option(0.9, "momentum of SGD")
    betas: tuple[float, float] = _option((0.9, 0.999), "betas of AdamW")
    groups: dict[str, dict[str, float]] = _option(
        {},
        "factors on lr and decay by parts of parameter names: {head: {lr: 10}, norm: {decay: 0}}; of the parts in a "
        "name the longest counts, and no other",
    )
    train: list[str] = _option([], "parts of names of further parameters to train, as 'backbone' for the tower")
    warmup: int = _option(1500, "steps over which the learning rate rises linearly")
    warmup_ratio: float = _option(1e-6, "share of the learning rate at the first step")
    power: float = _option(0.9, "the learning rate falls as (1 - step / max_steps) ** power")
    min_lr: float = _option(1e-6, "the learning rate at the end")
    clip_norm: float = _option(0.0, "largest norm of all gradients together; 0 leaves them")
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "of products: bf16 is autocast over fp32 weights, auto takes it where the device has it"
    )
    checkpointing: bool = _option(False, "compute the tower's activations again in backward instead of keeping them")
    ema: float = _option(0.0, "decay of a moving average of the weights, which is then tested and kept; 0: none")
    self_training: dict[str, Any] = _option(
        {},
        "labels for pixels without a seen one, in the inductive setting: {rule: best, teacher: frozen}; rules: best, "
        "rank (within), share (percent), consistent (scales), annealed (temperature); teachers: self, frozen, ema",
    )
    seed: int = _option(0, "of order, augmentation, dropout and new weights")
    workers: int = _option(2, "processes that read images; 0 reads them in this one", decisive=False)
    log_every: int = _option(50, "steps between lines of log.csv", decisive=False)
    save_every: int = _option(1000, "steps between checkpoints", decisive=False)
    evaluate_every: int = _option(2000, "steps between evaluations; 0: never", decisive=False)
    keep: list[int] = _option([], "steps whose checkpoints are kept beside the best and the last", decisive=False)

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "accumulate", "log_every", "save_every"):
            self._want(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "weight_decay", "warmup", "min_lr", "clip_norm", "workers", "evaluate_every", "power"):
            self._want(name, getattr(self, name) >= 0, "at least 0")
        self._want("warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        self._want("ema", 0 <= self.ema < 1, "in [0, 1)")
        self._want("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._want("optimizer", self.optimizer in ("adamw", "sgd"), "adamw or sgd")
        if self.self_training and self.setting != "inductive":
            raise ValueError(f"self_training goes with setting 'inductive', got {self.setting!r}")
        self._want("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        for part, factors in self.groups.items():
            for key in factors:
                if key not in ("lr", "decay"):
                    raise ValueError(f"groups: {part}: expected the factors lr and decay, got {key!r}")

    def _want(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {what}, got {getattr(self, name)}")

    def factors(self, name: str) -> tuple[float, float]:
        """Factors on learning rate and weight decay of the parameter called ``name``.

        Only the longest part that occurs in the name counts, as in mmcv, with which the published models were trained.
        There "backbone" wins over "norm", so the published norms are decayed.
        """
        parts = [part for part in self.groups if part in name]
        chosen = self.groups[min(parts, key=lambda part: (-len(part), part))] if parts else {}
        return chosen.get("lr", 1.0), chosen.get("decay", 1.0)

    def learning_rate(self, step: int, factor: float = 1.0) -> float:
        """The learning rate of step ``step``, counted from 0: poly decay, under linear warm-up."""
        left = (1 - step / self.max_steps) ** self.power
        rate = (self.lr * factor - self.min_lr) * left + self.min_lr
        if step < self.warmup:
            rate *= 1 - (1 - step / self.warmup) * (1 - self.warmup_ratio)
        return rate

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.metadata["decisive"]}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse unknown names of settings.

    Raises:
        ValueError: names the first unknown one and the nearest known.
    """
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: there is no setting {key!r}; {hint}")
