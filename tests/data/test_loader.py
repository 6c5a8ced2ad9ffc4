from itertools import islice

import torch

from fastzs.data.datasets import ShapesDataset
from fastzs.data.loader import StepSampler, training_batches
from fastzs.data.transforms import training_transform

TRANSFORM = training_transform(32, (0.5,) * 3, (0.5,) * 3)


def batches(count, length=5, **options):
    dataset = ShapesDataset("train", length=length, size=32)
    return list(islice(training_batches(dataset, TRANSFORM, batch=2, seed=3, **options), count))


def same(one, other):
    return one.names == other.names and torch.equal(one.images, other.images) and torch.equal(one.target, other.target)


def test_batches():
    batch = batches(1)[0]
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert type(batch.images) is torch.Tensor
    assert batch.target.shape == (2, 32, 32)
    assert len(batch.names) == 2


def test_every_epoch_holds_every_picture_once():
    keys = [key for some in islice(iter(StepSampler(5, 2, seed=0)), 10) for key in some]
    for epoch in range(4):
        assert sorted(index for e, index in keys if e == epoch) == list(range(5))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]


def test_going_on_meets_the_same_batches():
    whole = batches(6)
    assert all(same(one, other) for one, other in zip(whole[4:], batches(2, first_step=4), strict=True))
    assert not same(whole[3], whole[4])


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    first = batches(2)
    left = torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), left)
    torch.manual_seed(1)
    assert all(same(one, other) for one, other in zip(first, batches(2), strict=True))


def test_a_picture_looks_different_in_another_epoch():
    keys = [key for some in islice(iter(StepSampler(5, 1, seed=3)), 10) for key in some]
    samples = [b for b in islice(training_batches(ShapesDataset("train", 5, 32), TRANSFORM, batch=1, seed=3), 10)]
    by_index = {}
    for (_, index), sample in zip(keys, samples, strict=True):
        by_index.setdefault(index, []).append(sample.images)
    assert all(not torch.equal(one, other) for one, other in by_index.values())


def test_processes_share_a_step():
    alone = [key for some in islice(iter(StepSampler(7, 4, seed=1)), 5) for key in some]
    parts = [list(islice(iter(StepSampler(7, 2, seed=1, process=p, processes=2)), 5)) for p in (0, 1)]
    together = [key for step in zip(*parts, strict=True) for some in step for key in some]
    assert sorted(alone) == sorted(together)
    for step in range(5):
        shared = {key for part in parts for key in part[step]}
        assert shared == set(alone[4 * step : 4 * step + 4])


def test_worker_processes_load_the_same():
    assert all(same(one, other) for one, other in zip(batches(4), batches(4, workers=2), strict=True))
