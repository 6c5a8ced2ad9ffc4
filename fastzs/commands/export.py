"""``fastzs export``: a model as files that run without this package."""

import os
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from fastzs.commands.classes import given_classes
from fastzs.commands.options import add_source

HELP = "a model as torch.export program, ONNX or OpenVINO"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Write a model as a torch.export program, ONNX or OpenVINO, with the text vectors of the names as "
        "an input, its text tower, and metadata.json with the preprocessing. The files are checked against the model "
        "(docs/export.md)."
    )
    add = options.add_argument
    add("model", type=str, help="a name that fastzs models lists, or a checkpoint of any of them")
    add("--config", action="config", help="YAML file with any of these options (see --print_config)")
    add("--format", type=Literal["torch", "onnx", "openvino"], default="onnx", help="of the files")
    add("--output", type=str, required=True, help="new folder for the files")
    add("--size", type=int | tuple[int, int] | None, help="side of the images, or height and width; the model's crop")
    add("--dynamic", action="store_true", help="images of any size")
    add("--labels", action="store_true", help="the whole graph gives labels of the image's size, not logits")
    add("--int8", action="store_true", help="int8 weights, by ONNX Runtime or NNCF; accuracy is told, not promised")
    add("--classes", type=str | list[str] | None, help="names whose text vectors are written, too")
    add("--classes-file", type=str | None, help="YAML file with a list of names, or of name: [synonyms]")
    add_source(options)
    return options


def run(config: Namespace) -> int:
    """Export; 0."""
    from fastzs.export.package import check_system, export
    from fastzs.loading import load
    from fastzs.registry import systems
    from fastzs.vocabulary import Vocabulary

    if config.model in systems():  # before it asks for a checkpoint
        check_system(systems()[config.model].kind)
    vocabulary = None
    if config.classes is not None or config.classes_file is not None:
        vocabulary = Vocabulary(given_classes(config.classes, config.classes_file), synonyms="mean")
    given = {name: config[name] for name in ("backbone", "weights", "checkpoint")}
    model = load(config.model, device="cpu", precision="fp32", optimize=False, **given, **config.options).model
    size = config.size or model.crop or model.short_side or 512
    size = (size, size) if isinstance(size, int) else size
    if min(size) < 1:
        raise ValueError(f"--size: expected positive numbers of pixels, got {size[0]} x {size[1]}")
    output = Path(os.path.expanduser(config.output))
    about = export(
        model,
        output,
        config.format,
        size=size,
        dynamic=config.dynamic,
        labels=config.labels,
        int8=config.int8,
        vocabulary=vocabulary,
        say=print,
    )
    for what, found in about.checks.items():
        print(f"{what}: {told(found)}")
    print(f"{config.model} exported to {output}")
    return 0


def told(found: dict[str, Any]) -> str:
    """A check in words."""
    parts = []
    if "error" in found:
        allowed = "" if found["allowed"] is None else f" (at most {found['allowed']:.1e} allowed)"
        parts.append(f"off by {found['error']:.1e} of the largest{allowed}")
    if "labels" in found:
        ties = f" ({found['ties']} ties)" if found["ties"] else ""
        parts.append(f"{100 * found['labels']:.2f} % of the labels as the model's{ties}")
    return ", ".join(parts)
