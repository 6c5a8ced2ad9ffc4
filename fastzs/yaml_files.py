"""YAML files as people write them: a name stays the text that stands there, and what is wrong is told with its line.

YAML itself would read ``no`` as false, ``null`` as nothing and ``1`` as a number; a class may be called so.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from fastzs.files import read_text

NULL, FLAG, NUMBER = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int"))
IGNORED = "ignored"
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
BARE_COLOUR = re.compile(rf"\s*({COLOUR.pattern})\s*:")


class Item:
    """A piece of a YAML file."""

    def __init__(self, node: yaml.Node, file: str):
        self.node, self.file = node, file

    def wrong(self, wanted: str) -> ValueError:
        """The error that something else was expected here."""
        got = {yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}.get(type(self.node))
        return self.error(f"expected {wanted}, got {got or repr(self.node.value)}")

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.file}, line {self.node.start_mark.line + 1}: {message}")

    @property
    def is_null(self) -> bool:
        return self.node.tag == NULL

    @property
    def is_list(self) -> bool:
        return isinstance(self.node, yaml.SequenceNode)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_number(self) -> bool:
        return self.node.tag == NUMBER

    def text(self, wanted: str = "a name") -> str:
        """A scalar as it is written, whatever YAML takes it for.

        Raises:
            ValueError: it is a list, a mapping or empty.
        """
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value.strip():
            raise self.wrong(wanted)
        return self.node.value

    def flag(self) -> bool:
        """true or false.

        Raises:
            ValueError: it is something else, a text in quotes too.
        """
        if self.node.tag != FLAG:
            raise self.wrong("true or false")
        return self.node.value.lower() in ("yes", "true", "on")

    def number(self) -> int:
        """A whole number.

        Raises:
            ValueError: it is something else, a text in quotes too.
        """
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag != NUMBER:
            raise self.wrong("a whole number")
        return int(yaml.SafeLoader("").construct_yaml_int(self.node))

    def items(self, wanted: str = "a list") -> list["Item"]:
        """The entries of a list.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong(wanted)
        return [Item(node, self.file) for node in self.node.value]

    def pairs(self, wanted: str = "a mapping") -> list[tuple["Item", "Item"]]:
        """Keys and values of a mapping.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(wanted)
        return [(Item(key, self.file), Item(value, self.file)) for key, value in self.node.value]

    def mapping(self, wanted: str = "a mapping") -> dict[str, "Item"]:
        """A mapping by the texts of its keys.

        Raises:
            ValueError: it is something else, or has a key twice.
        """
        found: dict[str, Item] = {}
        for key, value in self.pairs(wanted):
            if (name := key.text("a key")) in found:
                raise key.error(f"{name!r} stands there twice")
            found[name] = value
        return found


def read(path: Path, what: str) -> Item | None:
    """The content of a YAML file; None if it is empty.

    Args:
        what: what the file is, for messages.

    Raises:
        ValueError: it cannot be read or is not YAML; the message names it and the line.
    """
    file = f"{what} {path}"
    try:
        root = yaml.compose(read_text(path), yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{file}{line}: is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"{file}: is not YAML that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error
    return None if root is None else Item(root, file)


def read_classes(path: Path) -> list[str | dict[str, list[str]]]:
    """Read a file of classes: a list whose items are names or ``name: [synonyms]``, or one such mapping.

    Also the ``names:`` of a YOLO data set, a list or numbers from 0 with a name each, with or without the rest of
    that file. A name that stands twice in a mapping is kept twice, for the vocabulary to refuse.

    Raises:
        ValueError: the file cannot be read, is not YAML, is empty, or holds something else; the message names it.
    """
    root = read(path, "classes file")
    entries = [] if root is None or root.is_null else class_entries(root)
    if not entries:
        raise ValueError(f"classes file {path}: has no names in it; name at least one class")
    return entries


def class_entries(item: Item) -> list[str | dict[str, list[str]]]:
    """Classes as :class:`fastzs.Vocabulary` takes them, see :func:`read_classes`.

    Raises:
        ValueError: it is something else; the message tells the line.
    """
    if item.is_mapping:
        for key, value in item.pairs():
            if key.text() == "names" and (value.is_list or value.is_mapping):
                return class_entries(value)
        numbered = [key for key, value in item.pairs() if key.is_number and not (value.is_list or value.is_null)]
        if numbered and len(numbered) == len(item.pairs()):
            for wanted, (key, _) in enumerate(item.pairs()):
                if key.number() != wanted:
                    raise key.error(f"expected the numbers of the classes in order, {wanted} here, got {key.number()}")
            return [value.text() for _, value in item.pairs()]
        return [entry for key, value in item.pairs() for entry in ({key.text(): _synonyms(value)},)]
    wanted = "a list of names, or of names with a list of synonyms"
    entries: list[str | dict[str, list[str]]] = []
    for one in item.items(wanted):
        if one.is_mapping:
            entries += [{key.text(): _synonyms(value)} for key, value in one.pairs()]
        else:
            entries.append(one.text("a name, or a name with a list of synonyms"))
    return entries


def _synonyms(item: Item) -> list[str]:
    if item.is_list:
        return [one.text("a synonym") for one in item.items()]
    return [] if item.is_null else [item.text("a list of synonyms")]


def label_file(path: str | None, classes: Sequence[str]) -> dict[int | tuple[int, int, int], int | None] | None:
    """:func:`read_remap` of a file that may not be given."""
    if path is None:
        return None
    return read_remap(Path(os.path.expanduser(path)), {name: i for i, name in enumerate(classes)})


def read_remap(path: Path, classes: Mapping[str, int]) -> dict[int | tuple[int, int, int], int | None]:
    """Read a file that says what the values of masks mean: ``7: road``, ``"#804080": road``, ``255: ignored``.

    Args:
        classes: the label of each name.

    Returns:
        For each value, or colour (red, green, blue), its label; None: it is ignored.

    Raises:
        ValueError: the file cannot be read or holds something else; the message names it and the line.
    """
    root = read(path, "label file")
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if found_colour := BARE_COLOUR.match(line):
            raise ValueError(
                f"label file {path}, line {number}: to YAML this is a comment; write the colour in quotes: "
                f'"{found_colour[1]}":'
            )
    if root is None:
        raise ValueError(f"label file {path}: is empty")
    found: dict[int | tuple[int, int, int], int | None] = {}
    for key, value in root.pairs("a mapping from values or colours of masks to names of classes"):
        text, name = key.text(), value.text()
        if COLOUR.fullmatch(text):
            what: int | tuple[int, int, int] = (int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16))
        elif key.is_number and 0 <= key.number() <= 65535:
            what = key.number()
        else:
            raise key.wrong('a value from 0 to 65535 or a colour as "#804080"')
        if what in found:
            raise key.error(f"{text} stands there twice")
        if name in classes:
            found[what] = classes[name]
        elif value.is_number and 0 <= value.number() < len(classes):
            found[what] = value.number()
        elif name == IGNORED:
            found[what] = None
        else:
            raise value.wrong(f"the name or number of a class, or {IGNORED}")
    if len({isinstance(what, tuple) for what in found}) > 1:
        raise ValueError(f"{root.file}: values and colours are mixed; a mask has the one or the other")
    return found
