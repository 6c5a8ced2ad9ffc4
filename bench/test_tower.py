"""The vision tower, ViT-B/16 at 512 x 512, one picture: CLIP-RC's with its bridge, and what exporting would give.

    pytest bench/test_tower.py --benchmark-only                         # the CPU, fp32
    pytest bench/test_tower.py --benchmark-only -m "full and not gpu"   # bf16
    pytest bench/test_tower.py --benchmark-only -m gpu                  # a GPU

Random weights (the work is the same). The first rival is the tower as published: prompts are tokens with queries, the
region mask is a dense additive matrix. "dense mask" is our tower on scaled_dot_product_attention under such a mask;
"fastzs" is what ``fastzs.load`` makes of ours, "unpacked" what is trained. OpenVINO and ONNX Runtime get the plain
tower, without prompts and bridge: less work, and the bar for a CPU. An answer is judged by the fp64 result of the tower
that it computes.
"""

import copy
import functools
import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip import VisionTransformer, packed, prompted
from fastzs.clip.prompted import PromptedVisionTransformer
from fastzs.kernels.packed_linear.compiled import why_int8_is_slow

from .baselines.prompt_tuned import Tower
from .machine import why_no_bf16
from .rivals import Contest, Rival, Unavailable, compete, largest_error

SIZES: dict[str, Any] = {"width": 768, "layers": 12, "heads": 12, "patch_size": 16, "grid": 32, "output_dim": 512}
PROMPTS, BRIDGE, SIDE = 10, (4, 4), 512
BF16 = torch.bfloat16
# Exporting is timed on CPUs: there it is what a user would do instead.
RIVALS = {
    "cpu": (
        *("published", "dense mask", "fastzs unpacked", "fastzs", "fastzs int8"),
        *("fastzs unpacked, plain", "fastzs, plain", "fastzs int8, plain", "plain OpenVINO", "plain ONNX Runtime"),
        *("plain OpenVINO int8", "plain ONNX Runtime int8"),
    ),
    "cuda": ("published", "dense mask", "fastzs", "fastzs, plain"),
}


def bridged() -> PromptedVisionTransformer:
    """The tower of CLIP-RC, as it is made for training."""
    torch.manual_seed(0)
    tower = PromptedVisionTransformer(prompts=PROMPTS, bridge=BRIDGE, double_class_embedding=True, **SIZES)
    return tower.eval().requires_grad_(False)


class Plain(nn.Module):
    """The plain tower with all its tokens in the text space, which is what an export would hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tower = VisionTransformer(**SIZES).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 1 + h * w, D]
        tokens, _ = self.tower.trunk(images)
        return self.tower.ln_post(self.tower.blocks[-1](tokens)) @ self.tower.proj


def dense_mask_attention(q, k, v, layout, *, prompt_kv=None):
    if prompt_kv is not None:
        k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in zip(prompt_kv, (k, v), strict=True))
    mask = dense_mask(layout, k.shape[2] - layout.length, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@functools.cache
def dense_mask(layout, prompts: int, device) -> Tensor:
    return layout.dense_mask(prompts, device)


def published(device, dtype):
    tower = Tower(bridged().state_dict(), SIZES["heads"], SIZES["grid"]).eval().requires_grad_(False)
    tower.to(device, dtype)
    return lambda images: tower(images)[1].flatten(2).transpose(1, 2)


def with_dense_mask(device, dtype):
    tower = bridged().to(device, dtype)

    def run(images):
        ours, prompted.bridged_attention = prompted.bridged_attention, dense_mask_attention
        try:
            return tower.encode(images).patches
        finally:
            prompted.bridged_attention = ours

    return run


def fastzs_unpacked(device, dtype):
    tower = bridged().to(device, dtype)
    return lambda images: tower.encode(images).patches


def fastzs(device, dtype):
    tower = bridged().to(device, dtype)
    if device == "cpu":
        packed.pack(tower)
    return lambda images: tower.encode(images).patches


def fastzs_int8(device, dtype):
    check_int8()
    tower = bridged().to(device, dtype)
    packed.pack(tower, int8=True)
    return lambda images: tower.encode(images).patches


def plain_unpacked(device, dtype):
    return Plain().to(device, dtype)


def plain(device, dtype, int8=False):
    tower = Plain().to(device, dtype)
    if device == "cpu":
        packed.pack(tower, int8)
    return tower


def plain_int8(device, dtype):
    check_int8()
    return plain(device, dtype, int8=True)


def check_int8() -> None:
    if why := why_int8_is_slow():
        raise Unavailable(why)


def exported(folder: str, module: nn.Module, side: int = SIDE) -> str:
    """A tower for images of ``side`` pixels as an ONNX file in ``folder``."""
    path = Path(folder) / "tower.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing
        torch.onnx.export(module, (torch.zeros(1, 3, side, side),), path, dynamo=False, verbose=False)
    return str(path)


def check_installed(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not installed: pip install 'fastzs[bench]'")


def openvino(device, dtype, int8=False):
    with tempfile.TemporaryDirectory() as folder:  # as fast as what it makes of the module itself, and made sooner
        return compiled_by_openvino(exported(folder, Plain()), dtype, int8)


def compiled_by_openvino(path: str, dtype: torch.dtype, int8: bool = False):
    """An ONNX file as a function of images."""
    check_installed("openvino", "onnx")
    from openvino import Core

    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == BF16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = Core()
    model = core.read_model(path)
    if int8:
        model = quantised(model)
    compiled = core.compile_model(model, "CPU", hints)
    return lambda images: torch.from_numpy(compiled(images.float().numpy())[0])


def openvino_int8(device, dtype):
    check_installed("nncf")
    check_int8()
    return openvino(device, dtype, int8=True)


def quantised(model):
    """Weights and activations in int8 by NNCF, for transformers, after a few drawn pictures."""
    import nncf  # pyright: ignore[reportMissingImports] - not among the extras: it is large and one row wants it

    pictures = [torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(n)).numpy() for n in range(8)]
    return nncf.quantize(model, nncf.Dataset(pictures), model_type=nncf.ModelType.TRANSFORMER, subset_size=8)


def onnx_runtime_int8(device, dtype):
    """Dynamic: activations are rounded in each call, with one scale for a tensor."""
    check_int8()
    return onnx_runtime(device, dtype, int8=True)


def onnx_runtime(device, dtype, int8=False):
    check_installed("onnxruntime", "onnx")
    if dtype == BF16:
        raise Unavailable("ONNX Runtime's CPU kernels do not multiply in bf16")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = exported(folder, Plain())
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(path, path + ".int8", weight_type=QuantType.QInt8)
            path += ".int8"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


MAKERS = {
    "published": published,
    "dense mask": with_dense_mask,
    "fastzs unpacked": fastzs_unpacked,
    "fastzs": fastzs,
    "fastzs int8": fastzs_int8,
    "fastzs unpacked, plain": plain_unpacked,
    "fastzs, plain": plain,
    "fastzs int8, plain": plain_int8,
    "plain OpenVINO": openvino,
    "plain ONNX Runtime": onnx_runtime,
    "plain OpenVINO int8": openvino_int8,
    "plain ONNX Runtime int8": onnx_runtime_int8,
}


def later(make, device, dtype):
    """The tower is made in the first call, so that one that cannot be had is a row of its own."""
    made = functools.cache(lambda: make(device, dtype))

    @torch.inference_mode()
    def run(images):
        return made()(images)

    return run


def rival(name, device, dtype):
    int8 = "int8" in name
    # twelve layers of rounding to bytes; with one scale for a tensor or few pictures to find it by, several times that
    bound = (0.2 if "fastzs" in name else 1.0) if int8 else None
    return Rival(later(MAKERS[name], device, dtype), dtype, torch.int8 if int8 else None, bound)


def contest(dtype, device):
    def inputs(seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(1, 3, SIDE, SIDE, generator=generator).to(device, dtype),)

    @torch.inference_mode()
    def judge(images):
        return copy.deepcopy(bridged()).double().encode(images).patches, Plain().double()(images)

    def error(got, right):
        return min(largest_error(got, [one]) for one in right if one.shape == got[0].shape)

    N = (SIDE // SIZES["patch_size"]) ** 2
    width, tokens, keys = SIZES["width"], N + 1 + 16, N + 1 + PROMPTS
    layer = 2 * tokens * 12 * width**2 + 4 * (N + 1) * keys * width
    weights = 12 * 12 * width**2 * (2 if dtype == BF16 else 4)
    return Contest(
        f"tower, ViT-B/16, {SIDE}x{SIDE}, {str(dtype).removeprefix('torch.')}",
        device,
        inputs,
        {name: rival(name, device, dtype) for name in RIVALS[device]},
        judge,
        error,
        nbytes=weights,
        operations=SIZES["layers"] * layer,
        info={"op": "tower", "tokens": tokens, "prompts": PROMPTS, "headline": dtype == torch.float32},
        seconds=10,
    )


@pytest.mark.parametrize("rival", RIVALS["cpu"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(BF16, marks=pytest.mark.full, id="bf16")]
)
def test_cpu(benchmark, dtype, rival):
    if dtype == BF16 and (why := why_no_bf16("cpu")):
        pytest.skip(why)
    compete(benchmark, rival, contest, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_gpu(benchmark, dtype, rival):
    compete(benchmark, rival, contest, dtype, "cuda")
