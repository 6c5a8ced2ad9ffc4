"""One case: a folder with odd things in it, a command, and what has to come of it."""

import contextlib
import io
import logging
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fastzs
from fastzs.cli import main
from fastzs.files import TEMPORARY
from fastzs.result import Segmentation

SECONDS, MEGABYTES = 20, 1500  # that a case may take, and by which the process may grow
BYTES = 3 * MEGABYTES  # of address space, beyond which the case is ended before the machine suffers
CANARY = "executed"  # a file that nothing may ever make
_loaded: dict[str, object] = {}
_load = fastzs.load
QUICK = ["--weights", "shapes", "--precision", "fp32", "--device", "cpu", "--short-side", "32"]


@dataclass
class Case:
    """A command and what has to come of it.

    Attributes:
        name: group and what is odd, "images: cut short".
        make: lays things out in an empty folder, which is the working directory, and gives the command line.
        code: exit codes that are right.
        says: pattern of what is said on stderr.
        variables: changes of the environment; None removes one.
        without: pattern of what must not be said.
    """

    name: str
    make: Callable[[Path], list[str]]
    code: Collection[int] = (0,)
    says: str = ""
    without: str = "Traceback"
    variables: Mapping[str, str | None] = field(default_factory=dict)
    check: Callable[[Path], None] = lambda folder: None


def load_once(*arguments: object, **options: object) -> object:
    """``fastzs.load``, which gives the built-in model a second time without reading it again."""
    if options.get("weights") != "shapes":
        return _load(*arguments, **options)
    key = repr((arguments, sorted(options.items())))
    if key not in _loaded:
        _loaded[key] = _load(*arguments, **options)
    return _loaded[key]


def good_pictures(folder: Path, count: int = 2) -> Path:
    """Small images that can be segmented, in ``folder/in``."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"good{i}.png")
    return folder / "in"


def segment(*more: str, classes: str | None = "red disc,blue ring") -> list[str]:
    return ["segment", "in", "--output", "out", *QUICK, *(["--classes", classes] if classes else []), *more]


def problems(case: Case, folder: Path) -> list[str]:
    """What is wrong with how a case went; an empty list is right."""
    folder.mkdir(parents=True)
    found: list[str] = []
    # pytest's handlers would take the warnings that a terminal shows
    terminal = patched(logging.getLogger(), "handlers", [])
    with working_in(folder), changed(case.variables), patched(fastzs, "load", load_once), terminal:
        arguments = case.make(folder)
        begun, grown = time.monotonic(), resident()
        out, err = io.StringIO(), io.StringIO()
        code: object
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(SECONDS):
            try:
                code = main(arguments)
            except SystemExit as ended:  # of the parser
                code = ended.code
            except BaseException as error:
                code = f"{type(error).__name__}: {error}"
        said = err.getvalue()
        if code not in case.code:
            found.append(f"exit code {code}, expected {sorted(case.code)}")
        if case.says and not re.search(case.says, said, re.DOTALL):
            found.append(f"does not say {case.says!r}")
        if re.search(case.without, said + out.getvalue()):
            found.append(f"says {case.without!r}")
        if time.monotonic() - begun > SECONDS:
            found.append(f"took {time.monotonic() - begun:.0f} s")
        if resident() - grown > MEGABYTES:
            found.append(f"grew by {resident() - grown} MB")
        found += left_behind(folder)
        try:
            case.check(folder)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return [f"{case.name}: {problem}; said: {said.strip()[-400:]}" for problem in found]


def left_behind(folder: Path) -> list[str]:
    """Files that no command may leave: half-written ones, locks, traces of code that ran."""
    found = []
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if TEMPORARY.fullmatch(name) or name.startswith(".running-") or name == CANARY:
                found.append(f"left {Path(parent, name).relative_to(folder)!r}")
    out = folder / "out"
    for line in out.glob("manifest*.jsonl") if out.is_dir() else ():
        if line.is_file() and not line.read_bytes().endswith(b"\n"):
            found.append("half a line in the manifest")
    return found


def segmented(*stems: str) -> Callable[[Path], None]:
    """A check that there are whole label maps of these images, and no others."""

    def check(folder: Path) -> None:
        there = {
            path.relative_to(folder / "out").with_suffix("").as_posix()
            for path in (folder / "out").rglob("*.png")
            if path.is_file()
        }
        assert there == set(stems), f"label maps of {sorted(there)}"
        for stem in stems:
            Segmentation.load(folder / "out" / f"{stem}.png")

    return check


def nothing_written(folder: Path) -> None:
    there = [str(path) for path in (folder / "out", *(folder / "out").rglob("*")) if os.path.lexists(path)]
    assert not there, f"wrote {there}"


@contextlib.contextmanager
def patched(place: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def changed(variables: Mapping[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds + 5)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (private() + (BYTES << 20), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def private() -> int:
    """Writable address space of this process in bytes."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Memory of this process in MB."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
