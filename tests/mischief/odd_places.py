"""Output folders, environments and command lines of every odd kind."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastzs.cli import main
from tests.mischief.odd_files import GOOD
from tests.mischief.runner import Case, good_pictures, nothing_written, segment, segmented


def outputs() -> Iterator[Case]:
    def make(prepare: Callable[[Path], object], *more: str) -> Callable[[Path], list[str]]:
        return lambda folder: [good_pictures(folder), prepare(folder), segment(*more)][-1]

    def put(name: str, content: bytes) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "out" / name).write_bytes(content)

        return write

    for what, prepare in (
        ("a file", lambda f: (f / "out").write_text("x")),
        ("a link to nothing that can be", lambda f: (f / "out").symlink_to("/proc/x")),
        ("a link to itself", lambda f: (f / "out").symlink_to("out")),
        ("a FIFO", lambda f: os.mkfifo(f / "out")),
    ):
        yield Case(f"outputs: {what}", make(prepare), code={2}, says="output folder out")
    for what, content in (
        ("rubbish", b"\xff\xfe\0{}\n[1]\nnull\n"),
        ("a line cut short", b'{"image": "/x", "sta'),
        ("names that lead out", b'{"image": "/x", "state": [1, 2], "digest": "", "settings": "s", "name": "../../x", '
                                b'"files": ["../../x.png"], "run": 1}\n'),
        ("a run far ahead", b'{"image": "/x", "state": null, "digest": "", "settings": "", "name": "a", "files": [], '
                            b'"run": 99999999999}\n'),
        ("other types", b'{"image": 3, "state": "x", "digest": 1, "settings": [], "name": null, "files": 7, '
                        b'"run": "r"}\n'),
        ("types that are no text", b'{"image": "/x", "state": 5, "digest": 1, "settings": [], "name": 4, "files": 7, '
                                   b'"run": 1}\n'),
    ):  # fmt: skip
        yield Case(f"outputs: a manifest with {what}", make(put("manifest.jsonl", content)), check=segmented(*GOOD))
    yield Case(
        "outputs: a folder as the manifest", make(lambda f: (f / "out" / "manifest.jsonl").mkdir(parents=True)),
        code={2}, says="manifest.jsonl",
    )  # fmt: skip
    in_the_way = make(lambda f: (f / "out" / "good0.png" / "x").mkdir(parents=True))
    yield Case("outputs: a folder where a label map goes", in_the_way, check=lambda f: segmented("good0-2", "good1")(f))
    left = make(put(".0123456789ab.tmp", b"half"))
    yield Case("outputs: what a killed run left", left, check=segmented(*GOOD))

    def again(folder: Path) -> list[str]:
        good_pictures(folder)
        main(segment())
        (folder / "out" / "good0.png").write_bytes(b"")
        os.truncate(folder / "out" / "manifest.jsonl", 20)
        return segment()

    yield Case("outputs: emptied label maps and half a manifest", again, check=segmented(*GOOD))
    yield Case("outputs: in the home folder", lambda f: [good_pictures(f), segment("--output", "~/res")][-1],
               variables={"HOME": "."}, check=lambda f: (f / "res" / "good0.png").stat() and None)  # fmt: skip


def environments() -> Iterator[Case]:
    def make(*more: str) -> Callable[[Path], list[str]]:
        return lambda folder: [good_pictures(folder), segment(*more)][-1]

    address = {"MASTER_ADDR": None, "MASTER_PORT": None}
    for rank, world, says in (
        ("1", "4", "MASTER_ADDR"),
        ("4", "4", "do not go together"),
        ("-1", "4", "RANK is '-1'"),
        ("0", "many", "WORLD_SIZE is 'many'"),
        (None, "4", "do not go together"),
        ("1", None, "do not go together"),
    ):
        variables = {"RANK": rank, "WORLD_SIZE": world, **address}
        what = f"environments: RANK={rank} WORLD_SIZE={world}"
        yield Case(what, make(), code={2}, says=says, variables=variables)
    for what, variables in (
        ("empty RANK and WORLD_SIZE", {"RANK": "", "WORLD_SIZE": ""}),
        ("one of one process", {"RANK": "0", "WORLD_SIZE": "1"}),
        ("a cache that is a file", {"FASTZS_CACHE": "/dev/null"}),
        ("a cache that cannot be made", {"FASTZS_CACHE": "/proc/fastzs"}),
        ("a dumb terminal", {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "1"}),
        ("no width", {"COLUMNS": "0", "LINES": "0"}),
        ("rubbish as the width", {"COLUMNS": "wide"}),
        ("a home that is not there", {"HOME": "/nonexistent", "FASTZS_CACHE": None, "XDG_CACHE_HOME": None}),
        ("an empty home", {"HOME": "", "FASTZS_CACHE": None, "XDG_CACHE_HOME": None}),
    ):
        yield Case(f"environments: {what}", make(), variables=variables, check=segmented(*GOOD))


def lines() -> Iterator[Case]:
    for what, arguments, says in (
        ("no images", ["--output", "out"], "no images given"),
        ("a folder without images", ["empty", "--output", "out"], "no image in it"),
        ("a path that is not there", ["gone.jpg", "--output", "out"], "gone.jpg"),
        ("a path with markup", ["[red]x[/].jpg", "--output", "out"], r"\[red\]x\[/\]\.jpg"),
        ("a path with a zero byte", ["a\0b.jpg", "--output", "out"], "a.{1,4}b.jpg"),
        ("a negative short side", ["in", "--output", "out", "--short-side", "-5"], "short_side"),
        ("a crop beyond all images", ["in", "--output", "out", "--crop", "100000", "--stride", "1"], "crop"),
        ("a stride of nothing", ["in", "--output", "out", "--crop", "16", "--stride", "0"], "stride"),
        ("a batch of nothing", ["in", "--output", "out", "--batch-size", "0"], "batch"),
        ("a device that is none", ["in", "--output", "out", "--device", "toaster"], "toaster"),
        ("a model that is none", ["in", "--output", "out", "--model", "maskclop"], "maskclip"),
        (
            "a threshold of NaN",
            ["in", "--output", "out", "--threshold", "nan", "--background", "threshold"],
            "threshold",
        ),
        ("an output in nobody's home", ["in", "--output", "~nobody-here/res"], "no home folder"),
        ("a web address as an image", ["https://example.org/a.jpg", "--output", "out"], "is a web address"),
        ("a web address as the output", ["in", "--output", "s3://bucket/out"], "got a web address"),
        ("an unknown option", ["in", "--output", "out", "--no-such-option"], "no-such-option"),
        ("an unknown model option", ["in", "--output", "out", "--options.dense", "up"], "dense"),
    ):

        def make(folder: Path, arguments: list[str] = arguments) -> list[str]:
            good_pictures(folder)
            (folder / "empty").mkdir()
            quick = ["--weights", "shapes", "--precision", "fp32", "--device", "cpu", "--classes", "red disc,blue ring"]
            return ["segment", *quick, *arguments]

        code = {1, 2} if "beyond" in what else {2}
        check = (lambda folder: None) if "beyond" in what else nothing_written
        yield Case(f"command lines: {what}", make, code=code, says=says, check=check)


def cases() -> Iterator[Case]:
    for group in (outputs, environments, lines):
        yield from group()
