"""The progress bar of every command: counts, rate and time left, on stderr."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar for ``with``; :meth:`start` says how many steps there are.

    Args:
        title: text before the bar.
        unit: what a step is, in the singular.
        shown: whether it is drawn at all.
    """

    def __init__(self, title: str, unit: str, *, shown: bool = True):
        self.title, self.unit = title, unit
        self.bar = Progress(
            TextColumn("{task.fields[title]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            disable=not shown,
        )

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.bar.stop()

    def start(self, total: int | None) -> None:
        """Begin with 0 of ``total``, or of an unknown number."""
        self.task = self.bar.add_task("", total=total, rate="", title=self.title)

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` as done."""
        self.bar.advance(self.task, steps)
        if speed := self.bar.tasks[0].speed:
            rate = f"{speed:.1f} {self.unit}s/s" if speed >= 1 else f"{1 / speed:.1f} s/{self.unit}"
            self.bar.update(self.task, rate=rate)

    def say(self, sentence: str) -> None:
        """Print a sentence in red above the bar, whether or not the bar is drawn."""
        self.bar.console.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)
