"""Plots of an evaluation: bars of the IoU of every class, and the confusion matrix. They need matplotlib."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastzs.data.protocols import Protocol
from fastzs.files import write_atomically
from fastzs.metrics import ConfusionMatrix
from fastzs.needed import check_installed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {False: "#3b75af", True: "#e0812d"}  # seen, unseen


def check() -> None:
    """Check that plots can be drawn.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    check_installed("matplotlib", "matplotlib", "plots", "plots")


def save_bars(path: Path, matrix: ConfusionMatrix, protocol: Protocol) -> None:
    """IoU of every class that occurs, best first, seen and unseen ones in two colours, as PNG.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    iou = matrix.iou()
    order = [int(i) for i in iou.nan_to_num(-1).argsort(descending=True) if not iou[i].isnan()]
    figure = Figure(figsize=(7, 1.2 + 0.2 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    colours = [COLOURS[i in protocol.unseen] for i in order]
    axes.barh(range(len(order)), [100 * iou[i].item() for i in order], color=colours)
    axes.set_yticks(range(len(order)), [protocol.classes[i] for i in order], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("IoU, %")
    axes.set_title(str(protocol), fontsize=8)
    if protocol.unseen:
        axes.legend(handles=[Patch(color=COLOURS[False], label="seen"), Patch(color=COLOURS[True], label="unseen")])
    _save(path, figure)


def save_confusion(path: Path, matrix: ConfusionMatrix, protocol: Protocol) -> None:
    """The confusion matrix as PNG: of each true class's pixels (rows) the share with each label (columns).

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    counts = matrix.counts.double()
    if not counts[:, -1].any():  # no prediction of no class
        counts = counts[:, :-1]
    shares = counts / counts.sum(1, keepdim=True)
    side = 2 + 0.16 * len(shares)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares.numpy(), vmin=0, vmax=100, cmap="magma", interpolation="nearest")
    names = (*protocol.classes, "no class")
    axes.set_xticks(range(counts.shape[1]), names[: counts.shape[1]], rotation=90, fontsize=6)
    axes.set_yticks(range(counts.shape[0]), protocol.classes, fontsize=6)
    for tick, i in zip(axes.get_yticklabels(), range(len(shares)), strict=True):
        tick.set_color(COLOURS[True] if i in protocol.unseen else "black")
    axes.set_xlabel("label")
    axes.set_ylabel("truth")
    axes.set_title(str(protocol), fontsize=8)
    figure.colorbar(image, label="% of the true class's pixels")
    _save(path, figure)


def _save(path: Path, figure: "Figure") -> None:
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None}  # the same figures give the same file
    figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
    write_atomically(path, buffer.getvalue())
