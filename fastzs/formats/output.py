"""The folder that a conversion writes: whole files only, and by the same conversion it goes on where it stopped."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastzs.files import replacing
from fastzs.formats.label_maps import LabelMap
from fastzs.runs import OutputError

RECORD = "convert.json"


class Output:
    """An output folder. It has to exist, and to be new or of the same conversion; see :meth:`begin`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._claimed: set[str] = set()

    def begin(self, form: str, names: Sequence[str]) -> None:
        """Say what the folder will hold, or see that an earlier run has begun the same.

        Raises:
            ValueError: there are other files in it.
            OutputError: it cannot be read or written.
        """
        about = {"format": form, "names": list(names)}
        record = self.folder / RECORD
        try:
            there = [one.name for one in self.folder.iterdir() if one.name != RECORD and one.name[0] != "."]
            before = json.loads(record.read_bytes()) if record.is_file() else None
        except ValueError:  # a file of somebody else
            before = {}
        except OSError as error:
            raise OutputError(f"output folder {self.folder}: cannot be read: {error.strerror}") from error
        if before == about:
            return
        if there or (before is not None and "format" not in before):
            held = f"{before['format']} files" if before and "format" in before else "other files"
            raise ValueError(
                f"--output {self.folder}: expected an empty folder, or one that the same conversion began, but it has "
                f"{held} in it; name another folder"
            )
        self.write(RECORD, json.dumps(about, indent=2) + "\n")

    def lacks(self, name: str, source: LabelMap) -> bool:
        """Whether the file ``name`` of a label map is still to be written: it is not there, or older than the map.

        Raises:
            ValueError: another label map has the same file, since their pictures differ in nothing but the suffix.
        """
        if name.casefold() in self._claimed:
            raise ValueError(
                f"{source.path}: its picture {source.picture} differs from another one only in its suffix (or in upper "
                f"and lower case), so both would be {name}; rename one of the pictures"
            )
        self._claimed.add(name.casefold())
        path = self.folder / name
        return not path.is_file() or path.stat().st_mtime_ns <= source.path.stat().st_mtime_ns

    def write(self, name: str, content: bytes | str | Iterable[str]) -> None:
        """Write a file below the folder, as a whole or not at all; parts of its text are asked for one by one.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.folder / name
        parts = [content] if isinstance(content, bytes | str) else content
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                for part in parts:
                    stream.write(part.encode() if isinstance(part, str) else part)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
