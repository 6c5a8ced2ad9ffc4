"""The pages: links lead somewhere, the site builds without a warning, and what Getting started and README show runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import fastzs
from tests.tiny import tiny_clip

ROOT = Path(__file__).parents[1]
# what the built-in model calls by the names that the README asks a photograph for
WORDS = {"road": "wood", "car": "red disc", "person": "blue moon", "pedestrian": "pink cross", "cyclist": "cyan heart"}
WORDS |= {"sky": "paper", "asphalt": "gravel", "vehicle": "red ring"}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def blocks(page: str) -> str:
    """A page's Python, all of it, since later blocks use what earlier ones made."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_ci_finds_the_two_commands_of_the_readme():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.startswith("pip install -e ")]) == 2


def test_every_page_is_in_the_site():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^[a-z-]+$", index, re.MULTILINE))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} == listed


@pytest.mark.parametrize("path", [*(ROOT / ".github" / "workflows").glob("*.yml")], ids=lambda path: path.stem)
def test_workflows_may_only_read(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}


CALLS = """
seg = fastzs.load("naclip", backbone="ViT-B-16", weights="openai")
result = seg("street.jpg", ["road", "car"])
results = seg(["a.jpg", "b.jpg"], ["road", "car"], batch_size=8)
features = seg.encode("street.jpg")
a = seg.label(features, ["road", "car"])
b = seg.label(features, ["asphalt", "vehicle", "sky"])
dense = features.dense
"""


def test_the_calls_of_the_readme(tmp_path, monkeypatch):
    """Literally as they stand there, but for the weights: a random CLIP that takes milliseconds."""
    shown = blocks("README.md")
    missing = [line for line in CALLS.split("\n") if not re.search(rf"^{re.escape(line)}( |$)", shown, re.MULTILINE)]
    assert missing == ['result = seg("street.jpg", ["road", "car"])']  # there with more names
    asked = []
    monkeypatch.setattr(fastzs.clip, "load", lambda **given: asked.append(given) or tiny_clip())
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    for name, colour in (("street.jpg", "blue"), ("a.jpg", "red"), ("b.jpg", "green")):
        Image.new("RGB", (40, 32), colour).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    made: dict = {"fastzs": fastzs}
    exec(CALLS, made)
    assert asked == [{"backbone": "ViT-B-16", "weights": "openai"}]
    assert made["result"].names == made["a"].names == ("road", "car")
    assert torch.equal(made["result"].labels, made["a"].labels)
    assert made["b"].names == ("asphalt", "vehicle", "sky")
    assert [tuple(result.labels.shape) for result in made["results"]] == [(32, 40)] * 2
    norms = made["dense"].norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fastzs.load" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/getting-started.md", "README.md"])
def test_what_is_shown_runs(page, tmp_path, monkeypatch):
    """On the built-in model, where a page shows one that would have to be downloaded."""
    scene = ROOT / "docs" / "pictures" / "scene.png"
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    shutil.copy(scene, tmp_path / "docs" / "pictures")
    shutil.copy(scene, tmp_path / "street.jpg")
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(scene, tmp_path / name)
    (tmp_path / "photos").mkdir()
    shutil.copy(scene, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    code = blocks(page).replace('backbone="ViT-B-16", weights="openai"', 'weights="shapes"')
    for word, other in WORDS.items():
        code = code.replace(f'"{word}"', f'"{other}"')
    assert "seg.label(features" in code
    shown: dict = {}
    exec(compile(code, page, "exec"), shown)
    assert shown["result"].labels.ndim == 2
    assert list(tmp_path.glob("*_overlay.jpg"))
    assert list(tmp_path.glob("*.png"))
