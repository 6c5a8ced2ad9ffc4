"""``fastzs profile``: run a model over and over for a profiler to look at."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

HELP = "run a model for a profiler: a capture range around warmed-up calls, or a trace of its own"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Segment a drawn image over and over. After the warm-up, the measured calls stand between "
        "cudaProfilerStart and cudaProfilerStop, for nsys --capture-range=cudaProfilerApi; FASTZS_NVTX=1 names what "
        "they do. See docs/profiling.md."
    )
    add = options.add_argument
    add("model", type=str, help="maskclip, clip_rc, ...")
    add("--backbone", type=str | None, help="CLIP architecture, as open_clip calls it; ViT-B-16 if omitted")
    add("--weights", type=str, default="random", help="the work is the same with random weights")
    add("--checkpoint", type=str | None, help="of models that are trained")
    add("--size", type=int, default=512, help="side of the image in pixels")
    add("--classes", type=int, default=20, help="number of classes, with drawn text vectors")
    add("--warmup", type=int, default=3, help="calls before the measured ones")
    add("--iterations", type=int, default=10, help="measured calls")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    add(
        "--precision", type=Literal["auto", "fp32", "bf16", "fp16", "int8"], default="auto", help="numbers of the model"
    )
    add("--torch-profiler", type=str | None, help="file for a trace that ui.perfetto.dev shows; also prints a table")
    return options


def run(config: Namespace) -> int:
    """Warm up, run the measured calls, print how long they took."""
    for name, least in (("size", 1), ("classes", 1), ("iterations", 1), ("warmup", 0)):
        if config[name] < least:
            raise ValueError(f"--{name} must be at least {least}, got {config[name]}")
    import time
    from contextlib import ExitStack
    from pathlib import Path

    import torch

    from fastzs.loading import load
    from fastzs.trace import torch_ranges
    from fastzs.vocabulary import Vocabulary

    if config.torch_profiler and not Path(config.torch_profiler).absolute().parent.is_dir():
        raise ValueError(f"--torch-profiler {config.torch_profiler}: there is no such folder")
    segmenter = load(
        config.model,
        backbone=config.backbone,
        weights=config.weights if config.checkpoint is None else None,
        checkpoint=config.checkpoint,
        device=config.device,
        precision=config.precision,
    )
    generator = torch.Generator().manual_seed(0)
    wide = segmenter.model.text_dim
    vectors = torch.nn.functional.normalize(torch.randn(config.classes, wide, generator=generator), dim=1)
    vocabulary = Vocabulary([f"class {i}" for i in range(config.classes)], embeddings=vectors)
    picture = torch.randint(256, (3, config.size, config.size), dtype=torch.uint8, generator=generator)
    for _ in range(config.warmup):
        segmenter(picture, vocabulary)
    on_gpu = segmenter.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    recording = None
    with ExitStack() as stack:
        if config.torch_profiler:
            stack.enter_context(torch_ranges())
            recording = stack.enter_context(torch.profiler.profile(record_shapes=True))
        begun = time.perf_counter()
        for _ in range(config.iterations):
            segmenter(picture, vocabulary)  # labels are copied to the host: nothing is left running
        taken = (time.perf_counter() - begun) / config.iterations
    if on_gpu:
        torch.cuda.profiler.stop()
    if recording is not None:
        recording.export_chrome_trace(config.torch_profiler)
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        print(recording.key_averages().table(sort_by=key, row_limit=20))
        print(f"trace in {config.torch_profiler}; open it at https://ui.perfetto.dev")
    print(f"{1000 * taken:.1f} ms an image over {config.iterations} calls on {segmenter.device}, {segmenter.dtype}")
    return 0
