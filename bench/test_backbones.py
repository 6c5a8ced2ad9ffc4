"""Vision towers that are not CLIP's own, one image, against the modules of open_clip and timm that they come from.

    pytest bench/test_backbones.py --benchmark-only -k siglip      # SigLIP-B/16 beside CLIP ViT-B/16 at 512 x 512
    pytest bench/test_backbones.py --benchmark-only -m full        # six towers at their native size

Random weights (the work is the same). Of six towers the image embedding is timed, which the module itself gives:
eagerly, compiled by torch.compile, and in OpenVINO. "fastzs" is what ``fastzs.load`` makes of the tower on a CPU. An
answer is judged by the module's own in fp64. Beside CLIP, features of all patches are timed, by the same operator.
"""

import copy
import functools
import tempfile
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from fastzs.clip import packed, towers

from .machine import why_no_bf16
from .rivals import Contest, Rival, compete
from .test_tower import BF16, compiled_by_openvino, exported, later

TOWERS = ("ViT-B-16-SigLIP2", "EVA02-B-16", "PE-Core-B-16", "MobileCLIP2-S2", "convnext_base_w", "ViTamin-B")
RIVALS = ("module", "torch.compile", "OpenVINO", "fastzs")
BESIDE = {"fastzs CLIP": "ViT-B-16", "fastzs SigLIP": "ViT-B-16-SigLIP"}
SIDE = 512


def module(name: str) -> nn.Module:
    """open_clip's own tower of a configuration."""
    config: Any = open_clip.get_model_config(name)
    torch.manual_seed(0)
    return towers._open_clips(config).eval().requires_grad_(False)


def ours(name: str, device: str, dtype: torch.dtype) -> towers.Tower:
    """The same as ``fastzs.load`` makes it."""
    width: int = open_clip.get_model_config(name)["embed_dim"]  # type: ignore[index]
    tower = towers.of_module(module(name), width, name).eval().requires_grad_(False).to(device, dtype)
    packed.pack(tower)
    return tower


def made(rival: str, name: str, side: int, device: str, dtype: torch.dtype):
    if rival == "fastzs":
        return ours(name, device, dtype)
    if rival == "OpenVINO":
        with tempfile.TemporaryDirectory() as folder:
            return compiled_by_openvino(exported(folder, module(name), side), dtype)
    theirs = module(name).to(device, dtype)
    return theirs if rival == "module" else torch.compile(theirs)


def contest(name: str, dtype: torch.dtype, device: str) -> Contest:
    side: int = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)  # type: ignore[index]
    make = {rival: functools.partial(made, rival, name, side) for rival in RIVALS}
    return Contest(
        f"{name}, {side}x{side}, {str(dtype).removeprefix('torch.')}",
        device,
        inputs(side, device),
        {rival: Rival(later(make[rival], device, dtype), dtype) for rival in RIVALS},
        torch.inference_mode()(lambda images: module(name).double()(images)),
        info={"op": "backbone", "backbone": name},
    )


def beside_clip(dtype: torch.dtype, device: str) -> Contest:
    """CLIP's tower and SigLIP's, each of its own weights."""

    def rival(name: str) -> Rival:
        def dense(tower):
            return lambda images: tower.dense(*tower.trunk(images), "kk")

        @torch.inference_mode()
        def judge(images):
            tower = towers.of_module(module(name), 512, name).eval()
            return dense(copy.deepcopy(tower).double())(images)

        return Rival(later(lambda device, dtype: dense(ours(name, device, dtype)), device, dtype), dtype, judge=judge)

    return Contest(
        f"SigLIP beside CLIP, B/16, {SIDE}x{SIDE}, {str(dtype).removeprefix('torch.')}",
        device,
        inputs(SIDE, device),
        {label: rival(name) for label, name in BESIDE.items()},
        lambda images: (),
        info={"op": "backbone"},
        seconds=10,
    )


def inputs(side: int, device: str):
    def draw(seed: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(1, 3, side, side, generator=generator).to(device, dtype),)

    return draw


dtypes = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])


@dtypes
@pytest.mark.parametrize("rival", BESIDE)
def test_siglip_beside_clip(benchmark, dtype, rival):
    if dtype == BF16 and (why := why_no_bf16("cpu")):
        pytest.skip(why)
    compete(benchmark, rival, beside_clip, dtype, "cpu")


@pytest.mark.full
@dtypes
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("rival", RIVALS)
def test_against_the_module(benchmark, name, dtype, rival):
    if dtype == BF16 and (why := why_no_bf16("cpu")):
        pytest.skip(why)
    compete(benchmark, rival, contest, name, dtype, "cpu")
