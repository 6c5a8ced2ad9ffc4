"""``fastzs compare``: what another precision changes in the labels of your own images."""

from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from fastzs.commands.options import add_source

HELP = "what another precision changes in the labels of images"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Label images in two precisions and say where they differ: the share of equal labels, the mean "
        "IoU between the two, and the classes that changed most. fastzs compare --precision int8 fp32 photos/ ..."
    )
    add = options.add_argument
    add("paths", nargs="+", type=str, help="images, folders, globs")
    add("--classes", type=str, required=True, help="names, separated by commas")
    add(
        "--precision",
        nargs=2,
        type=Literal["auto", "fp32", "bf16", "fp16", "int8"],
        default=["auto", "fp32"],
        help="the one that is judged, and the one it is held against",
    )
    add("--model", type=str, default="maskclip", help="a name that fastzs models lists, or a checkpoint of any of them")
    add_source(options)
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return options


def run(config: Namespace) -> int:
    """Print the comparison; 0."""
    names = [name.strip() for name in config.classes.split(",") if name.strip()]
    if not names:
        raise ValueError("--classes has no names in it; name at least one class")
    from fastzs.loading import load
    from fastzs.metrics import ConfusionMatrix
    from fastzs.pictures import find_pictures

    pictures = find_pictures(config.paths)
    given = {name: config[name] for name in ("backbone", "weights", "checkpoint", "device")}
    ours, theirs = (load(config.model, precision=name, **given, **config.options) for name in config.precision)
    matrix = ConfusionMatrix(len(names))  # the truth being the precision that is held against
    for picture in pictures:
        matrix.add(theirs(picture, names).labels, ours(picture, names).labels)
    print(report(matrix, names, ours.precision, theirs.precision, len(pictures)))
    return 0


def report(matrix: Any, names: list[str], ours: str, theirs: str, pictures: int) -> str:
    """The comparison in words; ``matrix`` has the labels of ``theirs`` as its truth."""
    counts, iou = matrix.counts[:, : len(names)], matrix.iou()
    pixels = int(counts.sum())
    lines = [f"{ours} against {theirs}, {pictures} images, {pixels:,} pixels"]
    lines.append(f"  labels that agree: {100 * int(counts.diagonal().sum()) / max(pixels, 1):.3f} %")
    lines.append(f"  mean IoU between the two: {100 * float(iou.nanmean()):.2f} %")
    changed = [(int(counts[i].sum() - counts[i, i]), i) for i in range(len(names)) if counts[i].sum() > counts[i, i]]
    for count, i in sorted(changed, reverse=True)[:10]:
        row = counts[i].clone()
        row[i] = 0
        share, iou_of = 100 * count / int(counts[i].sum()), 100 * float(iou[i])
        lines.append(f"  {names[i]}: {share:.2f} % changed, most to {names[int(row.argmax())]}; IoU {iou_of:.1f} %")
    return "\n".join(lines)
