"""The tables of all systems, from rows made up here; and that every system's twin can be judged."""

import json

import pytest
import torch

from bench import systems
from bench.rivals import largest_error
from bench.test_systems import RIVALS, answers


def row(system, order, seconds, **more):
    base = {"group": f"{system}, 20 classes", "system": system, "rival": order, "dtype": "float32", "device": "a CPU"}
    base |= {"threads": 2, "torch": "2.15", "load": 0.5, "seconds": seconds, "processor seconds": [2 * seconds[0]]}
    return base | {"median seconds": seconds[0], "pictures per second": 1 / seconds[0], "peak MB": 100.0} | more


def test_tables_are_made_of_the_benchs_rows(tmp_path, monkeypatch):
    figures = {"parameters (M)": 1.0, "trained (M)": 0.5, "multiply-adds (G)": 3.0}
    monkeypatch.setattr(systems, "counted", lambda: dict.fromkeys(systems.FULL, figures))
    rows = [row("clip_rc", "fastzs", [2.0]), row("zsseg", "fastzs", [20.0]), row("zsseg", "published", [30.0])]
    rows += [row("clip_rc", "fastzs", [1.0], dtype="bfloat16"), {"group": "op", "rival": "fastzs", "device": "a CPU"}]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": one} for one in rows]}))
    found = systems.measured(path)
    assert found.keys() == {("clip_rc", "fastzs"), ("zsseg", "fastzs"), ("zsseg", "published")}
    table = systems.table(found)
    assert "| `clip_rc` | 1.0 | 0.5 | 3.0 | 0.5 | 100 |" in table
    assert "| `lseg` | 1.0 | 0.5 | 3.0 | unmeasured | unmeasured |" in table
    page = systems.report(found)
    assert "| `zsseg` | published | 0.0333 | 60.0 | 100 |" in page
    assert "| clip_rc (fastzs) | zsseg (published) | 15.0 | 15.0 |" in page
    assert "float32, a CPU, 2 threads, torch 2.15, 1 round, load 0.5 to 0.5" in page


def test_a_run_without_systems_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match="has no rows of bench/test_systems"):
        systems.measured(path)


@pytest.mark.parametrize("name", ["published clip_rc", "published zsseg", "fastzs szn"])
def test_twins_are_worth_judging(name):
    order, system = name.split()
    answer, right = answers(system, order, "cpu", torch.float32)
    maps = answer(torch.empty(0))
    assert largest_error([maps], [right(torch.empty(0))]) < 1e-4
    assert maps.flatten(-2).std(-1).max() > 0.01 * maps.abs().max()  # they say something of the picture
    assert systems.counted().keys() == set(systems.FULL) == {one.split()[1] for one in RIVALS}
