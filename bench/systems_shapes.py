"""Train every system on the drawn shapes and score it, all under one protocol.

    python -m bench.systems_shapes --output runs [SYSTEM ...]   # goes on where it stopped
    python -m bench.shapes_page                                 # the table of docs/systems.md, of what is done

Protocol ``shapes``: 64 colour-shape pairs and 4 grounds, the labels of 16 pairs hidden in training (inductive). Scenes
of 128 x 128 with 2 to 4 objects; 2,000 for training, 200 others for the scores; three seeds. CLIP is the small one that
the package carries, so that all systems read the same text vectors; what else a system needs starts from random
weights. Recipes are the presets ``shapes/SYSTEM/inductive`` with their stages, but for MaskCLIP+, which labels the
hidden pairs itself (``transductive``). Scenes are as large in training as in testing; systems without a crop are
trained on whole ones, as ``fastzs train`` does.

The *control* is the same training, of the first seed, with the text vectors shuffled among the classes, and tested with
them: what a system scores there on unseen classes it owes to nothing it read in their names.

Every training has a folder in ``RUNS`` for its checkpoints. Its scores are kept in
``bench/results/shapes-table/SYSTEM/seed-N.json`` or ``control.json``, with all that decided them; what is done and
decided by the same is not done again, on any machine. A quick look (``--max-steps``, ``--pictures``) is kept in
``RUNS`` instead. ``--hours`` stops before a training that would begin later.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping
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
from fastzs.registry import system
from fastzs.segmenter import Segmenter
from fastzs.stages import folder, staged, steps_done
from fastzs.train import train
from fastzs.vocabulary import Vocabulary, text_vectors

from .machine import commit, describe

SHAPES = protocol("shapes")
SEEN = list(SHAPES.seen)
SEEN_NAMES = [SHAPES.classes[i] for i in SEEN]
SIDE = 128
SEEDS = (0, 1, 2)
SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")
PICTURES = 200  # held-out scenes that are scored
RESULTS = Path(__file__).parent / "results" / "shapes-table"
# The systems of the table and the mean hIoU that each is to reach; None: it has no bar.
BARS: dict[str, float | None] = {
    "spnet": 15, "strict": None, "zs3": 15, "cagnet": 15, "sign": 15, "joint": 15, "szn": 5, "maskclip": None,
    "maskclip_plus": 50, "lseg": 40, "zegclip": 50, "clip_rc": 60, "zegformer": 35, "zsseg": 35, "deop": 35,
}  # fmt: skip
# Raised where code, which no preset shows, comes to give other results: of all systems, and of one.
REVISION = 1
REVISIONS: dict[str, int] = {}


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
    """Training pictures: scenes in the size of testing, or parts of them, flipped, colours as they are."""

    def __init__(self, model: Any):
        side = model.crop or model.short_side
        self.transform = training_transform(
            side,
            model.mean,
            model.std,
            short_side=max(model.short_side, side),  # as in testing
            scale=(1.0, 1.0),
            most=1.0,
            distortion=False,  # names hold colours
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


def decided_by(name: str, seed: int, shuffled: bool, pictures: int, max_steps: int | None) -> dict[str, Any]:
    """All that decides a result, as plain values."""
    idle = {item.name for item in fields(Recipe) if not item.metadata["decisive"]}
    return {
        "system": name,
        "seed": seed,
        "shuffled": shuffled,
        "pictures": pictures,
        "max_steps": max_steps,
        "revision": f"{REVISION}.{REVISIONS.get(name, 1)}",
        "stages": [{key: value for key, value in stage.items() if key not in idle} for stage in settings(name)],
    }


def kept(path: Path, decided: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a file, if the same decided it."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if found and found["decided by"] == decided else None


def provenance() -> dict[str, Any]:
    """What is trained and where."""
    machine = describe("cpu")
    return {
        "commit": commit() or "unknown",
        "machine": machine["device"],
        "torch": machine["torch"],
        "threads": machine["threads"],
    }


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
    name: str,
    output: Path,
    seed: int = 0,
    pictures: int = PICTURES,
    max_steps: int | None = None,
    *,
    shuffled: bool = False,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Train (or go on training) and score one system with one seed; a result that is kept is read."""
    decided = decided_by(name, seed, shuffled, pictures, max_steps)
    title = "control" if shuffled else f"seed-{seed}"
    path = results / name / f"{title}.json"
    if found := kept(path, decided):
        return found
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:8]
    work, stages, spent = output / name / f"{title}-{digest}", settings(name), []
    model = make(name, None) if not stages else None
    for number, stage in enumerate(stages, start=1):
        torch.manual_seed(seed)
        model = make(name, stage, folder(work, number - 1) / "last" if number > 1 else None)
        numbers: dict[str, Any] = {key: stage[key] for key in stage.keys() & {item.name for item in fields(Recipe)}}
        recipe = Recipe(**numbers | {"workers": 0, "precision": "fp32", "seed": seed})
        if max_steps:
            recipe = replace(recipe, max_steps=max_steps)
        spent.append(_train(model, stage, recipe, folder(work, number), shuffled))
    seconds = [taken for _, taken in spent if taken is not None]
    row: dict[str, Any] = {"steps": sum(steps for steps, _ in spent)}
    row["seconds"] = round(sum(seconds)) if len(seconds) == len(spent) else None
    row["parameters"] = sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0
    row |= score(model, words(model, shuffled), pictures) | provenance() | {"decided by": decided}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(row, indent=1) + "\n").encode())
    return row


def _train(
    model: Any, stage: Mapping[str, Any], recipe: Recipe, output: Path, shuffled: bool
) -> tuple[int, float | None]:
    """One stage. Returns its steps, and their processor seconds at the rate of the last ones, if it is known.

    A signal ends the program, with a checkpoint: what is not done is not scored.
    """
    rate_file = output / "seconds_per_step.json"
    before, begun = steps_done(output), time.process_time()
    done = train(
        model,
        ShapesDataset("train", 2000, SIDE),
        Cropped(model),
        words(model, shuffled),
        recipe,
        output,
        seen=SEEN,
        loss_weights=stage.get("loss_weights") or {},
        about={"shuffled": shuffled},
    )
    if done.step > before:
        rate = (time.process_time() - begun) / (done.step - before)
        write_atomically(rate_file, json.dumps(rate).encode())
    if done.stopped_by is not None:
        sys.exit(128 + done.stopped_by)
    return done.step, done.step * json.loads(rate_file.read_text()) if rate_file.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=list(BARS), help="all of the table if omitted")
    parser.add_argument("--output", type=Path, required=True, help="RUNS, the folder for checkpoints")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="held-out scenes scored")
    parser.add_argument("--max-steps", type=int, help="steps of every stage, for a quick look")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="trainings of a system")
    parser.add_argument("--no-control", action="store_true", help="leave out the trainings with shuffled vectors")
    parser.add_argument("--hours", type=float, default=4.0, help="no training begins after them")
    args = parser.parse_args()
    if unknown := [name for name in args.systems if name not in BARS]:
        parser.error(f"the table has no {', '.join(unknown)}; it has {', '.join(BARS)}")
    begun = time.monotonic()
    whole = args.max_steps is None and args.pictures == PICTURES
    # one seed of all systems first, so that a stop leaves a whole table
    for seed in range(args.seeds + (not args.no_control)):
        for name in args.systems:
            trained, control = bool(settings(name)), seed == args.seeds
            if (seed or control) and not trained:
                continue
            if time.monotonic() - begun > 3600 * args.hours:
                print("time is up; the same command goes on")
                return
            row = run(
                name,
                args.output,
                0 if control else seed,
                args.pictures,
                args.max_steps,
                shuffled=control,
                results=RESULTS if whole else args.output / "quick",
            )
            told = {key: row[key] for key in (*SCORES, "steps", "seconds")}
            print(json.dumps({"system": name, "seed": "control" if control else seed} | told), flush=True)


if __name__ == "__main__":
    main()
