"""Run the cases; see the package's text."""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.mischief import odd_files, odd_models, odd_pictures, odd_places
from tests.mischief.runner import Case, problems

GROUPS = (odd_pictures, odd_files, odd_models, odd_places)


def run(folder: Path, part: str = "") -> tuple[int, list[str]]:
    """The cases with ``part`` in their name, in ``folder``: how many there are, and what is wrong."""
    chosen: list[Case] = [case for group in GROUPS for case in group.cases() if part in case.name]
    found: list[str] = []
    for number, case in enumerate(chosen):
        begun, place = time.monotonic(), folder / str(number)
        wrong = problems(case, place)
        shutil.rmtree(place, ignore_errors=True)  # some hold many megabytes
        found += wrong
        if wrong or time.monotonic() - begun > 3:
            print(f"{time.monotonic() - begun:5.1f} s  {case.name}", *wrong, sep="\n   ", flush=True)
    return len(chosen), found


if __name__ == "__main__":
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        count, wrong = run(Path(folder), *sys.argv[1:2])
    print(f"{count} cases, {len(wrong)} problems, {time.monotonic() - begun:.0f} s")
    sys.exit(bool(wrong))
