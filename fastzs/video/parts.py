"""What is done of a video: parts that are whole or absent, from which a killed run goes on, and their end."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fastzs.files import replacing, write_atomically
from fastzs.outputs import OutputError
from fastzs.video.clip import Place
from fastzs.video.reel import PART, join_reels

FOLDER = "parts"
FRAMES, OVERLAY = "frames.csv", "_overlay.mp4"
HEAD = b"frame,pts,time_base,seconds\n"


@dataclass
class Parts:
    """The parts of one video below its folder of results.

    Each has a JSON file, which is written last and makes it count: its frames and their times, the problems of frames,
    and how far the video was read. Beside it may be a part of the overlay and the state of the smoothing.

    Args:
        folder: of the video's results.
        key: identifies the video and the settings; parts of another key are removed.

    Attributes:
        count: of the parts.
        done: frames that are done.
        failed: frames that the model failed at.
        first: time of the first frame; None before there is one.
        read_to: how far the video was read; None before there is a part.
    """

    folder: Path
    key: str

    def __post_init__(self):
        self.place = self.folder / FOLDER
        self.count = self.done = self.failed = 0
        self.first: int | None = None
        self.read_to: Place | None = None
        while (record := self._record(self.count)) is not None:
            self._count(record)

    def _record(self, number: int) -> dict[str, Any] | None:
        try:
            record = json.loads(self.file(".json", number).read_bytes())
            return record if record["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _count(self, record: dict[str, Any]) -> None:
        self.count += 1
        self.done += len(record["frames"])
        self.failed += record["failed"]
        self.read_to = Place(*record["read_to"])
        self.first = record["frames"][0][1] if self.first is None else self.first

    def file(self, ending: str, number: int | None = None) -> Path:
        """A file of a part, of the one that is to come unless a number is given."""
        return self.place / f"{self.count if number is None else number:06d}{ending}"

    @property
    def state(self) -> Tensor | None:
        """The smoothing's after the last part."""
        try:
            return safetensors.torch.load_file(self.file(".safetensors", self.count - 1))["state"]
        except (OSError, SafetensorError, KeyError):
            return None

    def add(self, frames: list[Place], failed: int, state: Tensor | None) -> None:
        """Make a part count, whose overlay is written already.

        Args:
            frames: those that are done, at least one.
            failed: how many before the last of them are not.
            state: of the smoothing after the last, if there is one.

        Raises:
            OutputError: it cannot be written.
        """
        times = [[frame.index, frame.pts] for frame in frames]
        record = {"key": self.key, "frames": times, "read_to": list(frames[-1]), "failed": failed}
        try:
            if state is not None:
                data = safetensors.torch.save({"state": state.cpu().contiguous()})
                write_atomically(self.file(".safetensors"), data)
            write_atomically(self.file(".json"), json.dumps(record).encode())
            self.file(".safetensors", self.count - 1).unlink(missing_ok=True)  # not needed any more
        except OSError as error:
            raise OutputError(f"cannot write {self.file('.json')}: {error.strerror}") from error
        self._count(record)

    def begin(self) -> None:
        """Make the folder; without parts of this key, remove what an earlier run has left.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            if not self.count and self.folder.is_dir():
                self.remove(self.folder)
                self.folder.with_name(self.folder.name + OVERLAY).unlink(missing_ok=True)
                for path in self.folder.iterdir():
                    if path.name == FRAMES or path.name.split("_")[0].split(".")[0].isdigit():
                        path.unlink()
            self.place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.place}: {error.strerror}") from error

    def join(self, time_base: Any, overlay: Path | None) -> None:
        """Put the parts together: the times of all frames, and the overlay.

        Raises:
            OutputError: something cannot be written.
        """
        if overlay is not None:
            join_reels([self.file(PART, number) for number in range(self.count)], overlay)
        try:
            with replacing(self.folder / FRAMES) as stream:
                stream.write(HEAD)
                for index, pts in self._frames():
                    stream.write(f"{index},{pts},{time_base},{float(pts * time_base):.9f}\n".encode())
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / FRAMES}: {error.strerror}") from error

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the parts of a video that is done."""
        shutil.rmtree(folder / FOLDER, ignore_errors=True)

    def _frames(self) -> Iterator[tuple[int, int]]:
        for number in range(self.count):
            yield from map(tuple, json.loads(self.file(".json", number).read_bytes())["frames"])
