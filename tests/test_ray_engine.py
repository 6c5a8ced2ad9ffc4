"""``fastzs segment --engine ray``: what it writes, and what it refuses."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys

import pytest
from PIL import Image

from fastzs.cli import main
from fastzs.commands.segment import Job
from fastzs.data.shapes import draw
from fastzs.needed import MissingPackage
from fastzs.ray_engine import Actors, _Actor
from fastzs.vocabulary import Vocabulary


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, image in enumerate(draw(5, (48, 48)).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    return folder


@pytest.mark.slow
def test_two_actors_give_what_one_process_gives(pictures, tmp_path, monkeypatch, capsys):
    if any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow", "pandas")):
        pytest.skip("needs the extra 'ray'")
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--weights", "shapes", "--classes", "disc,star", "--device", "cpu", "--overlay", "--output"]
    home = os.getcwd()
    monkeypatch.chdir(pictures)
    assert main(["segment", "3.png", *options, str(two)]) == 0
    assert main(["segment", ".", *options, str(one)]) == 1
    plain = capsys.readouterr()
    # in a process of its own, for Ray changes its process's signals and environment
    command = [sys.executable, "-m", "fastzs", "segment", ".", *options, str(two), "--engine", "ray", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": home}
    ray = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ray.returncode == 1, ray.stderr
    assert "5 of 6 images segmented, 0 done before, 1 failed" in plain.out
    assert "4 of 6 images segmented, 1 done before, 1 failed" in ray.stdout  # it went on where the plain run was
    problem = next(line for line in plain.err.splitlines() if line.startswith("failed: "))
    assert problem in ray.stderr.splitlines()
    assert "5/5" in ray.stderr  # the bar
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in set(names) - {"run.json", "manifest.jsonl"}:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    records = [json.loads((folder / "run.json").read_text()) for folder in (one, two)]
    for key in ("settings_hash", "failed"):
        assert records[0][key] == records[1][key]
    assert main(["segment", ".", *options, str(two)]) == 1
    assert "0 of 6 images segmented, 5 done before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "it needs --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray chooses each actor's GPU; say --device cuda"),
    ],
)
def test_what_cannot_be_done_is_said(pictures, tmp_path, capsys, options, message):
    assert main(["segment", str(pictures), "--classes", "a", "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_actor_works_in_the_folder_of_the_command(pictures, monkeypatch):
    monkeypatch.chdir(os.getcwd())  # so that it is restored
    actor = _Actor(str(pictures), lambda names: map(os.path.abspath, names))
    block = actor({"item": [pickle.dumps("0.png"), pickle.dumps("1.png")]})
    assert [pickle.loads(result) for result in block["result"]] == [str(pictures / "0.png"), str(pictures / "1.png")]


def test_a_cluster_that_is_not_there(pictures, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray.data", reason="needs the extra 'ray'")
    import ray

    def nobody(**options):
        assert "address" not in options
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", nobody)
    options = ["--classes", "a", "--output", str(tmp_path / "out"), "--engine", "ray"]
    assert main(["segment", str(pictures), *options]) == 2
    assert "RAY_ADDRESS=auto: Could not find any running Ray instance.\n" in capsys.readouterr().err


def test_not_under_torchrun(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="without torchrun"):
        Actors(2, "cpu")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'fastzs\[ray\]'"):
        Actors(2, "cpu")


def test_a_job_travels_without_its_model():
    load = {"model": "maskclip", "weights": "shapes", "checkpoint": None, "device": "cpu"}
    job = Job(load, Vocabulary(["disc", "star"]), "threshold", 0.5)
    assert job.facts()["device"]["device"] == "cpu"
    assert "segmenter" in vars(job)
    there = pickle.loads(pickle.dumps(job))
    assert "segmenter" not in vars(there)
    assert there.vocabulary.hash == job.vocabulary.hash
    assert there.facts() == job.facts()
