"""What a release says of itself: one version, every package, and archives that hold what they should."""

import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
import yaml

import fastzs

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_stands_in_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) - (\S+)$", changelog, re.MULTILINE)
    assert "version" not in PROJECT
    assert released[0] == (fastzs.__version__, str(citation["date-released"]))
    assert citation["version"] == fastzs.__version__


def test_every_folder_of_modules_is_installed():
    folders = [path.parent.relative_to(ROOT) for top in ("fastzs", "kernels") for path in ROOT.glob(f"{top}/**/*.py")]
    names = {".".join(folder.parts) for folder in folders if "__pycache__" not in folder.parts}
    expected = {name if name.startswith("fastzs") else f"fastzs.{name}" for name in names}
    assert set(runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["packages"]()) == expected


def test_a_wheel_with_the_library_serves_all_later_pythons():
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    oldest = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    assert f"cp{oldest}" == setup["PYTHON"]
    options = setup["build_options"]()["options"]
    assert options == {"bdist_wheel": {"py_limited_api": f"cp{oldest}"}}
    distribution = setuptools.Distribution({"name": "fastzs", "ext_modules": [setuptools.Extension("fastzs._C", [])]})
    wheel = distribution.get_command_obj("bdist_wheel")
    wheel.py_limited_api = options["bdist_wheel"]["py_limited_api"]
    wheel.ensure_finalized()
    assert wheel.get_tag()[:2] == (f"cp{oldest}", "abi3")


def test_an_old_setuptools_gets_one_sentence(monkeypatch):
    monkeypatch.setattr("setuptools.__version__", "68.2.0")
    with pytest.raises(SystemExit, match=r"expected setuptools 77 or newer, got 68\.2\.0: run pip install -U"):
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


@pytest.mark.slow
def test_archives_hold_what_they_should(tmp_path):
    def run(folder, *command):
        command = [sys.executable, "setup.py", "-q", *command]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"FASTZS_BUILD": "0"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    run(ROOT, "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    with tarfile.open(tmp_path / f"fastzs-{fastzs.__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"fastzs-{fastzs.__version__}"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        top = re.compile(r"(fastzs|kernels|csrc|tests|bench|docs)/|[^/.]+$|[^/]+\.(md|toml|cff|py)$")
        missing = [name for name in listed.stdout.splitlines() if top.match(name) and not (unpacked / name).exists()]
        assert missing == []
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    assert {"csrc/label_map_cuda.cu", "csrc/simd.h", "kernels/dispatch.py", "tests/goldens"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc", "_build.json"))]

    run(unpacked, "bdist_wheel", "--dist-dir", tmp_path)  # of what the sdist holds
    with zipfile.ZipFile(tmp_path / f"fastzs-{fastzs.__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    assert {"fastzs/py.typed", "fastzs/kernels/dispatch.py", "fastzs/presets/voc/clip_rc/inductive.yaml"} <= names
    assert {name.partition("/")[0] for name in names} == {"fastzs", f"fastzs-{fastzs.__version__}.dist-info"}
    modules = {f"fastzs/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    modules |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastzs").rglob("*.py")}
    assert modules <= names
