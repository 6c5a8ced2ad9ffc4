"""CLIP-RC exported to ONNX and run by ONNX Runtime, against what ``fastzs.load`` gives in fp32: an image to labels.

    pytest bench/test_exported.py --benchmark-only

ViT-B/16 with random weights (the work is the same), one image of 683 x 512 in two windows of 512, 20 classes with given
text vectors, 10 prompts. Both go through the same segmenter, so windows and labels are the same work; the network is
one graph of plain operators in ONNX Runtime, and packed products with the bridged attention in ours. The class maps of
the first window are judged in fp64. Wanted of the exported model: at most 1.1 times ours.
"""

import functools
import importlib.util
import tempfile
from pathlib import Path

import pytest
import torch

from fastzs.clip.packed import pack
from fastzs.export.package import export
from fastzs.export.runtime import ExportedModel
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary

from .rivals import Contest, Rival, Unavailable, compete
from .test_models import Baseline, build, embeddings, squares

CLASSES, CROP, SIZE = 20, 512, (512, 683)
RIVALS = ["fastzs", "exported, ONNX Runtime", "exported int8, ONNX Runtime"]
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def contest(device):
    vocabulary = Vocabulary([f"class {i}" for i in range(CLASSES)], embeddings=embeddings(CLASSES))

    @functools.cache
    def ours():
        import copy

        model = copy.deepcopy(build("clip_rc", CLASSES))
        pack(model)
        return Segmenter(model, short_side=CROP)

    @functools.cache
    def exported(int8):
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise Unavailable(f"{' and '.join(missing)} not installed: pip install 'fastzs[export]'")
        folder = Path(tempfile.mkdtemp()) / "clip_rc"
        export(build("clip_rc", CLASSES), folder, "onnx", size=(CROP, CROP), int8=int8)
        return Segmenter(ExportedModel(folder), short_side=CROP)

    def rival(make, bound=None):
        def maps(image):
            made = make()
            return made.logits(made.encode(image), vocabulary)[:1]

        return Rival(lambda image: make()(image, vocabulary).labels, answer=maps, bound=bound)

    rivals = {
        "fastzs": rival(ours),
        "exported, ONNX Runtime": rival(lambda: exported(False)),
        "exported int8, ONNX Runtime": rival(lambda: exported(True), 1.0),
    }
    tokens = 1 + (CROP // 16) ** 2
    block = 24 * tokens * 768**2 + 4 * tokens**2 * 768
    return Contest(
        f"clip_rc exported, {CLASSES} classes, {SIZE[1]} x {SIZE[0]} to labels, {device}",
        device,
        lambda seed, dtype: (squares(seed, SIZE),),
        rivals,
        lambda image: Baseline("clip_rc", CLASSES, CROP, "cpu", torch.float64).maps(image),
        nbytes=4 * SIZE[0] * SIZE[1] + 2 * 86_000_000,
        operations=2 * 12 * block,
        pictures=1,
        info={"op": "exported", "classes": CLASSES, "height": SIZE[0], "width": SIZE[1], "batch": 1, "headline": True},
        seconds=10,
    )


@pytest.mark.parametrize("rival", RIVALS)
def test_cpu(benchmark, rival):
    compete(benchmark, rival, contest, "cpu")
