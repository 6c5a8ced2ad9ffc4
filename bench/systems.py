"""All systems side by side: the table of docs/systems.md, made of measured figures.

    pytest bench/test_systems.py --benchmark-only --benchmark-json speed.json
    python -m bench.systems_shapes --output runs
    python -m bench.systems --speed speed.json --runs runs

It also writes ``bench/results/systems.md``: the published order of work, and the ratios of one stage to two.

Parameters and multiply-adds are counted here: the full-size models with random weights, the same picture as in
:mod:`bench.test_systems`, torch's flop counter over the whole way from the picture to the labels, halved. It counts
matrix products, convolutions and attention, not what is done element by element, and for this first picture also what
is then kept. Ops are counted as their references compute them (``FASTZS_IMPL=reference``).
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastzs import clip, models
from fastzs.commands.models import SYSTEMS as KNOWN
from fastzs.predict import Segmenter
from fastzs.vocabulary import Vocabulary

SIZES = {"width": 768, "layers": 12, "heads": 12, "patch_size": 16, "grid": 32, "output_dim": 512}
CUT_OUT = SIZES | {"grid": 14}
SIZE, CLASSES = (512, 683), 20
TABLE = ("<!-- systems: begin -->", "<!-- systems: end -->")
DOCS = Path(__file__).parent.parent / "docs" / "systems.md"
RESULTS = Path(__file__).parent / "results" / "systems.md"

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


def counts(name: str, runs: Path) -> dict[str, float]:
    """The figures of a system, counted once and kept in ``RUNS/SYSTEM/figures.json``."""
    path = runs / name / "figures.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures(name), indent=2) + "\n")
    return json.loads(path.read_text())


def table(speed: dict[str, Any], runs: Path) -> str:
    """The table in Markdown; "unmeasured" where a figure is not there."""
    head = ["system", "parameters, M", "trained, M", "multiply-adds, G", "pictures/s", "peak MB", "pAcc", "mIoU(S)"]
    lines = [[*head, "mIoU(U)", "hIoU", "steps"]]
    for system in KNOWN:
        counted = counts(system.name, runs)
        timed = speed.get(system.name, {})
        path = runs / system.name / "scores.json"
        scored = json.loads(path.read_text()) if path.is_file() else {}
        numbers = [f"{value:.1f}" for value in counted.values()]
        numbers += [f"{timed['pictures/s']:.3g}", f"{timed['peak MB']:.0f}"] if timed else ["unmeasured"] * 2
        for key in ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "steps"):
            value = scored.get(key)
            part = f" of {scored['of']}" if key == "steps" and value != scored.get("of", value) else ""
            numbers.append("unmeasured" if value is None else f"{value}{part}")
        lines.append([f"`{system.name}`", *numbers])
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def report(info: dict[str, Any]) -> str:
    """What one run of bench/test_systems.py found, in Markdown."""
    lines = ["# One stage against two", "", "Made by `python -m bench.systems` from `pytest bench/test_systems.py`."]
    lines += [f"A picture of {SIZE[1]} x {SIZE[0]} to labels, {CLASSES} classes, random weights. {info['about']}", ""]
    lines += ["Processor time, of all cores together, is what other programs on the machine change least.", ""]
    lines += ["| system | order of work | pictures/s | processor s | peak MB |", "|---|---|---|---|---|"]
    for how, rows in (("best", info["systems"]), ("published", info["published"])):
        for name, row in rows.items():
            numbers = f"{row['pictures/s']:.3g} | {row['processor s']:.1f} | {row['peak MB']:.0f}"
            lines.append(f"| `{name}` | {how} | {numbers} |")
    lines += ["", "| faster | slower | times | in processor time |", "|---|---|---|---|"]
    for pair, (wall, processor) in info["faster"].items():
        one, two = pair.split(" over ")
        lines.append(f"| {one} | {two} | {wall:.1f} | {processor:.1f} |")
    lines += [
        "",
        "The published figures are about 5 (ZegCLIP over ZegFormer, on a GPU). Not measured on a GPU here.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, help="JSON of bench/test_systems.py")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="output folder of bench.systems_shapes; also keeps what is counted",
    )
    args = parser.parse_args()
    speed: dict[str, Any] = {}
    about = "Speed and memory are unmeasured."
    if args.speed:
        info = json.loads(args.speed.read_text())["benchmarks"][0]["extra_info"]
        speed, about = info["systems"], info["about"]
        RESULTS.write_text(report(info), encoding="utf-8")
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE[0])
    _, _, after = rest.partition(TABLE[1])
    made = f"{TABLE[0]}\n{table(speed, args.runs)}\n\n{about}\n{TABLE[1]}"
    DOCS.write_text(before + made + after, encoding="utf-8")


if __name__ == "__main__":
    main()
