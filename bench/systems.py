"""All systems side by side: the table of docs/systems.md, made of measured figures.

    pytest bench/test_systems.py -m "full and not gpu" --benchmark-only --benchmark-json speed.json
    python -m bench.systems --speed speed.json

It also writes ``bench/results/systems.md``: the published order of work, and the ratios of one stage to two. Scores are
in the table of :mod:`bench.shapes_page`.

Parameters and multiply-adds are counted here: the full-size models with random weights, the same picture as in
:mod:`bench.test_systems`, torch's flop counter over the whole way from the picture to the labels, halved. It counts
matrix products, convolutions and attention, not what is done element by element, and for this first picture also what
is then kept. Ops are counted as their references compute them (``FASTZS_IMPL=reference``). What was counted is kept in
``bench/results/systems-figures.json``; ``--count SYSTEM ...`` counts anew.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastzs import clip, models
from fastzs.files import write_atomically
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary

from .rows import Row, faster, read

SIZES = {"width": 768, "layers": 12, "heads": 12, "patch_size": 16, "grid": 32, "output_dim": 512}
CUT_OUT = SIZES | {"grid": 14}
SIZE, CLASSES = (512, 683), 20
ONE_STAGE, TWO_STAGE = ("zegclip", "clip_rc"), ("zegformer", "zsseg")
ONE_PASS = (*ONE_STAGE, "deop")  # look at the image once, whatever proposes masks
TABLE = ("<!-- systems: begin -->", "<!-- systems: end -->")
DOCS = Path(__file__).parent.parent / "docs" / "systems.md"
RESULTS = Path(__file__).parent / "results" / "systems.md"
FIGURES = Path(__file__).parent / "results" / "systems-figures.json"  # what is counted, by system

# every system at its published size, random weights
FULL: dict[str, Callable[[], Any]] = {
    "maskclip": lambda: models.MaskCLIP(clip.load("ViT-B-16", "random"), imagenet_normalization=True),
    "zegclip": lambda: models.ZegCLIP(sizes=SIZES, prompts=10),
    "clip_rc": lambda: models.ClipRC(sizes=SIZES, prompts=10),
    "lseg": lambda: models.LSeg(weights="random"),
    "szn": lambda: models.SZN(weights="random", text_dim=20),
    "maskclip_plus": lambda: models.MaskCLIPPlus(weights="random"),
    "zegformer": lambda: models.ZegFormer(sizes=CUT_OUT, pretrained=None),
    "zsseg": lambda: models.ZSSeg(sizes=CUT_OUT, pretrained=None),
    "spnet": lambda: models.SPNet(weights="random", text_dim=600, crop=512),
    "strict": lambda: models.STRICT(weights="random", text_dim=600, crop=512),
    "zs3": lambda: models.ZS3(CLASSES, weights="random", text_dim=300, crop=512),
    "cagnet": lambda: models.CaGNet(CLASSES, weights="random", text_dim=600, crop=512),
    "sign": lambda: models.SIGN(CLASSES, weights="random", text_dim=600, crop=512),
    "joint": lambda: models.Joint(weights="random", text_dim=300, crop=512),
    "deop": lambda: models.DeOP(sizes=CUT_OUT, pretrained=None),
}


def picture() -> torch.Tensor:
    """uint8 [3, H, W] of coloured squares."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (3, -(-SIZE[0] // 16), -(-SIZE[1] // 16)), dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : SIZE[0], : SIZE[1]].contiguous()


def text_vectors(width: int) -> torch.Tensor:
    """Random, [classes, width], so that no text tower runs."""
    return F.normalize(torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(1)), dim=1)


def vocabulary(width: int) -> Vocabulary:
    return Vocabulary([f"class {i}" for i in range(CLASSES)], embeddings=text_vectors(width))


def text_width(model: Any) -> int:
    return model.clip.embed_dim if isinstance(model, models.MaskCLIP) else model.text_dim


def figures(name: str) -> dict[str, float]:
    """Parameters, those trained, and multiply-adds of one picture, in millions and billions."""
    torch.manual_seed(0)
    model = FULL[name]()
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    segmenter, names = Segmenter(model.requires_grad_(False)), vocabulary(text_width(model))
    os.environ["FASTZS_IMPL"] = "reference"
    with FlopCounterMode(display=False) as counter:
        segmenter(picture(), names)
    return {
        "parameters (M)": sum(n for n, _ in counts) / 1e6,
        "trained (M)": sum(n for n, trained in counts if trained) / 1e6,
        "multiply-adds (G)": counter.get_total_flops() / 2e9,
    }


def counted() -> dict[str, dict[str, float]]:
    """The figures that are kept, by system."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def costs(name: str) -> tuple[float, float]:
    """Parameters of a system and multiply-adds of an image."""
    kept = counted()[name]
    return 1e6 * kept["parameters (M)"], 1e9 * kept["multiply-adds (G)"]


def count(names: Sequence[str]) -> None:
    """Count the figures of some systems anew."""
    kept = counted() if FIGURES.is_file() else {}
    found = kept | {name: {key: round(value, 1) for key, value in figures(name).items()} for name in names}
    write_atomically(FIGURES, (json.dumps({name: found[name] for name in FULL}, indent=1) + "\n").encode())


def table(speed: dict[tuple[str, str], Row]) -> str:
    """The table in Markdown; "unmeasured" where a figure is not there."""
    lines = [["system", "parameters, M", "trained, M", "multiply-adds, G", "pictures/s", "peak MB"]]
    kept = counted()
    for name in FULL:
        timed = speed.get((name, "fastzs"))
        numbers = [f"{value:.1f}" for value in kept[name].values()]
        numbers.append(f"{timed['pictures per second']:.3g}" if timed else "unmeasured")
        numbers.append(f"{timed['peak MB']:.0f}" if timed and timed["peak MB"] is not None else "unmeasured")
        lines.append([f"`{name}`", *numbers])
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def measured(path: Path) -> dict[tuple[str, str], Row]:
    """Rows of bench/test_systems.py by system and order of work, of the first dtype that the run has.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in read([path]) if "system" in row]
    if not rows:
        raise ValueError(f"{path} has no rows of bench/test_systems.py")
    return {(row["system"], row["rival"]): row for row in rows if row["dtype"] == rows[0]["dtype"]}


def about(rows: dict[tuple[str, str], Row]) -> str:
    """What was measured, where."""
    row = next(iter(rows.values()))
    loads = sorted(one["load"] for one in rows.values() if "load" in one)
    threads = f", {row['threads']} threads" if "threads" in row else ""
    count = f"{len(row['seconds'])} round" + "s" * (len(row["seconds"]) > 1)
    load = f", load {loads[0]:g} to {loads[-1]:g}" if loads else ""
    return f"Speed and memory: {row['dtype']}, {row['device']}{threads}, torch {row['torch']}, {count}{load}."


def processor(row: Row) -> str:
    """Seconds of processor time, which is read on CPUs only."""
    taken = row.get("processor seconds")
    return f"{statistics.median(taken):.1f}" if taken else ""


def report(rows: dict[tuple[str, str], Row]) -> str:
    """What one run of bench/test_systems.py found, in Markdown."""
    lines = ["# One stage against two", "", "Made by `python -m bench.systems` from `pytest bench/test_systems.py`."]
    lines += [f"A picture of {SIZE[1]} x {SIZE[0]} to labels, {CLASSES} classes, random weights. {about(rows)}", ""]
    lines += ["Processor time, of all cores together, is what other programs on the machine change least.", ""]
    lines += ["| system | order of work | pictures/s | processor s | peak MB |", "|---|---|---|---|---|"]
    for order in ("fastzs", "published"):
        for (name, how), row in rows.items():
            if how == order:
                peak = "" if row["peak MB"] is None else f"{row['peak MB']:.0f}"
                lines.append(f"| `{name}` | {how} | {row['pictures per second']:.3g} | {processor(row)} | {peak} |")
    lines += ["", "| faster | slower | times | in processor time |", "|---|---|---|---|"]
    for ours, theirs in (("published", "published"), ("fastzs", "fastzs"), ("fastzs", "published")):
        for one, two in ((one, two) for one in ONE_PASS for two in TWO_STAGE):
            if (one, ours) in rows and (two, theirs) in rows:
                fast, slow = rows[one, ours], rows[two, theirs]
                busy = ""
                if "processor seconds" in fast:
                    pairs = zip(slow["processor seconds"], fast["processor seconds"], strict=True)
                    busy = f"{statistics.median(a / b for a, b in pairs):.1f}"
                lines.append(f"| {one} ({ours}) | {two} ({theirs}) | {faster(fast, slow):.1f} | {busy} |")
    lines += [
        "",
        "The published figures, on GPUs, are about 5 (ZegCLIP over ZegFormer), and 2.5 and 3.9 (DeOP over zsseg on VOC "
        "and COCO-Stuff). Not measured on a GPU here.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, help="JSON of bench/test_systems.py, or of the whole bench")
    parser.add_argument("--count", nargs="+", default=[], choices=list(FULL), help="systems to count anew")
    args = parser.parse_args()
    count(args.count)
    speed = measured(args.speed) if args.speed else {}
    if speed:
        RESULTS.write_text(report(speed), encoding="utf-8")
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE[0])
    _, _, after = rest.partition(TABLE[1])
    origin = about(speed) if speed else "Speed and memory are unmeasured."
    made = f"{TABLE[0]}\n{table(speed)}\n\n{origin}\n{TABLE[1]}"
    DOCS.write_text(before + made + after, encoding="utf-8")


if __name__ == "__main__":
    main()
