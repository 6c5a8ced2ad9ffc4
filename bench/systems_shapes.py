"""Train every system on the drawn shapes and score it, all under one protocol.

    python -m bench.systems_shapes --output runs [SYSTEM ...]     # goes on where it was stopped

Protocol ``shapes``: 64 colour-shape pairs and 4 grounds, the labels of 16 pairs hidden in training (inductive). Scenes
of 128 x 128 with 2 to 4 objects; 2,000 for training, 200 others for the scores, one seed. CLIP is the small one that
the package carries, so that all systems read the same text vectors; what else a system needs starts from random
weights. Steps, learning rates and batches are each system's own and stand in its row, as do the minutes it took.
Scores go to ``RUNS/SYSTEM/scores.json``.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastzs import clip, models
from fastzs.data.datasets import ShapesDataset
from fastzs.data.protocols import protocol
from fastzs.data.transforms import training_transform
from fastzs.metrics import ConfusionMatrix
from fastzs.predict import Segmenter
from fastzs.recipe import Recipe
from fastzs.train import train
from fastzs.vocabulary import Vocabulary

SHAPES = protocol("shapes")
SEEN = [i for i in range(len(SHAPES.classes)) if i not in SHAPES.unseen]
SEEN_NAMES = [SHAPES.classes[i] for i in SEEN]
SIDE = 128
PROPOSALS = {"width": 64, "queries": 20, "layers": 3, "hidden": 256, "dropout": 0.0}


@dataclass
class System:
    """A system at a size for the shapes, and how it is trained; without a recipe it is not."""

    make: Callable[[], Any]
    recipe: Recipe | None = None
    losses: dict[str, float] = field(default_factory=dict)


def recipe(iterations: int, lr: float, batch: int, **options: Any) -> Recipe:
    common: dict[str, Any] = {"warmup": 50, "clip_norm": 1.0, "workers": 0, "precision": "fp32", "log_every": 20}
    return Recipe(iterations=iterations, lr=lr, batch=batch, save_every=100, evaluate_every=0, **(common | options))


def two_stage(kind: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: kind(
        weights="shapes", size=SIDE, resnet="resnet18", pretrained=None, proposals=PROPOSALS, seen=SEEN_NAMES
    )


SYSTEMS: dict[str, System] = {
    "maskclip": System(lambda: models.MaskCLIP(clip.load(weights="shapes"))),
    "zegclip": System(lambda: models.ZegCLIP(weights="shapes", crop=SIDE, seen=SEEN_NAMES), recipe(600, 1e-3, 8)),
    "clip_rc": System(lambda: models.ClipRC(weights="shapes", crop=SIDE, seen=SEEN_NAMES), recipe(600, 1e-3, 8)),
    "zegformer": System(two_stage(models.ZegFormer), recipe(1000, 5e-4, 8, weight_decay=1e-4)),
    "zsseg": System(two_stage(models.ZSSeg), recipe(1000, 5e-4, 8, weight_decay=1e-4)),
}


class Cropped:
    """Training pictures: parts of scenes in their own size, flipped, colours as they are (they are part of names)."""

    def __init__(self, model: Any):
        side = SIDE * 3 // 4 if isinstance(model, models.ZegFormer | models.ZSSeg) else SIDE
        self.transform = training_transform(
            side, model.mean, model.std, short_side=SIDE, scale=(1.0, 1.0), most=1.0, distortion=False
        )

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(image, mask)


@torch.inference_mode()
def score(model: Any, pictures: int) -> dict[str, float | None]:
    """Scores in percent on held-out scenes."""
    vocabulary, dataset = Vocabulary(SHAPES.classes), ShapesDataset("val", pictures, SIDE)
    segmenter, counts = Segmenter(model.eval()), ConfusionMatrix(len(SHAPES.classes))
    for i in range(len(dataset)):
        image, truth = dataset[i]
        counts.add(torch.as_tensor(truth), segmenter(torch.as_tensor(image), vocabulary).labels)
    found = counts.scores_of(SHAPES)
    names = {"pAcc": found.pAcc, "mIoU(S)": found.seen, "mIoU(U)": found.unseen, "hIoU": found.hIoU}
    return {name: None if value is None else round(100 * value, 1) for name, value in names.items()}


def run(name: str, folder: Path, pictures: int, iterations: int | None = None) -> dict[str, Any]:
    """Train (or go on training) and score one system."""
    system = SYSTEMS[name]
    torch.manual_seed(0)
    model, begun = system.make(), time.monotonic()
    row: dict[str, Any] = {"system": name, "steps": 0}
    if system.recipe:
        used = system.recipe if iterations is None else recipe(iterations, system.recipe.lr, system.recipe.batch)
        vocabulary, dataset = Vocabulary(SHAPES.classes), ShapesDataset("train", 2000, SIDE)
        train(model, dataset, Cropped(model), vocabulary, used, folder / name, seen=SEEN, losses=system.losses)
        row |= {"steps": used.iterations, "batch": used.batch, "lr": used.lr}
        row["minutes of this call"] = round((time.monotonic() - begun) / 60, 1)
    row |= score(model, pictures)
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "scores.json").write_text(json.dumps(row, indent=2) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=list(SYSTEMS), help="all if omitted")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200, help="held-out scenes scored")
    parser.add_argument("--iterations", type=int, help="steps of every system, for a quick look")
    args = parser.parse_args()
    for name in args.systems:
        print(json.dumps(run(name, args.output, args.pictures, args.iterations)), flush=True)


if __name__ == "__main__":
    main()
