"""Files: written as a whole or not at all, and read only if they are regular files."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, then rename it to ``path``; see :func:`replacing`.

    Raises:
        OSError: the folder is missing or cannot be written, the disk is full; ``path`` is the file it names.
    """
    with replacing(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A stream whose content is at ``path`` once the ``with`` block has ended well.

    An existing ``path`` is replaced. Whatever goes wrong on the way (a full disk, an interrupt), the
    temporary file is removed and what was at ``path`` before is still there.

    Raises:
        OSError: the folder is missing or cannot be written, the disk is full; ``path`` is the file it names.
    """
    target = Path(path)
    temporary = temporary_beside(target)
    try:
        with open(temporary, "xb") as stream:
            yield stream
            # Some file systems tell that they are full only now.
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(target)  # nobody has heard of the temporary name
            del error.filename2  # None would be printed
        raise


def temporary_beside(path: Path) -> Path:
    """A name for a temporary file or folder beside ``path``, which :func:`remove_leftovers` knows."""
    return path.with_name(f".{secrets.token_hex(6)}.tmp")


def remove_leftovers(folder: Path, before: float) -> None:
    """Remove the temporary files and folders that a killed process has left below ``folder``.

    Args:
        before: a modification time in seconds; files that changed later may be in use and stay.
    """
    for parent, folders, names in os.walk(folder):
        for name in [name for name in (*folders, *names) if TEMPORARY.fullmatch(name)]:
            path = Path(parent, name)
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime >= before:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        folders[:] = [name for name in folders if not TEMPORARY.fullmatch(name)]


def is_web_address(place: str | os.PathLike) -> bool:
    """Whether a place is written as ``https://...`` or another address, which nothing here fetches."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", os.fspath(place)) is not None


def output_path(path: str | os.PathLike) -> Path:
    """A path to write to, as a person gives it: ``~`` is the home folder.

    Raises:
        ValueError: there is no home folder, so that a folder called ``~`` would be made; or it is a web address.
    """
    full = os.path.expanduser(path)
    if is_web_address(full):
        raise ValueError(f"{full}: expected a path to write to, got a web address")
    if full.startswith("~") and not os.path.lexists(Path(full).parts[0]):
        raise ValueError(
            f"{full}: there is no home folder that {Path(full).parts[0]} could stand for; give the path in full, "
            f"or ./{full} for a file of that name"
        )
    return Path(full)


def open_file(path: str | os.PathLike) -> BufferedReader:
    """Open a regular file for reading; anything else is refused, so that nothing waits for it.

    Raises:
        OSError: it cannot be opened, or it is a folder, a FIFO (whose reader would wait for ever), a socket or a
            device (which may never end).
    """
    check_file(path)  # devices may do something when they are opened
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_kind(os.fstat(handle), path)  # what was there a moment ago may have been replaced
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_file(path: str | os.PathLike) -> None:
    """Check that a path is a regular file, so that a library may open it by name without waiting for ever.

    Raises:
        OSError: as :func:`open_file`.
    """
    _check_kind(os.stat(path), path)


def _check_kind(status: os.stat_result, path: str | os.PathLike) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"is {KINDS.get(kind, 'something else')}, not a file", os.fspath(path))


def file_state(path: Path) -> list[int] | None:
    """Size and time of change, which tell a file from another one put in its place; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: as :func:`open_file`.
    """
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
        OSError: see :func:`open_file`.
    """
    with open_file(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{os.fspath(path)}, line {line}: is not UTF-8 text") from None
