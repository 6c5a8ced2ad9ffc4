"""Rows of a bench run, read from pytest-benchmark's JSON or from the lines that FASTZS_BENCH_ROWS names a file for."""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files; of a row that is there twice, the last.

    Raises:
        ValueError: a file that is not a bench's, or rows of more than one machine.
    """
    rows: dict[tuple, Row] = {}
    for path in paths:
        for row in _rows(path):
            rows[row["device"], row["group"], row["rival"], row["dtype"]] = row
    machines = sorted({row["device"] for row in rows.values()})
    if len(machines) > 1:
        raise ValueError(f"rows of different machines do not go into one table: {', '.join(machines)}")
    return list(rows.values())


def _rows(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # the last may be cut short
        else:
            found = [entry["extra_info"] for entry in json.loads(text)["benchmarks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the JSON of a bench run: {type(error).__name__}: {error}") from error
    return [row for row in found if "seconds" in row]


def commit(path: Path) -> str:
    """The commit that a pytest-benchmark JSON was measured at, or an empty string."""
    if path.suffix == ".jsonl":
        return ""
    info = json.loads(path.read_text(encoding="utf-8")).get("commit_info") or {}
    return (info.get("id") or "")[:12] + (" with changes" if info.get("dirty") else "")


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by problem, in the order they were measured in."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def machine(rows: Sequence[Row]) -> str:
    """A file name for the machine."""
    row = rows[0]
    words = row["device"] if "threads" not in row else f"{row['device']} {row['threads']} threads"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower().replace("(r)", "").replace("processor", "")).strip("-")


def is_ours(row: Row) -> bool:
    return row["rival"].startswith("fastzs")


def spread(row: Row) -> float:
    """Half the distance of the quartiles, as a share of the median: how far the rounds of a row lie apart."""
    if len(row["seconds"]) < 2:
        return 0.0
    low, _, high = statistics.quantiles(row["seconds"], n=4)
    return (high - low) / 2 / row["median seconds"]


def faster(row: Row, other: Row) -> float:
    """How many times faster ``row`` is: the median over the rounds they were both in, or of the medians."""
    if len(row["seconds"]) != len(other["seconds"]):
        return other["median seconds"] / row["median seconds"]
    return statistics.median(b / a for a, b in zip(row["seconds"], other["seconds"], strict=True))


def duration(seconds: float) -> str:
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
