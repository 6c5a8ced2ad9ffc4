"""CLIP-RC exported to ONNX and run by ONNX Runtime, against what ``fastzs.load`` gives in fp32: an image to labels.

    pytest bench/test_exported.py --benchmark-only -m full

ViT-B/16 with random weights (the work is the same), an image of 683 x 512 in two windows of 512, 20 classes with given
text vectors, 10 prompts. Both go through the same segmenter, so windows and labels are the same work. The network is
one graph of plain operators in ONNX Runtime; ours has packed products and the bridged attention. The class maps of the
first window are judged in fp64. The model is exported once, before anything is timed. Wanted of it: at most 1.1 times
our time.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch

from fastzs.clip.packed import pack
from fastzs.export.package import export
from fastzs.export.runtime import ExportedModel
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary

from .rivals import Contest, Rival, compete
from .test_models import Baseline, build, embeddings, squares

CLASSES, CROP, SIZE = 20, 512, (512, 683)
RIVALS = ("fastzs", "exported, ONNX Runtime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """The exported model; processes of their own are given its place."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra 'export'")
    place = tmp_path_factory.mktemp("exported") / "clip_rc"
    export(build("clip_rc", CLASSES), place, "onnx", size=(CROP, CROP))
    return str(place)


def contest(folder: str) -> Contest:
    vocabulary = Vocabulary([f"class {i}" for i in range(CLASSES)], embeddings=embeddings(CLASSES))

    @functools.cache
    def ours() -> Segmenter:
        model = copy.deepcopy(build("clip_rc", CLASSES))
        pack(model)
        return Segmenter(model, short_side=CROP)

    @functools.cache
    def exported() -> Segmenter:
        return Segmenter(ExportedModel(Path(folder)), short_side=CROP)

    def rival(made) -> Rival:
        def maps(image):
            return made().logits(made().encode(image), vocabulary)[:1]

        return Rival(lambda image: made()(image, vocabulary).labels, answer=maps)

    tokens = 1 + (CROP // 16) ** 2
    block = 24 * tokens * 768**2 + 4 * tokens**2 * 768
    return Contest(
        f"clip_rc and its export, {CLASSES} classes, {SIZE[1]} x {SIZE[0]} to labels, cpu",
        "cpu",
        lambda seed, dtype: (squares(seed, SIZE),),
        dict(zip(RIVALS, (rival(ours), rival(exported)), strict=True)),
        lambda image: Baseline("clip_rc", CLASSES, CROP, "cpu", torch.float64).maps(image),
        nbytes=4 * SIZE[0] * SIZE[1] + 2 * 86_000_000,
        operations=2 * 12 * block,
        pictures=1,
        info={"op": "an exported model", "classes": CLASSES, "height": SIZE[0], "width": SIZE[1], "batch": 1},
        seconds=30,
    )


@pytest.mark.full
@pytest.mark.parametrize("rival", RIVALS)
def test_cpu(benchmark, folder, rival):
    row = compete(benchmark, rival, contest, folder)
    print(f"\n{row['group']}, {rival}: {row['median seconds']:.3f} s, {row['faster']:.2f}x")
