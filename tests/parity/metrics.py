"""``G_metrics``: the scores of the official evaluation, from label maps."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastzs.metrics import ConfusionMatrix, Scores
from tests.parity.golden import Check, Golden

STORED = 1e-5  # the printed percentages went through fp32


def metrics(golden: Golden) -> Iterator[Check]:
    classes, unseen = golden.config["K"], golden.config["unseen"]
    names = [str(i) for i in range(classes)]
    for variant in ("voc", "coco", "absent", "reducezero"):
        confusion = ConfusionMatrix(classes)
        held = golden.under(f"{variant}.in.")
        for i in range(sum(name.startswith("gt") for name in held)):
            truth = held[f"gt{i}"].long()
            if variant == "reducezero":
                truth = torch.where((truth == 0) | (truth == 255), 255, truth - 1)
            confusion.add(truth, held[f"pred{i}"])
        scores = confusion.scores(names, unseen)
        hits, truth, predicted = confusion.areas()
        for area, value in (
            ("intersect", hits),
            ("label", truth),
            ("pred", predicted),
            ("union", truth + predicted - hits),
        ):
            yield golden.check(f"{variant}.out.area_{area}", value)
        iou, accuracy = confusion.iou(), confusion.accuracy()
        yield _printed(golden, f"{variant}.out.IoU", iou)
        yield _printed(golden, f"{variant}.out.Acc", accuracy)
        yield _printed(golden, f"{variant}.out.eval_dict", _triple(scores), digits=4, factor=1)
        yield _printed(golden, f"{variant}.out.summary_all", _triple(scores))
        for group, indices in (("seen", golden.config["seen"]), ("unseen", unseen)):
            mean = torch.stack([iou[indices].nanmean(), accuracy[indices].nanmean()])
            yield _printed(golden, f"{variant}.out.summary_{group}", torch.cat([_triple(scores)[:1], mean]))
        five = [scores.pAcc, scores.mIoU, scores.seen, scores.unseen, scores.hIoU]
        yield golden.check(f"{variant}.raw64.pAcc_mIoU_mIoUS_mIoUU_hIoU", torch.tensor(five, dtype=torch.float64))


def _triple(scores: Scores) -> Tensor:
    return torch.tensor([scores.pAcc, scores.mIoU, scores.mAcc], dtype=torch.float64)


def _printed(golden: Golden, name: str, value: Tensor, digits: int = 2, factor: int = 100) -> Check:
    """Compare with figures that were rounded to be printed; NaN must stand where NaN stands."""
    reference, value = golden[name], factor * value
    if not torch.equal(reference.isnan(), value.isnan()):
        return Check(name, "fp64", float("nan"), 0.0)
    error = (reference - value).nan_to_num().abs().max().item()
    return Check(name, "fp64", error, 0.5 * 10**-digits + STORED)


RUNNERS = {"G_metrics": metrics}
