"""Letters of any script: each is drawn in the first font that has it.

In this order: the font inside Pillow (ASCII); DejaVu Sans, which matplotlib ships (European alphabets, Arabic, Hebrew,
symbols); Noto Sans CJK of the package noto-cjk-sans-jp-regular (Chinese, Japanese, Korean); the fonts of the system.
``pip install 'fastzs[fonts]'`` installs both packages.
"""

import importlib.util
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

PACKAGES = (
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    ("noto_cjk_sans_jp_regular", "NotoSansCJKjp-Regular.otf"),
)
FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts",),
}.get(sys.platform, ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"))
MOST = 400  # fonts of the system that are tried
NO_LETTER = "\uffff"  # what a font draws for this is its sign for letters that it lacks
log = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def text_width(text: str, size: int) -> int:
    """Width in pixels of a line that :func:`draw_text` draws with letters of ``size`` pixels."""
    return round(sum(font.getlength(part) for part, font in _parts(text, size)))


def draw_text(draw: ImageDraw.ImageDraw, left: float, middle: float, text: str, size: int) -> None:
    """Draw a line in black that begins at ``left``, with ``middle`` as the middle of its height.

    Letters that no font has come out as boxes, and a line in the log names them.
    """
    for part, font in _parts(text, size):
        draw.text((left, middle), part, fill="black", font=font, anchor="lm")
        left += font.getlength(part)


def _parts(text: str, size: int) -> list[tuple[str, Font]]:
    """The line, in one font if a packaged one has all of its letters, else cut where the font changes."""
    letters = {letter for letter in text if not letter.isspace()}
    for source in _packaged():
        if all(_has(source, letter) for letter in letters):
            return [(text, _font(source, size))]
    parts: list[tuple[str, Font]] = []
    missing = ""
    for letter in text:
        # what joins or changes the letter before it stays with that
        if parts and (letter.isspace() or unicodedata.category(letter) in ("Mn", "Me", "Mc", "Cf")):
            parts[-1] = (parts[-1][0] + letter, parts[-1][1])
            continue
        source = _source(letter)
        missing += letter if source is None else ""
        font = _font(source or "", size)
        if parts and parts[-1][1] is font:
            parts[-1] = (parts[-1][0] + letter, font)
        else:
            parts.append((letter, font))
    if missing:
        _warn(missing)
    return parts


@lru_cache(maxsize=256)
def _warn(letters: str) -> None:
    log.warning(
        "legend: no font here has %s, so boxes are drawn; pip install 'fastzs[fonts]', or install a font that has it",
        " ".join(f"{letter} (U+{ord(letter):04X})" for letter in dict.fromkeys(letters)),
    )


@lru_cache(maxsize=4096)
def _source(letter: str) -> str | None:
    """File of the first font that has a letter; "" for the one inside Pillow."""
    return next((source for source in _sources() if _has(source, letter)), None)


def _sources() -> Iterator[str]:
    yield from _packaged()
    yield from _system()


def _packaged() -> Iterator[str]:
    yield ""
    for package, file in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if os.path.isfile(path := os.path.join(folder, file)):
                yield path


@lru_cache(maxsize=1)
def _system() -> tuple[str, ...]:
    found = [
        str(path)
        for folder in FOLDERS
        for path in Path(os.path.expanduser(folder)).rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]
    # upright sans-serif ones of ordinary weight first
    return tuple(sorted(found, key=lambda path: ("Sans" not in path, "Regular" not in path, len(path), path))[:MOST])


@lru_cache(maxsize=4096)
def _has(source: str, letter: str) -> bool:
    try:
        font = _font(source, 16)
        return _mask(font, letter) != _lack(source)
    except (OSError, ValueError, UnicodeError):  # a damaged file, or a kind that is not for this
        return False


@lru_cache(maxsize=512)
def _lack(source: str) -> bytes:
    return _mask(_font(source, 16), NO_LETTER)


def _mask(font: Font, letter: str) -> bytes:
    mask: Any = font.getmask(letter)
    return bytes(mask)


@lru_cache(maxsize=64)
def _font(source: str, size: int) -> Font:
    return ImageFont.truetype(source, size) if source else ImageFont.load_default(size)
