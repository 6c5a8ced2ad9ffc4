"""What a training says on its way: a line on the screen, CSV files always, TensorBoard where it is installed."""

import csv
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from fastzs.files import write_atomically

LOG, EVALUATION = "log.csv", "evaluation.csv"


class TrainingLog:
    """Writes ``log.csv`` (step, learning rate, loss parts, rates) and ``evaluation.csv``; shows progress on stderr.

    Args:
        folder: of the training.
        first: the step it starts or goes on at; lines of later steps, which a crash has undone, are removed.
        max_steps: steps in all.
        batch_size: images of a step.
        every: steps between lines.
    """

    def __init__(self, folder: Path, first: int, max_steps: int, batch_size: int, every: int):
        self.folder, self.max_steps, self.batch_size, self.every = folder, max_steps, batch_size, every
        for name in (LOG, EVALUATION):
            _cut(folder / name, first)
        self.sums: dict[str, float] = {}
        self.steps, self.waited = 0, 0.0
        self.since = time.perf_counter()
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self.board = writer(str(folder / "tensorboard"), purge_step=first)
        self.bar = None
        if sys.stderr.isatty():
            self._show(first)

    def step(self, step: int, losses: Mapping[str, float], rate: float, waited: float) -> None:
        """Take note of step ``step`` (counted from 1), its losses, learning rate and seconds spent waiting for data."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps, self.waited = self.steps + 1, self.waited + waited
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0])
        if step % self.every and step != self.max_steps:
            return
        taken = time.perf_counter() - self.since
        means = {name: value / self.steps for name, value in self.sums.items()}
        speed = {
            "seconds_per_step": taken / self.steps,
            "pictures_per_second": self.batch_size * self.steps / taken,
            "waiting_for_data": self.waited / taken,
        }
        self._write(LOG, {"step": step, "lr": rate, **means, **speed}, "train")
        self._say(step, means, taken / self.steps)
        self.sums, self.steps, self.waited = {}, 0, 0.0
        self.since = time.perf_counter()

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Take note of an evaluation after ``step`` steps; its time does not count as the training's."""
        self._write(EVALUATION, {"step": step, **scores}, "evaluation")
        text = " ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self._print(f"step {step}: {text}")

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on something other than steps."""
        self.since += seconds

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()

    def _write(self, name: str, row: dict[str, float], group: str) -> None:
        path = self.folder / name
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="") as file:
            lines = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                lines.writeheader()
            lines.writerow({key: value if isinstance(value, int) else f"{value:.6g}" for key, value in row.items()})
        if self.board is not None:
            for key, value in row.items():
                if key != "step" and math.isfinite(value):
                    self.board.add_scalar(f"{group}/{key}", value, int(row["step"]))

    def _show(self, first: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
        )
        self.bar.add_task("", total=self.max_steps, completed=first, said="")
        self.bar.start()

    def _say(self, step: int, means: Mapping[str, float], seconds: float) -> None:
        losses = " ".join(f"{name} {value:.3g}" for name, value in means.items())
        rate = f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], said=f"{losses}, {rate}")
            return
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.max_steps - step) % 86400))
        days = int(seconds * (self.max_steps - step) // 86400)
        self._print(f"step {step}/{self.max_steps} {losses}, {rate}, {f'{days} d ' if days else ''}{left} left")

    def _print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _cut(path: Path, first: int) -> None:
    """Remove the lines of steps after ``first``, and a line that a crash has cut short."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    header, rest = lines[:1], lines[1:]
    kept = [line for line in rest if int(line.split(",")[0]) <= first]
    write_atomically(path, "".join(header + kept).encode())
