"""Which errors of a system on drawn shapes are of colours, of shapes, or of where objects are."""

import torch

from bench.shapes_errors import shares
from bench.systems_shapes import SEEN
from fastzs.data.shapes import PAIRS


def test_errors_are_told_apart():
    seen = [i for i in SEEN if i < len(PAIRS)]
    red = [i for i in seen if i < 8][:2]  # of one colour
    other = next(i for i in seen if i // 8 != 0 and i % 8 == red[0] % 8)  # of one shape
    unseen = next(i for i in range(len(PAIRS)) if i not in SEEN)
    paper = len(PAIRS)
    truth = torch.tensor([red[0]] * 5 + [unseen, unseen, paper, paper, 255])
    labels = torch.tensor([red[0], red[1], other, paper, paper + 1, unseen, paper, paper + 1, red[0], red[0]])
    found = shares(truth, labels)
    assert found["seen"] == {"ground": 40.0, "colour": 66.7, "shape": 66.7, "both": 33.3}
    assert found["unseen"] == {"ground": 50.0, "colour": 100.0, "shape": 100.0, "both": 100.0}
    assert found["grounds"] == {"ground": 50.0}
    assert shares(truth[:5], torch.full((5,), paper)) == {"seen": {"ground": 100.0}}
