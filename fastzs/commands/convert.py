"""``fastzs convert``: label maps to the files of other tools."""

import os
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from fastzs.commands.classes import given_classes

HELP = "label maps to COCO, CVAT, Label Studio, labelme, YOLO and others"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Write the label maps of a folder, such as fastzs segment made, in the format of another tool: "
        "coco, panoptic, cvat, label-studio, labelme, yolo or npy (docs/formats.md). An interrupted conversion goes on "
        "with the same command."
    )
    add = options.add_argument
    add("folder", type=str, help="folder of label maps")
    add("--config", action="config", help="YAML file with any of these options (see --print_config)")
    add("--format", type=str, required=True, help="coco, panoptic, cvat, label-studio, labelme, yolo, npy")
    add("--output", type=str, required=True, help="new folder for the files")
    add("--classes", type=str | list[str] | None, help="names of the labels, in place of those in the label maps")
    add("--classes-file", type=str | None, help="YAML file with a list of names")
    add("--pictures", type=str | None, help="folder of the images, against which their names are given")
    return options


def run(config: Namespace) -> int:
    """Convert; 0."""
    from fastzs.formats import format_of
    from fastzs.formats.convert import convert
    from fastzs.progress import ProgressBar
    from fastzs.vocabulary import Vocabulary

    format_of(config.format)  # before anything is read
    names = None
    if config.classes is not None or config.classes_file is not None:
        names = Vocabulary(given_classes(config.classes, config.classes_file)).names
    folder, output = (Path(os.path.expanduser(path)) for path in (config.folder, config.output))
    pictures = None if config.pictures is None else Path(os.path.expanduser(config.pictures))
    with ProgressBar("converting", "label map") as bar:
        count = convert(
            folder, config.format, output, names=names, pictures=pictures, start=bar.start, step=bar.advance
        )
    print(f"{count} label maps converted to {config.format}; results in {output}")
    return 0
