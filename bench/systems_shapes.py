"""Train every system on the drawn shapes and score it, all under one protocol.

    python -m bench.systems_shapes --output runs [SYSTEM ...]   # goes on where it stopped; Ctrl-C scores it as it is

Protocol ``shapes``: 64 colour-shape pairs and 4 grounds, the labels of 16 pairs hidden in training (inductive). Scenes
of 128 x 128 with 2 to 4 objects; 2,000 for training, 200 others for the scores, one seed. CLIP is the small one that
the package carries, so that all systems read the same text vectors; what else a system needs starts from random
weights. Recipes are the presets ``shapes/SYSTEM/inductive``, but for MaskCLIP+, which labels the hidden pairs itself
(``transductive``). Two-stage systems, which have no crop of their own, are trained on parts of 96 x 96. Steps,
learning rates and batches stand in a system's row, as do the minutes it took. Scores go to ``RUNS/SYSTEM/scores.json``.
"""

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fastzs import clip, models
from fastzs.commands.train import PRESETS
from fastzs.data.datasets import ShapesDataset
from fastzs.data.protocols import protocol
from fastzs.data.transforms import training_transform
from fastzs.metrics import ConfusionMatrix
from fastzs.recipe import Recipe
from fastzs.registry import list_models, system
from fastzs.segmenter import Segmenter
from fastzs.train import train
from fastzs.vocabulary import Vocabulary

SHAPES = protocol("shapes")
SEEN = [i for i in range(len(SHAPES.classes)) if i not in SHAPES.unseen]
SEEN_NAMES = [SHAPES.classes[i] for i in SEEN]
SIDE = 128


def settings(name: str) -> dict[str, Any] | None:
    """The preset of a system, None if it is not trained."""
    setting = "transductive" if name == "maskclip_plus" else "inductive"
    path = PRESETS / "shapes" / name / f"{setting}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def make(name: str, preset: dict[str, Any] | None) -> Any:
    if preset is None:
        return models.MaskCLIP(clip.load(weights="shapes"))
    kind: Any = system(name).kind
    return kind(weights="shapes", seen=SEEN_NAMES if preset["setting"] == "inductive" else None, **preset["options"])


class Cropped:
    """Training pictures: parts of scenes in their own size, flipped, colours as they are (they are part of names)."""

    def __init__(self, model: Any):
        side = model.crop or SIDE * 3 // 4
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
    torch.manual_seed(0)
    preset, begun = settings(name), time.monotonic()
    model = make(name, preset)
    row: dict[str, Any] = {"system": name, "steps": 0, "pictures": pictures}
    if preset:
        numbers: dict[str, Any] = {key: preset[key] for key in preset.keys() & {item.name for item in fields(Recipe)}}
        numbers |= {"workers": 0, "precision": "fp32"} | ({"iterations": iterations} if iterations else {})
        recipe = Recipe(**numbers)
        vocabulary, dataset = Vocabulary(SHAPES.classes), ShapesDataset("train", 2000, SIDE)
        losses = preset.get("losses", {})
        done = train(model, dataset, Cropped(model), vocabulary, recipe, folder / name, seen=SEEN, losses=losses).step
        row |= {"steps": done, "of": recipe.iterations, "batch": recipe.batch, "lr": recipe.lr}
        row["minutes of this call"] = round((time.monotonic() - begun) / 60, 1)
    row |= score(model, pictures)
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "scores.json").write_text(json.dumps(row, indent=2) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=list_models(), help="all if omitted")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200, help="held-out scenes scored")
    parser.add_argument("--iterations", type=int, help="steps of every system, for a quick look")
    args = parser.parse_args()
    for name in args.systems:
        print(json.dumps(run(name, args.output, args.pictures, args.iterations)), flush=True)


if __name__ == "__main__":
    main()
