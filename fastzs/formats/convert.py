"""From a folder of label maps to a folder in another tool's format."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastzs.formats import format_of
from fastzs.formats.label_maps import classes_of, find_label_maps
from fastzs.formats.output import Output
from fastzs.locks import hold


def convert(
    folder: Path,
    form: str,
    output: Path,
    *,
    names: Sequence[str] | None = None,
    pictures: Path | None = None,
    start: Callable[[int], None] = lambda count: None,
    step: Callable[[], None] = lambda: None,
) -> int:
    """Write label maps in a format of :data:`fastzs.formats.FORMATS`.

    Args:
        folder, names, pictures: see :func:`fastzs.formats.label_maps.find_label_maps`.
        form: the format's name.
        output: a new or empty folder, or one in which the same conversion was interrupted, which then goes on: files
            that are newer than their label maps are left as they are.
        start: called with the number of label maps.
        step: called after each of them.

    Returns:
        The number of label maps.

    Raises:
        ValueError: unknown format, no or unsuitable label maps, other files in ``output``.
        OutputError: ``output`` cannot be written.
        ModuleNotFoundError: a package that the format needs is not installed.
    """
    wanted = format_of(form)
    if output.resolve() == folder.resolve():
        raise ValueError(f"--output {output}: expected another folder than that of the label maps")
    maps = find_label_maps(folder, names, pictures)
    names = maps[0].names
    if not classes_of(names):
        raise ValueError(f"{folder}: its only class is the background; expected at least one other name")

    def counted():
        for one in maps:
            held.check()
            yield one
            step()

    with hold(output, "convert") as held:
        out = Output(output)
        out.begin(form, names)
        start(len(maps))
        wanted.write(counted(), classes_of(names), out)
    return len(maps)
