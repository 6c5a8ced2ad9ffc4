"""``python -m bench report``: the tables and plots of a bench run, and the README's table."""

from collections.abc import Sequence
from pathlib import Path

from .rows import Row, commit, duration, faster, groups, is_ours, machine, read, spread

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by python -m bench report -->", "<!-- end of what is made -->"
VERSIONS = ("python", "torch", "triton", "cuda", "xformers", "openvino", "onnxruntime")


def report(files: Sequence[Path], command: str, folder: Path = RESULTS, readme: Path | None = None) -> Path:
    """Write ``folder/MACHINE.md``, plots beside it where matplotlib is there, and the table in ``readme``.

    Raises:
        ValueError: files that are not a bench's, have no rows or are of several machines; a README without the markers.
    """
    rows = read(files)
    if not rows:
        raise ValueError(f"no measured rows in {', '.join(map(str, files))}")
    name = machine(rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    text = f"# {rows[0]['device']}\n\n{provenance(rows, files, command)}\n\n{summary(rows)}\n"
    pictures = plots(rows, folder / name)
    text += "".join(f"\n![{picture.stem}]({name}/{picture.name})" for picture in pictures) + "\n" * bool(pictures)
    text += "".join(f"\n## {group}\n\n{table(some)}\n" for group, some in groups(rows).items())
    path.write_text(text, encoding="utf-8")
    if readme is not None:
        replace_table(readme, f"{provenance(rows, files, command)}\n\n{summary(rows)}")
    return path


def provenance(rows: Sequence[Row], files: Sequence[Path], command: str) -> str:
    row = rows[0]
    versions = ", ".join(f"{name} {row[name]}" for name in VERSIONS if name in row)
    commits = sorted({commit(file) for file in files} - {""})
    loads = sorted(row["load"] for row in rows if "load" in row)
    parts = [
        f"By `{command}` on {row['device']}" + (f", {row['threads']} threads" if "threads" in row else ""),
        versions + (f", commit {', '.join(commits)}" if commits else ""),
        f"Copies at most {max(r['copy bytes/s'] for r in rows) / 1e9:.3g} GB/s, multiplies at most "
        + ", ".join(f"{rate / 1e9:.3g} GFLOP/s in {dtype}" for dtype, rate in _rates(rows).items()),
    ]
    if loads:
        parts.append(
            f"The machine's load (processes that wanted to run) was {loads[0]:g} to {loads[-1]:g}; "
            "rivals took turns round by round, so ratios bear it better than times"
        )
    return ". ".join(parts) + "."


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        found[row["dtype"]] = max(found.get(row["dtype"], 0), row["matrix operations/s"])
    return found


def summary(rows: Sequence[Row]) -> str:
    """One line a problem: ours against the first rival and against the fastest that is not ours; losses in bold."""
    lines = [
        "| problem | published | best other | fastzs | times faster than published | than best other | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, some in groups(rows).items():
        ours, others = _ours(some), [row for row in some if not is_ours(row)]
        if ours is None or not others:
            continue
        same = [row for row in others if row["dtype"] == ours["dtype"]] or others
        first, best = others[0], min(same, key=lambda row: row["median seconds"])
        memory = f"{_megabytes(first)} to {_megabytes(ours)}"
        cells = [duration(first["median seconds"]), f"{best['rival']}, {duration(best['median seconds'])}"]
        cells += [duration(ours["median seconds"]), _factor(faster(ours, first)), _factor(faster(ours, best)), memory]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ours(rows: Sequence[Row]) -> Row | None:
    mine = [row for row in rows if is_ours(row)]
    plain = [row for row in mine if row["rival"] == "fastzs"]
    return min(plain or mine, key=lambda row: row["median seconds"], default=None)


def _factor(times: float) -> str:
    return f"{times:.3g}" if times >= 1 else f"**{times:.2g}**"


def _megabytes(row: Row) -> str:
    return "?" if row.get("peak MB") is None else f"{row['peak MB']:.0f}"


def table(rows: Sequence[Row]) -> str:
    """All rows of a problem."""
    on_gpu = any("graph seconds" in row for row in rows)
    head = ["rival", "dtype", "median", "spread", "times faster", "error", "peak MB", "times the floor"]
    if any("pictures per second" in row for row in rows):
        head.append("pictures/s")
    head += ["launch overhead"] * on_gpu
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["rival"], row["dtype"], duration(row["median seconds"]), f"{100 * spread(row):.0f} %"]
        cells += [f"{row['faster']:.3g}" if "faster" in row else "", f"{row['error']:.0e}", _megabytes(row)]
        cells.append(f"{row['times the floor']:.3g}" if "times the floor" in row else "")
        if "pictures/s" in head:
            cells.append(f"{row.get('pictures per second', 0):.3g}")
        if on_gpu:
            cells.append(duration(row["launch overhead seconds"]) if "launch overhead seconds" in row else "not known")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_table(readme: Path, content: str) -> None:
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} should have the lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """PNG files: ratios, memory, roofline, and times against what varies; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_bars(rows, folder / "ratios.png", "faster", "times faster than published")]
    drawn.append(_bars(rows, folder / "memory.png", "peak MB", "peak MB beyond the inputs"))
    drawn.append(_roofline(rows, folder / "roofline.png"))
    for what in ("classes", "height", "batch"):
        drawn.append(_curves(rows, folder / f"{what}.png", what))
    return [path for path in drawn if path is not None]


def _bars(rows: Sequence[Row], path: Path, key: str, label: str) -> Path | None:
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.get(key)]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(rows)), layout="constrained")
    names = [f"{row['group']}: {row['rival']}" for row in rows]
    axes.barh(range(len(rows)), [row[key] for row in rows], color=["C0" if is_ours(row) else "0.6" for row in rows])
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(label)
    return _save(figure, path)


def _roofline(rows: Sequence[Row], path: Path) -> Path | None:
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["bytes"] and row["operations"]]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    bandwidth = max(row["copy bytes/s"] for row in rows)
    reach = [row["operations"] / row["bytes"] for row in rows]
    for dtype, rate in _rates(rows).items():
        xs = [min(reach) / 2, rate / bandwidth, max(max(reach) * 2, rate / bandwidth)]
        axes.plot(xs, [min(x * bandwidth, rate) for x in xs], label=f"ceiling, {dtype}")
    for ours, colour, label in ((True, "C0", "fastzs"), (False, "0.6", "rivals")):
        some = [(x, row["operations"] / row["median seconds"]) for x, row in zip(reach, rows, strict=True)]
        some = [point for point, row in zip(some, rows, strict=True) if is_ours(row) == ours]
        axes.scatter([x for x, _ in some], [y for _, y in some], s=12, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.legend()
    return _save(figure, path)


def _curves(rows: Sequence[Row], path: Path, what: str) -> Path | None:
    """Times of the rows that say that ``what`` varies, a line for each op and rival."""
    import matplotlib.pyplot as plt

    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.get("varies") == what:
            lines.setdefault(f"{row['op']}, {row['rival']}", {})[row[what]] = row["median seconds"]
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, points in lines.items():
        axes.plot(sorted(points), [points[x] for x in sorted(points)], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds")
    axes.legend(fontsize=7)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
