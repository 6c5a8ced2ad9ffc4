"""What the commands share about the training-free systems: the settings that have a flag of their own."""

from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

FLAGS = {"refine": "refine", "operator": "dense", "affinity": "affinity"}


def add_flags(options: ArgumentParser) -> None:
    """The flags of :data:`FLAGS`."""
    add = options.add_argument
    add("--refine", type=Literal["none", "pamr", "laplacian"] | None, help="of training-free systems; else their own")
    add("--operator", type=str | None, help="last-block operator: a kind, or FILE.py:FUNCTION, which is run")
    add("--affinity", type=str | None, help="of proxyclip: dino, dinov2 or a timm vision transformer")


def model_options(config: Namespace) -> dict[str, Any]:
    """The model's settings: ``--options``, and the flags that stand for one of them.

    Raises:
        ValueError: a setting is given both ways.
    """
    options = dict(config.options)
    for flag, name in FLAGS.items():
        if config[flag] is not None:
            if name in options:
                raise ValueError(f"--{flag} is --options.{name}, which is given as well; leave one of them out")
            options[name] = config[flag]
    return options
