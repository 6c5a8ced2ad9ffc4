"""Training batches in an order, and with a chance, that follow from a seed and the step alone.

A run that goes on at step s meets the very batches it would have met without the stop, and N processes that share the
steps meet together those that one process meets alone.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastzs.data.datasets import PairsDataset, ShapesDataset, seed_of

Key = tuple[int, int]  # epoch, index


class Batch(NamedTuple):
    """What a training step reads."""

    images: Tensor  # [B, 3, h, w] as the transform gives them
    target: Tensor  # [B, h, w], class indices or 255
    names: list[str]  # ids of the pictures


class Augmented(Dataset[tuple[Tensor, Tensor, str]]):
    """``dataset`` under a random transform whose chance depends on ``seed``, the epoch and the index only."""

    def __init__(self, dataset: PairsDataset | ShapesDataset, transform: Callable, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.names = dataset.names

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, str]:
        epoch, index = key
        picture, labels = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, "transform", epoch, index))
            image, target = self.transform(picture, labels)
        return image.as_subclass(Tensor), target.as_subclass(Tensor), self.names[index]


class StepSampler(Sampler[list[Key]]):
    """The keys of this process's part of every batch from ``first_step`` on, without end.

    The epochs' shuffled pictures follow each other without a gap; step s takes ``batch`` x ``processes`` of them.
    """

    def __init__(self, length: int, batch: int, seed: int, first_step: int = 0, process: int = 0, processes: int = 1):
        self.length, self.batch, self.seed, self.first_step = length, batch, seed, first_step
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[list[Key]]:
        together = self.batch * self.processes
        epoch, order = -1, torch.empty(0)
        step = self.first_step
        while True:
            keys = []
            for position in range(step * together + self.process, (step + 1) * together, self.processes):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                    order = torch.randperm(self.length, generator=generator)
                keys.append((epoch, int(order[position % self.length])))
            yield keys
            step += 1


def training_batches(
    dataset: PairsDataset | ShapesDataset,
    transform: Callable,
    *,
    batch: int,
    seed: int,
    first_step: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches without end, loaded by ``workers`` processes (0: in this one).

    Args:
        transform: takes and gives picture and labels, such as
            :func:`fastzs.data.transforms.training_transform`; its chance comes from torch's global generator.
        batch: pictures of one process's step.
        first_step: where to begin.
        process, processes: which of how many processes that share each step.
    """
    sampler = StepSampler(len(dataset), batch, seed, first_step, process, processes)
    loader = DataLoader(
        Augmented(dataset, transform, seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # without it the loader would draw from the global one
    )
    return iter(loader)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _collate(samples: list[tuple[Tensor, Tensor, str]]) -> Batch:
    images, targets, names = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.stack(targets), list(names))
