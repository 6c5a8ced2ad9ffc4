"""``E_szn``: losses, the choice of labels in every published way, and the published scores."""

from collections.abc import Iterator

import torch

from fastzs.losses import pixel_cross_entropy
from fastzs.metrics import ConfusionMatrix
from fastzs.models.szn import SZN, cosine_loss, mse_loss
from tests.parity.golden import DTYPES, Check, Golden

IGNORE = -1


def szn(golden: Golden) -> Iterator[Check]:
    config, target = golden.config, golden["in.target"]
    seen = torch.tensor(config["seen"])
    is_seen = torch.isin(torch.arange(config["n_class"]), seen)
    yield golden.check("mid.seenmask_target", torch.isin(target, seen).to(torch.uint8))
    for dtype in DTYPES:
        text = golden["in.embeddings"].to(dtype)
        valid = target != IGNORE
        assert torch.equal(golden["in.target_embed"].movedim(1, -1)[valid], golden["in.embeddings"][target[valid]])
        for name, loss, options in (
            ("cosine", cosine_loss, {}),
            ("cosine", cosine_loss, {"broadcast_norm": True}),  # the published slip, which one image does not show
            ("mse", mse_loss, {}),
        ):
            score = golden["in.score"].to(dtype).requires_grad_()
            value = loss(score, text, target, IGNORE, **options)
            yield golden.check(f"loss64.{name}", value)
            if dtype == torch.float32:
                yield golden.check(f"loss.{name}", value)
            (gradient,) = torch.autograd.grad(value, score)
            yield golden.check(f"grad64.{name}.score", gradient, gradient=True)
        # the published slip: ignored pixels are unseen ones
        for name, scores, labels in (
            ("fcn_ce_sum", "in.fcn_class_score", target),
            ("seenmask_ce", "in.seenmask_score", torch.isin(target, seen).long()),
        ):
            scores = golden[scores].to(dtype).requires_grad_()
            value = pixel_cross_entropy(scores, labels, IGNORE)
            if name == "fcn_ce_sum":  # the sum, where ours is the mean
                value = value * (labels != IGNORE).sum()
            yield golden.check(f"loss64.{name}", value)
            (gradient,) = torch.autograd.grad(value, scores)
            yield golden.check(f"grad64.{name}", gradient, gradient=True)
        yield from chosen_labels(golden, dtype, is_seen)
    yield from published_scores(golden, is_seen)


@torch.no_grad()
def chosen_labels(golden: Golden, dtype: torch.dtype, is_seen: torch.Tensor) -> Iterator[Check]:
    model = SZN(text_dim=golden.config["embed_dim"], widths=(1,) * 5, hidden=1, pretrained=False, zero_rows=True)
    cosines = model.cosines(golden["in.score"].to(dtype), golden["in.embeddings"].to(dtype))
    target = golden["in.target"]
    everywhere = torch.ones_like(target, dtype=torch.bool)
    yield golden.check_labels("out.labels.all", cosines)
    for name, seen_pixels in (
        ("seen_only", everywhere),
        ("unseen_only", ~everywhere),
        ("szn", golden["in.seenmask_score"].argmax(1) == 1),
        ("forced_unseen", ~torch.isin(target, (~is_seen).nonzero().flatten())),
    ):
        restricted = model.restrict(cosines, is_seen, seen_pixels)
        yield golden.check_labels(f"out.labels.{name}", restricted)


def published_scores(golden: Golden, is_seen: torch.Tensor) -> Iterator[Check]:
    matrix = ConfusionMatrix(golden.config["n_class"])
    for name, truth in golden.under("in.metric.gt").items():
        truth = torch.where(truth < 0, 255, truth.long())
        matrix.add(truth, golden[f"in.metric.pred{name}"])
    for name, classes in (("all", torch.ones_like(is_seen)), ("seen", is_seen), ("unseen", ~is_seen)):
        of_truth = matrix.of_truth(classes.nonzero().flatten().tolist())
        hits, truth, _ = of_truth.areas()
        iou = of_truth.iou()
        frequency_weighted = (truth / truth.sum() * iou).nansum()
        values = [hits.sum() / truth.sum(), of_truth.accuracy().nanmean(), iou.nanmean(), frequency_weighted]
        yield golden.check(f"out64.metric.{name}", torch.stack(values))


RUNNERS = {"E_szn": szn}
