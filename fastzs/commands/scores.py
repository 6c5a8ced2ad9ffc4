"""What ``fastzs evaluate`` prints and writes: tables of scores, ``results.json`` and plots."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastzs import __version__

if TYPE_CHECKING:
    from fastzs.data.protocols import Protocol
    from fastzs.evaluate import AnyDataset
    from fastzs.folds import FoldScores
    from fastzs.metrics import ConfusionMatrix

PLOTS = ("iou.png", "confusion.png")
ROWS = 40  # classes in a column of the printed table
LEAST = 80  # letters of the table of all classes together
WIDE = 30  # letters of a column beside the name: " (unseen)", two figures and the lines between


def show(matrices: "dict[float, ConfusionMatrix]", protocol: "Protocol", dataset: "AnyDataset", about: dict) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=True)
    wide = max(map(cell_len, protocol.classes)) + WIDE
    console.width = max(console.width, wide, LEAST)  # names are never cut
    what = f"predictions in {about['predictions']}" if "predictions" in about else about["model"]
    console.print(f"{what} on {dataset.what}, {about['pictures']} images", markup=False, highlight=False)
    console.print(f"protocol {protocol}", markup=False, highlight=False)
    summary = Table()
    summary.add_column("calibration" if "predictions" not in about else "")
    for title in ("pAcc", "mAcc", "mIoU", "mIoU(S)", "mIoU(U)", "hIoU"):
        summary.add_column(title, justify="right")
    for constant, matrix in matrices.items():
        s = matrix.scores_of(protocol)
        first = f"{constant:g}" if "predictions" not in about else ""
        summary.add_row(first, *(_percent(value) for value in (s.pAcc, s.mAcc, s.mIoU, s.seen, s.unseen, s.hIoU)))
    console.print(summary)
    scores = next(iter(matrices.values())).scores_of(protocol)
    columns = min(-(-len(protocol.classes) // ROWS), console.width // wide)
    table = Table()
    for _ in range(columns):
        table.add_column("class")
        table.add_column("IoU", justify="right")
        table.add_column("Acc", justify="right")
    rows = -(-len(protocol.classes) // columns)
    for row in range(rows):
        cells: list[str | Text] = []
        for i in range(row, len(protocol.classes), rows):
            name = protocol.classes[i] + (" (unseen)" if i in protocol.unseen else "")
            cells += [Text(name), _percent(scores.iou[i]), _percent(scores.accuracy[i])]
        table.add_row(*cells)
    console.print(table)
    if scores.absent:
        console.print(
            f"{len(scores.absent)} classes are not in the truth: {', '.join(scores.absent)}",
            markup=False,
            highlight=False,
        )


def show_fold(found: "FoldScores", protocol: "Protocol", dataset: "AnyDataset", model: str) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=True)
    console.width = max(console.width, max(map(cell_len, found.iou)) + WIDE)
    console.print(f"{model} on {dataset.what}, one unseen class at a time", markup=False, highlight=False)
    console.print(f"protocol {protocol}", markup=False, highlight=False)
    table = Table("class")
    table.add_column("IoU", justify="right")
    for name, value in (*found.iou.items(), ("mIoU", found.mIoU), ("FBIoU", found.FBIoU)):
        table.add_row(Text(name), _percent(value))
    console.print(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def write(
    folder: Path, protocol: "Protocol", dataset: "AnyDataset", about: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    from fastzs.files import write_atomically
    from fastzs.runs import OutputError

    content = {
        "fastzs": __version__,
        "protocol": {
            "name": protocol.name,
            "summary": str(protocol),
            "classes": list(protocol.classes),
            "unseen": list(protocol.unseen),
            "background": protocol.background,
        },
        "dataset": dataset.what,
        **about,
        "results": results,
    }
    for name in PLOTS:  # of an earlier run, whose figures they show
        (folder / name).unlink(missing_ok=True)
    path = folder / "results.json"
    try:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def plot(folder: Path, matrix: "ConfusionMatrix", protocol: "Protocol") -> None:
    from fastzs.plots import save_bars, save_confusion
    from fastzs.runs import OutputError

    for name, save in zip(PLOTS, (save_bars, save_confusion), strict=True):
        try:
            save(folder / name, matrix, protocol)
        except OSError as error:
            raise OutputError(f"cannot write {folder / name}: {error.strerror}") from error
