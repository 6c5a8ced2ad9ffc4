"""The page of a GPU hour: what ``bash bench/gpu.sh`` found, and which tiles it would change."""

import json
import re
from pathlib import Path
from typing import Any

from .report import report

# "path::test[case] PASSED [ 3%]", as pytest -v prints them one after the other
OUTCOME = re.compile(r"^(tests/\S+|bench/\S+) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
FASTER = 1.03  # a tile is proposed if it is by at least this factor faster than the table's


def gpu_report(folder: Path) -> str:
    """Write ``gpu.md`` into the folder of a run, whole or cut short; returns what was written.

    Raises:
        ValueError: the folder holds no run.
    """
    stages = _lines(folder / "stages.jsonl")
    if not stages:
        raise ValueError(f"{folder} holds no stages.jsonl; run: bash bench/gpu.sh {folder}")
    last = {entry["stage"]: entry for entry in stages}  # of a stage that ran again, the last
    page = ["# What the GPU said", ""]
    commit = folder / "commit.txt"
    page += [f"Commit {commit.read_text().strip()}.", ""] if commit.exists() else []
    card = folder / "nvidia-smi.txt"
    page += ["```", card.read_text().rstrip(), "```", ""] if card.exists() else ["No GPU: a dry run.", ""]
    page += ["| stage | ended | seconds | passed | failed |", "|---|---|---|---|---|"]
    failures: list[str] = []
    for name, entry in last.items():
        log = folder / f"{name}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        outcomes = OUTCOME.findall(text)
        failures += [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
        passed = sum(outcome == "PASSED" for _, outcome in outcomes)
        failed = sum(outcome in ("FAILED", "ERROR") for _, outcome in outcomes)
        page.append(f"| {name} | {entry['ended']} | {entry['seconds']} | {passed or ''} | {failed or ''} |")
    page += ["", "## Failures", "", *(f"- `{test}`" for test in failures)] if failures else []
    page += ["", *_tiles(_lines(folder / "tiles.jsonl"))]
    rows = folder / "rows.jsonl"
    if rows.exists() and rows.stat().st_size:
        made = report([rows], "bash bench/gpu.sh", folder, None)
        page += ["", "## Bench", "", f"{made}"]
    (folder / "gpu.md").write_text("\n".join(page) + "\n")
    return "\n".join(page)


def proposals(measured: list[dict[str, Any]]) -> dict[tuple[str, str, int], tuple[list[int], float]]:
    """Kernel, entry and architecture -> the fastest tile and by what factor, where it beats the table's own."""
    found = {}
    for key in dict.fromkeys((row["kernel"], row["entry"], row["arch"]) for row in measured):
        mine = [row for row in measured if (row["kernel"], row["entry"], row["arch"]) == key]
        best = min(mine, key=lambda row: row["seconds"])
        own = [row["seconds"] for row in mine if row["tile"] == row["own"]]
        if own and own[0] > FASTER * best["seconds"]:
            found[key] = best["tile"], own[0] / best["seconds"]
    return found


def _tiles(measured: list[dict[str, Any]]) -> list[str]:
    if not measured:
        return []
    page = ["## Tiles", ""]
    if any(row["dry"] for row in measured):
        return [*page, "Of a dry run: times of the interpreter, which say nothing."]
    page += ["| kernel | entry | tile | microseconds |", "|---|---|---|---|"]
    for row in measured:
        mark = " (the table's)" if row["tile"] == row["own"] else ""
        page.append(f"| {row['kernel']} | {row['entry']} | {row['tile']}{mark} | {1e6 * row['seconds']:.1f} |")
    page += ["", "Changes of `kernels/configs/tiles.json` that these times ask for:", ""]
    changes = proposals(measured)
    for (kernel, entry, arch), (tile, factor) in changes.items():
        page.append(f'- `{kernel}`, "{entry}": `"sm_{arch}": {tile}`, {factor:.2f} times as fast')
    return page if changes else [*page[:-1], "none."]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON of a file; the last may be cut short."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
