"""Strides as the attention kernels take them."""

import pytest
import torch

from fastzs.kernels.strides import in_units


@pytest.mark.parametrize(
    ("dtype", "width", "unit"),
    [
        (torch.bfloat16, 104, 8),
        (torch.float32, 104, 4),
        (torch.float32, 12, 4),
        (torch.bfloat16, 12, 1),  # the second head begins in the middle of 16 bytes
        (torch.float32, 7, 1),
    ],
)
def test_units_are_sixteen_bytes_where_rows_begin_there(dtype, width, unit):
    q, k, _ = torch.empty(2, 5, 3, 3, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    found, strides = in_units([q, k])
    assert found == unit
    assert [unit * stride for stride in strides] == [*q.stride()[:3], *k.stride()[:3]]


def test_one_tensor_that_lies_otherwise_decides():
    q, framed = torch.empty(1, 2, 5, 16), torch.empty(1, 2, 5, 17)[..., :16]
    assert in_units([q, framed])[0] == 1
    assert in_units([q, q.expand(3, -1, -1, -1)])[0] == 4  # a batch of one image again and again
