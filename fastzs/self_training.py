"""Self-training: pixels without a label of a seen class get one from a teacher, before the model's losses see them.

What is told about unseen pixels: nothing. Labels of unseen classes are dropped first, so that unseen classes,
background and padding are all unlabelled, as in STRICT, CaGNet and SIGN; ZegCLIP's and CLIP-RC's published form, which
is told where unseen pixels are, is the setting "transductive". Rules are those of :mod:`fastzs.pseudo`; here they work
at the labels' size on the teacher's enlarged class maps, and CaGNet's ranks are among the classes there are.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs import pseudo
from fastzs.recipe import check_keys

TOLD = "nothing: unseen classes, background and padding are all unlabelled"
NEEDS = {"rank": "within", "share": "percent", "annealed": "temperature", "consistent": "scales"}


@dataclass(frozen=True)
class SelfTraining:
    """How pixels are labelled.

    Attributes:
        rule: one of :data:`fastzs.pseudo.RULES`.
        teacher: whose scores: the model's own ("self"), those of the weights that the training started from ("frozen"),
            or of the moving average of the weights ("ema", which the recipe's ``ema`` makes).
        within: rule "rank"; published: 10 of 21 classes.
        percent: rule "share"; published: 25 on VOC, 75 on PASCAL-Context.
        temperature: rule "annealed".
        scales: rule "consistent"; published: 1.5 and 1.75.

    Raises:
        ValueError: an unknown rule or teacher, or a number that the rule needs is missing.
    """

    rule: str
    teacher: Literal["self", "frozen", "ema"] = "frozen"
    within: int | None = None
    percent: float | None = None
    temperature: float | None = None
    scales: Sequence[float] | None = None

    def __post_init__(self):
        for what, value, known in (
            ("rule", self.rule, pseudo.RULES),
            ("teacher", self.teacher, ("self", "frozen", "ema")),
        ):
            if value not in known:
                raise ValueError(f"self_training: {what} must be one of {', '.join(known)}, got {value!r}")
        need = NEEDS.get(self.rule)
        for name in NEEDS.values():
            if (getattr(self, name) is not None) != (name == need):
                wanted = f"needs {need}" if need else "takes no number"
                raise ValueError(f"self_training: the rule {self.rule!r} {wanted}, got {name}={getattr(self, name)}")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "SelfTraining":
        """From plain settings; unknown ones are refused."""
        check_keys(given, [item.name for item in fields(cls)], "self_training")
        if "rule" not in given:
            raise ValueError(f"self_training: name the rule: {', '.join(pseudo.RULES)}")
        return cls(**given)


class Teacher:
    """Labels batches for a model under training.

    Args:
        how: see :class:`SelfTraining`.
        model: the model, with the weights that the training starts from.
        text: text vectors [C, D] of all classes.
        seen: indices of the classes whose labels may be used.
        average: puts the moving average into the model while it is entered; for the teacher "ema".

    Raises:
        ValueError: every class is seen, or "ema" without an average.
    """

    def __init__(self, how: SelfTraining, model: Any, text: Tensor, seen: Sequence[int], average: Any = None):
        if how.teacher == "ema" and average is None:
            raise ValueError(
                "self_training: the teacher 'ema' needs a moving average of the weights; set ema, for example 0.999"
            )
        self.how, self.model, self.text, self.average = how, model, text, average
        self.seen = list(seen)
        self.unseen = [i for i in range(len(text)) if i not in set(self.seen)]
        if not self.unseen:
            raise ValueError("self_training: every class is seen, so there is nothing to label; leave it out")
        self.frozen = copy.deepcopy(model).eval().requires_grad_(False) if how.teacher == "frozen" else None

    @torch.no_grad()
    def label(self, images: Tensor, target: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor | None]:
        """Labels [B, H, W] and, with the rule "annealed", weights [B, H, W].

        Args:
            images: [B, 3, H, W], normalised.
            target: labels [B, H, W] of all classes; those of unseen ones are not used.
        """
        known = torch.isin(target, torch.tensor(self.seen, device=target.device))
        labels = target.long().masked_fill(~known, ignore_index)
        with self._ready() as model:

            def scores(x: Tensor) -> Tensor:
                return model(x, self.text)

            if self.how.rule == "consistent":
                views = pseudo.views_of(scores, images, self.how.scales or ())
            else:
                views = [scores(images)]
        found = [self._rule(labels[i : i + 1], [v[i : i + 1] for v in views], ignore_index) for i in range(len(labels))]
        weights = [weight for _, weight in found if weight is not None]
        return torch.cat([one for one, _ in found]), torch.cat(weights) if weights else None

    @contextlib.contextmanager
    def _ready(self):
        """The teacher, in its mode of testing."""
        if self.frozen is not None:
            yield self.frozen
            return
        training = self.model.training
        self.model.eval()
        try:
            with self.average.applied() if self.how.teacher == "ema" else contextlib.nullcontext():
                yield self.model
        finally:
            self.model.train(training)

    def _rule(self, labels: Tensor, views: list[Tensor], ignore_index: int) -> tuple[Tensor, Tensor | None]:
        """One image's labels and weights; maps are enlarged an image at a time."""
        how, size = self.how, labels.shape[1:]
        large = [F.interpolate(view.float(), size, mode="bilinear") for view in views]
        match how.rule:
            case "best":
                return pseudo.best(labels, large[0], self.unseen, ignore_index), None
            case "rank":
                return pseudo.rank(labels, large[0], self.unseen, how.within or 0, ignore_index), None
            case "share":
                return pseudo.share(labels, large[0], self.unseen, how.percent or 0, ignore_index), None
            case "consistent":
                return pseudo.consistent(labels, large, self.unseen, ignore_index), None
            case _:
                return pseudo.annealed(labels, large[0], self.unseen, how.temperature or 0, ignore_index)
