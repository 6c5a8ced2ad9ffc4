"""Two tiers: ``pytest`` runs every behaviour once, ``pytest -m slow`` what takes interpreters, compilers or processes.

``pytest -m "slow or not slow"`` runs both. Where pytest-xdist is installed, the suite as a whole takes all cores, with
one thread each; files that are named run in one process, and ``-n 0`` asks for one process always.
"""

import os
import shutil
import tempfile

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the option
def pytest_cmdline_main(config):
    whole = config.args_source is config.ArgsSource.TESTPATHS
    a_worker = hasattr(config, "workerinput")  # which has the arguments of the process that started it
    if a_worker or not whole or config.option.usepdb or config.option.collectonly:
        return
    if getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = min(os.cpu_count() or 1, 8)  # each process holds PyTorch: a gigabyte
        config.option.dist = "loadfile"  # a file's tests share what their fixtures compile
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    if "FASTZS_CACHE" not in os.environ:  # processes that tests and pytest-xdist start have the same
        folder = tempfile.mkdtemp(prefix="fastzs-tests-")
        os.environ["FASTZS_CACHE"] = folder  # not the user's: what an older version kept there must decide no test
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and len(slow) < len(items):  # a file or a test that is named runs, even where all of it is slow
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def pillows_guard(monkeypatch):
    """Commands that run in this process set Pillow's limit of pixels for all of it."""
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
