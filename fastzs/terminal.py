"""Standard output and error that cost no result: a closed pipe, a full disk or an ASCII terminal ends nothing."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Lenient:
    """A text stream that goes quiet where writing to it fails, and shows letters that it cannot encode by number.

    Attributes:
        problem: why it is quiet; None while all is well, and after a reader that had enough of it (a closed pipe).
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.problem: str | None = None
        self._quiet = False
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Any, *arguments: str) -> None:
        if self._quiet:
            return
        try:
            function(*arguments)
        except UnicodeEncodeError:  # of a stream that cannot be reconfigured
            encoding = self.stream.encoding or "ascii"
            function(*(text.encode(encoding, "backslashreplace").decode(encoding) for text in arguments))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._quiet = True
            if not isinstance(error, BrokenPipeError):
                self.problem = getattr(error, "strerror", None) or str(error)
            with contextlib.suppress(OSError, ValueError):  # what is in its buffer fails again at the end otherwise
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def lenient_streams() -> Iterator[Lenient]:
    """Put :class:`Lenient` streams in the place of ``sys.stdout`` (which it gives) and ``sys.stderr``."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # under pythonw and some services there are no streams
        out, err = (Lenient(nowhere if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
