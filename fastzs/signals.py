"""Signals that end a long run at a point where it can be resumed."""

import signal
import threading
from typing import Any


class Signals:
    """Notes SIGTERM and the first Ctrl-C, for the training to end after its step; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.came = 0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                self.before[which] = signal.signal(which, self._note)
        return self

    def __exit__(self, *problem: object) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def _note(self, which: int, frame: object) -> None:
        if self.came and which == signal.SIGINT:
            raise KeyboardInterrupt
        self.came = which
