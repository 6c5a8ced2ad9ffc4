"""A video file as a stream of frames."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastzs.files import check_file
from fastzs.needed import MissingPackage, check_installed
from fastzs.pictures import ImageError

if TYPE_CHECKING:
    from av import VideoFrame

SUFFIXES = frozenset(f".{kind}" for kind in "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts webm wmv".split())  # noqa: SIM905
# Playlists and lists of files are left out: what they name would be opened, whatever it is.
FORMATS = "asf,avi,flv,h264,hevc,ivf,matroska,mov,mpeg,mpegts,mxf,nut,ogg"
MAX_PIXELS = 178_956_970  # of a frame, as Pillow has it for pictures


class VideoError(ImageError):
    """A video that cannot be read or segmented; the message names it."""


class Place(NamedTuple):
    """How far a video was read: up to and with a frame.

    Attributes:
        index: of the frame among all that can be decoded, from 0.
        pts: its time in units of the clip's ``time_base``.
        damaged: packets that could not be decoded and frames marked as damaged, so far.
        seekable: whether all times so far were as they stand in the file, so that they can be sought.
    """

    index: int
    pts: int
    damaged: int = 0
    seekable: bool = True


class Frame(NamedTuple):
    """A frame."""

    place: Place
    image: Tensor  # uint8 RGB [3, H, W], turned as it is to be shown


class Clip:
    """A video file, for ``with``.

    Args:
        path: of a regular file.
        max_pixels: of a frame.

    Attributes:
        time_base: seconds of one unit of time.
        rate: frames per second on average, or None where the file does not say.
        count: how many frames the file says it has, or None.
        damaged: as of :class:`Place`, of all that was read.
        decoded: how many frames came, with those that an earlier run had done.

    Raises:
        VideoError: PyAV is not installed; the file is missing, no video, without frames, of a codec that this FFmpeg
            cannot decode, or its frames are too large.
    """

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
        try:
            check_installed("av", "PyAV", "videos", "video")
        except MissingPackage as error:
            raise VideoError(f"{path}: {error}") from error
        self.path, self.damaged, self.decoded = path, 0, 0
        self._open()
        codec = self.stream.codec_context
        if codec.width * codec.height > max_pixels:
            self.container.close()
            raise VideoError(
                f"{path}: frames of {codec.width} x {codec.height} pixels are more than {max_pixels:,}, the most that "
                "is read; if you trust it, allow more with --max-pixels"
            )
        self.size = (codec.width, codec.height)  # before turning
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate: Fraction | None = rate if rate and 0 < rate < 1000 else None
        self.time_base: Fraction = self.stream.time_base or 1 / (self.rate or Fraction(25))
        self.count: int | None = self.stream.frames or None

    def _open(self) -> None:
        import av
        from av.error import EOFError, FFmpegError

        try:
            check_file(self.path)
            # "file:" so that no name is taken for another protocol's address
            limits = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
            self.container: Any = av.open(f"file:{self.path}", options=limits)
        except EOFError as error:
            raise VideoError(f"{self.path}: ends before its first frame") from error
        except (FFmpegError, OSError) as error:
            raise VideoError(f"{self.path}: cannot be opened as a video: {error.strerror or error}") from error
        self.stream: Any = next(iter(self.container.streams.video), None)
        if self.stream is None:
            self.container.close()
            raise VideoError(f"{self.path}: has no video stream")
        if self.stream.codec_context is None:
            self.container.close()
            raise VideoError(f"{self.path}: its codec cannot be decoded by the FFmpeg of PyAV; convert it to H.264")
        # Threads of whole frames swallow errors, and frames with them; the model is slower than any decoder.
        self.stream.thread_type = "SLICE"

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *problem: object) -> None:
        self.container.close()

    def frames(self, step: int = 1, after: Place | None = None) -> Iterator[Frame]:
        """Frames in the order in which they are shown, one at a time.

        What cannot be decoded is left out and counted; a truncated file gives what there is. Times are those of the
        file. Where it has none, or they do not grow, a frame comes one frame's length after the last.

        Args:
            step: every so many-th frame, by its index.
            after: only what comes behind it.
        """
        start, last, seekable = 0, None, True
        frames: Iterator[VideoFrame] = self._decoded()
        if after is not None:
            frames = self._behind(after)
            start, last, seekable = after.index + 1, after.pts, after.seekable
            self.decoded = start
        tick = max(1, round(1 / ((self.rate or Fraction(25)) * self.time_base)))
        for index, frame in enumerate(frames, start):
            self.decoded += 1
            if frame.pts is None or (last is not None and frame.pts <= last):
                seekable = False
                pts = 0 if last is None else last + (frame.duration or tick)
            else:
                pts = frame.pts
            last = pts
            if index % step:
                continue
            try:
                image = self._image(frame)
            except (OSError, ValueError):  # of damaged frames, with unknown layouts of pixels for instance
                self.damaged += 1
                continue
            yield Frame(Place(index, pts, self.damaged, seekable), image)

    def _behind(self, place: Place) -> "Iterator[VideoFrame]":
        """The frames behind a place: from the keyframe before it, or from the beginning if that cannot be found."""
        from av.error import FFmpegError
        from av.format import Flags

        frames = None
        # where times may begin anew, as in recordings that were joined, one time may stand for several frames
        if place.seekable and not self.container.format.flags & Flags.ts_discont.value:
            try:
                self.container.seek(place.pts, stream=self.stream)
            except FFmpegError:
                pass
            else:
                frames = self._decoded()
                first = next(frames, None)
                if first is None or not first.key_frame or first.pts is None or first.pts > place.pts:
                    frames = None
                else:
                    known = chain([first], frames)
                    frames = dropwhile(lambda frame: frame.pts is not None and frame.pts <= place.pts, known)
        if frames is None:
            self.container.close()
            self._open()
            frames = islice(self._decoded(), place.index + 1, None)
        for frame in frames:
            self.damaged = place.damaged + bool(frame.is_corrupt)  # what is before was counted by whoever read it
            yield frame
            break
        yield from frames

    def _decoded(self) -> "Iterator[VideoFrame]":
        from av.error import EOFError, FFmpegError

        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:  # nothing more can be read; what the decoder holds is still good
                self.damaged += 1
                packet = None
            try:
                frames = self.stream.codec_context.decode(None) if packet is None else packet.decode()
            except EOFError:
                return
            except FFmpegError:
                self.damaged += 1
                frames = []
            for frame in frames:
                self.damaged += bool(frame.is_corrupt)
                yield frame
            if packet is None:
                return

    def _image(self, frame: "VideoFrame") -> Tensor:
        """Of one size, whatever the frame's is: streams may change theirs."""
        pixels = frame.to_ndarray(format="rgb24", width=self.size[0], height=self.size[1])
        turned = np.rot90(pixels, round(frame.rotation / 90) % 4)
        return torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1)))

    def missing(self) -> int:
        """How many frames the file announces but does not hold, as a truncated one; for when all was read.

        Frames that are there but not shown, such as those that a cut has left in an MP4 file, are none.
        """
        from av.error import FFmpegError

        if self.count is None or self.decoded >= self.count:
            return 0
        self.container.close()
        self._open()
        there = 0
        try:
            for packet in self.container.demux(self.stream):
                there += packet.size > 0
        except FFmpegError:  # that was counted as damage
            pass
        return max(0, self.count - there)
