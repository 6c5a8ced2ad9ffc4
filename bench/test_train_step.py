"""A training step of CLIP-RC and ZegCLIP against the published order of work in eager PyTorch.

    pytest bench/test_train_step.py --benchmark-only                         # the CPU
    pytest bench/test_train_step.py --benchmark-only -m "full and not gpu"   # 2 pictures, 171 classes, torch.compile
    pytest bench/test_train_step.py --benchmark-only -m gpu                  # a GPU

A step is forward, backward and AdamW: pictures of 512 x 512 (256 x 256 in the quick case), ViT-B/16 with random
weights, 20 classes with 10 prompts and 171 with 100, every label used, dropout as published. All start from the same
weights. "checkpointing" computes the tower's activations again in backward. A step takes up to half a minute on a CPU,
so each is timed in a process of its own, and the judge sees a smaller problem: the loss and all gradients, without
dropout, of a narrow tower of three layers on two pictures of 64 x 64, against the published order in fp64.

Our row also says where its time goes, and how many pictures a second one process of the loader gives (jitter 0.5 to 2,
crop, flip, colours, normalisation; not decoding), to be set beside those of the step. Wanted over published in fp32 at
20 and 171 classes: where the processor multiplies bf16 6 and 12 times with it, in a third of the memory, and 2.8 and
5.5 times in fp32; elsewhere 1.6 and 4.4 times.
"""

import contextlib
import functools
import statistics
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.data.batches import batches
from fastzs.data.datasets import ShapesDataset
from fastzs.data.transforms import training_transform
from fastzs.models import ClipRC, ZegCLIP

from .baselines.prompt_tuned import Published
from .machine import in_fresh_process, synchronize, why_no_bf16
from .rivals import Contest, Rival, compete

KINDS = {"clip_rc": ClipRC, "zegclip": ZegCLIP}
# system, classes, pictures, side of a picture
CASES = [("clip_rc", 20, 1, 256), ("clip_rc", 20, 1, 512), ("clip_rc", 20, 2, 512)]
CASES += [("clip_rc", 171, 2, 512), ("zegclip", 171, 2, 512)]
MARKS: list[Any] = [pytest.mark.quick, [], *[pytest.mark.full] * 3]
HEADLINE = CASES[1]
RIVALS = ("published", "torch.compile", "fastzs", "fastzs, checkpointing", "fastzs bf16")
PROMPTS = {20: 10, 171: 100}
WEIGHTS = {20: (100.0, 1.0, 2.0), 171: (200.0, 3.0, 50.0)}  # of focal, dice and recovery, as published
SIZES: dict[str, Any] = {"width": 768, "layers": 12, "heads": 12, "patch_size": 16, "grid": 32, "output_dim": 512}
TWIN: dict[str, Any] = {"width": 48, "layers": 3, "heads": 3, "patch_size": 8, "grid": 8, "output_dim": 32}
TWIN_OPTIONS: dict[str, Any] = {"sizes": TWIN, "prompts": 3, "crop": 64, "decoder_heads": 4, "decoder_hidden": 64}
LOSS_OPERATIONS = 59  # of a pixel and class, see test_mask_loss


def scene(seed: int, classes: int, pictures: int, side: int, device: str, width: int = 512) -> tuple[Tensor, ...]:
    """Images [B, 3, S, S], a target of rectangles with an ignored border, and text vectors."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(pictures, 3, side, side, generator=g)
    target = torch.empty(pictures, side, side, dtype=torch.uint8)
    for labels in target:
        labels.fill_(int(torch.randint(classes, (), generator=g)))
        for _ in range(6):
            y, x = torch.randint(side, (2,), generator=g).tolist()
            labels[y : y + side // 3, x : x + side // 3] = int(torch.randint(classes, (), generator=g))
        labels[:, -side // 16 :] = 255
    text = F.normalize(torch.randn(classes, width, generator=g), dim=1)
    return images.to(device), target.to(device), text.to(device)


class Step:
    """A training step of ours or of the published code, as a function, and what it is made of."""

    def __init__(
        self, name: str, classes: int, side: int, device: str, *, ours: bool, low: bool = False, twin=False, again=False
    ):
        torch.manual_seed(0)
        sizes = SIZES | {"grid": side // 16}
        options = TWIN_OPTIONS if twin else {"sizes": sizes, "prompts": PROMPTS[classes], "crop": side}
        options = options | ({"bridge": (2, 2)} if twin and name == "clip_rc" else {})
        model: Any = KINDS[name](weights="random", **options)
        if not ours:
            model = Published(name, model.state_dict(), *((3, 4) if twin else (12, 8)), side)
            for key, parameter in model.named_parameters():  # what is trained as published
                parameter.requires_grad_("prompt" in key or key.startswith("decode_head."))
        if again:
            model.backbone.checkpointing = True
        self.name, self.device, self.low, self.ours = name, device, low, ours
        self.model = model.to(device).train()
        self.weights = WEIGHTS[classes]
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=ours)
        self.loss_of = self.loss

    def loss(self, images: Tensor, target: Tensor, text: Tensor) -> Tensor:
        focal, dice, recovery = self.weights
        if not self.ours:
            return self.model.losses(images, target, text, focal, dice, recovery)
        weights = {"focal": focal, "dice": dice} | ({"recovery": recovery} if self.name == "clip_rc" else {})
        return self.model.losses(images, target, text, **weights)["total"]

    def forward(self, images: Tensor, target: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16) if self.low else contextlib.nullcontext():
            return self.loss_of(images, target, text)

    def __call__(self, images: Tensor, target: Tensor, text: Tensor) -> Tensor:
        loss = self.forward(images, target, text)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def gradients(self, images: Tensor, target: Tensor, text: Tensor) -> list[Tensor]:
        """The loss without dropout, and the gradients, one after the other in the order of their parameters' names."""
        for module in self.model.modules():
            for attribute in ("dropout", "prompt_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = self.forward(images, target, text)
        loss.backward()
        # parameters that influence nothing are only in the published model
        found = [
            (key, p.grad) for key, p in sorted(self.model.named_parameters()) if p.grad is not None and p.grad.any()
        ]
        return [loss.detach(), torch.cat([grad.flatten() for _, grad in found])]


def stages(name: str, classes: int, pictures: int, side: int, device: str, low: bool) -> dict[str, float]:
    """Seconds of the parts of a step of ours: the tower forward, the rest of forward, backward, the optimiser."""
    step = Step(name, classes, side, device, ours=True, low=low)
    inputs = scene(0, classes, pictures, side, device)
    step(*inputs)

    def timed(run) -> float:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start

    with torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext():
        tower = timed(lambda: step.model.encode(inputs[0]))
    losses = []
    whole = timed(lambda: losses.append(step.forward(*inputs)))
    backward = timed(lambda: losses[0].backward())
    return {
        "tower forward": tower,
        "decoder and loss forward": whole - tower,
        "backward": backward,
        "optimizer": timed(step.optimizer.step),
    }


@functools.cache
def loader_rate(side: int) -> float:
    """Pictures a second of the whole training pipeline in one process, which workers multiply."""
    dataset = ShapesDataset("train", 64, side)
    transform = training_transform(side, (0.5,) * 3, (0.5,) * 3)
    kept = [dataset[i] for i in range(4)]  # drawing large scenes is not what is asked here
    dataset.__class__ = type("Kept", (ShapesDataset,), {"__getitem__": lambda self, index: kept[index % 4]})
    queue = batches(dataset, transform, batch_size=2, steps=range(1000))
    next(queue)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        next(queue)
        seconds.append(time.perf_counter() - start)
    return 2 / statistics.median(seconds)


def contest(name: str, classes: int, pictures: int, side: int, device: str) -> Contest:
    def rival(ours: bool, low: bool = False, compiled: bool = False, again: bool = False) -> Rival:
        @functools.cache
        def made() -> Step:
            step = Step(name, classes, side, device, ours=ours, low=low, again=again)
            if compiled:
                step.loss_of = torch.compile(step.loss, dynamic=False)
            return step

        def gradients(*_: Tensor) -> list[Tensor]:
            twin = Step(name, 20, 64, device, ours=ours, low=low, twin=True, again=again)
            if compiled:
                twin.loss_of = torch.compile(twin.loss, dynamic=False)
            return twin.gradients(*scene(0, 20, 2, 64, device, width=32))

        def details() -> dict[str, Any]:
            args = (name, classes, pictures, side, device, low)
            parts = in_fresh_process(stages, *args) if device == "cpu" else stages(*args)
            return ({"parts": parts} if parts else {}) | {"loader pictures per second": loader_rate(side)}

        why = why_no_bf16(device) if low else None
        if compiled and (name, classes, pictures, side) in CASES[:3]:
            why = "compiling takes minutes: with 171 classes only"
        elif again and (name, classes, pictures, side) == CASES[0]:
            why = "not in the quick case"
        return Rival(
            lambda *inputs: made()(*inputs),
            unavailable=why,
            products=torch.bfloat16 if low else None,
            bound=3e-2 if low else None,
            answer=gradients,
            details=details if ours and not again else None,
            info={"dtype": "bfloat16"} if low else {},
        )

    def right(*_: Tensor) -> list[Tensor]:
        twin = Step(name, 20, 64, "cpu", ours=False, twin=True)
        twin.model.double()
        images, target, text = scene(0, 20, 2, 64, "cpu", width=32)
        return twin.gradients(images.double(), target, text.double())

    width, layers = SIZES["width"], SIZES["layers"]
    tokens, prompts = 1 + (side // 16) ** 2, PROMPTS[classes]
    # of a prompt only keys and values count, since the next layer puts its own prompts in the place of the outputs
    block = (24 * tokens + 4 * prompts) * width**2 + 4 * tokens * (tokens + prompts) * width
    # forward, and backward to the prompts: weights are not trained, and the first layer's queries, keys and values
    # of the image need no gradient
    tower = 2 * layers * block - 6 * tokens * width**2
    return Contest(
        f"training step, {name}, {classes} classes, {pictures} x {side} x {side}, {device}",
        device,
        lambda seed, dtype: scene(seed, classes, pictures, side, device),
        {
            "published": rival(False),
            "torch.compile": rival(False, compiled=True),
            "fastzs": rival(True),
            "fastzs, checkpointing": rival(True, again=True),
            "fastzs bf16": rival(True, low=True),
        },
        right,
        nbytes=3 * 4 * 86_000_000,  # the tower's weights forward and backward, and as much again for what is trained
        operations=pictures * (tower + LOSS_OPERATIONS * classes * side**2),
        pictures=pictures,
        info={
            "op": f"training step, {name}",
            "classes": classes,
            "height": side,
            "batch": pictures,
            "headline": (name, classes, pictures, side) == HEADLINE,
        },
        seconds=30 if device == "cpu" else 10,
        fresh=True,
    )


ROWS = [pytest.param(*case, marks=marks) for case, marks in zip(CASES, MARKS, strict=True)]


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("name", "classes", "pictures", "side"), ROWS)
def test_cpu(benchmark, name, classes, pictures, side, rival):
    compete(benchmark, rival, contest, name, classes, pictures, side, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("name", "classes", "pictures", "side"), ROWS)
def test_gpu(benchmark, name, classes, pictures, side, rival):
    compete(benchmark, rival, contest, name, classes, pictures, side, "cuda")
