"""Tables from what the bench measured.

pytest bench --benchmark-only --benchmark-json run.json
python -m bench report run.json            # bench/results/MACHINE.md with plots, and the table of docs/performance.md
python -m bench compare old.json new.json  # what changed beyond noise
python -m bench headlines                  # the chart of the README, from the tables of bench/results
python -m bench gpu-report out/gpu         # the page of bash bench/gpu.sh, and which tiles it would change
"""

import argparse
import sys
from pathlib import Path

from .compare import compare
from .gpu_report import gpu_report
from .headlines import headlines
from .report import PAGE, RESULTS, report
from .rows import read


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="what", required=True)
    tables = commands.add_parser("report", help="tables and plots of a run")
    tables.add_argument("files", nargs="+", type=Path, help="of --benchmark-json, or .jsonl of FASTZS_BENCH_ROWS")
    tables.add_argument("--folder", type=Path, default=RESULTS, help="where MACHINE.md goes")
    tables.add_argument("--command", default="pytest bench --benchmark-only", help="what measured it, for the page")
    tables.add_argument("--no-page", action="store_true", help="leave the table of docs/performance.md as it is")
    both = commands.add_parser("compare", help="what changed between two runs")
    both.add_argument("old", type=Path)
    both.add_argument("new", type=Path)
    commands.add_parser("headlines", help="the chart of the README")
    hour = commands.add_parser("gpu-report", help="the page of bash bench/gpu.sh")
    hour.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.what == "report":
            print(report(given.files, given.command, given.folder, None if given.no_page else PAGE))
        elif given.what == "headlines":
            print(headlines())
        elif given.what == "gpu-report":
            print(gpu_report(given.folder))
        else:
            print(compare(read([given.old]), read([given.new])))
    except ValueError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
