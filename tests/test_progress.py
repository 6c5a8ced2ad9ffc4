"""The progress bar: titles are texts, whatever they look like."""

import pytest
from rich.console import Console

from fastzs import progress
from fastzs.data import datasets, pairs
from tests.data.folders import put_mask, put_picture


@pytest.fixture
def shown(monkeypatch):
    """What every bar writes, drawn without a terminal."""
    console = Console(record=True, force_terminal=True, width=200)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    return lambda: console.export_text(clear=False)


def test_titles_are_no_markup_and_no_format(shown):
    title = "evaluating {0} [red]x[/] [/b]"
    with progress.ProgressBar(title, "image") as bar:
        bar.start(2)
        bar.advance()
    assert title in shown()


def test_folders_of_any_name_are_checked_with_a_bar(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(pairs, "QUIET", 1)
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    images, masks = (tmp_path / "[odd] {0} [" / kind for kind in ("images", "masks"))
    put_picture(images / "a.png")
    put_mask(masks / "a.png", [0, 1])
    datasets.FolderDataset(images, masks, ["a", "b"])
    assert "checking folder" in shown()
    assert "[odd] {0} [" in shown()
