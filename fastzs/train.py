"""Training: one loop for every model that has a method ``losses``.

A model is trained if it has

- ``losses(images, target, text, *, seen=None, transductive=False, **weights)``: a dictionary of scalar tensors, whose
  ``"total"`` is minimised. images [B, 3, H, W] fp32 are normalised with the model's ``mean`` and ``std``, target
  [B, H, W] has indices of the classes or 255, text [C, D] has a vector for each class. ``seen`` lists the indices of
  the classes whose labels may be used; it is passed in the zero-shot settings only. ``transductive`` (True or "honest")
  is passed in the transductive settings only, which the model has if its attribute ``transductive`` says so. The
  attributes that ``class_options`` names hold classes by name or index; they are passed as indices.
- ``requires_grad`` on exactly the parameters to train; each of them gets a gradient in every step.
- ``save_pretrained(folder)``: writes its settings and a ``model.safetensors`` with all of its state.

All its randomness must come from torch's default generators. They are seeded anew in every step, so that a step
depends on the seed, its number and the process only. Any other state must be kept in buffers.
"""

import contextlib
import inspect
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastzs import checkpoints, ranks
from fastzs.averages import Average
from fastzs.data.batches import Batch, batches, mix
from fastzs.data.protocols import IGNORE, ignore_label
from fastzs.devices import native_bf16
from fastzs.errors import FastzsError
from fastzs.locks import hold
from fastzs.models.words import FixedClasses
from fastzs.optimizers import check_gradients, choose_trained, make_optimizer, set_rates
from fastzs.recipe import Recipe
from fastzs.renamed import current
from fastzs.runs import OutputError
from fastzs.self_training import TOLD, SelfTraining, Teacher
from fastzs.signals import Signals
from fastzs.trace import span, traced
from fastzs.training_log import TrainingLog
from fastzs.vocabulary import Vocabulary, class_indices, normal_name, text_vectors


class TrainingError(FastzsError, ValueError):
    """A training cannot continue; the message names the step and the images."""


@dataclass
class Outcome:
    """How a training went.

    Attributes:
        step: steps done.
        scores: of the last evaluation.
        best: the best evaluation's score, None if there was none.
        stopped_by: the signal that stopped it before its end, None if none did.
    """

    step: int
    scores: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    stopped_by: signal.Signals | None = None


def train(
    model: Any,
    dataset: Any,
    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    vocabulary: Vocabulary | Tensor,
    recipe: Recipe,
    output: str | Path,
    *,
    seen: Sequence[int] | None = None,
    loss_weights: Mapping[str, float] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    best: str = "hIoU",
    about: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Outcome:
    """Train ``model`` into the folder ``output``, or resume the training that the folder holds.

    Under ``torchrun`` every process calls this. A SIGTERM or Ctrl-C ends it after the step, with a checkpoint.

    Args:
        model: see the module's text.
        dataset, transform: see :func:`fastzs.data.batches.batches`.
        vocabulary: the classes of the data set, or their text vectors [C, D].
        recipe: all numbers.
        output: gets ``last`` and ``best`` (see :mod:`fastzs.checkpoints`), ``log.csv``, ``evaluation.csv``.
        seen: indices of the seen classes; needed unless the setting is "supervised".
        loss_weights: of the parts of the loss, keyword arguments for ``model.losses``.
        evaluate: scores of the model, called every ``recipe.evaluate_every`` steps and at the end, by all processes.
        best: the score by which the best checkpoint is chosen.
        about: other settings that decide the result, as plain values; a folder that holds a different run is refused.
        device: of each process; with several, "cuda" is each one's own.

    Raises:
        TrainingError: a loss or the gradient is not finite, the model refuses a batch.
        ValueError: settings that do not fit each other, the data or what is in ``output``.
        CheckpointError: ``output/last`` cannot be read.
        OutputError: a file cannot be written.
    """
    if len(vocabulary) != len(dataset.classes):
        raise ValueError(f"the data set has {len(dataset.classes)} classes, the vocabulary {len(vocabulary)}")
    device = torch.device(device)
    with hold(Path(output), "train"), Signals() as signals:
        text = _one_vector_each(model, vocabulary)
        names = vocabulary.names if isinstance(vocabulary, Vocabulary) else dataset.classes
        options = {**_class_options(model, names), **(loss_weights or {})}
        run = _Run(model, text, recipe, Path(output), seen, options, device)
        run.restore(_settings(dataset, recipe, seen, loss_weights, about))
        if run.outcome.step < recipe.max_steps:
            run.go(dataset, transform, evaluate, best, signals)
    return run.outcome


def _one_vector_each(model: Any, vocabulary: Vocabulary | Tensor) -> Tensor:
    """The text vectors [C, D] of the classes."""
    if not isinstance(vocabulary, Vocabulary):
        return vocabulary
    if vocabulary.row_groups is not None:
        raise ValueError("training needs one text vector for each class: pass Vocabulary(..., synonyms='mean')")
    with torch.no_grad():
        return text_vectors(model, vocabulary)


def _class_options(model: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """The classes that the model's own settings name, as indices."""
    found = {}
    for option in getattr(model, "class_options", ()):
        given = getattr(model, option)
        if given is None or isinstance(given, str):  # a single class, which the data set need not have
            found[option] = [i for i, name in enumerate(names) if given and normal_name(name) == normal_name(given)]
        else:
            found[option] = class_indices(given, names) if given else []
    return found


def _loss_options(model: Any) -> set[str]:
    """Names of the options of a model's losses."""
    return set(inspect.signature(getattr(model, "parts", model.loss_parts)).parameters)


def _settings(dataset: Any, recipe: Recipe, seen: Any, loss_weights: Any, about: Any) -> dict[str, Any]:
    """Every setting that decides the result."""
    data = {"classes": [str(name) for name in dataset.classes], "pictures": len(dataset), "seen": list(seen or ())}
    told = {"told of unseen pixels": TOLD} if recipe.self_training else {}
    return recipe.decisive() | data | told | {"loss_weights": dict(loss_weights or {}), "about": dict(about or {})}


class _Run:
    """A training under way."""

    def __init__(
        self,
        model: Any,
        text: Tensor,
        recipe: Recipe,
        output: Path,
        seen: Sequence[int] | None,
        loss_options: Mapping[str, Any],
        device: torch.device,
    ):
        self.arguments: dict[str, Any] = dict(loss_options)
        if (ignored := ignore_label(len(text))) != IGNORE:
            self.arguments["ignore_index"] = ignored
        if recipe.setting != "supervised":
            if not seen:
                raise ValueError(f"setting {recipe.setting!r} needs the seen classes: pass seen=[...]")
            self.arguments["seen"] = list(seen)
        if recipe.setting.startswith("transductive"):
            if not model.transductive:
                raise ValueError(
                    f"{type(model).__name__} has no transductive training; use setting 'inductive' or 'supervised'"
                )
            self.arguments["transductive"] = "honest" if recipe.setting == "transductive-honest" else True
        choose_trained(model, recipe.train)
        model.fingerprint = ""  # which is of the weights it starts from
        if recipe.checkpointing:
            _checkpoint_activations(model)
        self.model = model.to(device).train()
        self.text, self.recipe, self.output, self.device = text.to(device), recipe, output, device
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and native_bf16(device))
        self.optimizer = make_optimizer(model, recipe)
        self.average = Average(model, recipe.ema) if recipe.ema else None
        self.teacher = self._teacher(seen) if recipe.self_training else None
        self.outcome = Outcome(0)
        self.settings: dict[str, Any] = {}

    def _teacher(self, seen: Sequence[int] | None) -> Teacher:
        """The teacher that labels pixels in self-training. All labels are then used, so no pixel is marked as given.

        Raises:
            ValueError: settings of self-training that do not fit the model.
        """
        how = SelfTraining.read(self.recipe.self_training)
        if isinstance(self.model, FixedClasses):
            self.arguments["self_labelled"] = True  # it needs to know which classes are unseen, too
        else:
            del self.arguments["seen"]
        if how.rule == "annealed" and "pixel_weights" not in _loss_options(self.model):
            raise ValueError(
                f"the rule 'annealed' needs a model that weighs pixels, and {type(self.model).__name__} does not"
            )
        return Teacher(how, self.model, self.text, seen or (), self.average)

    def restore(self, settings: dict[str, Any]) -> None:
        """Restore the last checkpoint, if there is one."""
        self.settings = settings
        folder = self.output / "last"
        if not folder.is_symlink():
            return
        state = checkpoints.read(folder)
        kept = current(state["settings"])
        if "about" in kept:
            kept["about"] = current(kept["about"])
        changed = sorted(key for key in settings if kept.get(key) != settings[key])
        if changed:
            before, now = ({key: some[key] for key in changed if key in some} for some in (kept, settings))
            raise ValueError(
                f"{self.output} has a training with other settings (there {_short(before)}, now {_short(now)}); "
                "give the same ones to go on with it, or another output folder"
            )
        missing, unexpected = load_model(self.model, folder / "model.safetensors", strict=False)
        if missing or unexpected:
            names = [*missing, *unexpected]
            raise checkpoints.CheckpointError(f"checkpoint {folder}: does not fit the model: {', '.join(names[:6])}")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.restore(state["raw"])
        self.outcome.step, self.outcome.best = state["step"], state["best"]

    def go(self, dataset: Any, transform: Any, evaluate: Any, best: str, signals: Signals) -> None:
        """Run the remaining steps."""
        recipe, first = self.recipe, self.outcome.step
        queue = batches(
            dataset,
            transform,
            batch_size=recipe.batch_size,
            steps=range(first, recipe.max_steps),
            parts=recipe.accumulate,
            seed=recipe.seed,
            rank=ranks.rank(),
            world=ranks.world(),
            workers=recipe.workers,
            pin=self.device.type == "cuda",
        )
        run: nn.Module = _Losses(self.model)
        if ranks.world() > 1:
            run = DistributedDataParallel(run, device_ids=[self.device] if self.device.type == "cuda" else None)
        with contextlib.ExitStack() as stack:
            log = None
            if ranks.rank() == 0:
                with self._writing():
                    self.output.mkdir(parents=True, exist_ok=True)
                    log = TrainingLog(self.output, first, recipe.max_steps, recipe.batch_size, recipe.log_every)
                stack.callback(log.close)
            for step in range(first, recipe.max_steps):
                rate = set_rates(self.optimizer, recipe, step)
                values, waited, stop = self._step(step, run, queue, signals)
                done = self.outcome.step = step + 1
                if log:
                    with self._writing():
                        log.step(done, values, rate, waited)
                begun = time.perf_counter()
                ended = done == recipe.max_steps
                better = False
                if evaluate and (ended or (recipe.evaluate_every and done % recipe.evaluate_every == 0)):
                    better = self._evaluate(evaluate, best)
                    if log:
                        with self._writing():
                            log.evaluation(done, self.outcome.scores)
                if ended or stop or better or done % recipe.save_every == 0 or done in recipe.keep:
                    self._save(["last", "best"] if better else ["last"])
                if log:
                    log.pause(time.perf_counter() - begun)
                if stop and not ended:
                    self.outcome.stopped_by = signal.Signals(stop)
                    break

    def _step(
        self, step: int, run: nn.Module, queue: Iterator[Batch], signals: Signals
    ) -> tuple[dict[str, float], float, int]:
        """Take one step. Returns its losses, the seconds it waited for data, and the signal to stop, if any came."""
        recipe, waited, names = self.recipe, 0.0, []
        values: dict[str, float] = {}
        for part in range(recipe.accumulate):
            begun = time.perf_counter()
            with span("train.data"):
                batch = next(queue)
            waited += time.perf_counter() - begun
            names += batch.names
            torch.manual_seed(mix(recipe.seed, "step", step, part, ranks.rank()))
            more = part < recipe.accumulate - 1  # gradients are exchanged with the last part
            with run.no_sync() if more and isinstance(run, DistributedDataParallel) else contextlib.nullcontext():
                losses = self._losses(run, batch, step)
                with span("train.backward"):
                    (losses["total"] / recipe.accumulate).backward()
            for name, value in zip(losses, torch.stack(list(losses.values())).tolist(), strict=True):
                values[name] = values.get(name, 0.0) + value / recipe.accumulate
        if step == 0:
            check_gradients(self.model)
        mine = values["total"]
        values, stop = self._agree(values, signals.came)
        if not math.isfinite(values["total"]):
            where = names if not math.isfinite(mine) else ["those of another process"]
            raise TrainingError(self._stopped(step, f"the loss is {values['total']}", where))
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if recipe.clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), recipe.clip_norm, norm)
        values["gradient_norm"] = norm.item()
        if not math.isfinite(values["gradient_norm"]):  # the weights must not take it, since they are to be kept
            raise TrainingError(self._stopped(step, f"the norm of the gradients is {norm.item()}", names))
        with span("train.optimizer"):
            self.optimizer.step()
        # A fused optimiser writes without being counted, and what the model keeps for evaluation goes by the counts.
        torch.autograd.graph.increment_version([p for p in self.model.parameters() if p.requires_grad])
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()
        return values, waited, stop

    def _losses(self, run: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        images, target = (x.to(self.device, non_blocking=True) for x in (batch.images, batch.target))
        arguments = dict(self.arguments)
        try:
            with span("train.forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                if self.teacher:
                    target, weights = self.teacher.label(images, target)
                    arguments |= {} if weights is None else {"pixel_weights": weights}
                losses = run(images, target, self.text, **arguments)
        except ValueError as error:
            raise TrainingError(self._stopped(step, str(error), batch.names)) from error
        return {name: value.float() for name, value in losses.items()}

    def _stopped(self, step: int, why: str, names: Sequence[str]) -> str:
        kept = f"the last good checkpoint is {self.output / 'last'}" if (self.output / "last").exists() else ""
        return f"step {step + 1}: {why}; its images: {', '.join(names)}" + (f"; {kept}" if kept else "")

    def _agree(self, values: dict[str, float], stop: int) -> tuple[dict[str, float], int]:
        """The mean of the losses over all processes, and the signal that any of them has got."""
        if ranks.world() == 1:
            return values, stop
        kinds = (signal.SIGTERM, signal.SIGINT)
        flags = [float(stop == kind) for kind in kinds]
        means = ranks.total(torch.tensor([*values.values(), *flags], dtype=torch.float64, device=self.device))
        *sums, term, interrupt = means.tolist()
        stop = signal.SIGTERM if term else signal.SIGINT if interrupt else 0
        return {name: value / ranks.world() for name, value in zip(values, sums, strict=True)}, stop

    @traced("train.evaluate")
    def _evaluate(self, evaluate: Callable[[Any], Mapping[str, float]], best: str) -> bool:
        """Score the model. Returns whether it is the best so far."""
        self.model.eval()
        with self.average.applied() if self.average else contextlib.nullcontext(), torch.no_grad():
            self.outcome.scores = dict(evaluate(self.model))
        self.model.train()
        if best not in self.outcome.scores:
            raise ValueError(f"the evaluation has no score {best!r}; it has {', '.join(self.outcome.scores)}")
        score = self.outcome.scores[best]
        better = not math.isnan(score) and (self.outcome.best is None or score > self.outcome.best)
        if better:
            self.outcome.best = score
        return better

    @traced("train.save")
    def _save(self, links: Sequence[str]) -> None:
        if ranks.rank() == 0:
            with self.average.applied() if self.average else contextlib.nullcontext():
                state = {
                    "step": self.outcome.step,
                    "best": self.outcome.best,
                    "settings": self.settings,
                    "optimizer": self.optimizer.state_dict(),
                    "raw": self.average.aside if self.average else None,
                }
                checkpoints.save(
                    self.output, self.outcome.step, self.model.save_pretrained, state, links, self.recipe.keep
                )
        if ranks.world() > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write to {self.output}: {error.strerror}") from error


class _Losses(nn.Module):
    """The model's losses as a forward pass, which is what several processes synchronise."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **arguments: Any) -> dict[str, Tensor]:
        return self.model.losses(*args, **arguments)  # type: ignore[operator]


def _checkpoint_activations(model: nn.Module) -> None:
    towers = [module for module in model.modules() if hasattr(module, "checkpointing")]
    if not towers:
        raise ValueError(f"{type(model).__name__} has no tower that can compute its activations again")
    for tower in towers:
        tower.checkpointing = True  # type: ignore[assignment]


def _short(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={str(value)[:60]}" for key, value in values.items())
