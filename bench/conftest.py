"""What of the bench runs by default, and how its rows come about.

``pytest bench --benchmark-only`` takes at most fifteen minutes on two cores and leaves out what is marked ``full``;
``-m quick`` takes at most three; ``-m "full or not full"`` runs everything, which takes hours, and so does naming a
file or a part of it together with any ``-m``. On a GPU everything that is marked ``gpu`` runs.

Rows replay what :mod:`bench.rivals` measured; pytest-benchmark prints them and writes the JSON.
"""

import importlib.util

import pytest

from .rivals import clock

SECONDS = 3600  # of one test at the most
BENCHMARK = bool(importlib.util.find_spec("pytest_benchmark"))


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        full = [item for item in items if item.get_closest_marker("full")]
        if len(full) < len(items):
            config.hook.pytest_deselected(items=full)
            items[:] = [item for item in items if item not in full]
    for item in items:
        if {"benchmark", "rival"} <= set(getattr(item, "fixturenames", ())):
            if BENCHMARK:
                item.add_marker(pytest.mark.benchmark(timer=clock))
            if config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(SECONDS))  # the first rival's test runs the whole contest


if not BENCHMARK:  # rows still go to FASTZS_BENCH_ROWS

    class Benchmark:
        def __init__(self):
            self.group, self.extra_info = "", {}

        def pedantic(self, run, rounds):
            for _ in range(rounds):
                run()

    @pytest.fixture
    def benchmark():
        return Benchmark()
