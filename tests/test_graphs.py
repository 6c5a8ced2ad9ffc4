"""CUDA graphs without a GPU: capturing records what was asked for, replaying does it again on the same memory.

While a graph is recorded no kernel runs, so numbers are NaN meanwhile, and nobody may ask for one. Between replays a
graph's memory may hold anything: it is NaN again, which would show in whatever was kept of it.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastzs import graphs
from fastzs.graphs import Graphs
from fastzs.models import ClipRC, MaskCLIP, ZegCLIP
from fastzs.models.training_free import SCLIP
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from tests.models.official import model
from tests.tiny import tiny_clip

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recorded(TorchDispatchMode):
    """In place of ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        super().__init__()
        self.steps, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = function(*args, **kwargs)
        lent = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in lent]
        if made or function._schema.is_mutable:
            self.steps.append((function, args, kwargs, made))
        self.forget(made)
        return out

    @staticmethod
    def forget(made):
        for t in made:
            if t.is_floating_point():
                t.fill_(torch.nan)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, made in self.steps:
            again = tensors(function(*args, **kwargs))
            for t, new in zip(made, again if made else [], strict=True):
                t.copy_(new)

    def lose(self):
        """Another graph has had the memory."""
        self.forget([t for *_, made in self.steps for t in made])


@pytest.fixture
def gpu(monkeypatch):
    """The graphs that were made."""
    made = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    class Cuda:
        @staticmethod
        def CUDAGraph():
            made.append(Recorded())
            return made[-1]

        @staticmethod
        def graph(graph, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            return graph

    for name, value in {
        "CUDAGraph": Cuda.CUDAGraph,
        "graph": Cuda.graph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(graphs.torch.cuda, name, value)
    return made


def vectors(count, width):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(0)), dim=1)


SYSTEMS = {
    "maskclip": (lambda: MaskCLIP(tiny_clip(), denoising=0.5, smoothing="official", smoothing_threshold=0.9), 24),
    "sclip": (lambda: SCLIP(tiny_clip()), 24),
    "zegclip": (lambda: model(ZegCLIP), 32),
    "clip_rc": (lambda: model(ClipRC), 32),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_the_same_as_a_graph(name, gpu):
    make, width = SYSTEMS[name]
    segmenter = Segmenter(make())
    names = ["cat", "kitten", "dog", "sky", "sea"]
    question = segmenter.question(Vocabulary(names, embeddings=vectors(5, width)))
    generator = torch.Generator().manual_seed(0)

    def function(images):
        return segmenter._decode(segmenter._encode(images, []), question)

    graph = Graphs(function)
    with torch.inference_mode():
        for number in range(4):
            images = torch.randint(256, (2, 3, 40, 56), dtype=torch.uint8, generator=generator)
            assert torch.equal(graph(images), function(images)), number
            for one in gpu:
                one.lose()
    assert [one.replays for one in gpu] == [4]  # one to see that it gives the same


def test_a_size_becomes_a_graph_when_it_comes_again_and_only_some_do(gpu, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    graph = Graphs(lambda x: x * 2)
    for size in (1, 2, 3, 1, 2, 3, 1, 2, 3):
        assert torch.equal(graph(torch.ones(size)), torch.full((size,), 2.0))
    assert [one.replays for one in gpu] == [3, 3]


def test_what_waits_for_the_gpu_is_called_as_it_is(gpu):
    calls = []

    def function(x):
        calls.append(x)
        return x * x.sum().item()

    graph = Graphs(function)
    for _ in range(4):
        assert torch.equal(graph(torch.ones(2)), torch.full((2,), 2.0))
    assert len(gpu) == 1  # it is tried once
    assert gpu[0].replays == 0


def test_a_graph_that_gives_other_numbers_is_not_used(gpu):
    calls = []

    def function(x):
        calls.append(x)
        return x * len(calls)

    graph = Graphs(function)
    assert [graph(torch.ones(1)).item() for _ in range(3)] == [1, 4, 5]  # calls 2 and 3 were the attempt
    assert [one.replays for one in gpu] == [1]


def test_something_kept_while_a_graph_is_recorded_shows(gpu):
    """That these tests would notice."""
    kept = {}

    def function(x):
        calls = kept.setdefault("calls", [])
        calls.append(0)
        if len(calls) == 3:  # the first batch, the call before the graph, the graph
            kept["table"] = torch.ones(2) * 3
        return x * kept.get("table", torch.full((2,), 3.0))

    graph = Graphs(function)
    graph(torch.ones(2))
    graph(torch.ones(2))
    gpu[0].lose()
    assert not torch.equal(function(torch.ones(2)), torch.full((2,), 3.0))
