"""Batches of a training: which images each step sees, prepared in parallel, the same however often it is resumed.

The order is one endless stream of shuffled epochs. Each step takes the next ``batch_size`` images of it, which the
processes of a training divide among themselves, so neither the number of processes nor a restart changes what a step
sees. Whatever is random about an image depends on the seed, the epoch and the image only.
"""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastzs.data.protocols import ignore_label


class Batch(NamedTuple):
    """Images of one process's part of a step."""

    images: Tensor  # [B, 3, H, W], fp32, normalised
    target: Tensor  # [B, H, W], class indices or ignore_label
    names: list[str]  # of the images


def mix(*parts: int | str) -> int:
    """A seed from numbers and words, in [0, 2^63)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Places(Sampler[list[tuple[int, int]]]):
    """For each step and part, this process's images as (epoch, index)."""

    def __init__(self, length: int, batch: int, parts: int, steps: range, seed: int, rank: int, world: int):
        self.length, self.steps, self.seed = length, steps, seed
        self.batch, self.share = batch, batch // world
        self.parts, self.first = parts, rank * (batch // world)

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.share // self.parts
        epoch, order = -1, torch.empty(0)
        for step in self.steps:
            for part in range(self.parts):
                places = []
                for i in range(size):
                    at, index = divmod(step * self.batch + self.first + part * size + i, self.length)
                    if at != epoch:
                        generator = torch.Generator().manual_seed(mix(self.seed, "order", at))
                        epoch, order = at, torch.randperm(self.length, generator=generator)
                    places.append((at, int(order[index])))
                yield places


class _Prepared(Dataset):
    """Images transformed; a problem with one comes as a sentence, since errors lose theirs between processes."""

    def __init__(self, dataset: Any, transform: Callable, classes: int, seed: int):
        self.dataset, self.transform, self.classes, self.seed = dataset, transform, classes, seed
        self.names = list(dataset.names)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, str] | str:
        epoch, index = place
        name = str(self.names[index])
        try:
            image, mask = self.dataset[index]
            used = torch.bincount(torch.as_tensor(mask).flatten(), minlength=1).nonzero().flatten()
            ignored = ignore_label(self.classes)
            wrong = used[(used >= self.classes) & (used != ignored)].tolist()
            if wrong:
                return (
                    f"{name}: expected labels from 0 to {self.classes - 1} ({self.classes} classes) or {ignored} in "
                    f"the mask, got {', '.join(map(str, wrong[:5]))}"
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix(self.seed, "picture", epoch, index))
                image, mask = self.transform(image, mask)
        except (ValueError, OSError) as error:
            return str(error) if name in str(error) else f"{name}: {error}"
        return image.as_subclass(Tensor), mask.as_subclass(Tensor), name


def _collate(items: Sequence[tuple[Tensor, Tensor, str] | str]) -> Batch | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, masks, names = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.stack(masks), list(names))


def _leave_signals(worker: int) -> None:
    """A signal to all processes of a training is for the one that trains; it ends its readers."""
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, signal.SIG_IGN)


def batches(
    dataset: Any,
    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    steps: range,
    parts: int = 1,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """This process's batches of the given steps, ``parts`` of each step one after the other.

    Args:
        dataset: ``dataset[i]`` -> (image uint8 [3, H, W], mask [H, W] of class indices or 255), with ``len``,
            ``.classes`` (their names) and ``.names`` (of the images).
        transform: (image, mask) -> (normalised image fp32 [3, h, w], mask [h, w]); may draw from torch's generator.
        batch_size: images of a step, over all processes and parts.
        steps: which steps of the training, counted from 0.
        pin: put batches where a GPU copies from fastest.

    Raises:
        ValueError: no images; a batch that cannot be divided evenly; an image or mask that cannot be used
            (named), when it is its turn.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there are 0 images to train on")
    if batch_size % (world * parts):
        raise ValueError(
            f"batch_size {batch_size} cannot be divided evenly among {world} processes, {parts} parts in each"
        )
    places = _Places(len(dataset), batch_size, parts, steps, seed, rank, world)
    loader = DataLoader(
        _Prepared(dataset, transform, len(dataset.classes), seed),
        batch_sampler=places,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals,
    )
    for item in loader:
        if isinstance(item, str):
            raise ValueError(item)
        yield item
