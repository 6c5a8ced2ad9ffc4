"""The figures of docs/scaling.md, from what :mod:`bench.scaling` measured.

python -m bench.scaling_page scaling.json
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
MANY, MACHINES = (10**6, 10**9), (1, 10, 100, 1000)


def hours(pictures: float, rate: float, machines: int) -> float:
    """pictures / (pictures per second per machine x machines), in hours."""
    return pictures / (rate * machines) / 3600


def span(hours: float) -> str:
    """A time as people say it."""
    for unit, size in (("years", 24 * 365.25), ("days", 24.0), ("hours", 1.0)):
        if hours >= 2 * size:
            return f"{hours / size:,.3g} {unit}" if hours / size < 1000 else f"{hours / size:,.0f} {unit}"
    return f"{hours * 60:.3g} minutes"


def page(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    classes, sizes, batches = found["classes"], found["sizes"], found["batches"]
    counts, processes = found["counts"], found["processes"]
    picture, names = f"{classes[0]['side']} x {classes[0]['side']}", f"{sizes[0]['classes']} classes"
    growth = median(classes[-1]) / median(classes[0])
    each = (counts[-1]["seconds"] - counts[0]["seconds"]) / (counts[-1]["pictures"] - counts[0]["pictures"])
    start = counts[0]["seconds"] - each * counts[0]["pictures"]
    parts = [
        introduction(found["about"]),
        f"**Classes**, ViT-B/16, a picture of {picture}, whole:",
        points(["classes"], classes),
        f"{classes[-1]['classes']} classes take {growth:.2f} times as long as {classes[0]['classes']}.",
        f"**Picture size**, {names}:",
        points(["how", "side", "windows"], sizes),
        f"**Windows at a time**, ViT-B/16, {batches[0]['windows']} windows of 224, {names}:",
        points(["batch"], batches),
        "**Pictures**, the whole command with the small model on pictures of 128 x 128:",
        table(["pictures", "seconds"], counts),
        f"So {start:.1f} s to start and {1000 * each:.1f} ms a picture.",
        f"**Processes**, {processes[0]['pictures']} pictures of {picture} by ViT-B/16, all cores in use each time:",
        table(["how", "processes", "threads", "seconds", "pictures/s"], processes),
        "Threads are each process's. Seconds are the whole command's, start included; pictures/s is over the middle "
        "half of the results, when all processes are at work.",
        *cost(found, picture),
    ]
    return "\n\n".join(parts) + "\n"


def introduction(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", "torch") if name in about)
    return (
        f"By `python -m bench.scaling` on {hardware(about)}; {versions}, commit {about['commit'] or 'unknown'}; "
        f"{about['minutes']} minutes, load at the start {about.get('load', 'unknown')}. Seconds are medians of the "
        "rounds; processor seconds are those of all cores together. **Unmeasured: GPUs, other machines, more than one "
        "machine.**"
    )


def hardware(about: dict[str, Any]) -> str:
    return f"{about['device']}, {about['threads']} threads, {about['precision']}"


def cost(found: dict[str, Any], picture: str) -> list[str]:
    """What a million and a billion pictures take, from the best rate of a whole machine."""
    best = max(found["processes"], key=lambda row: row["pictures/s"])
    rate = best["pictures/s"]
    head = ["pictures", "machine-hours", *(f"{n:,} machine{'s' * (n > 1)}" for n in MACHINES)]
    rows = [[f"{n:,}", f"{hours(n, rate, 1):,.0f}", *(span(hours(n, rate, m)) for m in MACHINES)] for n in MANY]
    done = found["manifest"]
    size, memory, seconds = (done[key] / done["lines"] for key in ("bytes", "peak MB", "seconds"))
    return [
        f"**A million and a billion pictures** of {picture} by ViT-B/16, {best['classes']} classes, on machines like "
        f"this one ({hardware(found['about'])}) at {rate:.3g} pictures per second each ({best['how']}), worked out:",
        marked(head, rows),
        f"The manifest grows by {size:.0f} bytes a picture; to go on, each process reads all of it: "
        f"{seconds * 1e6:.0f} s and {memory * 1e3:.2f} GB for a million pictures, by {done['lines']:,} lines.",
    ]


def median(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds"])


def points(keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """What each point is, then what was measured."""
    measured = []
    for row in rows:
        times = {kind: statistics.median(row[kind]) for kind in ("seconds", "processor seconds")}
        measured.append({**row, **times, "rounds": len(row["seconds"])})
    return table([*keys, "seconds", "processor seconds", "rounds", "peak MB"], measured)


def table(keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    return marked(keys, [[text(row[key]) for key in keys] for row in rows])


def text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def marked(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="JSON of bench.scaling")
    found = json.loads(parser.parse_args().measured.read_text(encoding="utf-8"))
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{page(found)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
