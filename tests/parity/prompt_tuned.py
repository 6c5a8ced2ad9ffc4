"""``A_cliprc_*`` and ``B_zegclip_*``: towers, decoders, sliding windows and training steps of CLIP-RC and ZegCLIP."""

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.clip import VisionTransformer
from fastzs.clip.prompted import Encoded, PromptedVisionTransformer
from fastzs.losses import inductive_target, transductive_target
from fastzs.models import ClipRC, ZegCLIP
from fastzs.models.prompt_tuned import PromptFeatures
from fastzs.ops import TokenLayout, label_map
from fastzs.windows import window_grid
from tests.parity.golden import DTYPES, Check, Golden

CALIBRATION = 0.1
# A gradient below this share of the file's largest is zero but for rounding; its error is taken of the largest.
NO_GRADIENT = 1e-9


def tower(golden: Golden, **changes) -> PromptedVisionTransformer:
    """The tower of a ``*_backbone`` file, in evaluation mode."""
    c, weights = golden.config, golden.under("w.")
    regions = len(weights.get("region_level_bridge", ()))
    options = {
        "prompts": c["tokens"],
        "deep_prompts": c["total_d_layer"],
        "bridge": (round(regions**0.5),) * 2 if regions else None,
    } | changes
    out = PromptedVisionTransformer(
        width=c["width"],
        layers=c["layers"],
        heads=c["heads"],
        patch_size=c["patch"],
        grid=c["img"] // c["patch"],
        output_dim=c["output_dim"],
        mlp_ratio=len(weights["transformer.resblocks.0.mlp.c_fc.weight"]) / c["width"],
        double_class_embedding=True,
        **options,
    )
    if out.deep_prompts:
        weights["deep_prompt_embeddings"] = weights["deep_prompt_embeddings"][: out.deep_prompts]
    wanted = out.state_dict().keys()
    out.load_state_dict({name: t for name, t in weights.items() if name in wanted})
    return out.eval()


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, D] -> [B, D, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def both(golden: Golden, name: str, value: Tensor) -> Iterator[Check]:
    """``out64.name``, and in fp32 also ``out.name``, which the official code gave in fp32."""
    if value.dtype == torch.float32:
        yield from golden.checks(f"out.{name}", value)
    yield from golden.checks(f"out64.{name}", value)


def encoded_checks(golden: Golden, encoded: Encoded, variant: str = "") -> Iterator[Check]:
    yield from both(golden, f"{variant}cls", encoded.cls)
    yield from both(golden, f"{variant}feat", as_map(encoded.patches, encoded.grid))


@torch.no_grad()
def backbone(golden: Golden) -> Iterator[Check]:
    variants = sorted({name.split(".")[1] for name in golden.tensors if name.startswith("out64.variant_")})
    for dtype in DTYPES:
        image = golden["in.image"].to(dtype)
        model = tower(golden).to(dtype)
        seen = []
        model.ln_pre.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        encoded = model.encode(image)
        yield from golden.checks("mid64.ln_pre_out", seen[0])
        yield from encoded_checks(golden, encoded)
        if encoded.bridge is not None:
            assert model.bridge is not None
            yield from both(golden, "rlb", as_map(encoded.bridge, model.bridge))
            layout = TokenLayout(1 + model.prompts, encoded.grid, model.bridge)
            yield golden.check("out.attn_blocked", ~layout.dense_mask())
        for variant in variants:
            deep = re.fullmatch(r"variant_total_d_layer_(\d+)", variant)
            changes = {"deep_prompts": int(deep[1])} if deep else {"prompts": 0, "deep_prompts": 0}
            yield from encoded_checks(golden, tower(golden, **changes).to(dtype).encode(image), f"{variant}.")


@torch.no_grad()
def init(golden: Golden) -> Iterator[Check]:
    """Positions and region tokens as a tower starts with them from CLIP's weights."""
    width, source = len(golden["in.class_embedding"]), golden.config["source_grid"]
    sizes: dict[str, Any] = {"width": width, "layers": 1, "heads": 1, "patch_size": 1, "output_dim": 1}
    for name in golden.tensors:
        found = re.fullmatch(r"out\.grid(\d+)\.positional_embedding", name)
        if not found:
            continue
        bridge_name = f"out.grid{found[1]}.region_level_bridge"
        side = round(len(golden[bridge_name]) ** 0.5) if bridge_name in golden else None
        for dtype in DTYPES:
            plain = VisionTransformer(**sizes, grid=source).to(dtype)
            plain.class_embedding.copy_(golden["in.class_embedding"])
            plain.positional_embedding.copy_(golden["in.positional_embedding"])
            model = PromptedVisionTransformer(
                **sizes, grid=int(found[1]), prompts=1, deep_prompts=0, bridge=(side, side) if side else None
            ).to(dtype)
            model.start_from(plain)
            yield golden.check(name, model.positional_embedding)
            if side:
                yield golden.check(bridge_name, model.region_level_bridge)


def masks(golden: Golden) -> Iterator[Check]:
    for name, packed in golden.tensors.items():
        found = re.fullmatch(r"mask\.t(\d+)_g(\d+)_b(\d+)", name)
        assert found, name
        tokens, side, regions = map(int, found.groups())
        layout = TokenLayout(1 + tokens, (side, side), (round(regions**0.5),) * 2)
        blocked = np.packbits(~layout.dense_mask().numpy(), axis=1)
        assert packed.dtype == torch.uint8
        yield golden.check(name, torch.from_numpy(blocked))


def model_of(kind: type[ClipRC] | type[ZegCLIP], body: Golden, head: Golden) -> ClipRC | ZegCLIP:
    """The whole model through a checkpoint as the official code writes it."""
    state = {f"backbone.{name}": t for name, t in body.under("w.").items()}
    state |= {f"decode_head.{name}": t for name, t in head.under("w.").items()}
    options = {"recovery": True} if kind is ClipRC else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pth")
        torch.save({"meta": {}, "state_dict": state}, path)
        return kind.from_checkpoint(
            path,
            heads=body.config["heads"],
            decoder_heads=head.config["head_heads"],
            dropout=0.0,
            seen=head.config["base"],
            calibration=CALIBRATION,
            **options,
        )


def upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def calibrated(probabilities: Tensor, seen: list[int]) -> Tensor:
    probabilities = probabilities.clone()
    probabilities[:, seen] -= CALIBRATION
    return probabilities


@torch.no_grad()
def head(kind: type[ClipRC] | type[ZegCLIP], prefix: str, golden: Golden) -> Iterator[Check]:
    model = model_of(kind, golden.beside(f"{prefix}_backbone", f"{prefix}_head"), golden)
    c = golden.config
    last = c["head_layers"] - 1
    for dtype in DTYPES:
        model.to(dtype)
        feat, cls, text = (golden[f"in.{name}"].to(dtype) for name in ("feat", "cls", "text"))
        bridge = golden["in.rlb"].to(dtype).flatten(2).transpose(1, 2) if "in.rlb" in golden else None
        encoded = PromptFeatures(feat.permute(0, 2, 3, 1), cls, bridge)
        logits = model.decode(encoded, text)
        if isinstance(model, ClipRC):
            streams = model.streams(encoded, text)
            yield from golden.checks("mid64.combine_token", model.descriptor(streams.visual, text))
            yield from golden.checks("mid64.q_proj_out", model.decode_head.q_proj(streams.visual, text))
            yield from golden.checks("mid64.lateral_proj_out", model.lateral(encoded))
            # some files hold the first layers only
            yield from golden.checks(f"mid64.q_layer{last}", streams.queries)
            yield from golden.checks(f"mid64.lateral_layer{last}", streams.features)
            yield from golden.checks("mid64.fusion_attn_map", logits)
        else:
            yield from golden.checks(f"mid64.attn_layer{last}", logits.flatten(2))
        size = (c["img"], c["img"])
        probabilities = upsampled(logits, size).sigmoid()
        scores = calibrated(probabilities, c["base"])
        yield from both(golden, "pred_inductive", scores)
        yield from both(golden, "pred_transductive", probabilities)
        for setting, values, seen in (("inductive", scores, c["base"]), ("transductive", probabilities, None)):
            labels = [label_map(one[None], [[0, 0, *size]], size, seen=seen).labels for one in logits]
            yield golden.check_labels(f"out64.labels_{setting}", values, torch.stack(labels))


@torch.no_grad()
def slide(kind: type[ClipRC] | type[ZegCLIP], prefix: str, golden: Golden) -> Iterator[Check]:
    mine = f"{prefix}_slide"
    model = model_of(kind, golden.beside(f"{prefix}_backbone", mine), golden.beside(f"{prefix}_head", mine))
    c = golden.config
    for dtype in DTYPES:
        model.to(dtype)
        image, text = golden["in.image"].to(dtype), golden["in.text"].to(dtype)
        size = (image.shape[2], image.shape[3])
        windows = window_grid(size, tuple(c["crop"]), tuple(c["stride"]))
        crops = torch.cat([image[:, :, y : y + h, x : x + w] for y, x, h, w in windows.tolist()])
        logits = model(crops, text)
        for setting, seen in (("inductive", c["base"]), ("transductive", [])):
            total, visits = image.new_zeros(1, len(text), *size), image.new_zeros(size)
            for (y, x, h, w), crop in zip(windows.tolist(), logits, strict=True):
                scores = calibrated(upsampled(crop[None], (h, w)).sigmoid(), seen)
                total[:, :, y : y + h, x : x + w] += scores
                visits[y : y + h, x : x + w] += 1
                if (y, x) == (0, 0):
                    yield from golden.checks(f"out64.{setting}.crop0", scores)
            total /= visits
            rescaled = upsampled(total, tuple(c["ori_shape"]))
            yield from golden.checks(f"out64.{setting}.scores", total)
            yield from golden.checks(f"out64.{setting}.scores_rescaled", rescaled)
            best = rescaled.topk(2, dim=1).values
            # a difference of two scores: its rounding is theirs
            yield from golden.checks(f"out64.{setting}.min_margin", (best[:, 0] - best[:, 1]).min(), scale=1.0)
            labels = label_map(
                logits, windows, size, output_size=c["ori_shape"], seen=seen or None, calibration=CALIBRATION
            ).labels
            yield golden.check_labels(f"out64.{setting}.labels", rescaled, labels[None])


LOSSES = {
    "focal": "loss_mask",
    "dice": "loss_dice",
    "recovery_queries": "recovery_loss_q",
    "recovery_features": "recovery_loss_k",
    "total": "total",
}


def train(kind: type[ClipRC] | type[ZegCLIP], prefix: str, setting: str, golden: Golden) -> Iterator[Check]:
    mine = f"{prefix}_train_{setting}"
    body, top = golden.beside(f"{prefix}_backbone", mine), golden.beside(f"{prefix}_head", mine)
    c = golden.config
    transductive = setting == "selftrain"
    weights = {"focal": c["mask_weight"], "dice": c["dice_weight"]}
    if kind is ClipRC:
        weights["recovery"] = c["recovery_loss_weight"]
    largest = max(t.item() for t in golden.under("gradnorm64.").values())
    for dtype in DTYPES:
        model = model_of(kind, body, top).to(dtype).train().requires_grad_()
        images, text, target = body["in.image"].to(dtype), golden["in.text"].to(dtype), golden["in.gt"].squeeze(1)
        losses = model.losses(images, target, text, seen=c["base"], transductive=transductive, **weights)
        for name, value in losses.items():
            if dtype == torch.float32:
                yield from golden.checks(f"loss.{LOSSES[name]}", value)
            yield from golden.checks(f"loss64.{LOSSES[name]}", value)
        losses["total"].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            norm = golden[f"gradnorm64.{name}"].item()
            scale = largest if norm < NO_GRADIENT * largest else None
            yield from golden.checks(f"gradnorm64.{name}", parameter.grad.norm(), gradient=True, scale=scale)
            yield from golden.checks(f"grad64.{name}", parameter.grad, gradient=True, scale=scale)
        yield from _train_forward(golden, model, images, target, text, transductive)


@torch.no_grad()
def _train_forward(
    golden: Golden, model: ClipRC | ZegCLIP, images: Tensor, target: Tensor, text: Tensor, transductive: bool
) -> Iterator[Check]:
    """What the losses are made of, where the file has it."""
    base, size = golden.config["base"], (golden.config["img"],) * 2
    if not transductive:
        target, text = inductive_target(target, base, len(text)), text[base]
    encoded = PromptFeatures.of(model.backbone.encode(images))
    logits = model.decode(encoded, text)
    if transductive:
        target = transductive_target(target, logits, base)
    if images.dtype == torch.float64:  # in fp32 pseudo labels may tie
        yield from golden.checks("mid.gt_final", target[:, None])
    predicted = upsampled(logits, size)
    yield from golden.checks("out64.pred_masks", predicted)
    counted = target != 255
    right = (predicted.argmax(1) == target)[counted].to(images.dtype)
    accuracy = 100 * right.sum()[None] / (len(right) + torch.finfo(torch.float32).eps)  # as mmseg divides
    if images.dtype == torch.float32:
        yield from golden.checks("loss.acc_seg", accuracy)
    yield from golden.checks("loss64.acc_seg", accuracy)
    if isinstance(model, ClipRC):
        streams = model.streams(encoded, text)
        assert model.decode_head.recovery_decoder is not None
        queries, features = model.decode_head.recovery_decoder(streams.queries, streams.features)
        yield from golden.checks("out64.q", queries)
        yield from golden.checks("out64.lateral", features)
        yield from golden.checks("out64.ori_q", model.descriptor(streams.visual, text))
        yield from golden.checks("out64.ori_lateral", encoded.tokens)


RUNNERS: dict[str, Callable[[Golden], Iterator[Check]]] = {}
for _kind, _prefix in ((ClipRC, "A_cliprc"), (ZegCLIP, "B_zegclip")):
    RUNNERS |= {
        f"{_prefix}_backbone": backbone,
        f"{_prefix}_init": init,
        f"{_prefix}_masks": masks,
        f"{_prefix}_head": partial(head, _kind, _prefix),
        f"{_prefix}_slide": partial(slide, _kind, _prefix),
        f"{_prefix}_train_inductive": partial(train, _kind, _prefix, "inductive"),
        f"{_prefix}_train_selftrain": partial(train, _kind, _prefix, "selftrain"),
    }
