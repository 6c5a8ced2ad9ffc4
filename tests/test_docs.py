"""The pages: links lead somewhere, the site builds without a warning, and what Getting started and README show runs."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fastzs
from fastzs.cli import COMMANDS, main
from fastzs.kernels.packed_linear.compiled import why_int8_is_slow
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


def commands(page: Path) -> list[list[str]]:
    """The arguments of each ``fastzs`` in a page's shell blocks."""
    text, found = page.read_text(encoding="utf-8"), []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
            if "fastzs" in words and "..." not in words:
                found.append(words[words.index("fastzs") + 1 :])
    return found


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


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_that_are_shown_are_understood(page, monkeypatch):
    for words in commands(page):
        given: list = []
        monkeypatch.setattr(COMMANDS[words[0]], "run", lambda config, given=given: given.append(config) or 0)
        assert main(words) == 0, words
        assert len(given) == 1


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


GUIDES = ["photographs", "concepts", "formats", "export", "evaluation", "operators"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the guides name, the built-in model's kind of them."""
    monkeypatch.chdir(tmp_path)
    scene = Image.open(ROOT / "docs" / "pictures" / "scene.png").convert("RGB")
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    for name in ("photo.jpg", "street.jpg", "photos/one.png"):
        scene.save(name)
    Image.new("L", scene.size, 1).save("masks/one.png")
    Path("names.yaml").write_text("- wood\n- red disc: [red ring, orange disc]\n- paper\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_the_python_of_guides_runs(page, place):
    code = (
        blocks(f"docs/{page}.md").replace('backbone="ViT-B-16", ', "").replace('weights="openai"', 'weights="shapes"')
    )
    for word, other in WORDS.items():
        code = code.replace(f'"{word}"', f'"{other}"')
    assert code
    if page == "export":
        assert main(["export", "maskclip", "--weights", "shapes", "--output", "exported"]) == 0
    # what they take for granted
    known = {"fastzs": fastzs, "seg": fastzs.load(weights="shapes"), "masks": np.asarray(Image.open("masks/one.png"))}
    known["queries"] = runpy.run_path(str(ROOT / "examples" / "own_operator.py"))["queries"]
    exec(compile(code, page, "exec"), known)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["photographs", "formats", "video", "maps"])
def test_the_commands_of_guides_run(page, place):
    if page == "video":
        pytest.importorskip("av", reason="needs the extra 'video'")
        from tests.video.clips import write_clip

        write_clip("clip.mp4", 3)
    elif page == "maps":
        pytest.importorskip("rasterio", reason="needs the extra 'geo'")
        from tests.maps.test_raster import noise, write

        write("scene.tif", noise(3, 60, 80))
    for words in commands(ROOT / "docs" / f"{page}.md"):
        if "int8" in words and why_int8_is_slow():
            continue
        for option in ("--backbone", "--weights"):
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
        if "--classes" in words:
            words[words.index("--classes") + 1] = "wood, red disc, paper"
        assert main([*words, *(["--weights", "shapes"] if words[0] != "convert" else [])]) == 0, words
