"""Writing files so that a reader meets the whole file or none of it."""

import contextlib
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, then rename it to ``path``.

    An existing ``path`` is replaced. Whatever goes wrong on the way (a full disk, an interrupt), the
    temporary file is removed and what was at ``path`` before is still there.

    Raises:
        OSError: the folder is missing or cannot be written, the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            # Some file systems tell that they are full only now.
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
