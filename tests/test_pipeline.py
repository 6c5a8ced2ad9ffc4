"""Images in, files out, in stages that work at once."""

import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import fastzs
from fastzs import pipeline
from fastzs.commands.segment import Job
from fastzs.data.shapes import draw
from fastzs.pipeline import Task, ahead, flow
from fastzs.result import Segmentation
from fastzs.vocabulary import Vocabulary

PATIENCE = 20  # seconds until a stage that waits for another has waited in vain


class Stages:
    """Labels are the numbers in file names; ``reading`` and ``labelling`` are called before."""

    def __init__(self, reading=lambda number: None, labelling=lambda numbers: None, batch=1):
        self.reading, self.labelling, self.batch = reading, labelling, batch
        self.read_so_far, self.labelled = [], []

    def read(self, picture):
        self.reading(int(picture.stem))
        self.read_so_far.append(int(picture.stem))
        return SimpleNamespace(number=int(picture.stem), nbytes=1 << 20)

    def label(self, images):
        images = iter(images)
        while some := [image.number for image in islice(images, self.batch)]:
            self.labelling(some)
            for number in some:
                self.labelled.append(number)
                yield Segmentation(torch.full((2, 3), number, dtype=torch.uint8), tuple(map(str, range(100))))


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "in").mkdir()
    made = []
    for number in range(40):
        path = tmp_path / "in" / f"{number}.txt"
        path.write_text(str(number))
        made.append(Task(path, tmp_path / "out" / str(number), []))
    return made


def labels(task):
    return Segmentation.load(f"{task.target}.png").labels.unique().tolist()


def test_every_image_is_written_once_and_in_order(tasks):
    stages = Stages(batch=3)
    attempts = list(flow(stages, (), tasks))
    assert [attempt.picture for attempt in attempts] == [task.picture for task in tasks]
    assert all(attempt.problem is None and len(attempt.digest) == 64 for attempt in attempts)
    assert [labels(task) for task in tasks] == [[number] for number in range(40)]


def test_the_model_waits_neither_for_files_to_be_read_nor_to_be_written(tasks, monkeypatch):
    """Each stage goes on with one image only when the others are at work on others."""
    third_is_read, second_is_labelled = threading.Event(), threading.Event()

    def reading(number):
        if number == 2:
            third_is_read.set()

    def labelling(numbers):
        if numbers == [0]:
            assert third_is_read.wait(PATIENCE)
        if numbers == [1]:
            second_is_labelled.set()

    def writing(result, picture, target, also):
        if picture.stem == "0":
            assert second_is_labelled.wait(PATIENCE)

    monkeypatch.setattr(pipeline, "write_result", writing)
    assert all(attempt.problem is None for attempt in flow(Stages(reading, labelling), (), tasks))


@pytest.mark.parametrize("large", [False, True])
def test_few_images_are_read_ahead(tasks, monkeypatch, large):
    """As many as may be, or fewer if they are large."""
    monkeypatch.setattr(pipeline, "BYTES", 0 if large else 1 << 30)
    most = 1 + pipeline.THREADS if large else pipeline.AHEAD + 1
    stages = Stages(batch=1)
    attempts = flow(stages, (), tasks)
    for number in range(40):
        next(attempts)
        assert len(stages.read_so_far) <= len(stages.labelled) + most, number


@pytest.mark.parametrize("large", [False, True])
def test_few_results_wait_for_a_slow_disk(tasks, monkeypatch, large):
    go_on, write = threading.Event(), pipeline.write_result
    monkeypatch.setattr(pipeline, "BYTES", 0 if large else 1 << 30)
    most = 1 if large else pipeline.BEHIND + 1

    def writing(*arguments):
        assert go_on.wait(PATIENCE)
        write(*arguments)

    monkeypatch.setattr(pipeline, "write_result", writing)
    stages, attempts = Stages(), []
    run = threading.Thread(target=lambda: attempts.extend(flow(stages, (), tasks)))
    run.start()
    run.join(0.3)
    waiting = len(stages.labelled)
    go_on.set()
    run.join()
    assert waiting == most
    assert len(attempts) == 40


def test_what_cannot_be_read_is_nobody_elses_problem(tasks):
    def reading(number):
        if number % 7 == 3:
            raise ValueError("odd\nin many lines")

    attempts = {attempt.picture.stem: attempt for attempt in flow(Stages(reading, batch=4), (), tasks)}
    assert len(attempts) == 40
    bad = [str(number) for number in range(40) if number % 7 == 3]
    assert [name for name, attempt in attempts.items() if attempt.problem] == sorted(bad, key=int)
    assert attempts["3"].problem == f"{tasks[3].picture}: ValueError: odd"
    assert attempts["3"].digest == ""


def test_of_a_batch_that_fails_each_image_is_tried_alone(tasks):
    tried = []

    def labelling(numbers):
        tried.append(numbers)
        if 5 in numbers:
            raise RuntimeError("out of memory")

    attempts = {attempt.picture.stem: attempt for attempt in flow(Stages(labelling=labelling, batch=4), (), tasks)}
    assert tried[1:6] == [[4, 5, 6, 7], [4], [5], [6], [7]]
    assert [name for name, attempt in attempts.items() if attempt.problem] == ["5"]
    assert attempts["5"].problem == f"{tasks[5].picture}: RuntimeError: out of memory"
    assert not Path(f"{tasks[5].target}.png").exists()
    assert labels(tasks[6]) == [6]


def test_what_was_labelled_before_an_interrupt_is_written(tasks):
    def labelling(numbers):
        if 9 in numbers:
            raise KeyboardInterrupt

    attempts = []
    with pytest.raises(KeyboardInterrupt):
        attempts.extend(flow(Stages(labelling=labelling), (), tasks))
    assert [attempt.picture.stem for attempt in attempts] == [str(number) for number in range(9)]


def test_who_wants_no_more_gets_no_more(tasks):
    stages = Stages()
    attempts = flow(stages, (), tasks)
    next(attempts)
    attempts.close()
    assert len(stages.read_so_far) < 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastzs-files")]


def test_labels_are_those_of_one_image_after_the_other(tmp_path):
    """Whatever shares a batch with an image, and whatever its size."""
    for i, size in enumerate([(48, 48), (48, 80), (90, 64), (48, 48), (200, 60), (64, 48)]):
        image = draw(1, size, seed=i).images[0]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    load = {"model": "maskclip", "weights": "shapes", "checkpoint": None, "device": "cpu", "crop": 48, "short_side": 0}
    job = Job(load, Vocabulary(["disc", "star", "ring"]), "prompt", None)
    tasks = [Task(path, tmp_path / "out" / path.stem, []) for path in sorted(tmp_path.glob("*.png"))]
    assert all(attempt.problem is None for attempt in flow(job, (), tasks))
    segmenter = fastzs.load(**load)
    for task in tasks:
        alone = segmenter(task.picture, job.vocabulary, **job.asked)
        ours = Segmentation.load(f"{task.target}.png")
        assert ours.names == alone.names
        assert torch.equal(ours.labels, alone.labels)


def test_ahead_keeps_the_order_and_passes_errors_on():
    def items():
        yield from range(20)
        raise ValueError("the end")

    found = ahead(items())
    taken = [next(found) for _ in range(20)]
    with pytest.raises(ValueError, match="the end"):
        next(found)
    assert taken == list(range(20))
