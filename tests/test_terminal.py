"""Whatever becomes of standard output and error costs no result, ends no run and gives no traceback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastzs.cli import main
from fastzs.terminal import Lenient, lenient_streams
from tests.mischief.runner import QUICK, good_pictures

ROOT = Path(__file__).parents[1]


class Broken(io.StringIO):
    """A stream that takes so many letters and then fails."""

    def __init__(self, room, error):
        super().__init__()
        self.room, self.error = room, error

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "problem"),
    [(BrokenPipeError(32, "Broken pipe"), None), (OSError(28, "No space left on device"), "No space left on device")],
)
def test_a_stream_that_fails_goes_quiet(error, problem):
    stream = Broken(5, error)
    out = Lenient(stream)
    print("abc", file=out)
    for _ in range(3):
        print("more than there is room for", file=out, flush=True)
    assert stream.getvalue() == "abc\n"
    assert out.problem == problem


def test_letters_that_a_stream_lacks_are_shown_by_number():
    raw = io.BytesIO()
    out = Lenient(io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    print("café 狗", file=out, flush=True)
    assert raw.getvalue() == rb"caf\xe9 \u72d7" + b"\n"


def test_streams_are_put_back(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    before = sys.stdout, sys.stderr

    def run():
        with lenient_streams():
            print("nobody sees this")
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert (sys.stdout, sys.stderr) == before


def names_with_markup(folder: Path) -> list[str]:
    good_pictures(folder)
    (folder / "masks").mkdir()
    for i in range(2):
        Image.fromarray(np.resize(np.array([0, 1], np.uint8), (24, 30))).save(folder / "masks" / f"good{i}.png")
    names = ["red disc", "blue [bold]ring[/bold]", "café [/]", "狗 [red]"]
    (folder / "p.yaml").write_text(f"name: own [x]\nclasses: {json.dumps(names)}\nunseen: [1]\n", encoding="utf-8")
    # the words that the built-in model knows
    (folder / "w.yaml").write_text("[red disc, blue ring, green star, pink moon]")
    data = ["--images", "in", "--masks", "masks", "--protocol", "p.yaml", "--words", "w.yaml"]
    return ["evaluate", *data, "--model", "maskclip", *QUICK, "--output", "out"]


def test_no_name_is_read_as_markup(tmp_path, monkeypatch, capsys):
    arguments = names_with_markup(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for name in ("blue [bold]ring[/bold] (unseen)", "café [/]", "狗 [red]", "own [x]"):
        assert name in said


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("| true", 0),
        ("> /dev/full", 1),
        (">&-", 0),
        ("2>/dev/full >/dev/null", 0),
        ("2>&1 | head -c 10 > /dev/null", 0),
    ],
)
def test_files_are_complete_whatever_becomes_of_the_words(tmp_path, end, code):
    arguments = names_with_markup(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    line = " ".join(f"'{part}'" for part in [sys.executable, "-m", "fastzs", *arguments])
    shell = ["bash", "-c", f"{line} {end}; exit ${{PIPESTATUS[0]}}"]
    ended = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]["classes"][2] == "café [/]"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["models", "doctor", "--help"])
def test_words_alone_into_a_closed_pipe(command):
    shell = ["bash", "-c", f"'{sys.executable}' -m fastzs {command} | true; exit ${{PIPESTATUS[0]}}"]
    ended = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr
    assert ended.returncode in (0, 1)
