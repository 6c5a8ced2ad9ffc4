"""Real photographs: ``python -m bench.experiments.camvid CAMVID TEXT``.

Trains ZegCLIP and CLIP-RC with all labels on CamVid's training pictures and tests them on its test pictures, beside two
predictors that look at no picture: the commonest class everywhere, and at each place the commonest class there. The
tower starts as the one that is built in, which has seen drawn shapes only, and is trained with the rest. CAMVID is the
data set's folder, TEXT the published ``coco_multi.npy`` [171, 512], whose rows stand for CamVid's classes. The runs lie
in ``runs/camvid``; the same command goes on where it stopped.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments.page import write_page
from bench.machine import describe
from fastzs.data.classes import CAMVID, COCO_STUFF
from fastzs.data.datasets import CamVid
from fastzs.data.protocols import protocol
from fastzs.data.transforms import training_transform
from fastzs.evaluate import evaluate
from fastzs.files import write_atomically
from fastzs.metrics import ConfusionMatrix
from fastzs.models import ClipRC, ZegCLIP
from fastzs.predict import Segmenter
from fastzs.recipe import Recipe
from fastzs.train import train
from fastzs.vocabulary import Vocabulary

PROTOCOL = protocol("camvid")
# COCO-Stuff has no pole; "metal" is what its poles are mostly labelled beside "other"
NAMED = (
    "sky-other", "building-other", "metal", "road", "pavement", "tree", "stop sign", "fence", "car", "person", "bicycle"
)  # fmt: skip
SHORT_SIDE, CROP, DIM = 180, 160, 128
MODEL: dict[str, Any] = {
    "weights": "shapes",
    "crop": CROP,
    "prompts": 8,
    "decoder_layers": 2,
    "dropout": 0.0,
    "imagenet_normalization": False,
    "double_class_embedding": False,
}
MODELS = {
    "ZegCLIP": lambda: ZegCLIP(**MODEL),
    "CLIP-RC": lambda: ClipRC(**MODEL, recovery=False),  # published with all labels: no recovery loss
}
# ZegCLIP divides its scores by 16 here, CLIP-RC by nothing: in a short training the former needs larger steps
RATES = {"ZegCLIP": 4e-3, "CLIP-RC": 1e-3}
TOWER_RATE = 4e-4
ITERATIONS = 2000


def text_vectors(path: Path) -> Tensor:
    """CamVid's rows of the published vectors, in the width of the small tower's joint space, fp32 [11, 128].

    Eleven vectors span at most eleven dimensions, so 128 hold them with all their inner products unchanged.
    """
    rows = torch.from_numpy(np.load(path, allow_pickle=False)).double()
    chosen = rows[[COCO_STUFF.index(name) for name in NAMED]]  # [11, 512]
    _, triangle = torch.linalg.qr(chosen.T)  # chosen = triangle^T basis^T
    vectors = torch.zeros(len(NAMED), DIM, dtype=torch.float64)
    vectors[:, : len(NAMED)] = triangle.T
    # a random rotation, so that no channel is special
    rotation, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)).double())
    return (vectors @ rotation).float()


def trivial(trained: CamVid, tested: CamVid) -> dict[str, ConfusionMatrix]:
    """Predictors that look at no picture, learnt from the labels of the training pictures."""
    classes = len(CAMVID)
    here: Tensor | None = None  # how often each class is at each place, [C, H, W]
    for i in range(len(trained)):
        truth = trained[i][1].as_subclass(Tensor).long()
        hot = torch.nn.functional.one_hot(truth.clamp(max=classes), classes + 1)[..., :classes]
        here = hot if here is None else here + hot  # ignored pixels count for no class
    assert here is not None
    maps = {
        "commonest class": here.sum((0, 1)).argmax().expand(here.shape[:2]),
        "commonest class at each place": here.argmax(-1),
    }
    matrices = {name: ConfusionMatrix(classes) for name in maps}
    for i in range(len(tested)):
        truth = tested[i][1].as_subclass(Tensor)
        for name, labels in maps.items():
            matrices[name].add(truth, labels)
    return matrices


def run(name: str, trained: CamVid, tested: CamVid, vocabulary: Vocabulary, iterations: int, work: Path) -> dict:
    """Train (or go on with training) and test one model."""
    folder = work / f"{name}-{iterations}"
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    recipe = Recipe(
        setting="supervised",
        iterations=iterations,
        batch=4,
        lr=RATES[name],
        min_lr=1e-5,
        warmup=min(20, iterations // 2),
        clip_norm=10.0,
        groups={"backbone": {"lr": TOWER_RATE / RATES[name]}},
        train=["backbone"],
        precision="fp32",
        workers=0,
        log_every=5,
        save_every=max(1, iterations // 8),
        evaluate_every=0,
    )
    transform = training_transform(CROP, model.mean, model.std, short_side=SHORT_SIDE, scale=(0.8, 1.5))
    losses = {"recovery": 0.0} if name == "CLIP-RC" else {}
    outcome = train(model, trained, transform, vocabulary, recipe, folder, losses=losses)
    if outcome.stopped_by is not None:
        sys.exit(128 + outcome.stopped_by)
    used = time.process_time()
    matrix = evaluate(Segmenter(model, short_side=SHORT_SIDE, crop=0), tested, PROTOCOL, vocabulary)[0.0]
    with open(folder / "log.csv", newline="") as stream:
        totals = [float(line["total"]) for line in csv.DictReader(stream)]
    tenth = max(1, len(totals) // 10)
    return {
        "counts": matrix.counts.tolist(),
        "loss": [statistics.mean(totals[:tenth]), statistics.mean(totals[-tenth:])],
        "test_seconds": (time.process_time() - used) / len(tested),
    }


def table(
    matrices: dict[str, ConfusionMatrix], losses: dict[str, Sequence[float]], iterations: int, counts: str
) -> str:
    machine = describe("cpu")
    flags = "" if iterations == ITERATIONS else f" --iterations {iterations}"
    lines = [
        "# CamVid: real photographs",
        "",
        f"`python -m bench.experiments.camvid CAMVID TEXT{flags}`: protocol {PROTOCOL}; {counts}; "
        f"short side {SHORT_SIDE} px; {iterations} steps of 4 crops of {CROP} px, one seed; "
        "text vectors of CLIP ViT-B/16 as published for COCO-Stuff (pole: the row of metal). "
        "Consecutive pictures of CamVid are near duplicates within a split.",
        "",
        f"Machine: {machine['device']}, torch {machine['torch']}, fp32.",
        "",
        "| predictor | pAcc | mAcc | mIoU | loss, first and last tenth |",
        "|---|---|---|---|---|",
    ]
    scores = {name: matrix.scores_of(PROTOCOL) for name, matrix in matrices.items()}
    for name, s in scores.items():
        loss = f"{losses[name][0]:.1f} to {losses[name][1]:.2f}" if name in losses else "-"
        lines.append(f"| {name} | " + " | ".join(_percent(v) for v in (s.pAcc, s.mAcc, s.mIoU)) + f" | {loss} |")
    lines += ["", "IoU by class:", "", "| class | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
    for i, name in enumerate(CAMVID):
        lines.append(f"| {name} | " + " | ".join(_percent(s.iou[i]) for s in scores.values()) + " |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CamVid's folder")
    parser.add_argument("text", type=Path, help="coco_multi.npy")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--work", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "camvid.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trained, tested = CamVid(args.data, "train"), CamVid(args.data, "test")
    vocabulary = Vocabulary(CAMVID, embeddings=text_vectors(args.text))
    losses: dict[str, Sequence[float]] = {}
    found: dict[str, ConfusionMatrix] = {}
    for name in args.models.split(","):
        kept = args.work / f"{name}-{args.iterations}.json"
        if not kept.is_file():
            result = run(name, trained, tested, vocabulary, args.iterations, args.work)
            write_atomically(kept, json.dumps(result).encode())
        result = json.loads(kept.read_text())
        found[name] = ConfusionMatrix(len(CAMVID))
        found[name].counts += torch.tensor(result["counts"])
        losses[name] = result["loss"]
    counts = f"{len(trained)} pictures to train, {len(tested)} to test"
    text = table(trivial(trained, tested) | found, losses, args.iterations, counts)
    print(text)
    write_page(args.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
