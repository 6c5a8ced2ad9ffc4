"""The CUDA sources compiled for the host, each once a session, with its mutants."""

import functools

import pytest

from ..mutants import NEEDS_COMPILER
from .host import compile_for_host
from .mutations import MUTATIONS

OPERATORS = {
    "mask_loss_cuda.cu": "mask_sums",
    "pixel_text_logits_cuda.cu": "pixel_text_logits",
    "label_map_cuda.cu": "label_map_cuda",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "cuda" and item.path.parent.parent.name == "kernels":
            for mark in NEEDS_COMPILER:
                item.add_marker(mark)


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """Of a source: the operator as it is under "nothing", and its mutants, by name."""

    @functools.cache
    def compiled(source):
        changes = MUTATIONS[source]
        made = compile_for_host(tmp_path_factory.mktemp("cuda"), source, OPERATORS[source], list(changes.values()))
        return dict(zip(changes, made, strict=True))

    return compiled
