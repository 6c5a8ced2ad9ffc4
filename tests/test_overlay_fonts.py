"""Legends in any script."""

import pytest
import torch
from PIL import Image, ImageDraw

from fastzs import fonts
from fastzs.fonts import draw_text, text_width
from fastzs.result import Segmentation


def drawn(text, size=24):
    image = Image.new("L", (max(text_width(text, size), 1) + 8, 2 * size), 255)
    draw_text(ImageDraw.Draw(image), 2, size, text, size)
    return image


@pytest.fixture(autouse=True)
def _fresh():
    for cached in (fonts._source, fonts._warn, fonts._system):
        cached.cache_clear()


@pytest.mark.parametrize(
    "text",
    ["žlutý kůň", "ґанок", "ψάρι", "كلب", "שמש", "猫と犬", "강아지", "树木", "a→b ≤ c", "½ é"],
)
def test_every_letter_is_its_own(text, caplog):
    pytest.importorskip("matplotlib", reason="needs the extra 'fonts'")
    pytest.importorskip("noto_cjk_sans_jp_regular", reason="needs the extra 'fonts'")
    assert drawn(text).getextrema()[0] < 100
    letters = {letter for letter in text if not letter.isspace()}
    pictures = {drawn(letter).tobytes() for letter in letters}
    assert len(pictures) == len(letters)
    assert drawn("\u0378").tobytes() not in pictures  # a letter that is none
    assert [record.message for record in caplog.records if "U+0378" not in record.message] == []


def test_ascii_is_drawn_as_before_and_needs_no_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(fonts, "FOLDERS", ())
    assert fonts._source("a") == ""
    assert drawn("cat").getextrema()[0] < 100


def test_what_no_font_has_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(fonts, "PACKAGES", ())
    monkeypatch.setattr(fonts, "FOLDERS", ())
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    result = Segmentation(labels, ("ねこ",), image=torch.zeros(3, 40, 60, dtype=torch.uint8))
    for _ in range(3):
        result.overlay()
    told = [record.message for record in caplog.records]
    assert len(told) == 1
    assert "ね (U+306D) こ (U+3053)" in told[0]
    assert "fastzs[fonts]" in told[0]


def test_damaged_fonts_of_the_system_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "Sans-Regular.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "PACKAGES", ())
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    assert fonts._source("ж") is None


def test_marks_stay_with_their_letter():
    parts = [part for part, _ in fonts._parts("नि a\u0301", 20)]
    assert "".join(parts) == "नि a\u0301"
    assert not any(part.startswith(("\u093f", "\u0301")) for part in parts)
