import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.windows import resize_size, window_grid

sides = st.integers(1, 200)


@pytest.mark.parametrize(
    ("size", "short", "long", "wanted"),
    [
        ((375, 500), 512, 2048, (512, 683)),
        ((500, 375), 512, 2048, (683, 512)),
        ((480, 640), 512, None, (512, 683)),
        ((512, 512), 512, None, (512, 512)),
        ((100, 1000), 512, 2048, (205, 2048)),  # the long side binds
        ((1, 1), 224, None, (224, 224)),
        ((8192, 1), 512, 2048, (2048, 1)),  # never zero
    ],
)
def test_resize_size(size, short, long, wanted):
    assert resize_size(size, short, long) == wanted


@pytest.mark.parametrize(
    "arguments", [((0, 5), 512), ((5, 5), 0), ((5, 5), 512, -1), ((5.0, 5), 512), ((5, 5, 5), 512)]
)
def test_resize_size_refuses(arguments):
    with pytest.raises(ValueError, match="expected a positive integer"):
        resize_size(*arguments)


def test_the_published_example():
    # A 500 x 375 VOC image becomes 683 x 512: two windows, the second shifted back.
    assert window_grid((512, 683), 512, 426).tolist() == [[0, 0, 512, 512], [0, 171, 512, 512]]


@given(size=st.tuples(sides, sides), crop=st.tuples(st.integers(8, 260), st.integers(8, 260)), data=st.data())
@settings(deadline=None)
def test_windows_follow_the_published_rule_and_cover(size, crop, data):
    stride = tuple(data.draw(st.integers(-(-c // 6), c)) for c in crop)
    grid = window_grid(size, crop, stride)
    assert grid.dtype == torch.int64
    assert grid.shape[1] == 4
    assert (grid[:, 2:] == torch.tensor([min(c, s) for c, s in zip(crop, size, strict=True)])).all()

    # mmsegmentation's way to count and clip, written for a crop that fits.
    places = []
    for length, c, step in zip(size, crop, stride, strict=True):
        c = min(c, length)
        count = max(length - c + step - 1, 0) // step + 1
        places.append([max(min(i * step + c, length) - c, 0) for i in range(count)])
    assert grid[:, :2].tolist() == [[top, left] for top in places[0] for left in places[1]]

    seen = torch.zeros(size, dtype=torch.bool)
    for top, left, height, width in grid.tolist():
        assert top + height <= size[0]
        assert left + width <= size[1]
        seen[top : top + height, left : left + width] = True
    assert seen.all()


def test_no_window_twice():
    grid = window_grid((1024, 1024), 512, 512)
    assert len({tuple(row) for row in grid.tolist()}) == len(grid) == 4


def test_large_picture():
    grid = window_grid((8192, 8192), 512, 426)
    assert len(grid) == 20 * 20
    assert grid[-1].tolist() == [7680, 7680, 512, 512]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((10, 10), 4, 5), "stride .5, 5. is larger than crop"),
        (((10, 10), (4, 8), (4, 9)), "larger than crop"),
        (((10, 0), 4, 4), "image_size: expected"),
        (((10, 10), 0, 4), "crop: expected .*, got 0"),
        (((10, 10), 4, -1), "stride: expected .*, got -1"),
        (((10, 10), (4, 4.0), 4), "crop: expected"),
        (((10, 10), True, 1), "crop: expected .*, got True"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_grid(*arguments)
