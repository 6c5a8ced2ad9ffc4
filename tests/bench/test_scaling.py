"""The scaling bench: turns of its points, the page, what a million pictures cost."""

import time

import pytest

from bench import scaling, scaling_page
from fastzs.loading import load


def test_points_take_turns_and_long_ones_are_called_once(monkeypatch):
    calls = []

    def run(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    monkeypatch.setattr(scaling, "LONG", 0.05)
    points = [({"n": 1}, lambda: run("a", 0.001)), ({"n": 2}, lambda: run("b", 0.1)), ({"n": 3}, lambda: run("c", 0.0))]
    rows = scaling.in_turns(points)
    assert calls == ["a", "b", "c", *["a", "c"] * scaling.ROUNDS]
    assert [len(row["seconds"]) for row in rows] == [scaling.ROUNDS, 1, scaling.ROUNDS]
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert rows[1]["seconds"][0] >= 0.1


def test_a_point_is_what_it_says():
    model = load("maskclip", weights="shapes", device="cpu").model
    facts, run = scaling.point(model, 64, 7, crop=32, stride=32, batch=2)
    assert facts == {"side": 64, "classes": 7, "windows": 4, "batch": 2}
    result = run()
    assert result.labels.shape == (64, 64)
    assert len(result.names) == 7


def test_what_a_manifest_takes():
    found = scaling.manifest(2000)
    assert found["lines"] == 2000
    assert 100 < found["bytes"] / 2000 < 400
    assert found["peak MB"] > 0


def point(**facts):
    return {"classes": 20, "side": 512, "windows": 1, "batch": 8, "seconds": [2.0, 1.0, 4.0]} | {
        "processor seconds": [3.0], "peak MB": 1234.5, **facts
    }  # fmt: skip


RUN = {"processes": 1, "threads": 2, "pictures": 16, "classes": 6, "seconds": 30.0}
FOUND = {
    "about": {"device": "some processor", "threads": 2, "precision": "float32", "commit": "abc", "minutes": 5.0},
    "classes": [point(classes=1), point(classes=2000, seconds=[6.0])],
    "sizes": [point(how="whole")],
    "batches": [point(windows=16, batch=1)],
    "counts": [{"pictures": 10, "seconds": 12.0}, {"pictures": 110, "seconds": 22.0}],
    "processes": [RUN | {"how": "one process", "pictures/s": 0.8}, RUN | {"how": "two", "pictures/s": 1.0}],
    "manifest": {"lines": 1000, "bytes": 200000, "seconds": 0.02, "peak MB": 2.0},
}


def test_the_page():
    text = scaling_page.page(FOUND)
    assert "| 2000 | 6 | 3 | 1 | 1234 |" in text
    assert "2000 classes take 3.00 times as long as 1." in text  # medians
    assert "So 11.0 s to start and 100.0 ms a picture." in text
    # at one picture per second, the faster of the two ways
    assert "| 1,000,000 | 278 | 11.6 days | 27.8 hours | 2.78 hours | 16.7 minutes |" in text
    assert "| 1,000,000,000 | 277,778 | 31.7 years | 3.17 years | 116 days | 11.6 days |" in text
    assert "grows by 200 bytes a picture" in text
    assert "20 s and 2.00 GB for a million" in text
    assert "Unmeasured: GPUs" in text


def test_the_formula():
    assert scaling_page.hours(3600, 2.0, 5) == pytest.approx(0.1)
    assert [scaling_page.span(h) for h in (0.5, 3, 100, 10**9)] == [
        "30 minutes",
        "3 hours",
        "4.17 days",
        "114,077 years",
    ]


def test_the_docs_have_a_place_for_it():
    text = scaling_page.DOCS.read_text(encoding="utf-8")
    assert text.count(scaling_page.BEGIN) == text.count(scaling_page.END) == 1
