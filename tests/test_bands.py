"""Class maps of a large image, a band at a time. That bands change no label: tests/test_segmenter.py."""

import pytest
import torch

from fastzs.bands import bands
from fastzs.windows import window_grid


@pytest.mark.parametrize("together", [1, 3, 7, 100])
@pytest.mark.parametrize(("crop", "stride"), [(24, 16), (16, 16), (30, 7)])
def test_bands_hold_their_windows_in_one_place(crop, stride, together, monkeypatch):
    monkeypatch.setattr("fastzs.bands.MAPS_BYTES", 1)
    size = (70, 50)
    windows = window_grid(size, crop, stride)
    maps = torch.arange(float(len(windows)))[:, None, None, None].expand(-1, 2, 3, 3)
    done, places = 0, set()
    for band in bands(size, size, windows, iter(maps.split(together))):
        rows = band.size[0]
        begin = done - band.rows.start  # the band's first row in the image
        assert band.size == band.output_size == (rows, size[1])
        there = (windows[:, 0] < begin + band.rows.stop) & (windows[:, 0] + windows[:, 2] > done)
        assert torch.equal(band.windows, windows[there] - torch.tensor([begin, 0, 0, 0]))
        assert torch.equal(band.logits, maps[there])
        places.add(band.logits.data_ptr())
        done = begin + band.rows.stop
    assert done == size[0]
    assert len(places) == 1


def test_an_image_that_changes_its_size_is_one_band():
    windows = window_grid((40, 40), 20, 20)
    maps = torch.rand(len(windows), 2, 3, 3)
    (band,) = bands((40, 40), (50, 60), windows, iter(maps.split(3)))
    assert torch.equal(band.logits, maps)
    assert (band.size, band.output_size, band.rows) == ((40, 40), (50, 60), slice(None))
