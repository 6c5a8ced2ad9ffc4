"""Small videos to read."""

from fractions import Fraction

import numpy as np


def write_clip(
    path, count=40, size=(48, 64), times=lambda i: 1000 + i * 3600 + (i % 3) * 7, level=None, image=None, key=10, **more
):
    """Frames of noise, of one grey ``level(i)``, or ``image(i)``; ``times`` are in units of 1 / 90000 s.

    Gives the times in seconds.
    """
    import av

    base = Fraction(1, 90000)
    with av.open(str(path), "w", **more) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "20", "g": str(key), "bf": "0"})
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", base
        container.start_encoding()
        for i in range(count):
            if image is not None:
                pixels = np.ascontiguousarray(image(i))
            elif level is None:
                pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            else:
                pixels = np.full((*size, 3), level(i), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times(i), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return [times(i) * base for i in range(count)]
