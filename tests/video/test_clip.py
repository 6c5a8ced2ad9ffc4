from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from fastzs.video.clip import Clip, VideoError
from tests.video.clips import write_clip

av = pytest.importorskip("av", reason="needs the extra 'video'")


def test_frames_in_order_with_their_times(tmp_path):
    times = write_clip(tmp_path / "a.mp4", 12, level=lambda i: 20 * i, options={"movie_timescale": "90000"})
    with Clip(tmp_path / "a.mp4") as clip:
        frames = list(clip.frames())
        assert (clip.count, clip.decoded, clip.damaged) == (12, 12, 0)
        assert [frame.place.pts * clip.time_base for frame in frames] == times
    assert [frame.place.index for frame in frames] == list(range(12))
    for i, frame in enumerate(frames):
        assert frame.image.shape == (3, 48, 64)
        assert abs(frame.image.float().mean() - 20 * i) < 4
    with Clip(tmp_path / "a.mp4") as clip:
        assert [frame.place.index for frame in clip.frames(5)] == [0, 5, 10]
        clip.decoded = 8  # as where four are there but not shown
        assert clip.missing() == 0


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
def test_going_on_behind_a_frame(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_clip(path)
    with Clip(path) as clip:
        frames = list(clip.frames())
    assert len(frames) == 40
    assert all(a.place.pts < b.place.pts for a, b in pairwise(frames))
    for cut in (0, 9, 10, 25, 39):
        with Clip(path) as clip:
            rest = list(clip.frames(after=frames[cut].place))
        assert [frame.place for frame in rest] == [frame.place for frame in frames[cut + 1 :]]
        assert all((a.image == b.image).all() for a, b in zip(rest, frames[cut + 1 :], strict=True))


def test_going_on_where_times_begin_anew(tmp_path):
    """Two recordings in one file: each time of the first stands for a frame of the second, too."""
    path = tmp_path / "a.ts"
    write_clip(path)
    path.write_bytes(2 * path.read_bytes())
    with Clip(path) as clip:
        frames = list(clip.frames())
    assert len(frames) == 80
    assert all(a.place.pts < b.place.pts for a, b in pairwise(frames))
    for cut in (30, 50):
        with Clip(path) as clip:
            rest = list(clip.frames(after=frames[cut].place))
        assert [frame.place for frame in rest] == [frame.place for frame in frames[cut + 1 :]]


def test_damage_is_counted_and_what_the_decoder_holds_is_kept():
    """A frame that is marked as damaged, and a file that cannot be read further."""
    good, bad = (SimpleNamespace(is_corrupt=flag) for flag in (False, True))

    def packets(stream):
        yield SimpleNamespace(decode=lambda: [good, bad])
        raise av.error.InvalidDataError(1, "damaged")

    clip = Clip.__new__(Clip)
    clip.damaged, clip.container = 0, SimpleNamespace(demux=packets)
    clip.stream = SimpleNamespace(codec_context=SimpleNamespace(decode=lambda packet: [good]))
    assert list(clip._decoded()) == [good, bad, good]
    assert clip.damaged == 2


def test_a_truncated_file_gives_what_there_is(tmp_path):
    path = tmp_path / "a.mp4"
    write_clip(path, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with Clip(path) as clip:
        frames = list(clip.frames())
        assert 15 < len(frames) < 30
        assert (clip.count, clip.decoded) == (40, len(frames))
        assert clip.damaged >= 1
        assert len(frames) + clip.damaged + clip.missing() == 40


def test_damage_in_the_middle_is_counted_once(tmp_path):
    path = tmp_path / "a.mp4"
    write_clip(path, options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    middle, size = len(data) // 2, len(data) // 10
    data[middle : middle + size] = bytes(size)
    path.write_bytes(data)
    with Clip(path) as clip:
        frames = list(clip.frames())
        damaged = clip.damaged
    assert 25 < len(frames) < 40
    assert 1 <= damaged <= 10
    with Clip(path) as clip:
        assert [frame.place for frame in clip.frames(after=frames[-8].place)] == [f.place for f in frames[-7:]]
        assert clip.damaged == damaged


def test_files_that_are_no_videos(tmp_path):
    def refused(name, data, match):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(VideoError, match=match) as caught:
            Clip(path)
        assert str(path) in str(caught.value)

    refused("gone.mp4", None, "No such file")
    refused("words.mp4", b"words\n" * 99, "cannot be opened as a video: Invalid data")
    refused("empty.mp4", b"", "cannot be opened as a video|ends before its first frame")
    write_clip(tmp_path / "a.ts", 3)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{tmp_path}/a.ts\n#EXT-X-ENDLIST\n"
    refused("list.mp4", playlist.encode(), "cannot be opened as a video")
    refused("files.mp4", b"ffconcat version 1.0\nfile a.ts\n", "cannot be opened as a video")
    write_clip(tmp_path / "a.mkv", 3)
    foreign = (tmp_path / "a.mkv").read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ")
    refused("foreign.mkv", foreign, "codec cannot be decoded")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    refused("sound.mkv", None, "has no video stream")
    with pytest.raises(VideoError, match="64 x 48 pixels are more than 100"):
        Clip(tmp_path / "a.mkv", 100)


def test_frames_are_turned_as_the_file_says():
    clip = Clip.__new__(Clip)
    clip.size = (3, 2)
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    frame = SimpleNamespace(rotation=-90, to_ndarray=lambda **_: pixels)
    image = clip._image(frame).permute(1, 2, 0)
    assert image.shape == (3, 2, 3)
    assert image[0, 1].tolist() == pixels[0, 0].tolist()  # clockwise: the upper left corner goes to the upper right


def test_times_that_do_not_grow_are_put_right(tmp_path):
    clip = Clip.__new__(Clip)
    clip.decoded, clip.damaged, clip.rate, clip.time_base = 0, 0, Fraction(25), Fraction(1, 100)
    given = [None, 3, 3, None, 50]
    clip._decoded = lambda: (SimpleNamespace(pts=pts, duration=0) for pts in given)
    clip._image = lambda frame: None
    places = [frame.place for frame in clip.frames()]
    assert [place.pts for place in places] == [0, 3, 7, 11, 50]
    assert not places[-1].seekable
