"""The machine code of every Triton kernel, compiled as it is launched, for six GPU architectures that are not here.

Nothing spills, shared memory fits, no atomics, tensor cores are used where they can be; and no integer argument that
happens to be 1, which Triton makes a constant of, keeps a kernel from compiling.
"""

import math
from collections.abc import Callable

import pytest
import torch

from .interpreter import INTERPRETED

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
if not INTERPRETED:
    from triton.compiler import ASTSource

    from bench.aot import ARCHITECTURES, MARKS, SHARED_LIMIT, Launch, launched_for
    from fastzs.kernels import probe
    from fastzs.kernels.bridged_attention import triton as bridged
    from fastzs.kernels.bridged_attention.layout import TokenLayout
    from fastzs.kernels.dense_attention import proxy_triton as proxy
    from fastzs.kernels.dense_attention import triton as dense
    from fastzs.kernels.key_smoothing import triton as smoothing
    from fastzs.kernels.label_map import triton as label_map
    from fastzs.kernels.label_map.options import Options
    from fastzs.kernels.mask_loss import triton as mask_loss
    from fastzs.kernels.pixel_text_logits import triton as pixel_text
    from fastzs.kernels.refine.operator import refine
else:
    ARCHITECTURES = ()

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def attention(dtype: torch.dtype, width: int, bridge: tuple[int, int] | None = (2, 2), batch: int = 1):
    layout = TokenLayout(1, (8, 8), bridge)
    q, k, v = torch.empty(batch, layout.length, 3, 2, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    prompts = torch.empty(1, 2, 10, width, dtype=dtype)
    out, lse = bridged.forward(q, k, v, prompts, prompts, layout, 0.1)
    bridged.backward(out, q, k, v, prompts, prompts, out, lse, layout, 0.1)


def near(dtype: torch.dtype, width: int, std: float | None):
    dense.attention(*torch.empty(1, 65, 3, 2, width, dtype=dtype).permute(2, 0, 3, 1, 4), (8, 8), std)


def outside(dtype: torch.dtype, smallest: float | None, patches: int = 1764):
    tokens, row = torch.empty(1, patches, 768, dtype=dtype), torch.empty(1, patches)
    proxy.attention(tokens, row, row, tokens, torch.empty(1), 3.0, smallest)


def smooth(dtype: torch.dtype, width: int, mode: str, classes: int = 171, positions: int = 1024):
    keys, probs = torch.empty(1, positions, width, dtype=dtype), torch.empty(1, classes, positions, dtype=dtype)
    smoothing.key_smoothing(keys, probs, mode, 0.9)


def labels(dtype: torch.dtype, activation: str, output: tuple[int, int], classes: int = 171, scores: bool = False):
    seen = torch.zeros(classes) if activation != "none" else None
    wide = torch.int16 if scores else torch.uint8
    options = Options((64, 96), output, activation, seen, -math.inf, 1, wide, scores)
    logits = torch.empty(2, classes, 4, 4, dtype=dtype)
    label_map.label_map_triton(logits, [[0, 0, 64, 64], [0, 32, 64, 64]], options)


def loss(dtype: torch.dtype, target: torch.dtype, gamma: float, with_nodes: bool, size: int = 64):
    at = torch.zeros(2, size, size, dtype=target)
    mask_loss.mask_sums(torch.empty(2, 20, 4, 4, dtype=dtype), at, 0.25, gamma, 255, with_nodes)


def cosines(dtype: torch.dtype, text: torch.dtype, classes: int, tokens: bool = False):
    features = torch.empty(2, 512, 16, 16, dtype=dtype)
    if tokens:
        features = features.to(memory_format=torch.channels_last)[:, :, :, ::2]
    pixel_text.pixel_text_logits(features, torch.empty(classes, 512, dtype=text), 100.0)


def smoothed(method: str, scale: float | None, output: tuple[int, int] = (60, 101), classes: int = 40):
    """A readout of four windows."""
    windows = torch.tensor([[y, x, 32, 32] for y in (0, 16) for x in (0, 32)], device="cpu")
    text, logits = torch.empty(classes, 8), torch.zeros(4, classes, 4, 4)
    more = (method, [8, 16], 2, text, 30, scale, scale is not None, "triton")
    refine(logits, windows, torch.zeros(3, *output), [48, 64], *more)


# What is compiled, and whether tensor cores multiply in it.
CASES: dict[str, tuple[Callable[[], None], bool]] = {
    "probe": (lambda: probe.probe_kernel[(1,)](torch.ones(1), num_warps=1, enable_fp_fusion=True), False),
    "attention fp32 64": (lambda: attention(f32, 64), False),
    "attention fp32 128": (lambda: attention(f32, 128), False),
    "attention fp32 80": (lambda: attention(f32, 80), False),  # ViT-H; masked to 128
    "attention bf16 64": (lambda: attention(bf16, 64), True),
    "attention bf16 128": (lambda: attention(bf16, 128), True),
    "attention bf16 104": (lambda: attention(bf16, 104), True),  # ViT-bigG; rows begin at multiples of 16 bytes
    "attention fp32 72": (lambda: attention(f32, 72), False),  # SigLIP's largest
    "attention fp16 64, no bridge": (lambda: attention(f16, 64, None), True),
    "dense fp32 64": (lambda: near(f32, 64, 5.0), False),
    "dense fp32 128": (lambda: near(f32, 128, 5.0), False),
    "dense bf16 64": (lambda: near(bf16, 64, 5.0), True),
    "dense bf16 104": (lambda: near(bf16, 104, 5.0), True),
    "dense bf16 128": (lambda: near(bf16, 128, None), True),
    "proxy fp32": (lambda: outside(f32, 1e-6), False),
    "proxy bf16": (lambda: outside(bf16, None), True),
    "key_smoothing fp32 1024": (lambda: smooth(f32, 1024, "paper"), False),
    "key_smoothing fp32 512": (lambda: smooth(f32, 512, "official"), False),
    "key_smoothing bf16 768": (lambda: smooth(bf16, 768, "official"), True),
    "key_smoothing fp16 512, 20 classes": (lambda: smooth(f16, 512, "paper", 20), True),
    "label_map fp32": (lambda: labels(f32, "sigmoid", (100, 150)), False),
    "label_map bf16": (lambda: labels(bf16, "softmax", (100, 150), scores=True), False),
    "label_map fp16": (lambda: labels(f16, "none", (64, 96)), False),
    "mask_loss fp32": (lambda: loss(f32, torch.uint8, 2.0, True), False),
    "mask_loss bf16": (lambda: loss(bf16, torch.int64, 1.5, True, 56), False),
    "mask_loss fp16": (lambda: loss(f16, torch.int16, 2.0, False), False),
    "pixel_text fp32": (lambda: cosines(f32, f32, 171), False),
    "pixel_text fp32, 16 classes": (lambda: cosines(f32, f32, 16, True), False),
    "pixel_text bf16": (lambda: cosines(bf16, bf16, 171), True),
    "pixel_text bf16, 20 classes": (lambda: cosines(bf16, bf16, 20, True), True),
    "refine": (lambda: smoothed("pamr", None), False),
    "refine, probabilities": (lambda: smoothed("pamr", 40.0), False),
    "refine, laplacian": (lambda: smoothed("laplacian", None), False),
    "pixel_text autocast": (lambda: cosines(f32, bf16, 171), True),
}
# Kernels of a case in which tensor cores have nothing to multiply.
NO_PRODUCTS = {"probe_kernel", "mask_sums_nodes_kernel"}
# Registers of a thread: with 80, six blocks of 128 threads fit an SM; these kernels hide latency by many blocks.
REGISTERS = dict.fromkeys(("mask_sums_fwd_kernel", "label_map_fwd_kernel", "label_map_norm_kernel"), 80)
REGISTERS |= dict.fromkeys([f"refine_{name}_kernel" for name in ("weights", "maps", "step", "take")], 80)


def faults(launch: Launch, arch: int, tensor_cores: bool) -> list[str]:
    """What must not be in the machine code of a launch."""
    seen, found = launch.resources(), []
    if seen.local_accesses:
        found.append(f"{launch.kernel}: {seen.local_accesses} accesses to spilled registers")
    if seen.shared > SHARED_LIMIT[arch]:
        found.append(f"{launch.kernel}: {seen.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    if seen.atomics > (MARKS.get(arch, 0) if tensor_cores else 0):
        found.append(f"{launch.kernel}: {seen.atomics} atomics")
    if seen.registers > REGISTERS.get(launch.kernel, 255):
        found.append(f"{launch.kernel}: {seen.registers} registers")
    if (seen.matrix_products > 0) != (tensor_cores and launch.kernel not in NO_PRODUCTS):
        found.append(f"{launch.kernel}: {seen.matrix_products} instructions of the tensor cores")
    return found


# On these only what takes most of an SM: their code is much like sm_80's, their shared memory is smaller.
SMALLER = (86, 89)
DEMANDING = (
    "attention fp32 128", "attention bf16 64", "attention bf16 128", "attention bf16 104", "dense fp32 64",
    "dense bf16 128", "proxy bf16", "key_smoothing fp32 1024", "key_smoothing bf16 768", "label_map bf16",
    "mask_loss fp32", "pixel_text fp32", "pixel_text bf16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "case"), [(arch, case) for arch in ARCHITECTURES for case in (DEMANDING if arch in SMALLER else CASES)]
)
def test_machine_code(arch, case):
    call, tensor_cores = CASES[case]
    with launched_for(arch) as launches:
        call()
    assert launches
    assert [fault for launch in launches for fault in faults(launch, arch, tensor_cores)] == []


def test_a_tile_that_spills_is_seen(monkeypatch):
    monkeypatch.setattr(bridged, "tile", lambda *_: (128, 128, 4, 2))
    with launched_for(90) as launches:
        attention(bf16, 128)
    assert any("spilled" in fault for launch in launches for fault in faults(launch, 90, True))


def test_pictures_of_all_sizes_share_kernels():
    """A variant of a kernel takes a second to compile: a folder of images must not meet one after the other.

    There may be two, for numbers that lie 16 bytes apart and for others.
    """
    with launched_for(90) as launches:
        for height, width in ((33, 47), (64, 112), (100, 150), (7, 9), (16, 16)):
            tokens = torch.empty(1, 1 + height * width, 3, 2, 64, dtype=bf16).permute(2, 0, 3, 1, 4)
            dense.attention(*tokens, (height, width), 5.0)
            outside(bf16, None, height * width)
            for classes in (1, 16, 171):
                labels(f32, "sigmoid", (height, width), classes)
                smoothed("pamr", None, (height, width), classes)
                smooth(bf16, 768, "paper", classes, height * width)
                pixel_text.pixel_text_logits(torch.empty(1, 512, height, width), torch.empty(classes, 512), 100.0)
    variants = {}
    for launch in launches:
        tile = tuple(value for name, value in launch.arguments.items() if name in ("CLASSES", "num_stages"))
        variants.setdefault((launch.kernel, tile), set()).add(id(launch.compiled))
    assert {kernel for kernel, _ in variants} > {
        "label_map_fwd_kernel",
        "refine_step_kernel",
        "proxy_attention_fwd_kernel",
    }
    assert {key: len(found) for key, found in variants.items() if len(found) > 2} == {}


class _Compiles(Exception):
    """The front end is through."""


def test_every_integer_argument_may_be_one(monkeypatch):
    """Triton makes a constant of an integer argument that is 1; what then is written `n.to(...)` does not compile."""
    with launched_for(90, compiled=False) as launches:
        for call, _ in CASES.values():
            call()
    to_ir = ASTSource.make_ir

    def only_to_ir(*args, **kwargs):
        to_ir(*args, **kwargs)
        raise _Compiles

    monkeypatch.setattr(ASTSource, "make_ir", only_to_ir)
    kernels = {launch.kernel: launch for launch in launches}
    checked = 0
    for launch in kernels.values():
        integers = [n for n, v in launch.arguments.items() if type(v) is int and n in launch.parameters]
        for chosen in [*([name] for name in integers), integers]:
            with launched_for(91), pytest.raises(_Compiles):  # an architecture of its own: nothing is kept for it
                launch.again(dict.fromkeys(chosen, 1))
            checked += 1
    assert checked > 150
