"""Options that several commands have in the same words."""

from typing import Any, Literal

from jsonargparse import ArgumentParser


def add_source(options: ArgumentParser) -> None:
    """Where a model comes from, beside its name."""
    add = options.add_argument
    add("--backbone", type=str | None, help="CLIP architecture, as open_clip calls it; else the model's own")
    add("--weights", type=str | None, help="open_clip's name of weights, 'shapes', a file or folder")
    add("--checkpoint", type=str | None, help="trained model: .pth or safetensors file, folder, hub id")
    add("--options", type=dict[str, Any], default={}, help="settings of the model, as --options.dense=qq")


def add_regions(options: ArgumentParser) -> None:
    """What :func:`fastzs.regions.find` takes."""
    options.add_argument(
        "--regions",
        type=str | None,
        help="regions of the images, one label for each: slic, felzenszwalb, or a folder with a NAME.png for each, "
        "integers of the image's size, 0 for none",
    )


def add_windows(options: ArgumentParser) -> None:
    """See :class:`fastzs.Segmenter`."""
    options.add_argument(
        "--windows",
        type=Literal["separate", "stitched"],
        default="separate",
        help="stitched: the last block (of clip_rc and zegclip the decoder) sees the whole image once; not published",
    )
