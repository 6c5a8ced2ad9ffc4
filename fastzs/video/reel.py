"""Overlay videos: written in parts that are whole or absent, and joined without encoding anew."""

from collections.abc import Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastzs.files import temporary_beside
from fastzs.outputs import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av import VideoFrame

ENCODER = "libx264"
PART = ".nut"  # a container that keeps any time base and any first time
QUALITY = {"crf": "20", "preset": "veryfast", "bf": "0"}  # without B-frames, whose order of decoding is another


def why_no_overlay() -> str | None:
    """Why overlays cannot be encoded here, or None."""
    import av

    return None if ENCODER in av.codecs_available else f"FFmpeg in PyAV {av.__version__} has no encoder {ENCODER}"


def video_frame(image: Image.Image) -> "VideoFrame":
    """A frame as the encoder takes it, of an image whose sides are even."""
    from av import VideoFrame

    return VideoFrame.from_ndarray(np.asarray(image), format="rgb24").reformat(format="yuv420p")


class Reel:
    """A part of an overlay: at its path once :meth:`close` has come back, and absent before.

    Args:
        path: of the part.
        time_base: seconds of one unit of time.
        rate: frames per second, by which the encoder shares out its bits.
    """

    def __init__(self, path: Path, time_base: Fraction, rate: Fraction):
        self.path, self.time_base, self.rate = path, time_base, rate
        self.temporary = temporary_beside(path)
        self.container: Any = None

    def add(self, frame: "VideoFrame", pts: int) -> None:
        """Write a frame; all have one size, and their times grow from 0 or later.

        Raises:
            OutputError: it cannot be written.
        """
        with _told(self.path):
            if self.container is None:
                self.container = self._begin(frame.width, frame.height)
            frame.pts, frame.time_base = pts, self.time_base
            self.container.mux(self.stream.encode(frame))

    def _begin(self, width: int, height: int) -> Any:
        import av

        container = av.open(str(self.temporary), "w", format="nut")
        self.stream: Any = container.add_stream(ENCODER, rate=self.rate, options=QUALITY)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.time_base = self.stream.codec_context.time_base = self.time_base
        return container

    def close(self) -> None:
        """Put the part where it belongs.

        Raises:
            OutputError: it cannot be written.
        """
        with _told(self.path):
            self.container.mux(self.stream.encode(None))
            self.container.close()
            self.container = None
            self.temporary.replace(self.path)

    def discard(self) -> None:
        """Leave nothing of a part that was not closed."""
        if self.container is not None:
            with suppress(Exception):  # of a full disk
                self.container.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


def join_reels(parts: Sequence[Path], path: Path) -> None:
    """Put the parts of an overlay into one MP4 file, which is written whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    import av

    temporary = temporary_beside(path)
    try:
        with _told(path):
            with av.open(str(parts[0])) as first:
                source: Any = first.streams.video[0]
                # edit lists, which hold the first time, count in the movie's own unit
                options = {"movflags": "faststart", "movie_timescale": str(source.time_base.denominator)}
                with av.open(str(temporary), "w", format="mp4", options=options) as joined:
                    stream = joined.add_stream_from_template(source)
                    stream.time_base = source.time_base
                    for part in parts:
                        _append(part, joined, stream)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _append(part: Path, joined: Any, stream: Any) -> None:
    import av

    with av.open(str(part)) as container:
        for packet in container.demux(container.streams.video[0]):
            if packet.pts is not None:  # the last is empty
                packet.dts, packet.stream = packet.pts, stream
                joined.mux(packet)


@contextmanager
def _told(path: Path) -> "Iterator[None]":
    from av.error import FFmpegError

    try:
        yield
    except (FFmpegError, OSError) as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
