"""Which labels train: the setting that is not told where the unseen classes are."""

import pytest
import torch

from fastzs.losses import honest_target, inductive_target, pixel_cross_entropy, transductive_target


def test_honest_target_goes_by_the_models_own_certainty():
    """Classes 0 and 2 are seen. An unseen label and an ignored pixel are treated alike."""
    target = torch.tensor([[[0, 1, 3, 255, 1, 255, 2]]], dtype=torch.uint8)
    logits = torch.full((1, 4, 1, 7), -3.0)
    logits[0, 3, 0, :4] = 2.0  # the model sees class 3 in the first four pixels
    logits[0, 0] = 5.0  # and is yet surer of a seen one, which must not count
    honest = honest_target(target, logits, [0, 2])
    assert honest.tolist() == [[[0, 3, 3, 3, 255, 255, 2]]]
    assert honest.dtype == torch.int64
    # published: told that pixels 1, 2 and 4 are of unseen classes, and that 3 and 5 are not
    assert transductive_target(target, logits, [0, 2]).tolist() == [[[0, 3, 3, 255, 1, 255, 2]]]


def test_honest_target_knows_no_unseen_label():
    """Whatever unseen or ignored label a pixel has, the result is the same."""
    logits = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 4, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    other = torch.where((target == 1) | (target == 3), 255, target)
    assert torch.equal(honest_target(target, logits, [0, 2]), honest_target(other, logits, [0, 2]))
    assert not torch.equal(transductive_target(target, logits, [0, 2]), transductive_target(other, logits, [0, 2]))


def test_honest_target_wants_an_unseen_class():
    with pytest.raises(ValueError, match="every class is seen"):
        honest_target(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 1, 1), [0, 1])


@pytest.mark.parametrize(
    ("dtype", "ignore_index", "label"), [(torch.uint8, -100, 156), (torch.int8, 255, -1), (torch.uint8, 65535, 255)]
)
def test_a_label_is_not_taken_for_an_ignored_one_that_its_dtype_cannot_hold(dtype, ignore_index, label):
    """In a byte -100 is 156: comparing a narrow tensor with it would find the pixels of class 156."""
    target, wide = torch.full((1, 2, 2), label, dtype=dtype), torch.full((1, 2, 2), label)
    logits = torch.randn(1, 300, 2, 2, generator=torch.Generator().manual_seed(0))
    for function in (
        lambda target: inductive_target(target, [3, 156, 255], 300, ignore_index),
        lambda target: transductive_target(target, logits, [3, 156], ignore_index),
        lambda target: honest_target(target, logits, [3, 156], ignore_index),
        lambda target: pixel_cross_entropy(logits, target, ignore_index),
    ):
        if label < 0:
            with pytest.raises(ValueError, match="got -1"):
                function(target)
        else:
            assert torch.equal(function(target), function(wide))
            assert (function(target) != ignore_index).all()
