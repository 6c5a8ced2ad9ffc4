"""The way of an image to a GPU and of its labels back, without a GPU: no step between may wait for it.

``FakeTensorMode`` runs the package's own code on tensors of a GPU that is not there: they have shapes and a device but
no values. What asks for a value fails, and every copy between host and GPU is written down.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.v2.functional as TF

from fastzs import transfers
from fastzs.answer import in_turn
from fastzs.losses import honest_target, inductive_target, transductive_target
from fastzs.models import ClipRC, MaskCLIP, ZegCLIP
from fastzs.models.pearl import PEARL
from fastzs.models.training_free import NACLIP, SCLIP
from fastzs.segmenter import Segmenter
from fastzs.transfers import Fetched, Sending
from fastzs.vocabulary import Vocabulary
from tests.copies import forget_tables, gpu_that_is_not_there
from tests.models.official import model as model_of
from tests.tiny import tiny_clip

GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class Clock:
    """A GPU's streams and events: which order each wait establishes."""

    def __init__(self):
        self.current, self.log = "model", []

    def patch(self, monkeypatch):
        def stream(name):
            return SimpleNamespace(
                name=name,
                wait_event=lambda event: self.log.append((name, "waits for", event.name)),
                wait_stream=lambda other: self.log.append((name, "waits for", other.name)),
            )

        @contextlib.contextmanager
        def within(entered):
            before, self.current = self.current, entered.name
            yield
            self.current = before

        def event():
            made = SimpleNamespace(name=None)
            made.record = lambda recorded: setattr(made, "name", f"{recorded.name} event")
            made.synchronize = lambda: self.log.append(("host", "waits for", made.name))
            return made

        monkeypatch.setattr(transfers, "_copies", lambda device: stream("copies"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream(self.current))
        monkeypatch.setattr(torch.cuda, "stream", within)
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, s: self.log.append(("memory", "kept for", s.name))
        )


@pytest.fixture(autouse=True)
def tables():
    """Tables of tensors that have no values are nothing for other tests."""
    yield
    forget_tables()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    made.patch(monkeypatch)
    return made


SYSTEMS = {
    "maskclip": lambda: MaskCLIP(tiny_clip()),
    "sclip": lambda: SCLIP(tiny_clip()),
    "naclip": lambda: NACLIP(tiny_clip()),
    "pearl": lambda: PEARL(tiny_clip()),
    "zegclip": lambda: model_of(ZegCLIP),
    "clip_rc": lambda: model_of(ClipRC),
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("windows", ["separate", "stitched"])
def test_nothing_waits_between_an_image_and_its_labels(system, windows, clock, monkeypatch):
    monkeypatch.setattr("fastzs.kernels.label_map.api.reasons", lambda *_: {"cuda": None})
    # with a built CUDA part, too, which would ask the driver
    monkeypatch.setattr("fastzs.kernels.pixel_text_logits.api.reasons", lambda *_: {"reference": None})
    monkeypatch.setattr("fastzs.kernels.checks.why_too_old", lambda device: None)
    monkeypatch.setattr("fastzs.kernels.triton_runtime.why_too_old", lambda device: "it is not there")
    image, model = torch.randint(256, (3, 50, 70), dtype=torch.uint8), SYSTEMS[system]()
    text = Vocabulary(["cat", "kitten", "dog", "sky"], embeddings=torch.eye(4, model.text_dim))
    with gpu_that_is_not_there() as seen:
        segmenter = Segmenter(model.to(GPU), short_side=40, crop=32, stride=24, batch_size=4, windows=windows)
        question = segmenter.question(text, scores=True)
        question = replace(question, groups=torch.tensor([0, 0, 1, 2]), names=("cat", "dog", "sky"))
        list(segmenter.answers([image], question))  # tables and names get there
        seen.clear()
        results = list(segmenter.answers([image, image, image], question))
    assert [result.labels[0].shape for result in results] == [(50, 70)] * 3
    assert {result.labels[0].device.type for result in results} == {"cpu"}
    assert [copy for copy in seen if not copy[2]] == []
    assert seen.count(("cpu", "cuda", True)) == 3  # each image once
    assert seen.count(("cuda", "cpu", True)) == 6  # labels and scores


@pytest.mark.parametrize("rule", [transductive_target, honest_target])
def test_labels_of_a_transductive_step_wait_for_nothing(rule, monkeypatch):
    monkeypatch.setattr("fastzs.kernels.label_map.api.reasons", lambda *_: {"cuda": None})
    with gpu_that_is_not_there() as seen:
        logits, target = torch.empty(2, 6, 4, 4, device=GPU), torch.empty(2, 32, 32, dtype=torch.int64, device=GPU)
        rule(target, logits, [0, 2, 3])
        seen.clear()
        assert rule(target, logits, [0, 2, 3]).shape == target.shape
        assert inductive_target(target, [0, 2, 3], 6).shape == target.shape
    assert seen == []


def test_streams_wait_for_each_other_and_the_host_for_labels_only(clock):
    """Images go up beside the model's work; the model waits for them, their memory for the model."""
    image = torch.zeros(3, 4, 5)
    with gpu_that_is_not_there():
        with Sending(GPU) as sending:
            assert clock.current == "copies"
            there = sending.send(image)
        assert clock.current == "model"
        assert there.device == GPU
        assert clock.log == []
        transfers.arrive(sending.arrived, (there, None))
        assert clock.log == [("model", "waits for", "copies event"), ("memory", "kept for", "model")]
        clock.log.clear()
        with Sending(GPU) as sending:  # somebody's own image on the GPU, perhaps not computed yet
            sending.send(there)
        assert clock.log == [("copies", "waits for", "model"), ("memory", "kept for", "copies")]
        clock.log.clear()
        fetched = Fetched(there)
        assert clock.log == []
        assert fetched.get().device.type == "cpu"
        assert clock.log == [("host", "waits for", "model event")]


def test_on_a_cpu_nothing_is_copied():
    image = torch.zeros(3, 4, 5)
    with Sending(torch.device("cpu")) as sending:
        assert sending.send(image) is image
    assert sending.arrived is None
    assert Fetched(image).get() is image


@pytest.mark.parametrize("late", [0, 2])
def test_answers_are_late_but_none_is_lost_to_an_error(late):
    asked = []

    def pending():
        for number in range(5):
            asked.append(number)
            yield SimpleNamespace(wait=lambda number=number: number)
        raise ValueError("the sixth")

    answers, seen = in_turn(pending(), late), []
    with pytest.raises(ValueError, match="the sixth"):
        seen.extend((answer, len(asked)) for answer in answers)
    assert seen == [(number, min(number + 1 + late, 5)) for number in range(5)]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(40, 61), (300, 200), (31, 500)])
def test_images_that_a_gpu_resizes_differ_by_one_level_at_most(size, antialias):
    """On CPUs bytes are resized in whole numbers, on GPUs in fp32 and rounded then, which is done here on the CPU."""
    image = torch.randint(256, (3, 120, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = TF.resize(image, list(size), antialias=antialias)
    theirs = TF.resize(image.float(), list(size), antialias=antialias).round()
    assert (ours.float() - theirs).abs().max() <= 1
