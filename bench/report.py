"""``python -m bench report``: the tables and plots of a bench run, and the table of docs/performance.md."""

from collections.abc import Sequence
from pathlib import Path

from .rows import Row, commit, duration, faster, groups, is_ours, machine, read, spread

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- made by python -m bench report -->", "<!-- end of what is made -->"
SIZES = {"classes": "classes", "height": "height in pixels or positions", "batch": "batch"}  # that curves go over
MARKERS = "os^vDPX*"
STYLES = ("-", "--", ":")
GREYS = ("0.2", "0.45", "0.6", "0.75")
VERSIONS = ("python", "torch", "triton", "cuda", "xformers", "openvino", "onnxruntime")


def report(files: Sequence[Path], command: str, folder: Path = RESULTS, page: Path | None = None) -> Path:
    """Write ``folder/MACHINE.md``, plots beside it where matplotlib is there, and the table in ``page``.

    ``folder/MACHINE.md`` has everything, ``page`` the problems that stand for their op or model ("headline").

    Raises:
        ValueError: files that are not a bench's, have no rows or are of several machines; a page without the markers,
            or rows of which none is for it.
    """
    rows = read(files)
    if not rows:
        raise ValueError(f"no measured rows in {', '.join(map(str, files))}")
    headlines = [row for row in rows if row.get("headline")]
    if page is not None and not headlines:
        raise ValueError(f"no rows for {page.name} in {', '.join(map(str, files))}: run the whole bench, or --no-page")
    name = machine(rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    text = f"# {rows[0]['device']}\n\n{provenance(rows, files, command)}\n\n{summary(rows)}\n"
    pictures = plots(rows, folder / name)
    text += "".join(f"\n![{picture.stem}]({name}/{picture.name})" for picture in pictures) + "\n" * bool(pictures)
    text += "".join(f"\n## {group}\n\n{table(some)}\n{remarks(some)}" for group, some in groups(rows).items())
    path.write_text(text, encoding="utf-8")
    if page is not None:
        replace_table(page, f"{provenance(rows, files, command)}\n\n{summary(headlines)}")
    return path


def provenance(rows: Sequence[Row], files: Sequence[Path], command: str) -> str:
    row = rows[0]
    versions = ", ".join(f"{name} {row[name]}" for name in VERSIONS if name in row)
    commits = sorted({commit(file) for file in files} - {""})
    loads = sorted(row["load"] for row in rows if "load" in row)
    parts = [
        f"By `{command}` on {row['device']}" + (f", {row['threads']} threads" if "threads" in row else ""),
        versions + (f", commit {', '.join(commits)}" if commits else ""),
        f"Copies at most {_bandwidth(rows) / 1e9:.3g} GB/s, multiplies at most "
        + ", ".join(f"{rate / 1e9:.3g} GFLOP/s in {dtype}" for dtype, rate in _rates(rows).items()),
    ]
    if loads:
        parts.append(
            f"The machine's load (processes that wanted to run) was {loads[0]:g} to {loads[-1]:g}; "
            "rivals took turns round by round, so ratios bear it better than times"
        )
    return ". ".join(parts) + "."


def _bandwidth(rows: Sequence[Row]) -> float:
    return max(row.get("memory bytes/s", row["copy bytes/s"]) for row in rows)  # rows before 0.2.0 have one of them


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        kind = row.get("products", row["dtype"])  # rows before 0.2.0 do not say it
        found[kind] = max(found.get(kind, 0), row["matrix operations/s"])
    return found


def summary(rows: Sequence[Row]) -> str:
    """One line a problem: ours against the published order and against the fastest that is not ours; losses in bold.

    An empty cell: not measured, because nobody else computes it or its tensors would not fit.
    """
    lines = [
        "| problem | published | best other | fastzs | times faster than published | than best other | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, some in groups(rows).items():
        ours, first, best = _sides(some)
        if ours is None:
            continue
        cells = ["" if first is None else duration(first["median seconds"])]
        cells.append("" if best is None else f"{best['rival']}, {duration(best['median seconds'])}")
        cells.append(duration(ours["median seconds"]))
        cells += ["" if other is None else _factor(faster(ours, other)) for other in (first, best)]
        cells.append(("" if first is None else f"{_megabytes(first)} to ") + _megabytes(ours))
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sides(rows: Sequence[Row]) -> tuple[Row | None, Row | None, Row | None]:
    """Of a problem's rows ours, the first rival's (which the others' speeds are relative to) and the best other."""
    ours, others = _ours(rows), [row for row in rows if not is_ours(row)]
    if ours is None:
        return None, None, None
    same = [row for row in others if row["dtype"] == ours["dtype"]] or others
    first = others[0] if others and "faster" in others[0] else None
    return ours, first, min(same, key=lambda row: row["median seconds"], default=None)


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
        cells = [row["rival"], row["dtype"], duration(row["median seconds"])]
        cells.append(f"{100 * spread(row):.0f} %" if len(row["seconds"]) > 1 else "one round")
        cells += [f"{row['faster']:.3g}" if "faster" in row else "", f"{row['error']:.0e}", _megabytes(row)]
        cells.append(f"{row['times the floor']:.3g}" if "times the floor" in row else "")
        if "pictures/s" in head:
            cells.append(f"{row.get('pictures per second', 0):.3g}")
        if on_gpu:
            cells.append(duration(row["launch overhead seconds"]) if "launch overhead seconds" in row else "not known")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def remarks(rows: Sequence[Row]) -> str:
    """What was measured of some rows besides: the parts of a call, the rate at which a loader feeds it."""
    lines = []
    for row in rows:
        if "parts" in row:
            parts = ", ".join(f"{part} {duration(seconds)}" for part, seconds in row["parts"].items())
            lines.append(f"\nWhere the time of {row['rival']} goes, in one call: {parts}.\n")
        if "loader pictures per second" in row:
            rate = row["loader pictures per second"]
            lines.append(f"\nOne process of the loader gives {rate:.3g} pictures/s, decoding not counted.\n")
    return "".join(lines)


def replace_table(page: Path, content: str) -> None:
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} should have the lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """PNG files: ratios, memory, roofline, and times against what varies; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_ratios(rows, folder / "ratios.png"), _memory(rows, folder / "memory.png")]
    drawn.append(_roofline(rows, folder / "roofline.png"))
    drawn += [_curves(rows, folder / f"{what}.png", what) for what in SIZES]
    return [path for path in drawn if path is not None]


def _ratios(rows: Sequence[Row], path: Path) -> Path | None:
    """How many times faster than the published order ours is, and the best other: two bars a problem."""
    bars = []
    for group, some in groups(rows).items():
        ours, first, best = _sides(some)
        if ours is not None and first is not None and best is not None:
            times = [faster(ours, first), faster(best, first)]
            colour = "C0" if times[0] >= times[1] else "C3"
            bars.append((group, times, [f"{times[0]:.3g}", f"{times[1]:.3g} {best['rival']}"], (colour, "0.7")))
    label = "times faster than published: fastzs (red: a loss), best other (grey)"
    return _bars(bars, path, label, 1.0)


def _memory(rows: Sequence[Row], path: Path) -> Path | None:
    """Peak memory of ours and of the published order: two bars a problem."""
    bars = []
    for group, some in groups(rows).items():
        ours, first, _ = _sides(some)
        if ours is not None and first is not None and None not in (ours["peak MB"], first["peak MB"]):
            peaks = [max(row["peak MB"], 0.1) for row in (ours, first)]
            bars.append((group, peaks, [f"{peak:.{0 if peak >= 10 else 1}f}" for peak in peaks], ("C0", "0.7")))
    return _bars(bars, path, "peak MB beyond the inputs: fastzs (blue), published (grey)", 0.1)


def _bars(bars: Sequence[tuple], path: Path, label: str, start: float) -> Path | None:
    """Two bars a problem from ``start`` on a logarithmic axis, each with a text at its end."""
    import matplotlib.pyplot as plt

    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(11, 1 + 0.42 * len(bars)), layout="constrained")
    ends = [value for _, values, _, _ in bars for value in values] + [start]
    axes.set_xscale("log")
    axes.set_xlim(min(ends) * 0.7, max(ends) * 6)  # room for the texts
    for i, (_, values, texts, colours) in enumerate(bars):
        for offset, value, text, colour in zip((-0.2, 0.2), values, texts, colours, strict=True):
            axes.barh(i + offset, value - start, 0.38, left=start, color=colour)
            axes.text(max(value, start) * 1.04, i + offset, text, va="center", fontsize=7)
    axes.axvline(start, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [group for group, *_ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel(label)
    return _save(figure, path)


def _roofline(rows: Sequence[Row], path: Path) -> Path | None:
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["bytes"] and row["operations"]]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    bandwidth = _bandwidth(rows)
    reach = [row["operations"] / row["bytes"] for row in rows]
    for i, (dtype, rate) in enumerate(_rates(rows).items()):
        xs = [min(reach) / 2, rate / bandwidth, max(max(reach) * 2, rate / bandwidth)]
        axes.plot(
            xs, [min(x * bandwidth, rate) for x in xs], label=f"ceiling, {dtype}", color="0.3", linestyle=STYLES[i % 3]
        )
    points = [(x, row["operations"] / row["median seconds"]) for x, row in zip(reach, rows, strict=True)]
    others = [point for point, row in zip(points, rows, strict=True) if not is_ours(row)]
    axes.scatter(*zip(*others, strict=True), s=10, color="0.75", label="rivals") if others else None
    for i, op in enumerate(dict.fromkeys(row.get("op", "other") for row in rows if is_ours(row))):
        some = [p for p, row in zip(points, rows, strict=True) if is_ours(row) and row.get("op", "other") == op]
        axes.scatter(*zip(*some, strict=True), s=24, color=f"C{i}", marker=MARKERS[i // 10], label=f"fastzs, {op}")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.set_title("bf16 may be computed in fp32, and then lies above its own ceiling", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def _curves(rows: Sequence[Row], path: Path, what: str) -> Path | None:
    """Times over ``what``: a panel for each op and rest of its sizes, a line for each rival."""
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        if "op" in row and what in row:
            rest = [f"{size} {row[size]}" for size in SIZES if size != what and size in row]
            name = row["rival"] if row["dtype"] == "float32" else f"{row['rival']}, {row['dtype']}"
            panels.setdefault(", ".join([row["op"], *rest]), {}).setdefault(name, {})[row[what]] = row["median seconds"]
    panels = {
        title: several
        for title, lines in panels.items()
        if (several := {name: points for name, points in lines.items() if len(points) > 1})
    }
    if not panels:
        return None
    columns = min(3, len(panels))
    lines_of_panels = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines_of_panels, columns, figsize=(5 * columns, 3.6 * lines_of_panels), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        ours = [name for name in lines if name.startswith("fastzs")]
        others = [name for name in lines if name not in ours]
        for name, points in lines.items():
            if name in ours:
                style = {"color": "C0", "marker": "o", "linestyle": "-" if name == "fastzs" else ":"}
            else:
                place = others.index(name)
                style = {"color": GREYS[place % 4], "marker": MARKERS[1 + place % 7], "linestyle": "--"}
            xs = sorted(points)
            axes.plot(xs, [points[x] for x in xs], label=name, **style)
        ticks = sorted({x for points in lines.values() for x in points})
        axes.set(xscale="log", yscale="log", xlabel=SIZES[what], ylabel="seconds")
        axes.set_xticks(ticks, [str(x) for x in ticks])
        axes.minorticks_off()
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
