"""Tables in the pages that are made from the code: ``python -m tests.tables`` writes them anew."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastzs.data.benchmarks import BENCHMARKS, SYSTEMS, Setting
from fastzs.models.training_free import Settings
from fastzs.registry import system, table

ROOT = Path(__file__).parents[1]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _windows(crop: int, stride: int) -> str:
    return f"{crop}/{stride}" if crop else "whole"


def defaults() -> str:
    """The settings of the training-free systems where nothing else is asked for."""
    rows = [["system", "operator", "residual and MLP", "short side", "crop/stride", "scale", "refinement"]]
    for name in SYSTEMS:
        ours: Settings = system(name).kind.published  # type: ignore[attr-defined]
        kept = "no" if ours.bare else "yes"
        sizes = [str(ours.short_side), _windows(ours.crop, ours.stride)]
        rows.append([f"`{name}`", f"`{ours.dense}`", kept, *sizes, f"{ours.readout.scale:g}", ours.readout.refine])
    return _markdown(rows)


def settings() -> str:
    """The published settings of the training-free systems on the eight benchmarks."""
    rows = [["system", *(f"`{name}`" for name in BENCHMARKS)]]
    for name in SYSTEMS:
        rows.append([f"`{name}`", *(_setting(benchmark.of(name)) for benchmark in BENCHMARKS.values())])
    return _markdown(rows)


def _setting(setting: Setting) -> str:
    parts = [str(setting.short_side), _windows(setting.crop, setting.stride)]
    parts += [f"{setting.threshold:g}"] * bool(setting.threshold)
    parts += [f"{name} {value:g}" for name, value in setting.options.items()]
    return ", ".join(parts)


# of each page the tables by the name in their markers
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/systems.md": {"models": lambda: table("does", "trained", "needs", "paper", "checkpoints")},
    "docs/training-free.md": {"defaults": defaults, "settings": settings},
}


def renewed(page: str) -> str:
    """The text of a page with its tables as the code has them now."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        text = before + begin + make() + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(renewed(page), encoding="utf-8")
