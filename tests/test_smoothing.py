import pytest
import torch

from fastzs.smoothing import Smoothing


def test_maps_are_averaged_exponentially():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, 4, 5, 6, generator=generator) for _ in range(5)]
    smoothing = Smoothing(0.75)
    found = [torch.cat(smoothing(some.split(2))) for some in maps]
    expected = maps[0].double()
    for some, smoothed in zip(maps, found, strict=True):
        expected = 0.75 * expected + 0.25 * some.double()
        torch.testing.assert_close(smoothed.double(), expected, rtol=0, atol=1e-6)
    again = Smoothing(0.75, Smoothing(0.75)(maps[:1])[0])
    for some, smoothed in zip(maps[1:], found[1:], strict=True):
        assert torch.equal(again([some])[0], smoothed)


def test_no_weight_changes_nothing_and_other_sizes_begin_anew():
    smoothing = Smoothing(0.0)
    for size in (2, 2, 3):
        maps = torch.randn(1, 2, size, size)
        assert torch.equal(smoothing([maps])[0], maps)
    smoothing = Smoothing(0.9, torch.zeros(1, 2, 2, 2))
    assert torch.equal(smoothing([torch.ones(1, 3, 2, 2)])[0], torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("weight", [-0.1, 1.0, float("nan")])
def test_weights_out_of_range(weight):
    with pytest.raises(ValueError, match="from 0 to below 1, got"):
        Smoothing(weight)
