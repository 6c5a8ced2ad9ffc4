"""Train every system on the drawn shapes and score it, all under one protocol.

    python -m bench.systems_shapes --output runs [SYSTEM ...]   # goes on where it stopped

Protocol ``shapes``: 64 colour-shape pairs and 4 grounds, the labels of 16 pairs hidden in training (inductive). Scenes
of 128 x 128 with 2 to 4 objects; 2,000 for training, 200 others for the scores; three seeds. CLIP is the small one that
the package carries, so that all systems read the same text vectors; what else a system needs starts from random
weights. Recipes are the presets ``shapes/SYSTEM/inductive`` with their stages, but for MaskCLIP+, which labels the
hidden pairs itself (``transductive``). Systems that have no crop of their own are trained on parts of 96 x 96.

The *control* is the same training, of the first seed, with the text vectors shuffled among the classes, and tested with
them: what a system scores there on unseen classes it owes to nothing it read in their names.

Every training has a folder, ``RUNS/SYSTEM/seed-N`` or ``RUNS/SYSTEM/control``, with a ``scores.json`` when it is done;
what is done is not done again. ``RUNS/SYSTEM/scores.json`` has the means over the seeds and their spread (the largest
minus the smallest), and is written anew after each. ``--hours`` stops before a training that would begin later.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fastzs import clip, models
from fastzs.commands.train import MODEL_SETTINGS, PRESETS
from fastzs.data.datasets import ShapesDataset
from fastzs.data.protocols import protocol
from fastzs.data.transforms import training_transform
from fastzs.files import write_atomically
from fastzs.metrics import ConfusionMatrix
from fastzs.models.words import FixedClasses
from fastzs.recipe import Recipe
from fastzs.registry import list_models, system
from fastzs.segmenter import Segmenter
from fastzs.stages import folder, staged
from fastzs.train import train
from fastzs.vocabulary import Vocabulary, text_vectors

SHAPES = protocol("shapes")
SEEN = list(SHAPES.seen)
SEEN_NAMES = [SHAPES.classes[i] for i in SEEN]
SIDE = 128
SEEDS = (0, 1, 2)
SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")


def settings(name: str) -> list[dict[str, Any]]:
    """The stages of a system's preset, each with all of its settings; none if it is not trained."""
    setting = "transductive" if name == "maskclip_plus" else "inductive"
    path = PRESETS / "shapes" / name / f"{setting}.yaml"
    if not path.is_file():
        return []
    preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = [*MODEL_SETTINGS, *(item.name for item in fields(Recipe))]
    return staged(preset, preset.pop("stages", [{}]), known)


def make(name: str, stage: dict[str, Any] | None, start: Path | None = None) -> Any:
    """A system as a stage wants it, new or from a folder."""
    if stage is None:
        return models.MaskCLIP(clip.load(weights="shapes"))
    kind: Any = system(name).kind
    options = {**stage["options"], "seen": SEEN_NAMES if stage["setting"] == "inductive" else None}
    if issubclass(kind, FixedClasses):
        options["classes"] = list(SHAPES.classes)
    return kind(weights="shapes", **options) if start is None else kind.from_pretrained(start, **options)


class Cropped:
    """Training pictures: parts of scenes in the size of testing, flipped, colours as they are (names hold them)."""

    def __init__(self, model: Any):
        side = model.crop or SIDE * 3 // 4
        self.transform = training_transform(
            side,
            model.mean,
            model.std,
            short_side=max(model.short_side or SIDE, side),  # as in testing
            scale=(1.0, 1.0),
            most=1.0,
            distortion=False,
        )

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(image, mask)


def words(model: Any, shuffled: bool) -> Vocabulary:
    """The classes; ``shuffled``: with the text vectors of others."""
    vocabulary = Vocabulary(SHAPES.classes)
    if not shuffled:
        return vocabulary
    order = torch.randperm(len(SHAPES.classes), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Vocabulary(SHAPES.classes, embeddings=text_vectors(model, vocabulary)[order])


@torch.inference_mode()
def score(model: Any, vocabulary: Vocabulary, pictures: int) -> dict[str, float | None]:
    """Scores in percent on held-out scenes."""
    dataset = ShapesDataset("val", pictures, SIDE)
    segmenter, counts = Segmenter(model.eval()), ConfusionMatrix(len(SHAPES.classes))
    for i in range(len(dataset)):
        image, truth = dataset[i]
        counts.add(torch.as_tensor(truth), segmenter(torch.as_tensor(image), vocabulary).labels)
    found = counts.scores_of(SHAPES)
    values = (found.pAcc, found.seen, found.unseen, found.hIoU)
    return {name: None if v is None else round(100 * v, 1) for name, v in zip(SCORES, values, strict=True)}


def run(
    name: str, output: Path, seed: int, pictures: int, max_steps: int | None = None, *, shuffled: bool = False
) -> dict[str, Any]:
    """Train (or go on training) and score one system with one seed; what is done is read."""
    path = output / "scores.json"
    if path.is_file():
        return json.loads(path.read_text())
    stages, begun, steps = settings(name), time.monotonic(), 0
    model = make(name, None) if not stages else None
    for number, stage in enumerate(stages, start=1):
        torch.manual_seed(seed)
        model = make(name, stage, folder(output, number - 1) / "last" if number > 1 else None)
        numbers: dict[str, Any] = {key: stage[key] for key in stage.keys() & {item.name for item in fields(Recipe)}}
        recipe = Recipe(**numbers | {"workers": 0, "precision": "fp32", "seed": seed})
        if max_steps:
            recipe = replace(recipe, max_steps=max_steps)
        dataset = ShapesDataset("train", 2000, SIDE)
        done = train(
            model,
            dataset,
            Cropped(model),
            words(model, shuffled),
            recipe,
            folder(output, number),
            seen=SEEN,
            loss_weights=stage.get("loss_weights") or {},
            about={"shuffled": shuffled},
        )
        steps += done.step
    row: dict[str, Any] = {"system": name, "seed": seed, "shuffled": shuffled, "steps": steps, "pictures": pictures}
    row["seconds"] = round(time.monotonic() - begun)
    row["parameters"] = sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0
    row |= score(model, words(model, shuffled), pictures)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(row, indent=2) + "\n").encode())
    return row


def summary(rows: Sequence[dict[str, Any]], control: dict[str, Any] | None) -> dict[str, Any]:
    """Means over the seeds, and the spread of hIoU."""
    first = rows[0]
    out = {key: first[key] for key in ("system", "steps", "pictures", "parameters")} | {"seeds": len(rows)}
    out["of"] = first["steps"]
    out["seconds"] = round(statistics.mean(row["seconds"] for row in rows))
    for name in SCORES:
        values = [row[name] for row in rows if row[name] is not None]
        out[name] = round(statistics.mean(values), 1) if values else None
    values = [row["hIoU"] for row in rows if row["hIoU"] is not None]
    out["spread"] = round(max(values) - min(values), 1) if values else None
    return out | ({"control": control["hIoU"]} if control else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=list_models(), help="all if omitted")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200, help="held-out scenes scored")
    parser.add_argument("--max-steps", type=int, help="steps of every stage, for a quick look")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="trainings of a system")
    parser.add_argument("--no-control", action="store_true", help="leave out the trainings with shuffled vectors")
    parser.add_argument("--hours", type=float, default=4.0, help="no training begins after them")
    args = parser.parse_args()
    begun, rows = time.monotonic(), {name: [] for name in args.systems}
    controls: dict[str, dict[str, Any]] = {}
    # one seed of all systems first, so that a stop leaves a whole table
    for seed in range(args.seeds + (not args.no_control)):
        for name in args.systems:
            trained, control = bool(settings(name)), seed == args.seeds
            if (seed or control) and not trained:
                continue
            if time.monotonic() - begun > 3600 * args.hours:
                print("time is up; the same command goes on")
                return
            where = args.output / name / ("control" if control else f"seed-{seed}")
            row = run(name, where, 0 if control else seed, args.pictures, args.max_steps, shuffled=control)
            if control:
                controls[name] = row
            else:
                rows[name].append(row)
            found = summary(rows[name], controls.get(name))
            write_atomically(args.output / name / "scores.json", (json.dumps(found, indent=2) + "\n").encode())
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
