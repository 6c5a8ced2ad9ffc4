"""``S_deop*``: severed features, anchors, logits, scores, and the losses with all gradients; proposals are given."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD
from fastzs.models.deop import DeOP, summed_losses
from fastzs.models.deop_files import naming
from tests.parity.golden import DTYPES, Check, Golden

SEVERANCE = {"mask": "mask", "identity": "identity", "mask_similarity": "similarity"}
HEADS = 8  # of the anchors, as published, whatever the tower's


def model_of(golden: Golden, dtype: torch.dtype) -> DeOP:
    config = golden.config
    patch, dim = config["patch"], config["dim"]
    sizes = {
        "width": config["width"],
        "layers": config["layers"],
        "heads": config["heads"],
        "patch_size": patch,
        "grid": config["clip_input"] // patch,
        "output_dim": dim,
    }
    model = DeOP(
        weights="random",
        sizes=sizes,
        resnet="resnet18",
        pretrained=None,
        proposals={"width": 32, "queries": config["queries"], "layers": 1, "hidden": 32},
        severance=SEVERANCE[config["severance"]],
        severed=config["severed_layers"],
        added=config["position_layers"],
        added_side=config["position_input"] // patch,
        anchor_layers=config["anchor_layers"],
        anchor_heads=HEADS,
        anchor_hidden=config["hidden"],
    )
    missing, unexpected = model.load_state_dict(naming(golden.under("w.")), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"maskformer", "project"}
    return model.to(dtype)


def deop(golden: Golden) -> Iterator[Check]:
    config = golden.config
    count = config.get("batch", 2)
    for dtype in DTYPES:
        model = model_of(golden, dtype).eval()
        model.tower.requires_grad_(True)
        mean, std = (torch.tensor(x, dtype=dtype)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        images = (torch.stack([golden[f"in.image{i}"] for i in range(count)]).to(dtype) / 255 - mean) / std
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % config["divisor"], 0, -height % config["divisor"]))
        masks, text = golden["in.masks"].to(dtype), golden["in.text"].to(dtype)
        grid = (images.shape[2] // config["patch"], images.shape[3] // config["patch"])
        small = F.interpolate(masks, grid, mode="bilinear")
        found, _ = model.tower(images, small, model.severance)
        yield golden.check("mid64.features", found.unflatten(1, grid))
        anchors, states = model.anchors(
            F.normalize(found, dim=-1).mT.unflatten(2, grid), F.interpolate(masks.sigmoid(), grid, mode="bilinear")
        )
        norm = [golden[f"w.decoder.norm.{leaf}"].to(dtype) for leaf in ("weight", "bias") if states]
        states = [F.layer_norm(state, state.shape[-1:], *norm) for state in states]
        yield golden.check("mid64.anchors", torch.stack([*states, anchors]).transpose(1, 2))
        logits = model.compare(anchors, text)
        yield golden.check("out64.logits", logits)
        if dtype == torch.float32:
            yield golden.check("out.logits", logits, scale=100.0)
        scores = _scores(masks, logits.softmax(-1)[..., :-1], (height, width), config)
        yield golden.check("out64.scores", scores)
        yield golden.check_labels("out.labels", scores)
        if "loss64.total" in golden:
            yield from _losses(golden, model, masks, logits)


def _scores(masks: Tensor, share: Tensor, size: tuple[int, int], config: dict) -> Tensor:
    """As published: masks are enlarged to the padded image and cut before the sigmoid, the scores then resized."""
    padded = [-(-side // config["divisor"]) * config["divisor"] for side in size]
    masks = F.interpolate(masks, padded, mode="bilinear")[:, :, : size[0], : size[1]].sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", share, masks)
    return F.interpolate(scores, config["original"], mode="bilinear")


def _losses(golden: Golden, model: DeOP, masks: Tensor, logits: Tensor) -> Iterator[Check]:
    config = golden.config
    focal, dice = summed_losses(masks, logits.softmax(-1), golden["in.gt"].long())
    focal, dice = config["ce_weight"] * focal, config["dice_weight"] * dice
    yield golden.check("loss64.ce", focal)
    yield golden.check("loss64.decoder_dice", dice)
    yield golden.check("loss64.total", focal + dice)
    (focal + dice).backward()
    ours = {name: p for name, p in model.named_parameters() if p.grad is not None}
    norms = golden.under("gradnorm64.")
    largest = max(norm.item() for norm in norms.values())
    zero = set(config["gradients_zero_but_for_rounding"])
    for name in norms:
        places = naming({name: golden[f"w.{name}"]}).keys()
        grads = [ours[place].grad if place in ours else None for place in places]
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, _like(model, places), strict=True)]
        grad = torch.cat([g.flatten() for g in grads]) if grads else torch.zeros(1, dtype=masks.dtype)
        scale = largest if name in zero else None
        yield golden.check(f"gradnorm64.{name}", grad.norm(), gradient=True, scale=scale)
        if f"grad64.{name}" in golden:
            reference = golden[f"grad64.{name}"]
            whole = F.pad(grad, (0, reference.numel() - grad.numel()))  # the value's third, which nothing reads
            yield golden.check(f"grad64.{name}", whole.view(reference.shape), gradient=True, scale=scale)


def _like(model: nn.Module, names) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    return [parameters[name] for name in names]


RUNNERS = {"S_deop": deop}
