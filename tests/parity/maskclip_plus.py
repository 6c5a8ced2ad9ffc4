"""``C_maskclip_plus``: pseudo labels of every published kind, and the loss they give."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastzs.decoders.deeplab import DeepLabV2Head
from fastzs.losses import pixel_cross_entropy
from fastzs.models.maskclip_plus import UNLABELLED, MaskCLIPPlus
from tests.parity.golden import DTYPES, TIE, Check, Golden
from tests.parity.maskclip import vit_model

IGNORE = 255
MOST_TIES = 0.005  # of the pixels


def network(golden: Golden, dtype: torch.dtype, case: dict) -> MaskCLIPPlus:
    """The golden decode module as the whole network, its teacher that of the file beside."""
    config, background = golden.config, case.get("cls_bg", False)
    head = DeepLabV2Head(config["feature_channels"], config["text_channels"], config["aspp_dilations"])
    head.load_state_dict(golden.under("w.decode_module."))
    model = MaskCLIPPlus(
        network=head,
        text_dim=config["text_channels"],
        normalization=[(0.0,) * 3, (1.0,) * 3],
        background="background" if background else None,
        guided_steps=None if case["clipg"] else 0,
        own_from=0 if case.get("selft") else 1,
        trust_clip=case.get("trust", ()),
        confidence=case.get("conf", 0.0),
        threshold_on_all=True,
    )
    if model.bg_embeddings is not None:
        model.bg_embeddings.data.copy_(golden["w.bg_embeddings"])
    smoothing = {"smoothing": "official", "smoothing_threshold": case["ks"]} if "ks" in case else {}
    vit = golden.beside("C_maskclip_vit", "C_maskclip_plus")
    model._teacher.append(vit_model(vit, dtype, **smoothing).eval())
    return model.eval().to(dtype)


def maskclip_plus(golden: Golden) -> Iterator[Check]:
    text = golden.beside("C_maskclip_vit", "C_maskclip_plus")["w.head.text_embeddings"]
    cases = {name.removeprefix("case_"): case for name, case in golden.config.items() if name.startswith("case_")}
    for dtype in DTYPES:
        for name, case in cases.items():
            model = network(golden, dtype, case)
            background = 0 if model.background else None
            rows = text if background is None else F.pad(text[:-1], (0, 0, 1, 0))
            weight = model.classifier(rows.to(dtype), background)
            feat = golden["in.feat"].to(dtype).requires_grad_()
            features = model.encode(feat).maps
            logits = model.logits(features, weight)
            labels = (golden[f"{name}.in.gt"] if f"{name}.in.gt" in golden else golden["in.gt"])[:, 0]
            images = golden["in.image"].to(dtype)
            found = model.label(labels, images, features.detach(), weight, case["cats"], background, model.trust_clip)
            yield from golden.checks(f"{name}.out64.logits", logits)
            final = found.merged.masked_fill(found.merged == UNLABELLED, IGNORE)
            choices = case["cats"]
            own = tied(model.logits(features.detach(), weight[choices]), model.confidence, labels.shape[1:])
            asked = [c for c in choices if c != background]
            taught = tied(model.taught(images, weight[asked]), model.confidence, labels.shape[1:])
            for what, got, ties in (
                ("gt_self", found.own, own),
                ("gt_clip", found.clip, own | taught),  # the network's background comes first
                ("final", final, own | taught),
            ):
                if f"{name}.{what}" in golden:
                    yield same(golden, f"{name}.{what}", got, ties, dtype)
            trained = golden[f"{name}.final"][:, 0]
            loss = pixel_cross_entropy(logits, trained, IGNORE, over_all=True)
            yield golden.check(f"{name}.loss64.loss_ce", loss)
            best = F.interpolate(logits, trained.shape[1:], mode="bilinear").argmax(1)
            close = tied(logits.detach(), 0.0, trained.shape[1:])
            accuracy = 100 * (best == trained).to(dtype).mean(dtype=torch.float64)[None]
            yield Check(
                f"{name}.loss64.acc_seg",
                str(dtype),
                (accuracy - golden[f"{name}.loss64.acc_seg"]).abs().item(),
                1e-4 + 100 * close.double().mean().item(),
            )
            if f"{name}.grad64.feat" in golden:
                (gradient,) = torch.autograd.grad(loss, feat)
                yield golden.check(f"{name}.grad64.feat", gradient, gradient=True)


def tied(scores: torch.Tensor, confidence: float, size: torch.Size) -> torch.Tensor:
    """Pixels, bool [B, H, W], whose best two classes, or best class and threshold, lie within rounding of each other.

    Labels are chosen in fp32 whatever the scores' dtype, from scores [B, C, h, w] enlarged bilinearly.
    """
    best = F.interpolate(scores.double(), size, mode="bilinear").topk(min(2, scores.shape[1]), dim=1).values
    rounding = TIE * scores.abs().max().item()
    near = (best[:, 0] - best[:, -1]).abs() <= rounding if best.shape[1] > 1 else torch.zeros_like(best[:, 0]) > 0
    return near | ((best[:, 0] - confidence).abs() <= rounding) if confidence else near


def same(golden: Golden, name: str, labels: torch.Tensor | None, ties: torch.Tensor, dtype: torch.dtype) -> Check:
    """Labels are equal but for ties, of which there may be few: the error is infinite where they are many."""
    reference = golden[name][:, 0].long()
    wrong = reference.numel() if labels is None else int(((labels != reference) & ~ties).sum())
    many = ties.double().mean().item() > MOST_TIES
    return Check(name, str(dtype).removeprefix("torch."), math.inf if many else wrong, 0)


RUNNERS = {"C_maskclip_plus": maskclip_plus}
