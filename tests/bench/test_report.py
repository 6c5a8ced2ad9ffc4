"""Tables and comparisons of bench runs, from rows made up here."""

import json
import re

import pytest

from bench import report as pages
from bench.__main__ import main
from bench.compare import compare
from bench.headlines import CHART, PAGES, ratios
from bench.rows import faster, read


def row(group="op, 20 classes", rival="fastzs", seconds=(0.1, 0.1, 0.1), device="some processor", **more):
    median = sorted(seconds)[len(seconds) // 2]
    base = {"group": group, "rival": rival, "dtype": "float32", "device": device, "threads": 2, "torch": "2.15"}
    base |= {"seconds": list(seconds), "median seconds": median, "error": 1e-7, "peak MB": 3.0, "bytes": 10**6}
    base |= {"operations": 10**6, "copy bytes/s": 1e10, "matrix operations/s": 1e11, "times the floor": 9.0}
    return base | more


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    else:
        commit = {"id": "abcdef0123456789", "dirty": False}
        path.write_text(json.dumps({"benchmarks": [{"extra_info": one} for one in rows], "commit_info": commit}))
    return path


ROWS = [
    row(rival="published", seconds=(1.0, 1.1, 1.2), faster=1.0, headline=True, **{"peak MB": 100.0}),
    row(rival="torch.compile", seconds=(0.05, 0.05, 0.05), faster=20.0, headline=True),
    row(
        rival="fastzs int8",
        faster=11.0,
        products="int8",
        **{"matrix operations/s": 4e11, "copy bytes/s": 9e10, "memory bytes/s": 2e10},
    ),
    row(seconds=(0.1, 0.1, 0.1), faster=11.0, headline=True),
]
OTHER = row(group="op, 847 classes", parts={"forward": 0.5, "backward": 1.5})  # nobody else's tensors fit


def test_the_page_shows_wins_and_losses(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    path = pages.report([write(tmp_path / "a.json", [*ROWS, OTHER])], "the command", tmp_path / "results", page)
    assert path.name == "some-2-threads.md"
    line = "| op, 20 classes | 1.1 s | torch.compile, 50 ms | 100 ms | 11 | **0.5** | 100 to 3 |"
    assert line in path.read_text()
    assert "| published | float32 | 1.1 s | 9 % | 1 | 1e-07 | 100 | 9 |" in path.read_text()
    assert "`the command` on some processor, 2 threads" in path.read_text()
    assert "commit abcdef012345" in path.read_text()
    assert "Copies at most 20 GB/s, multiplies at most 100 GFLOP/s in float32, 400 GFLOP/s in int8." in path.read_text()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{pages.END}\nafter\n")
    assert line in text
    assert "old" not in text
    assert "| op, 847 classes |  |  | 100 ms |  |  | 3 |" in path.read_text()
    assert "Where the time of fastzs goes, in one call: forward 500 ms, backward 1.5 s." in path.read_text()
    assert "847" not in text  # the page of headlines has a row an op


def test_the_page_of_headlines_is_not_emptied(tmp_path, capsys):
    path = write(tmp_path / "a.json", [OTHER])
    assert main(["report", str(path), "--folder", str(tmp_path)]) == 2
    assert f"no rows for performance.md in {path}: run the whole bench, or --no-page" in capsys.readouterr().err


def test_plots_are_written_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = [(1, 32, 1), (10, 32, 1), (10, 64, 1), (10, 32, 2)]
    many = [
        row(group=str(size), op="op", rival=rival, **dict(zip(("classes", "height", "batch"), size, strict=True)))
        for size in sizes
        for rival in ("published", "fastzs")
    ]
    drawn = pages.plots([*ROWS, *many], tmp_path / "plots")
    names = ["ratios", "memory", "roofline", "classes", "height", "batch"]
    assert [path.stem for path in drawn] == names
    assert all(path.stat().st_size > 5000 for path in drawn)
    assert [path.stem for path in pages.plots(many[:2], tmp_path / "few")] == ["roofline"]


def test_lines_cut_short_are_left_out_and_a_later_row_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(seconds=(1.0,)), row(seconds=(2.0,))])
    path.write_text(path.read_text() + '{"group": "op')
    assert [one["seconds"] for one in read([path])] == [[2.0]]


def test_ratios_are_of_the_rounds():
    assert faster(row(seconds=(1.0, 2.0, 4.0)), row(seconds=(3.0, 4.0, 4.0))) == 2.0


def test_comparing_tells_changes_from_noise(tmp_path, capsys):
    old = [row(), row(rival="shaky", seconds=(0.1, 0.2, 0.3)), row(rival="gone")]
    new = [row(seconds=(0.2, 0.2, 0.2)), row(rival="shaky", seconds=(0.1, 0.25, 0.3)), row(rival="came")]
    files = [str(write(tmp_path / name, rows)) for name, rows in (("a.json", old), ("b.jsonl", new))]
    assert main(["compare", *files]) == 0
    text = capsys.readouterr().out
    assert "| op, 20 classes | fastzs | float32 | 100 ms | 200 ms | 2.00 times as long |" in text
    assert "| shaky |" not in text
    assert "only before: op, 20 classes, gone" in text
    assert "only after: op, 20 classes, came" in text
    assert "nothing beyond noise" in compare(old, old)


def test_machines_are_not_mixed(tmp_path, capsys):
    one, other = write(tmp_path / "a.json", [row()]), write(tmp_path / "b.json", [row(device="another")])
    assert main(["compare", str(one), str(other)]) == 2
    assert main(["report", str(one), str(other), "--no-page", "--folder", str(tmp_path)]) == 2
    assert "another, some processor" in capsys.readouterr().err


def test_files_that_are_no_bench_run_are_named(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text("[]")
    assert main(["report", str(path), "--no-page"]) == 2
    assert f"{path} is not the JSON of a bench run" in capsys.readouterr().err


def test_the_chart_of_the_readme_has_what_the_tables_have(tmp_path):
    """``python -m bench headlines`` draws it anew."""
    drawn = CHART.read_text(encoding="utf-8")
    shown = [text for text in re.findall(r"<text [^>]*>([^<]*)</text>", drawn) if re.fullmatch(r"[\d.]+", text)]
    for page in PAGES:
        machine, times = ratios(page)
        assert machine in drawn
        assert {f"{time:g}" for time in times} <= {*shown}
    page = tmp_path / "machine.md"
    page.write_text("# machine\n\n| problem | times faster than published |\n|---|---|\n| op | **0.5** |\n")
    with pytest.raises(ValueError, match=r"machine\.md: has no figure of 'label_map"):
        ratios(page)
    page.write_text("# machine\n")
    with pytest.raises(ValueError, match="expected a table"):
        ratios(page)
