"""The table of drawn shapes in docs/systems.md, of the results that are kept: ``python -m bench.shapes_page``.

:mod:`bench.systems_shapes` makes the results. A result that another preset or older code gave is left out: a system
without one is "not run yet", one with fewer than three seeds says how many it has.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastzs.files import write_atomically

from .systems_shapes import BARS, PICTURES, RESULTS, SCORES, SEEDS, decided_by, kept, settings

DOCS = Path(__file__).parent.parent / "docs" / "systems.md"
MARKS = ("<!-- shapes: begin -->", "<!-- shapes: end -->")
HEAD = (
    "system", "seeds", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "spread", "control", "bar", "met", "steps", "minutes",
    "parameters, M",
)  # fmt: skip
TEACHER = "maskclip"  # whose hIoU CLIP-RC is to exceed with every seed


def results(name: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The results of a system's seeds, and its control's."""
    seeds = [kept(folder / name / f"seed-{i}.json", decided_by(name, i, False, PICTURES, None)) for i in SEEDS]
    control = kept(folder / name / "control.json", decided_by(name, 0, True, PICTURES, None))
    return [row for row in seeds if row], control


def met(name: str, rows: Sequence[dict[str, Any]], control: dict[str, Any] | None, teacher: float | None) -> str:
    """Whether a system reaches its bar, its control and, if CLIP-RC, MaskCLIP; "so far" while runs are missing."""
    bar = BARS[name]
    if bar is None:
        return ""
    found = [row["hIoU"] for row in rows]
    failed = []
    if statistics.mean(found) < bar:
        failed.append("bar")
    if control and statistics.mean(found) <= control["hIoU"]:
        failed.append("control")
    if name == "clip_rc" and teacher is not None and min(found) <= teacher:
        failed.append(f"`{TEACHER}`")
    if failed:
        return "no: " + ", ".join(failed)
    return "yes" if control and len(rows) == len(SEEDS) else "so far"


def line(name: str, rows: Sequence[dict[str, Any]], control: dict[str, Any] | None, teacher: float | None) -> list[str]:
    """The cells of a system."""
    bar = BARS[name]
    aim = "" if bar is None else f"{bar:g}"
    if not rows:
        return [f"`{name}`", "not run yet", *[""] * 6, aim, *[""] * 4]
    wanted = len(SEEDS) if settings(name) else 1
    values = {key: [row[key] for row in rows] for key in SCORES}
    means = [f"{statistics.mean(values[key]):.1f}" for key in SCORES]
    spread = f"{max(values['hIoU']) - min(values['hIoU']):.1f}" if len(rows) > 1 else ""
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return [
        f"`{name}`",
        f"{len(rows)}" + (f" of {wanted}" if len(rows) < wanted else ""),
        *means,
        spread,
        f"{control['hIoU']:.1f}" if control else "",
        aim,
        met(name, rows, control, teacher),
        f"{rows[0]['steps']}",
        f"{statistics.mean(seconds) / 60:.1f}" if any(seconds) else "",
        f"{rows[0]['parameters'] / 1e6:.2f}",
    ]


def table(folder: Path = RESULTS) -> str:
    """The table in Markdown, and where its results come from."""
    found = {name: results(name, folder) for name in BARS}
    teacher = next((row["hIoU"] for row in found[TEACHER][0]), None)
    rows = [HEAD, ("---",) * len(HEAD), *(line(name, *found[name], teacher) for name in BARS)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    every = [row for seeds, control in found.values() for row in (*seeds, *([control] if control else []))]
    if not every:
        return text
    machines = sorted({f"{row['machine']}, {row['threads']} thread(s), torch {row['torch']}" for row in every})
    commits = sorted({row["commit"] for row in every})
    return f"{text}\n\nMachine: {'; '.join(machines)}. Commits: {', '.join(commits)}."


def main() -> None:
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_atomically(DOCS, f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}".encode())


if __name__ == "__main__":
    main()
