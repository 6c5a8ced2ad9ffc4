"""Files that are no images, broken images, and images of every odd kind."""

import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests.mischief.runner import Case, good_pictures, segment, segmented

FORMATS = ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")
GOOD = ("good0", "good1")


def encoded(kind: str, size: tuple[int, int] = (60, 40), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=Image.registered_extensions()[f".{kind}"])
    return buffer.getvalue()


def with_bad(name: str, put: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """Good images and a bad one, which is the first in the order."""

    def make(folder: Path) -> list[str]:
        inside = good_pictures(folder)
        put(inside / name)
        return segment()

    return make


def bad(name: str, file: str, put: Callable[[Path], None], says: str) -> Case:
    """An image that is named and counted, while the others come out."""
    return Case(f"images: {name}", with_bad(file, put), code={1}, says=says, check=segmented(*GOOD))


def data(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(width: int, height: int, rest: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + rest + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def broken() -> Iterator[Case]:
    chance = random.Random(7)
    for kind in FORMATS:
        whole = encoded(kind)
        for part in (chance.uniform(0.02, 0.15), chance.uniform(0.2, 0.6)):
            cut = whole[: int(len(whole) * part)]
            yield bad(f"{kind} cut to {part:.0%}", f"a.{kind}", data(cut), rf"a\.{kind}: ")
    for content, what in (
        (b"", "empty"),
        (b"\0" * 4096, "zeros"),
        (b"<html><script>alert(1)</script></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of git-lfs"),
        (random.Random(3).randbytes(5000), "noise"),
        (b"PK\x03\x04" + b"\0" * 200, "a zip archive"),
        (b'\x80\x04c__builtin__\nexec\n(S\'open("executed","w")\'\ntR.', "a pickle"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\n", "a program in PostScript"),
    ):
        yield bad(what, "a.jpg", data(content), r"a\.jpg: ")
    yield bad("a bomb", "a.png", data(huge_png(65000, 65000)), r"a\.png: has more than 178,956,970 pixels")
    yield bad("no width", "a.png", data(huge_png(0, 5)), r"a\.png: ")
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * (80 << 20)))
    yield bad("a bomb in a text chunk", "a.png", data(huge_png(8, 8, text)), r"a\.png: ")


def no_files() -> Iterator[Case]:
    yield bad("a FIFO", "a.png", os.mkfifo, r"a\.png: cannot be read: is a FIFO")

    def bind(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)

    yield bad("a socket", "a.jpg", bind, r"a\.jpg: cannot be read: is a socket")
    for device in ("zero", "null", "random", "tty"):
        put = lambda path, device=device: path.symlink_to(f"/dev/{device}")  # noqa: E731
        yield bad(f"a link to /dev/{device}", "a.jpg", put, r"a\.jpg: cannot be read: is a device")
    yield bad("a link to nowhere", "a.jpg", lambda path: path.symlink_to("gone"), r"a\.jpg: no such file")
    yield bad("a link to itself", "a.jpg", lambda path: path.symlink_to(path.name), r"a\.jpg: cannot be read: .*links")

    def endless(folder: Path) -> list[str]:
        inside = good_pictures(folder)
        (inside / "again").symlink_to(inside)
        (inside / "up").symlink_to(folder)
        return segment()

    yield Case("images: folders that hold themselves", endless, check=segmented(*GOOD))

    def named_like_a_picture(folder: Path) -> list[str]:
        inside = good_pictures(folder)
        (inside / "a.jpg").mkdir()
        return segment()

    yield Case("images: a folder called a.jpg", named_like_a_picture, check=segmented(*GOOD))


def kinds() -> Iterator[Case]:
    """Images that come out."""
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (20, 28)).astype(np.uint8)
    colour = rng.integers(0, 256, (20, 28, 3)).astype(np.uint8)
    animation = {"save_all": True, "append_images": [Image.fromarray(colour[::-1])]}
    exif = Image.Exif()
    exif[0x0112] = 9
    images: list[tuple[str, str, Image.Image, dict]] = [
        ("1 x 1", "a.png", Image.new("RGB", (1, 1)), {}),
        ("1 x 2000", "a.png", Image.new("RGB", (1, 2000)), {}),
        ("2000 x 1", "a.png", Image.new("RGB", (2000, 1)), {}),
        ("16 bits", "a.png", Image.fromarray(grey.astype(np.uint16) * 257), {}),
        ("12 bits in 16", "a.tif", Image.fromarray(grey.astype(np.uint16) * 16), {}),
        ("32 bits", "a.tif", Image.fromarray(grey.astype(np.int32)), {}),
        ("one bit", "a.png", Image.fromarray(grey).convert("1"), {}),
        ("CMYK", "a.jpg", Image.fromarray(colour).convert("CMYK"), {}),
        ("transparent palette", "a.png", Image.fromarray(grey).convert("P"), {"transparency": 3}),
        ("grey with alpha", "a.png", Image.fromarray(grey).convert("LA"), {}),
        ("animation", "a.gif", Image.fromarray(colour), animation),
        ("several pages", "a.tif", Image.fromarray(colour), animation),
        ("orientation 9", "a.jpg", Image.fromarray(colour), {"exif": exif}),
        ("rubbish as EXIF", "a.jpg", Image.fromarray(colour), {"exif": b"Exif\0\0" + bytes(range(200))}),
        ("wrong ending", "a.bmp", Image.fromarray(colour), {"format": "PNG"}),
        ("ending in capitals", "a.JPG", Image.fromarray(colour), {"format": "JPEG"}),
    ]
    for what, file, image, options in images:
        put = lambda path, image=image, options=options: image.save(path, **options)  # noqa: E731
        yield Case(f"images: {what}", with_bad(file, put), check=segmented("a", *GOOD))
    for what, values in (("floating point", np.ones((9, 9), np.float32)), ("NaN", np.full((9, 9), np.nan, np.float32))):
        put = lambda path, values=values: Image.fromarray(values).save(path)  # noqa: E731
        yield bad(what, "a.tif", put, r"a\.tif: cannot be read: its pixels are floating point")


def names() -> Iterator[Case]:
    """File names of every kind, whose images come out."""
    for what, stem in (
        ("of 251 letters", "n" * 251),
        ("of 240 bytes in another script", "ж" * 120),
        ("with a line break", "a\nb"),
        ("with control characters", "a\x1b[31mb\x07"),
        ("with markup", "a [red]b [bold"),
        ("with quotes and a dollar", "a'b\"c $(touch executed) `touch executed`"),
        ("with an emoji", "😀"),
        ("that is not UTF-8", "a\udce9"),
        ("with a leading dash", "--output=x"),
        ("with spaces at the ends", " a "),
        ("of dots", "a..b"),
        ("with a glob", "a[1]*?"),
        ("with a per cent sign", "%s %d {0} {x}"),
        ("that is a manifest's", "manifest"),
        ("that is a record's", "run"),
        ("of an overlay", "x_overlay"),
    ):

        def make(folder: Path, stem: str = stem) -> list[str]:
            inside = good_pictures(folder, 1)
            (inside / "good0.png").rename(inside / f"{stem}.png")
            return segment("--overlay")

        def check(folder: Path, stem: str = stem) -> None:
            maps = [path for path in (folder / "out").rglob("*.png")]
            assert len(maps) == 1, maps
            assert maps[0].stem == stem or len(stem) > 100

        yield Case(f"names: {what}", make, check=check)


def earlier_results() -> Iterator[Case]:
    def inside(folder: Path) -> list[str]:
        from tests.mischief.runner import main

        good_pictures(folder)
        main(["segment", "in", "--output", "in/first", "--overlay", *segment()[4:]])
        return segment()

    yield Case("images: earlier results among them", inside, says="are left out", check=segmented(*GOOD))

    def moved(folder: Path) -> list[str]:
        from tests.mischief.runner import main

        good_pictures(folder)
        main(segment())
        (folder / "in").rename(folder / "elsewhere")
        return ["segment", "elsewhere", *segment("--threshold", "0.4", "--background", "threshold")[2:]]

    yield Case("images: a folder that has moved", moved, check=segmented(*GOOD))

    def marked(folder: Path) -> list[str]:
        inside = good_pictures(folder)
        info = PngImagePlugin.PngInfo()
        info.add_text("fastzs.names", "[not json")
        Image.new("L", (5, 5)).save(inside / "a.png", pnginfo=info)
        return segment()

    yield Case("images: one that says it is a result", marked, says="are left out", check=segmented(*GOOD))


def cases() -> Iterator[Case]:
    for group in (broken, no_files, kinds, names, earlier_results):
        yield from group()
