"""Pictures per second from a picture to labels, every system in one contest: one stage against two.

    pytest bench/test_systems.py --benchmark-only                         # the CPU
    pytest bench/test_systems.py --benchmark-only -m "full and not gpu"   # both orders of work, and bf16
    pytest bench/test_systems.py --benchmark-only -m gpu                  # a GPU

One picture of 683 x 512, 20 classes with given text vectors, published sizes with random weights (the work is the
same, except that every one of the 100 proposals has pixels), each system with its own test recipe: short side 512 and
two windows (ZegCLIP, CLIP-RC), short side 640 and 100 cut-outs (ZegFormer, zsseg). "fastzs" is what ``fastzs.load``
gives; "published" is the published order of work in eager PyTorch (:mod:`bench.baselines`), under autocast for bf16.
All take turns in every round; each system is a problem of its own in the tables, and ``python -m bench.systems`` makes
docs/systems.md of the rows, with the ratios between one stage and two.

A call takes up to half a minute on a CPU, so each is timed in a process of its own, slow ones without a call before
(it would change nothing), and the judge sees a *small twin*: the same classes with few and narrow layers, on a small
picture, in the same two orders of work. One stage is judged by the published order in fp64; the other systems by
themselves in fp64 on PyTorch alone, since the two orders of two stages give the same labels only where there is
something to see: ``tests/models/test_two_stage.py`` compares those.
"""

import contextlib
import functools
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from fastzs import clip, models
from fastzs.clip.packed import pack
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from fastzs.windows import resize_size

from . import systems
from .baselines import prompt_tuned, two_stage
from .machine import why_no_bf16
from .rivals import Contest, Rival, compete
from .systems import ONE_STAGE, TWO_STAGE

SLOW = (*TWO_STAGE, "lseg", "maskclip_plus", "spnet", "cagnet", "sign")
RIVALS = (*(f"published {name}" for name in (*ONE_STAGE, *TWO_STAGE)), *(f"fastzs {name}" for name in systems.FULL))
# The default has every system once; two stages in the published order would take over a third of its time.
DEFAULT = tuple(rival for rival in RIVALS if rival not in ("published zegformer", "published zsseg"))
CPU = [pytest.param(torch.float32, DEFAULT, rival, id=f"fp32-{rival}") for rival in DEFAULT]
CPU += [
    pytest.param(dtype, RIVALS, rival, marks=pytest.mark.full, id=f"{name}-{rival}-of-all")
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    for rival in RIVALS
]

TINY: dict[str, Any] = {"width": 48, "layers": 3, "heads": 3, "patch_size": 8, "grid": 8, "output_dim": 32}
HEADS, DECODER_HEADS = (12, 8), (3, 4)  # of the published sizes and of the twins: tower, decoder
PROPOSALS = {"width": 32, "queries": 7, "layers": 2, "heads": 4, "hidden": 64, "dropout": 0.0}
TIMM = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0}
TWO_STAGE_TWIN: dict[str, Any] = {"sizes": TINY, "size": 64, "resnet": "resnet18", "pretrained": None}
WORDS: dict[str, Any] = {"weights": "random", "text_dim": 6, "resnet": (1, 1, 1, 1), "width": 8, "crop": 64}
PIXELS: dict[str, Any] = {"features": 8, "context": 4, "generator": (8,), "generator_dropout": (0.0,), "hidden": 8}
TWINS = {
    "maskclip": lambda: models.MaskCLIP(clip.load(weights="shapes")),
    "zegclip": lambda: models.ZegCLIP(sizes=TINY, prompts=3, crop=64, decoder_heads=4, decoder_hidden=64),
    "clip_rc": lambda: models.ClipRC(sizes=TINY, prompts=3, crop=64, decoder_heads=4, decoder_hidden=64, bridge=(2, 2)),
    "lseg": lambda: models.LSeg(sizes=TIMM, text_dim=24, reassemble=(8, 8, 16, 16), features=16, crop=64),
    "szn": lambda: models.SZN(text_dim=6, pretrained=False, widths=(4, 4, 8, 8, 8), hidden=16),
    "maskclip_plus": lambda: models.MaskCLIPPlus(weights="shapes", resnet="resnet50", pretrained=False, crop=64),
    "zegformer": lambda: models.ZegFormer(proposals=PROPOSALS, **TWO_STAGE_TWIN),
    "zsseg": lambda: models.ZSSeg(proposals=PROPOSALS, **TWO_STAGE_TWIN),
    "spnet": lambda: models.SPNet(**WORDS),
    "strict": lambda: models.STRICT(**WORDS),
    "zs3": lambda: models.ZS3(systems.CLASSES, **WORDS, features=8, fine=4, hidden=8, noise=4),
    "cagnet": lambda: models.CaGNet(systems.CLASSES, **WORDS, **PIXELS),
    "sign": lambda: models.SIGN(systems.CLASSES, **WORDS, **PIXELS, positions_hidden=4),
    "joint": lambda: models.Joint(**WORDS, features=8, fine=4),
    "deop": lambda: models.DeOP(proposals=PROPOSALS, added=(1,), added_side=4, anchor_hidden=32, **TWO_STAGE_TWIN),
}
TWIN_PICTURE = (64, 96)


def build(name: str, twin: bool) -> Any:
    torch.manual_seed(0)
    model = (TWINS if twin else systems.FULL)[name]().eval().requires_grad_(False)
    if twin and name == "szn":  # so small a VGG is silent as torch makes it
        for key, parameter in model.named_parameters():
            if parameter.ndim == 4 and "upscore" not in key:
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    if twin and name in TWO_STAGE:  # masks with clear insides, that CLIP tells apart: else one class wins everywhere
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        model.maskformer.to_mask[-1].weight *= 30
        model.tower.conv1.weight *= 20
    return model


def text_vectors(model: Any, device: str) -> Tensor:
    return systems.text_vectors(systems.text_width(model)).to(device)


def vocabulary(model: Any) -> Vocabulary:
    return systems.vocabulary(systems.text_width(model))


def normalised(picture: Tensor, model: Any, short_side: int, device: str) -> Tensor:
    """What a system's test recipe makes of a picture, [1, 3, H, W] in the dtype of the model."""
    size = resize_size((picture.shape[1], picture.shape[2]), short_side, 4 * short_side)
    image = TF.resize(picture, list(size), antialias=True).to(device, next(model.parameters()).dtype) / 255
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (model.mean, model.std))
    return ((image - mean) / std)[None].to(next(model.parameters()).dtype)


class Published:
    """The published order of work: ``labels`` of a picture; ``maps`` of its first window, or of all with two stages."""

    def __init__(self, name: str, device: str, twin: bool = False, dtype: torch.dtype = torch.float32):
        self.name, self.device = name, device
        self.model: Any = build(name, twin).to(device, dtype)
        self.text = text_vectors(self.model, device).to(dtype)
        if name in ONE_STAGE:
            heads = DECODER_HEADS if twin else HEADS
            net = prompt_tuned.Published(name, self.model.state_dict(), *heads, self.model.crop)
            self.net = net.eval().requires_grad_(False).to(device, dtype)

    @torch.inference_mode()
    def labels(self, picture: Tensor) -> Tensor:
        size = (picture.shape[1], picture.shape[2])
        if self.name in ONE_STAGE:
            return self.net.segment(normalised(picture, self.model, 512, self.device), self.text, 426, size)
        return two_stage.segment(*self.two_stage(picture, 640), size)

    @torch.inference_mode()
    def maps(self, picture: Tensor) -> Tensor:
        if self.name in ONE_STAGE:
            return self.net.low_resolution(normalised(picture, self.model, 64, self.device)[..., :64], self.text)
        return two_stage.scores(*self.two_stage(picture, 64), (picture.shape[1], picture.shape[2]))

    def two_stage(self, picture: Tensor, short_side: int) -> tuple[Any, Tensor, Tensor, Tensor]:
        seen = torch.zeros(len(self.text), dtype=torch.bool, device=self.device)
        return self.model, normalised(picture, self.model, short_side, self.device), self.text, seen


class Loaded:
    """What ``fastzs.load`` makes of a system."""

    def __init__(self, name: str, device: str, twin: bool = False, dtype: torch.dtype = torch.float32):
        model = build(name, twin).to(device, dtype)
        self.names = vocabulary(model)
        if device == "cpu" and dtype != torch.float64:
            pack(model)
        self.segmenter = Segmenter(model)

    def labels(self, picture: Tensor) -> Tensor:
        return self.segmenter(picture, self.names).labels

    @torch.inference_mode()
    def maps(self, picture: Tensor) -> Tensor:
        return self.segmenter.logits(self.segmenter.encode(picture), self.names)[:1]


def answers(name: str, order: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """What the twin gives in an order of work, and what is right, both as functions of nothing they are given."""
    picture = systems.picture()[:, : TWIN_PICTURE[0], : TWIN_PICTURE[1]].contiguous()
    low = dtype == torch.bfloat16

    def answer(_: Tensor) -> Tensor:
        if order == "fastzs":
            return Loaded(name, device, True, dtype).maps(picture)
        published = Published(name, device, True)
        with autocast(device, low):
            return published.maps(picture)

    def right(_: Tensor) -> Tensor:
        if name in ONE_STAGE or order == "published":
            return Published(name, "cpu", True, torch.float64).maps(picture)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTZS_IMPL", "reference")
            return Loaded(name, "cpu", True, torch.float64).maps(picture)

    return answer, right


def autocast(device: str, low: bool) -> Any:
    return torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext()


def rival(name: str, order: str, device: str, dtype: torch.dtype) -> Rival:
    low = dtype == torch.bfloat16

    @functools.cache
    def made() -> Published | Loaded:
        return Published(name, device) if order == "published" else Loaded(name, device, dtype=dtype)

    def run(picture: Tensor) -> Tensor:
        with autocast(device, low and order == "published"):
            return made().labels(picture)

    answer, right = answers(name, order, device, dtype)
    why = why_no_bf16(device) if low else None
    if low and name in TWO_STAGE:
        why = (
            "bf16 moves mask logits across 0, which changes what is cut out and shown to CLIP: an answer's distance to "
            "fp64 has no bound"
        )
    parameters, multiply_adds = systems.costs(name)
    kind = str(dtype).removeprefix("torch.")
    size = f"{systems.SIZE[1]} x {systems.SIZE[0]}"
    info = {
        "group": f"{name}, {systems.CLASSES} classes, {size} to labels, own test recipe, {kind}, {device}",
        "rival": order,
        "op": f"{name}, own recipe",
        "system": name,
        "dtype": kind,
        "bytes": round(dtype.itemsize * parameters),
        "operations": round(2 * multiply_adds),
        "headline": name not in ("maskclip", "clip_rc") and not low,  # bench/test_models.py has these
    }
    bound = 0.1 if low else None
    return Rival(
        run,
        products=dtype,
        bound=bound,
        answer=answer,
        judge=right,
        unavailable=why,
        prepare=made,
        once=name in SLOW,
        info=info,
    )


def contest(dtype: torch.dtype, device: str, rivals: tuple[str, ...]) -> Contest:
    return Contest(
        "systems",
        device,
        lambda seed, dtype: (systems.picture(),),
        {full: rival(name, order, device, dtype) for full in rivals for order, name in [full.split()]},
        lambda picture: picture,  # every rival has a judge of its own
        pictures=1,
        info={"classes": systems.CLASSES, "height": systems.SIZE[0], "width": systems.SIZE[1], "batch": 1},
        seconds=150 if device == "cpu" else 10,
        fresh=True,
    )


@pytest.mark.parametrize(("dtype", "rivals", "rival"), CPU)
def test_cpu(benchmark, dtype, rivals, rival):
    compete(benchmark, rival, contest, dtype, "cpu", rivals)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu(benchmark, dtype, rival):
    compete(benchmark, rival, contest, dtype, "cuda", RIVALS)
