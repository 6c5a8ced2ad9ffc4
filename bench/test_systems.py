"""Pictures per second from a picture to labels, every system in one run: one-stage against two-stage.

    pytest bench/test_systems.py --benchmark-only -s            # the CPU
    pytest bench/test_systems.py --benchmark-only -s -m gpu     # a GPU

One picture of 683 x 512, 20 classes with given text vectors, published sizes with random weights (the work is the
same, except that every one of the 100 proposals has pixels), each system with its own test recipe: short side 512 and
two windows (ZegCLIP, CLIP-RC), short side 640 and 100 cut-outs (ZegFormer, zsseg). "best" is what ``fastzs.load``
gives; "published" is the published order of work in eager PyTorch (:mod:`bench.baselines`), under autocast for bf16.
All systems run in each round. Printed and kept in ``extra_info``: pictures per second, peak memory beyond the weights,
and how many times faster each one-stage system is than each two-stage one, medians of the ratios of the rounds.
The same in processor time, which other programs on the machine hardly change. That
both orders of work give the same labels is asserted for one stage; random weights leave those of two stages to chance,
so ``tests/models/test_two_stage.py`` compares them where there is something to see.
"""

import contextlib
import functools
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
from .rivals import ratio

ROUNDS, SECONDS = 3, 120.0  # at the most; no new round is begun after so many seconds
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


def runs(name, device, dtype):
    """Orders of work of a system with one model, to be run in this order: the second packs the model for itself."""
    torch.manual_seed(0)
    model = systems.FULL[name]().eval().requires_grad_(False).to(device)
    if name in ONE_STAGE + TWO_STAGE:
        yield "published", published_run(name, model, device, dtype == torch.bfloat16)
    run = best_run(model, device, dtype)
    if name not in TWO_STAGE:  # theirs takes so long that what is kept from a first call would change nothing
        run()
    yield "best", run


def seconds(run, device):
    """Seconds of a call, the processor's (of all cores together), and the labels."""
    synchronize(device)
    start, busy = time.perf_counter(), time.process_time()
    labels = run()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - busy, labels.cpu().long()


def bench(benchmark, device, dtype):
    times, busy, megabytes, labels = {}, {}, {}, {}

    def one(key, run):
        taken, used, labels[key] = seconds(run, device)
        times.setdefault(key, []).append(taken)
        busy.setdefault(key, []).append(used)

    def all_rounds():
        begun = time.perf_counter()
        for i in range(ROUNDS):
            for name in systems.FULL:  # one model at a time, made anew, so that they need not all fit in memory
                for how, run in runs(name, device, dtype):
                    if i == 0:
                        megabytes[name, how] = peak_megabytes(functools.partial(one, (name, how), run), device)
                    else:
                        one((name, how), run)
                    del run
                    gc.collect()
            if time.perf_counter() - begun > SECONDS:
                break

    benchmark.group = f"systems, {systems.CLASSES} classes, {systems.SIZE[1]} x {systems.SIZE[0]} to labels, {device}"
    benchmark.pedantic(all_rounds, rounds=1)
    for name in ONE_STAGE:
        same = (labels[name, "best"] == labels[name, "published"]).float().mean().item()
        assert same > 0.999 or dtype != torch.float32, f"{name}: {same} of the labels are the published order's"
    rows = {
        key: {
            "pictures/s": 1 / statistics.median(taken),
            "processor s": statistics.median(busy[key]),
            "peak MB": megabytes[key],
        }
        for key, taken in times.items()
    }
    faster = {
        f"{one} ({ours}) over {two} ({theirs})": [
            ratio(found[two, theirs], found[one, ours]) for found in (times, busy)
        ]
        for ours, theirs in (("published", "published"), ("best", "best"), ("best", "published"))
        for one in ONE_STAGE
        for two in TWO_STAGE
    }
    machine, rounds = describe(device), len(times["zegformer", "best"])
    kind = str(dtype).removeprefix("torch.")
    benchmark.extra_info.update(
        machine,
        dtype=kind,
        about=f"Speed and memory: {kind}, {machine.get('device')}, torch {torch.__version__}, {rounds} of {ROUNDS} "
        f"rounds, load {machine.get('load', 'unknown')}.",
        systems={name: row for (name, how), row in rows.items() if how == "best"},
        published={name: row for (name, how), row in rows.items() if how == "published"},
        faster=faster,
    )
    print(f"\n{benchmark.group}, {kind}")
    for (name, how), row in rows.items():
        spent = f"{row['processor s']:.1f} s of processor time"
        print(f"{name} ({how}): {row['pictures/s']:.3g} pictures/s, {spent}, peak {row['peak MB']:.0f} MB")
    for pair, (wall, processor) in faster.items():
        print(f"{pair}: {wall:.1f}x, in processor time {processor:.1f}x")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu(benchmark, dtype):
    if dtype == torch.bfloat16 and not native_bf16(torch.device("cpu")):
        pytest.skip("this CPU has no bf16 matrix instructions")
    bench(benchmark, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu(benchmark, dtype):
    bench(benchmark, "cuda", dtype)
