"""Class names, class files, configurations, protocols, label files and templates of every odd kind."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastzs.result import Segmentation
from tests.mischief.runner import QUICK, Case, good_pictures, nothing_written, segment, segmented

GOOD = ("good0", "good1")


def refused(name: str, make: Callable[[Path], list[str]], says: str) -> Case:
    """A command that cannot be carried out: one sentence, nothing written."""
    return Case(name, make, code={2}, says=says, check=nothing_written)


def names_of(folder: Path) -> tuple[str, ...]:
    return Segmentation.load(folder / "out" / "good0.png").names


def on_the_command_line() -> Iterator[Case]:
    """The built-in model knows few words; what is tried here is how names get through."""

    def make(classes: str) -> Callable[[Path], list[str]]:
        return lambda folder: good_pictures(folder) and segment(f"--classes={classes}", classes=None)

    for what, classes, says in (
        ("none", "", "no names in it"),
        ("spaces", "  ", "no names in it"),
        ("only commas", ",,,", "empty class name"),
        ("an empty one", "red disc,,blue ring", "empty class name"),
        ("twice", "red disc,Red  disc", "same name"),
        ("twice by case and underscore", "red_disc,RED DISC", "same name"),
        ("a word that the model lacks", "red disc,zebra", "zebra"),
        ("markup", "red disc,[red]blue[/red]", r"\[red\]"),
        ("closing markup", "red disc,[/]", r"\[/\]"),
        ("a line break", "red disc,a\nzebra", "zebra"),
        ("an escape", "red disc,\x1b[31mzebra", "zebra"),
        ("not UTF-8", "red disc,zebra\udce9", "zebra"),
        ("another script", "red disc,斑马", "斑马"),
        ("very long", "red disc," + "zebra " * 2000, "zebra"),
        ("ten thousand", ",".join(f"zebra {i}" for i in range(10000)), "zebra"),
        ("templates' sign", "red disc,{}", r"\{\}"),
        ("a path", "red disc,../../etc/passwd", "passwd"),
    ):
        yield refused(f"names: {what}", make(classes), says)
    for odd in ("#road", "null", "NULL", "no", "1", "~", "3.0", "2020-01-01", "!tag", "&a", "*a", "{a}", "'b'"):
        name = re.escape(odd)
        for classes in (f"red disc,{odd}", odd, f"{odd},red disc", f"- {odd}"):
            yield refused(
                f"names: {classes}, read as YAML", make(classes), f"(?i)know the word .{name}|know the word '-'"
            )
    yield Case("names: spaces around", make(" red disc , blue ring "), check=segmented(*GOOD))
    yield Case("names: one", make("red disc"), check=segmented(*GOOD))


def in_files() -> Iterator[Case]:
    def make(content: bytes, *more: str) -> Callable[[Path], list[str]]:
        def lay(folder: Path) -> list[str]:
            good_pictures(folder)
            (folder / "names.yaml").write_bytes(content)
            return segment("--classes-file", "names.yaml", *more, classes=None)

        return lay

    for what, content, says in (
        ("empty", b"", "has no names in it"),
        ("a comment only", b"# red disc\n", "has no names in it"),
        ("null", b"null\n", "has no names in it"),
        ("a single name", b"red disc\n", "line 1: expected a list of names"),
        ("not UTF-8", b"- red disc\n- caf\xe9\n", "line 2: is not UTF-8"),
        ("not YAML", b"- red disc\n- [blue\n", "line 3: is not YAML"),
        ("a tab", b"\t- red disc\n", "is not YAML"),
        ("nested lists", b"- red disc\n- [a, [b]]\n", "line 2: expected a name"),
        ("deeper than a stack", b"[" * 100_000, "nested too deeply|is not YAML"),
        ("objects of Python", b"- !!python/object/apply:os.system ['touch executed']\n", "names.yaml|the model"),
        ("an alias to itself", b"- &a [*a]\n", "line 1: expected a name"),
        ("a billion laughs", b"a: &a [x,x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "expected a synonym"),
        ("numbers from one", b"1: red disc\n2: blue ring\n", "line 1: expected the numbers of the classes in order"),
        ("synonyms of synonyms", b"- red disc: [{a: b}]\n", "line 1: expected a synonym"),
        ("zero bytes", b"- red\0disc\n", "is not YAML"),
        ("an image", b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8|is not YAML"),
    ):
        yield refused(f"class files: {what}", make(content), says)

    def fifo(folder: Path) -> list[str]:
        good_pictures(folder)
        os.mkfifo(folder / "names.yaml")
        return segment("--classes-file", "names.yaml", classes=None)

    yield refused("class files: a FIFO", fifo, "is a FIFO")
    device = ["--classes-file", "/dev/zero"]
    yield refused("class files: a device", lambda f: good_pictures(f) and segment(*device, classes=None), "is a device")
    gone = ["--classes-file", "gone.yaml"]
    yield refused("class files: missing", lambda f: good_pictures(f) and segment(*gone, classes=None), "No such file")
    folder = ["--classes-file", "in"]
    yield refused("class files: a folder", lambda f: good_pictures(f) and segment(*folder, classes=None), "is a folder")
    two = ("red disc", "blue ring")
    for what, content in (
        ("a byte order mark and CRLF", b"\xef\xbb\xbf- red disc\r\n- blue ring\r\n"),
        ("as of a YOLO data set", b"path: ../x\nnc: 2\nnames:\n  0: red disc\n  1: blue ring\n"),
        ("a list under names", b"names: [red disc, blue ring]\n"),
        ("numbers from zero", b"0: red disc\n1: blue ring\n"),
        ("without a last line break", b"- red disc\n- blue ring"),
        ("JSON", b'["red disc", "blue ring"]'),
    ):

        def check(folder: Path) -> None:
            assert names_of(folder) == two, names_of(folder)

        yield Case(f"class files: {what}", make(content), check=check)
    for what, content, says in (
        ("without braces", b"a photo\n", "holds .* once"),
        ("twice", b"{} and {}\n", "holds .* once"),
        ("empty", b"\n\n", "holds .* once"),
        ("not UTF-8", b"caf\xe9 {}\n", "templates.*line 1: is not UTF-8"),
    ):

        def templates(folder: Path, content: bytes = content) -> list[str]:
            good_pictures(folder)
            (folder / "t.txt").write_bytes(content)
            return segment("--templates", "t.txt")

        yield refused(f"templates: {what}", templates, says)


def configurations() -> Iterator[Case]:
    def make(content: str) -> Callable[[Path], list[str]]:
        def lay(folder: Path) -> list[str]:
            good_pictures(folder)
            (folder / "c.yaml").write_text(content, encoding="latin-1")
            return ["segment", "--config", "c.yaml", "--output", "out", *QUICK]

        return lay

    for what, content, says in (
        ("an unknown key", "paths: [in]\nclases: [a]\n", "clases"),
        ("not YAML", "paths: [in\n", "c.yaml"),
        ("a list", "- in\n", "c.yaml|mapping"),
        ("a number for a path", "paths: [in]\nclasses: [red disc]\nshort_side: wide\n", "short.side"),
        ("objects of Python", "paths: !!python/object/apply:os.system ['touch executed']\n", "c.yaml"),
        ("not UTF-8", "paths: [in]\nclasses: [caf\xe9]\n", "c.yaml"),
        ("empty", "", "no images given|neither is given"),
        ("deeper than a stack", "paths: " + "[" * 20000, "c.yaml"),
    ):
        yield refused(f"configurations: {what}", make(content), says)
    yield refused(
        "configurations: missing", lambda f: ["segment", "--config", "gone.yaml", "--output", "out"], "gone.yaml"
    )
    yield Case("configurations: names", make("paths: [in]\nclasses: [red disc, blue ring]\n"), check=segmented(*GOOD))
    yield Case("configurations: a path", make("paths: in\nclasses: [red disc, blue ring]\n"), check=segmented(*GOOD))
    odd = make("paths: [in]\nclasses: [red disc, no]\n")
    yield refused("configurations: a name that YAML takes for false", odd, "'no'|\"no\"| no ")


def protocols() -> Iterator[Case]:
    def evaluate(folder: Path, protocol: str, masks: tuple[int, ...] = (0, 1), *more: str) -> list[str]:
        good_pictures(folder)
        (folder / "masks").mkdir()
        for i in range(2):
            values = np.resize(np.array(masks, np.uint8), (24, 30))
            Image.fromarray(values).save(folder / "masks" / f"good{i}.png")
        (folder / "p.yaml").write_text(protocol)
        data = ["--images", "in", "--masks", "masks", "--protocol", "p.yaml"]
        return ["evaluate", *data, "--output", "out", "--model", "maskclip", *QUICK, *more]

    names = "classes: [red disc, blue ring]\n"
    for what, text, masks, says in (
        ("a text for true", names + "reduce_zero_label: 'false'\n", (0, 1), "line 2: expected true or false"),
        ("a number for a list", names + "unseen: 0\n", (0, 1), "line 2: expected a list"),
        ("an unknown class", names + "unseen: [green]\n", (0, 1), "none of the classes"),
        ("an unknown key", names + "unsen: [0]\n", (0, 1), "unknown key 'unsen'"),
        ("no classes", "name: x\n", (0, 1), "list of names under 'classes'"),
        ("empty", "", (0, 1), "is empty"),
        ("masks of 0 and 255", names, (0, 255), "hold only 0 and 255"),
        ("labels out of range", names, (0, 7), "got 7"),
    ):
        make = lambda folder, text=text, masks=masks: evaluate(folder, text, masks)  # noqa: E731
        yield refused(f"protocols: {what}", make, says)

    def check(folder: Path) -> None:
        found = json.loads((folder / "out" / "results.json").read_text())
        assert found["protocol"]["classes"] == ["red disc", "blue ring"]

    yield Case(
        "protocols: synonyms", lambda f: evaluate(f, "classes: [red disc, {blue ring: [blue star]}]\n"), check=check
    )


def cases() -> Iterator[Case]:
    for group in (on_the_command_line, in_files, configurations, protocols):
        yield from group()
