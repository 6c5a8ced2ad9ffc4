"""The papers' claims on drawn shapes: ``python -m bench.experiments.shapes``.

Trains every row of the table below on scenes that the package draws, from the small CLIP that is built in, three times
each, and tests them on other scenes. 16 of the 64 colour-shape pairs are unseen: the scenes hold them, the labels of
the training do not (protocol ``shapes``). The runs lie in ``runs/shapes``; the same command goes on where it stopped.
``--rows zegclip,clip_rc`` runs some rows only, ``--processes 2`` two at a time, ``--smoke`` all of them for a few
steps, to see that they run.
"""

import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.experiments.page import write_page
from bench.experiments.variants import OneStage, WithoutAlignment, WithoutBridge
from bench.machine import describe, peak_megabytes
from fastzs import checkpoints, clip
from fastzs.data.datasets import ShapesDataset
from fastzs.data.protocols import protocol
from fastzs.data.transforms import training_transform
from fastzs.evaluate import evaluate, summary
from fastzs.files import write_atomically
from fastzs.models import ClipRC, MaskCLIP, ZegCLIP
from fastzs.recipe import Recipe
from fastzs.segmenter import Segmenter
from fastzs.train import train
from fastzs.vocabulary import Vocabulary

PROTOCOL = protocol("shapes")
SIZE = 64  # side of the scenes in pixels: 8 x 8 patches
SCENES: dict[str, Any] = {"objects": (1, 2), "radius": (10.0, 24.0)}
MODEL: dict[str, Any] = {
    "weights": "shapes",
    "crop": SIZE,
    "prompts": 8,
    "decoder_layers": 2,
    "dropout": 0.0,
    "imagenet_normalization": False,
    "double_class_embedding": False,
}
BRIDGE: dict[str, Any] = {"bridge": (2, 2)}  # regions of 4 x 4 patches
CALIBRATION = 0.1  # published, for inductive models


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: as printed.
        make: the model; for trained rows new, with the generator's seed set.
        setting: of the training; None for rows without one.
        start: the row whose half-way weights it goes on from, as the published transductive trainings do.
        tune: train the tower, too, at a tenth of the learning rate.
        loss_weights: of the loss's parts where they are not the published ones.
    """

    title: str
    make: Callable[..., Any]
    setting: Any = None
    start: str | None = None
    tune: bool = False
    loss_weights: dict[str, float] = field(default_factory=dict)


def _maskclip(**options: Any) -> Callable[[], MaskCLIP]:
    return lambda: MaskCLIP(clip.load("", "shapes"), **options)


ROWS: dict[str, Row] = {
    "maskclip": Row("MaskCLIP", _maskclip()),
    "maskclip_smoothing": Row("MaskCLIP + key smoothing", _maskclip(smoothing="paper")),
    "maskclip_denoising": Row("MaskCLIP + prompt denoising", _maskclip(denoising=0.5)),
    "maskclip_both": Row("MaskCLIP + both", _maskclip(smoothing="paper", denoising=0.5)),
    "baseline": Row(
        "one-stage baseline: softmax, tuned tower",
        lambda: OneStage(exclusive=True, **MODEL | {"prompts": 0}),
        "inductive",
        tune=True,
    ),
    "prompts": Row("+ deep prompts, tower frozen", lambda: OneStage(exclusive=True, **MODEL), "inductive"),
    "non_exclusive": Row("+ non-exclusive loss", lambda: OneStage(exclusive=False, **MODEL), "inductive"),
    "zegclip": Row("+ relationship descriptor = ZegCLIP", lambda: ZegCLIP(**MODEL), "inductive"),
    "clip_rc": Row("CLIP-RC", lambda: ClipRC(**MODEL, **BRIDGE), "inductive"),
    "clip_rc_no_bridge": Row("CLIP-RC without bridge", lambda: WithoutBridge(**MODEL, **BRIDGE), "inductive"),
    "clip_rc_no_alignment": Row(
        "CLIP-RC without region alignment", lambda: WithoutAlignment(**MODEL, **BRIDGE), "inductive"
    ),
    "clip_rc_no_recovery": Row(
        "CLIP-RC without recovery",
        lambda: ClipRC(**MODEL, **BRIDGE, recovery=False),
        "inductive",
        loss_weights={"recovery": 0.0},
    ),
    "zegclip_transductive": Row("ZegCLIP, transductive", ZegCLIP.from_pretrained, "transductive", start="zegclip"),
    "clip_rc_transductive": Row("CLIP-RC, transductive", ClipRC.from_pretrained, "transductive", start="clip_rc"),
    "zegclip_supervised": Row("ZegCLIP, all labels", lambda: ZegCLIP(**MODEL), "supervised"),
    "clip_rc_supervised": Row(
        "CLIP-RC, all labels",
        lambda: ClipRC(**MODEL, **BRIDGE, recovery=False),
        "supervised",
        loss_weights={"recovery": 0.0},
    ),
}


@dataclass(frozen=True)
class Length:
    """How long everything takes."""

    max_steps: int = 400
    batch_size: int = 8
    scenes: int = 256  # tested
    seeds: int = 3

    def command(self) -> str:
        """The command line that asks for it."""
        changed = [item for item in dataclasses.fields(self) if getattr(self, item.name) != item.default]
        flags = "".join(f" --{item.name.replace('_', '-')} {getattr(self, item.name)}" for item in changed)
        return f"python -m bench.experiments.shapes{flags}"


SMOKE = Length(max_steps=4, batch_size=2, scenes=12, seeds=1)


def run(name: str, seed: int, length: Length, work: Path) -> dict[str, Any]:
    """Train (or go on with training) and test one row with one seed; what was found, which ``result.json`` keeps."""
    torch.set_num_threads(1)
    row, folder = ROWS[name], work / name / f"seed{seed}"
    if (before := _kept(name, seed, length, work)) is not None:
        return before
    settings = _settings(name, seed, length)
    torch.manual_seed(seed)
    result: dict[str, Any] = {"settings": settings, "machine": describe("cpu")}
    if row.setting is None:
        model = row.make().eval()
    else:
        start = None
        if row.start is not None:
            run(row.start, seed, length, work)
            start = work / row.start / f"seed{seed}" / "checkpoints" / checkpoints.name_of(length.max_steps // 2)
        model = row.make(start, seen=None) if start is not None else row.make()
        max_steps = length.max_steps // (2 if start is not None else 1)
        result |= _train(model, row, seed, max_steps, length, folder)
    dataset = ShapesDataset("val", length.scenes, SIZE, **SCENES)
    constants = [0.0, CALIBRATION] if row.setting == "inductive" else [0.0]
    with torch.inference_mode():
        matrices = evaluate(Segmenter(model), dataset, PROTOCOL, Vocabulary(PROTOCOL.classes), calibrations=constants)
    result["scores"] = {str(constant): summary(matrix.scores_of(PROTOCOL)) for constant, matrix in matrices.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _settings(name: str, seed: int, length: Length) -> dict[str, Any]:
    settings = {"row": name, "seed": seed} | dataclasses.asdict(length)
    del settings["seeds"]
    return settings


def _kept(name: str, seed: int, length: Length, work: Path) -> dict[str, Any] | None:
    """What an earlier run of the same length found."""
    path = work / name / f"seed{seed}" / "result.json"
    found = json.loads(path.read_text()) if path.is_file() else None
    return found if found and found["settings"] == _settings(name, seed, length) else None


def _train(model: Any, row: Row, seed: int, max_steps: int, length: Length, folder: Path) -> dict[str, float]:
    recipe = Recipe(
        setting=row.setting,
        max_steps=max_steps,
        batch_size=length.batch_size,
        lr=2e-3,
        min_lr=2e-5,
        warmup=min(20, max_steps // 2),
        clip_norm=10.0,
        groups={"backbone": {"lr": 0.1}} if row.tune else {},
        train=["backbone"] if row.tune else [],
        precision="fp32",
        seed=seed,
        workers=0,
        log_every=10,
        save_every=max(1, length.max_steps // 4),
        keep=[length.max_steps // 2],
        evaluate_every=0,
    )
    transform = training_transform(SIZE, model.mean, model.std, scale=(1.0, 1.0), distortion=False)
    dataset = ShapesDataset("train", 100_000, SIZE, **SCENES)  # no scene comes twice
    last = folder / "last"  # of a run that was stopped
    steps = max_steps - (checkpoints.read(last)["step"] if last.is_symlink() else 0)
    begun, used = time.perf_counter(), time.process_time()
    seen = None if row.setting == "supervised" else PROTOCOL.seen
    vocabulary = Vocabulary(PROTOCOL.classes, synonyms="mean")

    def go() -> None:
        outcome = train(model, dataset, transform, vocabulary, recipe, folder, seen=seen, loss_weights=row.loss_weights)
        if outcome.stopped_by is not None:  # with a checkpoint; a half-trained model is not scored
            sys.exit(128 + outcome.stopped_by)

    peak = peak_megabytes(go, "cpu")
    return {
        "seconds_per_step": (time.perf_counter() - begun) / max(1, steps),
        "cpu_seconds_per_step": (time.process_time() - used) / max(1, steps),
        "peak_megabytes": peak,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas")
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "shapes.md")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, written nowhere else")
    parser.add_argument("--processes", type=int, default=1, help="rows that are run at a time, of one thread each")
    for item in dataclasses.fields(Length):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, default=item.default)
    args = parser.parse_args(arguments)
    rows = args.rows.split(",")
    if unknown := [name for name in rows if name not in ROWS]:
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    length = SMOKE if args.smoke else Length(args.max_steps, args.batch_size, args.scenes, args.seeds)
    work = args.work / "smoke" if args.smoke else args.work
    jobs = [(name, seed) for seed in range(length.seeds) for name in rows]
    if not _run_all(jobs, length, work, args.processes):
        return 1
    found = {name: [run(name, seed, length, work) for seed in range(length.seeds)] for name in rows}
    page = table(found, length)
    print(page)
    if not args.smoke:
        write_page(args.output, page)
        everything = json.dumps([result for results in found.values() for result in results], indent=1)
        write_atomically(args.output.with_suffix(".json"), (everything + "\n").encode())
    return 0


def _run_all(jobs: list[tuple[str, int]], length: Length, work: Path, processes: int) -> bool:
    """:func:`run` of each job in a process that has computed nothing before, for its memory to be its own.

    A row that goes on from another one's weights waits until that is done. Whether all came out.
    """
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(["bench.experiments.variants", "fastzs.evaluate", "fastzs.train"])
    waiting = [job for job in jobs if _kept(*job, length, work) is None]
    running: dict[tuple[str, int], Any] = {}
    while waiting or running:
        for job in list(waiting):
            start = (ROWS[job[0]].start, job[1])
            if len(running) < processes and start not in waiting and start not in running:
                waiting.remove(job)
                running[job] = context.Process(target=run, args=(*job, length, work))
                running[job].start()
        multiprocessing.connection.wait([process.sentinel for process in running.values()])
        for job, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[job]
            if process.exitcode:
                print(f"{job[0]}, seed {job[1]}: failed", file=sys.stderr)
                for other in running.values():
                    other.terminate()  # it writes a checkpoint first
                return False
            print(f"{job[0]}, seed {job[1]}: {_told(run(*job, length, work))}", flush=True)
    return True


def _constant(result: dict[str, Any]) -> str:
    """The published choice: the constant in the inductive setting, none elsewhere."""
    return str(CALIBRATION) if str(CALIBRATION) in result["scores"] else "0.0"


def _told(result: dict[str, Any]) -> str:
    scores = result["scores"][_constant(result)]
    figures = ", ".join(f"{key} {100 * scores[key]:.1f}" for key in SCORES if key in scores)
    step = f", {result['cpu_seconds_per_step']:.3f} s/step" if "cpu_seconds_per_step" in result else ""
    return figures + step


def table(found: dict[str, list[dict[str, Any]]], length: Length) -> str:
    """The page: what was run, where, and one line for each row."""
    first = next(iter(found.values()))[0]
    machine = first["machine"]
    lines = [
        "# The papers' claims on drawn shapes",
        "",
        f"`{length.command()}`: protocol {PROTOCOL}; {SIZE} x {SIZE} pixels, 1 or 2 objects; "
        f"{length.max_steps} steps of {length.batch_size} scenes, tested on {length.scenes} others; "
        f"{_over(length.seeds)}. Transductive rows go on from the inductive ones' half-way weights for half the steps. "
        "mIoU in %, inductive "
        f"rows with {CALIBRATION} taken from the seen classes' scores as published; the last column without it. "
        "Seconds are one thread's processor time, drawing included; memory is what training held beyond the start.",
        "",
        f"Machine: {machine['device']}, 1 thread, torch {machine['torch']}, fp32.",
        "",
        "| system | pAcc | S | U | hIoU | s/step | MB | hIoU, no constant |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        if name not in found:
            continue
        results = found[name]
        cells = [_spread([r["scores"][_constant(r)].get(key) for r in results]) for key in SCORES]
        cells += [_mean([r.get("cpu_seconds_per_step") for r in results], 3)]
        cells += [_mean([r.get("peak_megabytes") for r in results], 0)]
        cells += [_spread([r["scores"]["0.0"].get("hIoU") for r in results])]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _over(seeds: int) -> str:
    if seeds == 1:
        return "one seed, so differences of a few points mean nothing"
    return f"mean and standard deviation over {seeds} seeds (of weights and order; MaskCLIP has no training)"


SCORES = ("pAcc", "seen", "unseen", "hIoU")


def _spread(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    if len(set(known)) == 1:
        return f"{known[0]:.1f}"
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f}"


def _mean(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "-"


if __name__ == "__main__":
    sys.exit(main())
