"""Pictures per second from a picture to labels, every system in one run: one-stage against two-stage.

    pytest bench/test_systems.py --benchmark-only -s            # the CPU
    pytest bench/test_systems.py --benchmark-only -s -m gpu     # a GPU

One picture of 683 x 512, 20 classes with given text vectors, published sizes with random weights (the work is the
same, except that every one of the 100 proposals has pixels), each system with its own test recipe: short side 512 and
two windows (ZegCLIP, CLIP-RC), short side 640 and 100 cut-outs (ZegFormer, zsseg). "best" is what ``fastzs.load``
gives; "published" is the published order of work in eager PyTorch (:mod:`bench.baselines`), under autocast for bf16.
All systems run in each round. Printed and kept in ``extra_info``: pictures per second, peak memory beyond the weights,
and how many times faster each one-stage system is than each two-stage one, medians of the ratios of the rounds.
"""

import contextlib
import copy
import gc
import statistics
import time

import pytest
import torch
import torchvision.transforms.v2.functional as TF

from fastzs.clip.packed import pack
from fastzs.predict import Segmenter, native_bf16
from fastzs.windows import resize_size

from . import systems
from .baselines import prompt_tuned, two_stage
from .machine import describe, peak_megabytes, synchronize

ROUNDS = 2
ONE_STAGE, TWO_STAGE = ("clip_rc", "zegclip"), ("zegformer", "zsseg")


def normalised(model, short_side, device):
    """What a system's test recipe makes of the picture, fp32 [1, 3, H, W]."""
    size = resize_size(systems.SIZE, short_side, 4 * short_side)
    image = TF.resize(systems.picture(), list(size), antialias=True).to(device) / 255
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (model.mean, model.std))
    return ((image - mean) / std)[None]


def published_run(name, model, device, autocast):
    """The published order of work with the model's weights; gives labels."""
    text = systems.text_vectors(model.text_dim).to(device)
    if name in TWO_STAGE:
        seen = torch.zeros(systems.CLASSES, dtype=torch.bool, device=device)

        def segment():
            return two_stage.segment(model, normalised(model, 640, device), text, seen, systems.SIZE)
    else:
        net = prompt_tuned.Published(name, model.state_dict(), 12, 8, 512).eval().requires_grad_(False).to(device)

        def segment():
            return net.segment(normalised(model, 512, device), text, 426, systems.SIZE)

    @torch.inference_mode()
    def run():
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            return segment()

    return run


def best_run(model, device, dtype):
    """What fastzs.load makes of the model; gives labels."""
    model = model.to(dtype)
    if device == "cpu":
        pack(model)
    segmenter, picture = Segmenter(model), systems.picture()
    names = systems.vocabulary(systems.text_width(model))
    return lambda: segmenter(picture, names).labels


def runs(device, dtype):
    """One callable for every system and order of work."""
    found = {}
    for name, make in systems.FULL.items():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False).to(device)
        if name in ONE_STAGE + TWO_STAGE:
            kept = copy.deepcopy(model) if name in TWO_STAGE else model  # the prompt-tuned baseline copies for itself
            found[name, "published"] = published_run(name, kept, device, dtype == torch.bfloat16)
        found[name, "best"] = best_run(model, device, dtype)
    return found


def seconds(run, device):
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def bench(benchmark, device, dtype):
    found = runs(device, dtype)
    gc.collect()
    rows, labels = {}, {}
    for key, run in found.items():  # also the warm-up
        rows[key] = {"peak MB": peak_megabytes(lambda run=run, key=key: labels.update({key: run().cpu()}), device)}
    for name in ONE_STAGE + TWO_STAGE:
        same = (labels[name, "best"].long() == labels[name, "published"].long()).float().mean().item()
        rows[name, "best"]["labels as published"] = same
    times = {key: [] for key in found}

    def one_round():
        for key, run in found.items():
            times[key].append(seconds(run, device))

    benchmark.group = f"systems, {systems.CLASSES} classes, {systems.SIZE[1]} x {systems.SIZE[0]} to labels, {device}"
    benchmark.pedantic(one_round, rounds=ROUNDS)
    for key, taken in times.items():
        rows[key]["pictures/s"] = 1 / statistics.median(taken)
    faster = {
        f"{one} ({how}) over {two} ({how})": statistics.median(
            slow / fast for slow, fast in zip(times[two, how], times[one, how], strict=True)
        )
        for how in ("published", "best")
        for one in ONE_STAGE
        for two in TWO_STAGE
    } | {
        f"{one} (best) over {two} (published)": statistics.median(
            slow / fast for slow, fast in zip(times[two, "published"], times[one, "best"], strict=True)
        )
        for one in ONE_STAGE
        for two in TWO_STAGE
    }
    machine = describe(device)
    kind = str(dtype).removeprefix("torch.")
    benchmark.extra_info.update(
        machine,
        dtype=kind,
        about=f"Speed and memory: {kind}, {machine.get('device')}, torch {torch.__version__}, {ROUNDS} rounds, "
        f"load {machine.get('load', 'unknown')}.",
        systems={name: row for (name, how), row in rows.items() if how == "best"},
        published={name: row for (name, how), row in rows.items() if how == "published"},
        faster=faster,
    )
    print(f"\n{benchmark.group}, {kind}")
    for (name, how), row in rows.items():
        same = f", labels as published {row['labels as published']:.3f}" if "labels as published" in row else ""
        print(f"{name} ({how}): {row['pictures/s']:.3g} pictures/s, peak {row['peak MB']:.0f} MB{same}")
    for pair, factor in faster.items():
        print(f"{pair}: {factor:.1f}x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu(benchmark, dtype):
    if dtype == torch.bfloat16 and not native_bf16(torch.device("cpu")):
        pytest.skip("this CPU has no bf16 matrix instructions")
    bench(benchmark, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu(benchmark, dtype):
    bench(benchmark, "cuda", dtype)
