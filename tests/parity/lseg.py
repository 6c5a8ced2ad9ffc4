"""``D_lseg`` and ``D_lseg_blocks``: the whole network on a tiny ViT, and the spatial blocks with their gradients."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastzs.decoders.dpt import READOUTS, SpatialBlock, double
from fastzs.models.lseg import LOGIT_SCALE, LSeg
from tests.parity.golden import DTYPES, Check, Golden

FP16 = 2e-2  # of logits that the published code multiplied in half precision, absolute


def network(golden: Golden, dtype: torch.dtype, **settings) -> LSeg:
    config, state = golden.config, golden.under("w.")
    options = {"heads": config["heads"], "hooks": config["hooks"], "block": None, "crop": config["img"][0]} | settings
    if options["readout"] != "project":
        state = {name: tensor for name, tensor in state.items() if ".project." not in name}
    state = LSeg._used(state)
    model = LSeg(**LSeg._sizes(state, options))
    model._load(golden.path, state)
    return model.eval().to(dtype)


@torch.no_grad()
def lseg(golden: Golden) -> Iterator[Check]:
    for dtype in DTYPES:
        images, text = golden["in.image"].to(dtype), golden["in.text_features"].to(dtype)
        for readout in READOUTS:
            model = network(golden, dtype, readout=readout)
            logits = model(images, text)
            if readout != "project":
                yield from golden.checks(f"out64.readout_{readout}", logits)
                continue
            yield from golden.checks("out64.plain", logits)
            for name in golden.under("out_fp16path."):
                reference = golden[f"out_fp16path.{name}"]
                error = (golden.subsample(f"out_fp16path.{name}", logits) - reference).abs().max().item()
                yield Check(f"out_fp16path.{name}", "half", error, FP16)
            yield from intermediates(golden, model, images, text)
            for name in golden.under("out64."):
                kind, _, activation = name.removesuffix("_sub").partition("_")
                if not kind.startswith(("bottleneck", "depthwise")):
                    continue
                block = {"block": kind.rstrip("01234"), "block_depth": int(kind[-1]), "block_activation": activation}
                yield golden.check(f"out64.{name}", network(golden, dtype, readout=readout, **block)(images, text))


def intermediates(golden: Golden, model: LSeg, images: torch.Tensor, text: torch.Tensor) -> Iterator[Check]:
    encoder, decoder = model.pretrained, model.scratch
    tokens, grid = encoder.tokens(images, model.hooks)
    levels, path = encoder.levels(tokens, grid), None
    for i, (token, level) in enumerate(zip(tokens, levels, strict=True), start=1):
        readout = encoder.get_submodule(f"act_postprocess{i}.0")(token)
        reduced = decoder.get_submodule(f"layer{i}_rn")(level)
        for name, value in (("tokens", token), ("readout", readout), ("layer", level)):
            yield from golden.checks(f"mid64.{name}_{i}", value)
        yield from golden.checks(f"mid64.layer_{i}_rn", reduced)
    for i in range(4, 0, -1):
        path = decoder.get_submodule(f"refinenet{i}")(decoder.get_submodule(f"layer{i}_rn")(levels[i - 1]), path)
        yield from golden.checks(f"mid64.path_{i}", path)
    features = F.normalize(decoder.head1(path), dim=1)
    half = LOGIT_SCALE * torch.einsum("bdhw,cd->bchw", features, F.normalize(text, dim=1))
    yield from golden.checks("mid64.logits_before_upsample", half)
    yield from golden.checks("out64.plain", double(half))


def blocks(golden: Golden) -> Iterator[Check]:
    for name in golden.under("out64."):
        kind, activation, depth = name.split(".")
        for dtype in DTYPES:
            block = SpatialBlock(kind.removesuffix("_block"), int(depth), activation).to(dtype)
            block.load_state_dict({n: t.to(dtype) for n, t in golden.under("w.").items()})
            x = golden["in.x"].to(dtype).requires_grad_()
            out = block(x)
            yield golden.check(f"out64.{name}", out)
            weight = block.depthwise.depthwise.weight
            gradients = torch.autograd.grad((out * golden["in.R"]).sum(), (x, weight))
            for what, gradient in zip(("x", "weight"), gradients, strict=True):
                yield golden.check(f"grad64.{name}.{what}", gradient, gradient=True)


RUNNERS = {"D_lseg": lseg, "D_lseg_blocks": blocks}
