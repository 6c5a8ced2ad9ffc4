"""One run at a time in an output folder.

A run announces itself by a file of its own in the folder, ``.running-RANDOM.json``, and then looks for others: it goes
on only if it sees none, else it takes its file back. Of two that begin at the same time the later one sees the earlier
one, whatever the file system, so never both go on. Names are never used twice, so the file of a run that died can be
removed by anybody. A run has died if its process is gone; for one on another machine, if its file, which it touches
every few seconds, has not changed for a minute by the clock of the file system.

The processes of one ``torchrun`` share the folder. Ray's actors write on behalf of the process that started them.
"""

import contextlib
import getpass
import hashlib
import json
import os
import random
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastzs import ranks
from fastzs.files import remove_leftovers, write_atomically
from fastzs.runs import OutputError

PATTERN = ".running-*.json"
BEAT, DEAD = 10.0, 60.0  # seconds between touches, and without one until a run on another machine counts as dead


_mine: ContextVar["dict[str, Hold]"] = ContextVar("folders of this thread", default={})  # noqa: B039


class Hold:
    """An output folder that is this run's; see :func:`hold`."""

    def __init__(self, folder: Path, path: Path):
        self.folder, self.path = folder, path
        self.lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="fastzs-lock")
        self._thread.start()

    def check(self) -> None:
        """See that the folder is still this run's.

        Raises:
            OutputError: this machine was asleep or cut off for so long that another run took it to be dead.
        """
        if self.lost:
            raise OutputError(
                f"output folder {self.folder}: another run took it over while this one gave no sign of life; "
                "the same command goes on from here once that one is done"
            )

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self.lost = True
                return
            except OSError:  # a file server that is away for a while
                continue


@contextlib.contextmanager
def hold(folder: Path, what: str) -> Iterator[Hold]:
    """Make an output folder, keep other runs out of it, and remove the temporary files that killed ones left there.

    A folder that is made here and in which nothing was written is removed at the end.

    Within the ``with`` block of a folder, another one of the same folder changes nothing.

    Args:
        what: the command, for the message that another run gets.

    Raises:
        OutputError: the folder cannot be written, or another run is at work in it; the message says which.
    """
    place, mine = os.path.realpath(folder), _mine.get()
    if place in mine:
        yield mine[place]
        return
    new = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    try:
        try:
            path, alone = _enter(folder, what)
        except OSError as error:
            raise OutputError(f"cannot write to the output folder {folder}: {error.strerror}") from error
        held = Hold(folder, path)
        token = _mine.set({**mine, place: held})
        try:
            if alone:
                remove_leftovers(folder, before=path.stat().st_mtime)
            yield held
        finally:
            _mine.reset(token)
            held.release()
    finally:
        with contextlib.suppress(OSError):  # there is something in it
            for parent in new:
                parent.rmdir()


def _enter(folder: Path, what: str) -> tuple[Path, bool]:
    """Make the folder and announce this process in it, see :func:`_acquire`."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another run, which was refused, has just removed what it made
            return _acquire(folder, what)


def _acquire(folder: Path, what: str) -> tuple[Path, bool]:
    """The file that announces this process, and whether it is the first of its run."""
    seen: set[Path] = set()
    about = {**_myself(), "run": _run(), "user": _user(), "command": what}
    while True:
        path = folder / PATTERN.replace("*", secrets.token_hex(8))
        write_atomically(path, json.dumps({**about, "since": time.time()}).encode())
        live = _live(folder, path)
        others = {other: entry for other, entry in live.items() if entry.get("run") != about["run"]}
        if not others:
            return path, not live
        path.unlink()
        stays = [other for other in others if other in seen]
        if stays:  # one that only tried, as this one does, has taken its file back by now
            raise OutputError(f"output folder {folder} is in use by {_told(others[stays[0]])}")
        seen |= others.keys()
        time.sleep(random.uniform(0.1, 0.5))


def _live(folder: Path, mine: Path) -> dict[Path, dict[str, Any]]:
    """The other runs that work in the folder. Files of runs that died are removed."""
    now = mine.stat().st_mtime
    found = {}
    for path in folder.glob(PATTERN):
        if path == mine:
            continue
        try:
            entry = json.loads(path.read_bytes())
            changed = path.stat().st_mtime
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            entry, changed = {}, now
        if _alive(entry, now - changed):
            found[path] = entry
        else:
            path.unlink(missing_ok=True)
    return found


def _alive(entry: dict[str, Any], silent: float) -> bool:
    if entry.get("place") == _place() and sys.platform != "win32":
        return entry.get("born") == _born(entry["pid"])
    return silent < DEAD


def _myself() -> dict[str, Any]:
    return {"place": _place(), "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


@cache
def _place() -> str:
    """What process numbers belong to: this start of the machine, and of its containers this one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _born(pid: int) -> str | None:
    """When a process began, in the machine's own units, to tell it from a later one of its number; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _run() -> str:
    """The same for all processes of one ``torchrun``, else different each time."""
    world = ranks.started()[1]
    if world == 1:
        return secrets.token_hex(8)
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    parts = [os.environ.get(name, "") for name in names]
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # one machine: the usual port and id are everybody's
        parts += [_place(), str(os.getppid())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a number without a name, as in containers
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _told(entry: dict[str, Any]) -> str:
    if "since" not in entry:
        return "another run; wait for it or name another folder"
    begun = datetime.fromtimestamp(entry["since"], UTC).isoformat(sep=" ", timespec="seconds")
    minutes = max(0, int(time.time() - entry["since"])) // 60
    age = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    where = "" if entry["place"] == _place() else f"; if it is dead, the folder is free {DEAD:.0f} s after its end"
    return (
        f"another run: fastzs {entry['command']} of user {entry['user']} on {entry['host']}, process {entry['pid']}, "
        f"since {begun} ({age}); wait for it or name another folder{where}"
    )
