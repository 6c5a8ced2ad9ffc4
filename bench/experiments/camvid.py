"""Real photographs: ``python -m bench.experiments.camvid CAMVID TEXT``.

Trains ZegCLIP and CLIP-RC with all labels on CamVid's training pictures and tests them on its test pictures, by the
presets and commands of docs/training.md, beside two predictors that look at no picture: the commonest class everywhere,
and at each place the commonest class there. CAMVID is the data set's folder, TEXT the published ``coco_multi.npy``
[171, 512], whose rows stand for CamVid's classes. The runs lie in ``runs/camvid``; the same command goes on where it
stopped.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from bench.experiments.page import write_page
from bench.machine import describe
from fastzs import cli
from fastzs.commands.train import CONFIG
from fastzs.data.classes import CAMVID, COCO_STUFF
from fastzs.data.datasets import CamVid
from fastzs.data.protocols import protocol
from fastzs.metrics import ConfusionMatrix

PROTOCOL = protocol("camvid")
# COCO-Stuff has no pole; "metal" is what its poles are mostly labelled beside "other"
NAMED = (
    "sky-other", "building-other", "metal", "road", "pavement", "tree", "stop sign", "fence", "car", "person", "bicycle"
)  # fmt: skip
MODELS = {"ZegCLIP": "zegclip", "CLIP-RC": "clip_rc"}


def text_vectors(path: Path) -> np.ndarray:
    """CamVid's rows of the published vectors, fp32 [11, 512]."""
    rows = np.load(path, allow_pickle=False)
    return rows[[COCO_STUFF.index(name) for name in NAMED]].astype(np.float32)


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


def run(model: str, data: Path, text: Path, work: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train (or go on with training) and test one model, as anybody would."""
    train = ["train", "--preset", f"camvid/{model}/supervised", "--data", str(data), "--embeddings", str(text)]
    code = cli.main([*train, *overrides, "--device", "cpu", "--workers", "0", "--output", str(work)])
    if code:
        sys.exit(code)
    settings = yaml.safe_load((work / CONFIG).read_text())
    scored = ["evaluate", "--protocol", "camvid", "--data", str(data), "--split", "test", "--embeddings", str(text)]
    scored += ["--model", model, "--checkpoint", str(work / "last"), "--device", "cpu", "--precision", "fp32"]
    scored += ["--short-side", str(settings["transform"]["short_side"]), "--crop", "0"]
    code = cli.main([*scored, "--output", str(work / "scores")])
    if code:
        sys.exit(code)
    found = json.loads((work / "scores" / "results.json").read_text())["results"][0]["confusion"]
    with open(work / "log.csv", newline="") as stream:
        log = list(csv.DictReader(stream))
    totals = [float(line["total"]) for line in log]
    tenth = max(1, len(totals) // 10)
    return {
        "counts": found,
        "loss": [statistics.mean(totals[:tenth]), statistics.mean(totals[-tenth:])],
        "steps": settings["max_steps"],
    }


def table(matrices: dict[str, ConfusionMatrix], results: dict[str, dict[str, Any]], command: str, counts: str) -> str:
    machine = describe("cpu")
    lines = [
        "# CamVid: real photographs",
        "",
        f"`python -m bench.experiments.camvid CAMVID TEXT{command}`: protocol {PROTOCOL}; {counts}; "
        "presets `camvid/*/supervised`, tower from nothing, one seed; text vectors of CLIP ViT-B/16 as published for "
        "COCO-Stuff (pole: the row of metal). Consecutive pictures of CamVid are near duplicates within a split.",
        "",
        f"Machine: {machine['device']}, one thread, torch {machine['torch']}, fp32.",
        "",
        "| predictor | pAcc | mAcc | mIoU | steps | loss, first and last tenth |",
        "|---|---|---|---|---|---|",
    ]
    scores = {name: matrix.scores_of(PROTOCOL) for name, matrix in matrices.items()}
    for name, s in scores.items():
        how = "- | -"
        if name in results:
            first, last = results[name]["loss"]
            how = f"{results[name]['steps']} | {first:.1f} to {last:.2f}"
        lines.append(f"| {name} | " + " | ".join(_percent(v) for v in (s.pAcc, s.mAcc, s.mIoU)) + f" | {how} |")
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
    parser.add_argument("--max-steps", type=int, help="instead of the presets'")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--work", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "camvid.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.work / "text.npy"
    np.save(text, text_vectors(args.text))
    overrides = [] if args.max_steps is None else ["--max-steps", str(args.max_steps)]
    results: dict[str, dict[str, Any]] = {}
    found: dict[str, ConfusionMatrix] = {}
    for name in args.models.split(","):
        results[name] = run(MODELS[name], args.data, text, args.work / MODELS[name], overrides)
        found[name] = ConfusionMatrix(len(CAMVID))
        found[name].counts += torch.tensor(results[name]["counts"])
    trained, tested = CamVid(args.data, "train"), CamVid(args.data, "test")
    counts = f"{len(trained)} pictures to train, {len(tested)} to test"
    page = table(trivial(trained, tested) | found, results, "".join(f" {part}" for part in overrides), counts)
    print(page)
    write_page(args.output, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
