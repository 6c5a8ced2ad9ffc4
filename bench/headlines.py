"""``python -m bench headlines``: the bar chart of the README, from the tables of ``bench/results``."""

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHART = ROOT / "docs" / "pictures" / "headlines.svg"
PAGES = tuple(
    ROOT / "bench" / "results" / f"{name}.md" for name in ("intel-xeon-2.80ghz-2-threads", "amd-epyc-2-threads")
)
COLUMN = "times faster than published"
# problems of the tables, and what the chart calls them
HEADLINES = {
    "label_map, 171 classes, regions, to 683 x 512, cpu": "class maps to labels,\n171 classes",
    "mask_loss forward + backward, B 2, C 156, 32x32 -> 512x512, cpu": "mask losses and gradients,\n156 classes",
    "dense_attention kk+gaussian, fp32, cpu": "NACLIP's attention",
    "training step, clip_rc, 171 classes, 2 x 512 x 512, cpu": "CLIP-RC, a training step,\n171 classes",
    "clip_rc, 171 classes, 683 x 512 to labels, cpu": "CLIP-RC, image to labels,\n171 classes",
    "clip_rc, 20 classes, 683 x 512 to labels, cpu": "CLIP-RC, image to labels,\n20 classes",
}


def ratios(page: Path) -> tuple[str, list[float]]:
    """The machine of a page, and how many times faster than published each of :data:`HEADLINES` is there.

    Raises:
        ValueError: the page has no such table, or lacks one of the problems.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    machine = lines[0].removeprefix("# ").replace("(R)", "").replace(" Processor", "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    if not rows or COLUMN not in rows[0]:
        raise ValueError(f"{page}: expected a table with the column {COLUMN!r} first; run python -m bench report")
    place = rows[0].index(COLUMN)
    found = {row[0]: row[place].strip("*") for row in rows if len(row) == len(rows[0])}
    if missing := [problem for problem in HEADLINES if not found.get(problem)]:
        raise ValueError(f"{page}: has no figure of {missing[0]!r}; run that row of the bench, too")
    return machine, [float(found[problem]) for problem in HEADLINES]


def headlines(pages: Sequence[Path] = PAGES, chart: Path = CHART) -> Path:
    """Draw the chart: for each problem one bar a machine, on a logarithmic axis that begins at 1, the published order.

    Raises:
        ValueError: as :func:`ratios`.
    """
    machines = [ratios(page) for page in pages]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = 0.8 / len(machines)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastzs", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
        for i, (machine, times) in enumerate(machines):
            places = [place + (i - (len(machines) - 1) / 2) * width for place in range(len(times))]
            axes.barh(
                places,
                [time - 1 for time in times],
                width * 0.92,
                left=1,
                color=("#4f6bed", "#f28c38")[i],
                label=machine,
            )
            for place, time in zip(places, times, strict=True):
                axes.text(time * 1.05, place, f"{time:g}", va="center", fontsize=9)
        axes.set(
            xscale="log", xlim=(1, 900), xlabel="times faster than the published order of work (CPU, 2 threads, fp32)"
        )
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200, 500], ["1", "2", "5", "10", "20", "50", "100", "200", "500"])
        axes.minorticks_off()
        axes.set_yticks(range(len(HEADLINES)), list(HEADLINES.values()))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
        figure.savefig(chart, metadata={"Date": None})
        plt.close(figure)
    return chart
