"""What DPT reads of a tower, and images whose sides it can take."""

import pytest
import torch

from fastzs.decoders.dpt import enlarged, quarters


@pytest.mark.parametrize(("depth", "blocks"), [(24, (5, 11, 17, 23)), (12, (2, 5, 8, 11)), (4, (0, 1, 2, 3))])
def test_reads_the_last_block_of_each_quarter(depth, blocks):
    assert quarters(depth) == blocks  # of 24 the published ones


def test_sides_become_multiples_of_two_patches():
    fits, odd = torch.rand(1, 3, 64, 96), torch.rand(1, 3, 33, 96)
    assert enlarged(fits, 16) is fits
    assert enlarged(odd, 16).shape == (1, 3, 64, 96)
