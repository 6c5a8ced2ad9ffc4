"""The compiled library and its build: falls back when it may, fails when it must, and says which."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastzs.kernels import extension

ROOT = Path(__file__).parents[2]


def build(tmp_path, **environment):
    """Run the build into ``tmp_path``; the finished process and the build's report (None if there is none)."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    report = tmp_path / "fastzs" / "_build.json"
    return done, json.loads(report.read_text()) if report.exists() else None


@pytest.mark.slow
def test_auto_survives_a_broken_compiler(tmp_path):
    done, report = build(tmp_path, FASTZS_BUILD="auto", CXX="/bin/false", CC="/bin/false", MAX_JOBS="1")
    assert done.returncode == 0, done.stderr
    assert report is not None
    assert not report["library"]
    assert report["cpu"].startswith("failed to build")


@pytest.mark.slow
def test_an_explicit_build_fails_with_a_broken_compiler(tmp_path):
    done, _ = build(tmp_path, FASTZS_BUILD="cpu", CXX="/bin/false", CC="/bin/false", MAX_JOBS="1")
    assert done.returncode != 0


def test_no_build(tmp_path):
    done, report = build(tmp_path, FASTZS_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert report is None
    assert not list(tmp_path.rglob("*.so"))


def test_unknown_build(tmp_path):
    done, _ = build(tmp_path, FASTZS_BUILD="gpu")
    assert done.returncode != 0
    assert "FASTZS_BUILD='gpu' is unknown; use auto, 0, cpu or cuda" in done.stderr


def test_says_what_is_missing(monkeypatch):
    if extension.why_not_loaded() is not None:
        pytest.skip(extension.why_not_loaded() or "")
    assert extension.why_missing("mask_sums", "cpu") is None
    assert "no such_op" in (extension.why_missing("such_op", "cpu") or "")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastzs::mask_sums", "CUDA"):
        assert "no cuda part of mask_sums" in (extension.why_missing("mask_sums", "cuda") or "")


def test_a_library_that_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text('{"cpu": "failed to build: no compiler"}')
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    monkeypatch.setattr(extension, "build_report", extension.build_report.__wrapped__)
    reason = extension.why_not_loaded.__wrapped__()
    assert reason == "the extension is not built (failed to build: no compiler)"


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    reason = extension.why_not_loaded.__wrapped__()
    assert reason.startswith("_C.abi3.so does not load: ")
