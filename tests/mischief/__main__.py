"""Run the cases; see the package's text."""

import sys
import tempfile
import time
from pathlib import Path

from tests.mischief import odd_files, odd_models, odd_pictures, odd_places
from tests.mischief.runner import Case, problems

GROUPS = (odd_pictures, odd_files, odd_models, odd_places)


def run(part: str = "") -> tuple[int, list[str]]:
    """The cases with ``part`` in their name: how many there are, and what is wrong."""
    chosen: list[Case] = [case for group in GROUPS for case in group.cases() if part in case.name]
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(chosen):
            begun = time.monotonic()
            wrong = problems(case, Path(folder) / str(number))
            found += wrong
            if wrong or time.monotonic() - begun > 3:
                print(f"{time.monotonic() - begun:5.1f} s  {case.name}", *wrong, sep="\n   ", flush=True)
    return len(chosen), found


if __name__ == "__main__":
    begun = time.monotonic()
    count, wrong = run(*sys.argv[1:2])
    print(f"{count} cases, {len(wrong)} problems, {time.monotonic() - begun:.0f} s")
    sys.exit(bool(wrong))
