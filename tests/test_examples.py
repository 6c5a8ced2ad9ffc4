"""The scripts of ``examples/`` run, and the gallery in the docs is what they make."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SHOWN = ROOT / "docs" / "pictures" / "gallery"


@pytest.mark.slow
def test_the_gallery_is_what_the_script_makes(tmp_path):
    """``python examples/gallery.py docs/pictures/gallery`` makes it anew."""
    runpy.run_path(str(ROOT / "examples" / "gallery.py"))["main"](tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in SHOWN.iterdir())
    for name in made:
        ours, kept = (np.asarray(Image.open(folder / name), np.int16) for folder in (tmp_path, SHOWN))
        # another processor or Pillow may change single pixels at borders, and JPEG spreads each over its block
        assert (np.abs(ours - kept).max(2) > 32).mean() < 0.01, name
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert all(f"pictures/gallery/{name}" in page for name in made)
