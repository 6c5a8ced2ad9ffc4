"""Images in, files out, in three stages at once: threads read ahead and write behind while the model computes."""

import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from fastzs.files import file_digest, file_state
from fastzs.outputs import OutputError, write_result
from fastzs.pictures import ImageError
from fastzs.result import Segmentation

THREADS = min(4, os.cpu_count() or 1)
AHEAD, BEHIND = 3 * THREADS, 2 * THREADS  # images that wait for the model, and results that wait for the disk, ...
BYTES = 256 << 20  # ... each at most so many bytes of them, beside what the threads hold


class Read(Protocol):
    """An image that was read."""

    @property
    def nbytes(self) -> int: ...


R = TypeVar("R", bound=Read)


class Stages(Protocol[R]):
    """What is done with images."""

    def read(self, picture: Path) -> R:
        """One image, in any thread."""
        ...

    def label(self, images: Iterable[R]) -> Iterator[Segmentation]:
        """The results of some images in their order. Several are taken at a time if the model takes batches."""
        ...


class Task(NamedTuple):
    """One image to do.

    Attributes:
        picture: its path.
        target: the path of its label map, without ending.
        stale: files of an earlier run that are to go.
    """

    picture: Path
    target: Path
    stale: Sequence[Path]


class Attempt(NamedTuple):
    """How one image went, as plain values, since it may come from another process.

    Attributes:
        picture: its path.
        state: its size and time of change, from before it was read; None if it was not there.
        digest: SHA-256 of its content, or "" where it could not be read.
        problem: why it did not come out, or None.
        ends: what ends the run.
    """

    picture: Path
    state: list[int] | None
    digest: str = ""
    problem: str | None = None
    ends: OutputError | None = None


def flow(stages: Stages[Any], also: Collection[str], tasks: Sequence[Task]) -> Iterator[Attempt]:
    """Read, label and write images; how each went, in the order in which they are done.

    An image that fails is no other image's problem: where the model fails at several at once, it gets them one by one.
    Where the run is interrupted, results that the model has given are still written.
    """
    # one thread of torch's for each: they would hold up the model's
    with ThreadPoolExecutor(THREADS, "fastzs-files", torch.set_num_threads, (1,)) as pool:
        work = _Flow(pool, stages, also, tasks)
        try:
            yield from work.run()
        except GeneratorExit:  # whoever asked wants no more
            raise
        except BaseException:
            for _, reading in work.reading:
                reading.cancel()
            yield from work.written(all=True)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _Flow:
    def __init__(self, pool: ThreadPoolExecutor, stages: Stages[Any], also: Collection[str], tasks: Sequence[Task]):
        self.pool, self.stages, self.also = pool, stages, also
        self.tasks = iter(tasks)
        self.reading: deque[tuple[Task, Future[tuple[Any, Attempt]]]] = deque()
        self.with_model: deque[tuple[Task, Any, Attempt]] = deque()
        self.writing: deque[tuple[int, Future[Attempt]]] = deque()
        self.failed: deque[Attempt] = deque()

    def run(self) -> Iterator[Attempt]:
        results = self.stages.label(self.images())
        while True:
            try:
                result = next(results, None)
            except Exception:
                self.one_by_one()
                results = self.stages.label(self.images())
            else:
                if result is None:
                    break
                self.write(result)
            yield from self.written()
        yield from self.written(all=True)

    def images(self) -> Iterator[Any]:
        """Images in their order, those that cannot be read left out."""
        while True:
            self.read_ahead()
            if not self.reading:
                return
            task, reading = self.reading.popleft()
            image, attempt = reading.result()
            if attempt.problem is not None:
                self.failed.append(attempt)
                continue
            self.with_model.append((task, image, attempt))
            self.read_ahead()
            yield image

    def read_ahead(self) -> None:
        done = (reading.result()[0] for _, reading in self.reading if reading.done() and not reading.exception())
        room = BYTES - sum(image.nbytes for image in done if image is not None)
        while len(self.reading) < (AHEAD if room > 0 else 1):
            task = next(self.tasks, None)
            if task is None:
                return
            self.reading.append((task, self.pool.submit(_read, self.stages, task)))

    def write(self, result: Segmentation) -> None:
        task, _, attempt = self.with_model.popleft()
        tensors = (result.labels, result.scores, result.image, result.probabilities)
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        self.writing.append((size, self.pool.submit(_write, result, task, self.also, attempt)))

    def written(self, *, all: bool = False) -> Iterator[Attempt]:
        """What has been done; waits for the oldest where too much is being written, or for all."""
        while self.failed:
            yield self.failed.popleft()
        while self.writing:
            full = len(self.writing) > BEHIND or sum(size for size, _ in self.writing) > BYTES
            if not (all or full or self.writing[0][1].done()):
                return
            yield self.writing.popleft()[1].result()

    def one_by_one(self) -> None:
        """The images that were with the model when it failed."""
        waiting, self.with_model = self.with_model, deque()
        for task, image, attempt in waiting:
            self.with_model.append((task, image, attempt))
            try:
                (result,) = self.stages.label([image])
            except Exception as error:  # its traceback would hold on to the model's tensors
                self.with_model.clear()
                self.failed.append(attempt._replace(digest="", problem=_problem(task.picture, error)))
            else:
                self.write(result)


def _read(stages: Stages[Any], task: Task) -> tuple[Any, Attempt]:
    attempt = Attempt(task.picture, file_state(task.picture))
    try:
        image = stages.read(task.picture)
        return image, attempt._replace(digest=file_digest(task.picture))
    except Exception as error:
        return None, attempt._replace(problem=_problem(task.picture, error))


def _write(result: Segmentation, task: Task, also: Collection[str], attempt: Attempt) -> Attempt:
    try:
        for path in task.stale:
            path.unlink(missing_ok=True)
        write_result(result, task.picture, task.target, also)
    except OutputError as error:
        return attempt._replace(digest="", problem=str(error), ends=OutputError(str(error)))
    except Exception as error:
        return attempt._replace(digest="", problem=_problem(task.picture, error))
    return attempt


def _problem(picture: Path, error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, ImageError):
        return text if str(picture) in text else f"{picture}: {text}"
    return f"{picture}: {type(error).__name__}{f': {text.splitlines()[0]}' if text else ''}"
