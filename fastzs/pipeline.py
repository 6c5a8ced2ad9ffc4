"""Images in, files out, in three stages at once: threads read ahead and write behind while the model computes."""

import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
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
T = TypeVar("T")


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
        task: what was to be done.
    """

    picture: Path
    state: list[int] | None
    digest: str = ""
    problem: str | None = None
    ends: OutputError | None = None
    task: Task | None = None

    def failed(self, error: Exception) -> "Attempt":
        """The same with what went wrong."""
        return self._replace(digest="", problem=problem_text(self.picture, error))


def flow(stages: Stages[Any], also: Collection[str], tasks: Sequence[Task]) -> Iterator[Attempt]:
    """Read, label and write images; how each went, in the order in which they are done."""
    return staged(partial(_read, stages), stages.label, partial(_write, also), tasks)


def staged(
    read: Callable[[Any], tuple[Any, Any]],
    label: Callable[[Iterable[Any]], Iterator[Any]],
    write: Callable[[Any, Any], Any],
    tasks: Iterable[Any],
) -> Generator[Any]:
    """Read, label and write; how each task went, an :class:`Attempt` or another with ``problem`` and ``failed``.

    An image that fails is no other image's problem: where the model fails at several at once, it gets them one by one.
    Where the run is interrupted, results that the model has given are still written. Results are written in any order;
    their attempts come in the order of the tasks, except that those without a result come early.

    Args:
        read: an image, which has ``nbytes``, and its attempt, of a task; in any thread.
        label: results, which have ``nbytes``, of images in their order.
        write: the attempt of a result and its attempt so far; in any thread.
        tasks: asked for when there is room for more.
    """
    # one thread of torch's for each: they would hold up the model's
    with ThreadPoolExecutor(THREADS, "fastzs-files", torch.set_num_threads, (1,)) as pool:
        work = _Flow(pool, read, label, write, tasks)
        try:
            yield from work.run()
        except GeneratorExit:  # whoever asked wants no more
            raise
        except BaseException:
            for reading in work.reading:
                reading.cancel()
            yield from work.written(all=True)
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(items: Iterator[T]) -> Generator[T]:
    """The same items, taken in one thread before they are asked for."""
    with ThreadPoolExecutor(1, "fastzs-ahead") as pool:
        end: Any = object()
        waiting = deque(pool.submit(next, items, end) for _ in range(THREADS))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item


class _Flow:
    def __init__(self, pool: ThreadPoolExecutor, read: Any, label: Any, write: Any, tasks: Iterable[Any]):
        self.pool, self.read, self.label, self.write_one = pool, read, label, write
        self.tasks = iter(tasks)
        self.reading: deque[Future[tuple[Any, Any]]] = deque()
        self.with_model: deque[tuple[Any, Any]] = deque()
        self.writing: deque[tuple[int, Future[Any]]] = deque()
        self.failed: deque[Any] = deque()

    def run(self) -> Iterator[Any]:
        results = self.label(self.images())
        while True:
            try:
                result = next(results, None)
            except Exception:
                self.one_by_one()
                results = self.label(self.images())
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
            image, attempt = self.reading.popleft().result()
            if attempt.problem is not None:
                self.failed.append(attempt)
                continue
            self.with_model.append((image, attempt))
            self.read_ahead()
            yield image

    def read_ahead(self) -> None:
        done = (reading.result()[0] for reading in self.reading if reading.done() and not reading.exception())
        room = BYTES - sum(image.nbytes for image in done if image is not None)
        while len(self.reading) < (AHEAD if room > 0 else 1):
            task = next(self.tasks, None)
            if task is None:
                return
            self.reading.append(self.pool.submit(self.read, task))

    def write(self, result: Any) -> None:
        _, attempt = self.with_model.popleft()
        self.writing.append((result.nbytes, self.pool.submit(self.write_one, result, attempt)))

    def written(self, *, all: bool = False) -> Iterator[Any]:
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
        for image, attempt in waiting:
            self.with_model.append((image, attempt))
            try:
                (result,) = self.label([image])
            except Exception as error:  # its traceback would hold on to the model's tensors
                self.with_model.clear()
                self.failed.append(attempt.failed(error))
            else:
                self.write(result)


def _read(stages: Stages[Any], task: Task) -> tuple[Any, Attempt]:
    attempt = Attempt(task.picture, file_state(task.picture), task=task)
    try:
        image = stages.read(task.picture)
        return image, attempt._replace(digest=file_digest(task.picture))
    except Exception as error:
        return None, attempt.failed(error)


def _write(also: Collection[str], result: Segmentation, attempt: Attempt) -> Attempt:
    task = attempt.task
    assert task is not None
    try:
        for path in task.stale:
            path.unlink(missing_ok=True)
        write_result(result, task.picture, task.target, also)
    except OutputError as error:
        return attempt._replace(digest="", problem=str(error), ends=OutputError(str(error)))
    except Exception as error:
        return attempt.failed(error)
    return attempt


def problem_text(picture: Path, error: Exception) -> str:
    """What went wrong with an image, in one line that names it."""
    text = str(error).strip()
    if isinstance(error, ImageError):
        return text if str(picture) in text else f"{picture}: {text}"
    return f"{picture}: {type(error).__name__}{f': {text.splitlines()[0]}' if text else ''}"
