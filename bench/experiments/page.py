"""A page of results: a table that a command makes, and below it what somebody read in it."""

from pathlib import Path

from fastzs.files import write_atomically

READING = "## Reading"


def write_page(path: Path, page: str) -> None:
    """Write the page; the reading that is there already stays."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    reading = before[before.index(READING) :] if READING in before else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (page + (f"\n{reading}" if reading else "")).encode())
