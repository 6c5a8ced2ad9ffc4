"""Checkpoints and weights that are damaged, of another kind, or hostile."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fastzs.clip.weights import SHAPES
from fastzs.models import ZegCLIP
from tests.mischief.odd_files import refused
from tests.mischief.runner import CANARY, QUICK, Case, good_pictures, segment, segmented
from tests.training import SIZES

MODEL = ["--model", "zegclip", "--checkpoint", "model"]


class Hostile:
    """What reading it with pickle would do."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {CANARY}",)


def saved(folder: Path, wide: int = 16) -> Path:
    torch.manual_seed(1)
    sizes = SIZES | {"output_dim": wide}
    ZegCLIP(weights="random", sizes=sizes, prompts=3, crop=32).save_pretrained(folder)
    return folder


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def flipped(folder: Path) -> None:
    """Bytes changed where training has kept a SHA-256."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (folder / "checkpoint.json").write_text(json.dumps({"step": 1, "sha256": {path.name: "0" * 64, "config.json": ""}}))
    path.write_bytes(data)


def head(size: int) -> bytes:
    return size.to_bytes(8, "little") + b"{}"


def folders() -> Iterator[Case]:
    def make(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
        def lay(folder: Path) -> list[str]:
            good_pictures(folder)
            change(saved(folder / "model"))
            return segment(*MODEL)

        return lay

    nan = lambda s: s | {k: torch.full_like(v, torch.nan) for k, v in list(s.items())[:1]}  # noqa: E731
    for what, change, says in (
        ("half of the tensors", lambda f: tensors(f, lambda s: dict(list(s.items())[::2])), "missing: "),
        ("one tensor", lambda f: tensors(f, lambda s: dict(list(s.items())[:1])), "missing: "),
        ("other names", lambda f: tensors(f, lambda s: {f"m.{k}": v for k, v in s.items()}), "unexpected: "),
        ("one too many", lambda f: tensors(f, lambda s: s | {"x": torch.zeros(1)}), "unexpected: x"),
        ("NaN", lambda f: tensors(f, nan), "NaN"),
        ("another size", lambda f: config(f, decoder_layers=2), "does not fit"),
        ("an unknown setting", lambda f: config(f, layers=2), "no setting 'layers'"),
        ("another model", lambda f: config(f, model="ClipRC"), "it is a ClipRC, not a ZegCLIP"),
        ("settings of the wrong type", lambda f: config(f, sizes=[1]), "config.json"),
        ("sizes beyond all memory", lambda f: config(f, decoder_hidden=1 << 40), "config.json|memory"),
        ("no JSON", lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        ("JSON deeper than a stack", lambda f: (f / "config.json").write_text("[" * 99999), "config.json: is not JSON"),
        ("a list as settings", lambda f: (f / "config.json").write_text("[]"), "expected a mapping"),
        ("no settings", lambda f: (f / "config.json").unlink(), "no config.json in it"),
        ("no weights", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in it"),
        ("weights cut short", cut, "model.safetensors: cannot be read"),
        ("weights not as trained", flipped, "is not as it was written"),
        ("a header of 2^62 bytes", lambda f: (f / "model.safetensors").write_bytes(head(1 << 62)), "cannot be read"),
        ("empty weights", lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be read"),
    ):
        yield refused(f"checkpoints: {what}", make(change), says)
    for what, arguments, says in (
        ("whose system is not named", ["--checkpoint", "model"], "^$|segmenting"),
        (
            "with a seen class that is misspelt",
            [*MODEL, "--seen", "red dics,blue ring"],
            "'red dics'.* is it 'red disc'",
        ),
    ):
        line = segment(*arguments)
        lay = lambda f, line=line: [good_pictures(f), saved(f / "model", 128), line][-1]  # noqa: E731
        yield Case(f"checkpoints: {what}", lay, says=says, check=segmented("good0", "good1"))
    for place, says in (
        ("gone", "no such file or folder"),
        ("runs/voc/last", "no such file or folder"),
        ("in/last", "no such file or folder"),
        ("x.ckpt", "no such file"),
        ("y.pth.tar", "no such file"),
        ("runs/last", "runs/last: there is no such file or folder"),
        ("https://example.org/last", "is a web address"),
        ("../../etc", "no such file or folder|config.json"),
        ("", "config.json|no such file"),
    ):
        line = segment("--model", "zegclip", f"--checkpoint={place}")
        yield refused(f"checkpoints: at {place!r}", lambda f, line=line: good_pictures(f) and line, says)


def files() -> Iterator[Case]:
    def make(name: str, write: Callable[[Path], object], *more: str) -> Callable[[Path], list[str]]:
        def lay(folder: Path) -> list[str]:
            good_pictures(folder)
            write(folder / name)
            return segment(*(part.replace("FILE", name) for part in more))

        return lay

    checkpoint = ("--model", "zegclip", "--checkpoint", "FILE")
    weights = ("--weights", "FILE", "--backbone", "ViT-B-32")

    def archive(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Hostile()))
            file.writestr("archive/version", "3\n")

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for what, name, write, says in (
        ("a hostile pickle", "m.pth", lambda p: p.write_bytes(pickle.dumps(Hostile())), "m.pth"),
        ("a hostile pickle in an archive", "m.pth", archive, "m.pth"),
        ("a hostile object in a checkpoint", "m.pth", lambda p: torch.save({"x": Hostile()}, p), "m.pth"),
        (
            "a hostile object with tensors",
            "m.pt",
            lambda p: torch.save({"a": torch.ones(2), "x": Hostile()}, p),
            "m.pt",
        ),
        ("a pointer of git-lfs", "m.bin", lambda p: p.write_bytes(pointer), "m.bin"),
        ("noise", "m.safetensors", lambda p: p.write_bytes(np.random.default_rng(0).bytes(999)), "m.safetensors"),
        ("empty", "m.pt", lambda p: p.touch(), "m.pt"),
        ("an image", "m.pth", lambda p: shutil.copy(p.parent / "in" / "good0.png", p), "m.pth"),
        ("a text", "m.pth", lambda p: p.write_text("weights"), "m.pth"),
        ("no tensors", "m.pt", lambda p: torch.save({"epoch": 3}, p), "no tensors"),
        ("a list", "m.pt", lambda p: torch.save([torch.ones(1)], p), "dictionary"),
        ("other tensors", "m.safetensors", lambda p: save_file({"x": torch.ones(2)}, p), "m.safetensors"),
    ):
        for use, option in (("checkpoint", checkpoint), ("weights", weights)):
            yield refused(f"{use}: {what}", make(name, write, *option), says)


def weights_folders() -> Iterator[Case]:
    def make(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
        def lay(folder: Path) -> list[str]:
            good_pictures(folder)
            change(shutil.copytree(SHAPES, folder / "clip"))
            return [
                "segment",
                "in",
                "--output",
                "out",
                *QUICK[2:],
                "--classes",
                "red disc,blue ring",
                "--weights",
                "clip",
            ]

        return lay

    name = "open_clip_config.json"
    for what, change, says in (
        ("no JSON", lambda f: (f / name).write_text("{"), name),
        ("an empty mapping", lambda f: (f / name).write_text("{}"), name),
        ("a list", lambda f: (f / name).write_text("[]"), name),
        ("no configuration", lambda f: (f / name).unlink(), name),
        ("no weights", lambda f: next(f.glob("*.safetensors")).unlink(), "safetensors"),
        ("words that are no JSON", lambda f: (f / "words.json").write_text("{"), "words.json"),
    ):
        yield refused(f"weights folders: {what}", make(change), says)


def cases() -> Iterator[Case]:
    for group in (folders, files, weights_folders):
        yield from group()
