"""``S_spnet``, ``S_strict``, ``S_joint*``: systems that project pixels to words."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs import pseudo
from fastzs.decoders.multi_scale import greatest, nearest_labels
from fastzs.losses import pixel_cross_entropy
from fastzs.models.base import Labels
from fastzs.models.joint import calibrated, consistency, regression
from fastzs.models.spnet import STRICT, SPNet
from fastzs.models.words import WordModel
from tests.parity.golden import DTYPES, Check, Golden

IGNORE = 255


def word_model(kind: type[WordModel], state: dict[str, Tensor], dtype: torch.dtype, **options) -> WordModel:
    """A model with published tensors, all of it trained, its norms' statistics kept."""
    used = kind._used(state)
    model = kind(weights="random", **kind._sizes(used, options))
    missing, unexpected = model.load_state_dict(used, strict=False)
    assert not unexpected
    assert all(name.startswith("generator.") for name in missing), missing  # ZS3's files are of the network alone
    model.requires_grad_(True)
    return model.to(dtype)


def gradients(golden: Golden, model: WordModel, prefix: str = "") -> Iterator[Check]:
    """Gradients and their norms under the published names that follow ``prefix``."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    zero = set(golden.config["gradients_zero_but_for_rounding"])
    norms = golden.under(f"gradnorm64.{prefix}")
    largest = max(norm.item() for norm in norms.values())
    for name in norms:
        whole = prefix.rpartition(".")[0]
        published = f"w.{name}" if f"w.{name}" in golden else f"w.student.{name.removeprefix('base.')}"
        (ours,) = type(model)._renamed({name: golden[published]}).keys() - {"_iter_counter"}
        grad = grads[ours]
        assert grad is not None, ours
        scale = largest if f"{whole}.{name}".lstrip(".") in zero else None
        yield golden.check(f"gradnorm64.{prefix}{name}", grad.norm(), gradient=True, scale=scale)
        if f"grad64.{prefix}{name}" in golden:
            reference = golden[f"grad64.{prefix}{name}"]
            yield golden.check(f"grad64.{prefix}{name}", grad.view(reference.shape), gradient=True, scale=scale)


def spnet(golden: Golden) -> Iterator[Check]:
    config = golden.config
    seen, order = config["seen"], config["order"]
    target = golden["in.gt"].long()
    target = torch.where(target < 0, IGNORE, target)
    for dtype in DTYPES:
        model = word_model(SPNet, golden.under("w."), dtype)
        images, text = golden["in.image"].to(dtype).flip(1), golden["in.embeddings"].to(dtype)  # RGB
        with torch.no_grad():
            features = model.encode(images)
            yield golden.check("mid64.embedding", model.embedded(features))
            logits = model(images, text[order])
            yield golden.check("out64.logits", logits)
            if dtype == torch.float32:
                yield golden.check("out.logits", logits)
            probabilities = F.interpolate(logits, target.shape[1:], mode="bilinear").softmax(1)
            yield golden.check("out64.probabilities", probabilities)
            taken = torch.tensor([config["calibration"] * (i in seen) for i in order], dtype=dtype)
            for name, scores in (("", probabilities), ("_calibrated", probabilities - taken[:, None, None])):
                yield _labels(golden, f"out.labels{name}", scores, order)
        outputs = [model.head.scores(x, text[seen]) for x in model.encode(images).scales]
        outputs.append(greatest(outputs))
        losses = model.losses(images, target, text, seen=seen)
        for scale, output, loss in zip(("1", "0.5", "0.75", "max"), outputs, losses.values(), strict=False):
            yield golden.check(f"mid64.train_logits.{scale}", output)
            yield golden.check(f"loss64.ce.{scale}", loss)
        yield golden.check("loss64.total", losses["total"])
        losses["total"].backward()
        yield from gradients(golden, model)


def _labels(golden: Golden, name: str, scores: Tensor, order: list[int]) -> Check:
    """Labels as class ids, of scores in another order."""
    by_id = torch.empty_like(scores)
    by_id[:, order] = scores
    return golden.check_labels(name, by_id)


def strict(golden: Golden) -> Iterator[Check]:
    config = golden.config
    seen = len(config["seen"])
    unseen = list(range(seen, config["classes"]))  # positions in config.order
    place = torch.full((256,), IGNORE)
    place[torch.tensor(config["order"])] = torch.arange(config["classes"])
    target = golden["in.gt"].long()
    labelled = torch.where(target < 0, IGNORE, place[target.clamp(min=0)])
    for dtype in DTYPES:
        teacher = word_model(STRICT, golden.under("w.teacher."), dtype).eval()
        student = word_model(STRICT, golden.under("w.student."), dtype)
        images, text = golden["in.image"].to(dtype).flip(1), golden["in.embeddings"].to(dtype)[config["order"]]
        with torch.no_grad():
            views = pseudo.views_of(lambda x, t=teacher, words=text: t(x, words[seen:]), images, config["scales"])
            for i, view in enumerate(views):
                yield golden.check(f"mid64.view{i}", view)
            logits = student(images, text)
            yield golden.check("out64.logits", logits)
        # the rules want the scores of all classes, with the unseen ones where they are
        views = [F.pad(view, (0, 0, 0, 0, seen, 0)) for view in views]
        given = nearest_labels(labelled, logits.shape[2:])
        with_background = torch.where(given == IGNORE, 0, given)
        found = {
            "hard": pseudo.best(given, views[0], unseen),
            "strict": pseudo.consistent(given, views, unseen),
            "strict_bkg": pseudo.consistent(with_background, views, unseen, ignore_index=0),
        }
        for name, labels in found.items():
            reference = golden[f"mid.target.{name}"].long()
            yield golden.check(f"mid.target.{name}", torch.where(labels == IGNORE, -1, labels).to(torch.int16))
            labels = torch.where(reference < 0, IGNORE, reference)
            student.zero_grad()
            parts = student.loss_parts(images, Labels(labels, range(len(text)), None, False, IGNORE), text)
            yield golden.check(f"loss64.{name}", parts["cross_entropy"])
            if name == "strict":
                parts["cross_entropy"].backward()
                yield from gradients(golden, student)


def joint(golden: Golden) -> Iterator[Check]:
    config = golden.config
    ids, seen = config["ids"], config["seen"]
    context = config["kind"].startswith("context")
    target = golden["in.gt"].long()
    for dtype in DTYPES:
        semantic = nn.Linear(config["embed"], config["feature"]).to(dtype)
        semantic.load_state_dict(golden.under("w.semantic_encoder.model."))
        text, feature = golden["in.embeddings"].to(dtype), golden["in.feature"].to(dtype, copy=True).requires_grad_()
        yield golden.check("out64.prototypes", semantic(text))
        kept = [i for i in seen if i != 0]
        spread = consistency(text[kept], semantic(text[kept]), config["temperature"], 1e-8 if context else 0.0)
        logits = golden["in.logits"].to(dtype, copy=True).requires_grad_()
        losses = {
            "bar": regression(feature, target, text, semantic, config["ratio"]),
            "ce": pixel_cross_entropy(logits, target, IGNORE, align_corners=True),
            "sc": spread / len(kept) if context else spread,
        }
        for name, loss in losses.items():
            yield golden.check(f"loss64.{name}", loss)
        total = losses["bar"] + losses["ce"] + config["alpha"] * losses["sc"]
        yield golden.check("loss64.total", total)
        total.backward()
        yield golden.check("grad64.feature", feature.grad, gradient=True)
        for name, parameter in semantic.named_parameters():
            yield golden.check(f"grad64.semantic_encoder.model.{name}", parameter.grad, gradient=True)
        yield golden.check("gradnorm64.logits", logits.grad.norm(), gradient=True)
        with torch.no_grad():
            prototypes = semantic(text[ids])
            scores = 2 * torch.einsum("cd,bdhw->bchw", prototypes, feature)
            scores = scores - prototypes.square().sum(1)[:, None, None]
            is_seen = torch.tensor([i in seen for i in ids])
            whole = F.interpolate(scores, target.shape[1:], mode="bilinear")
            taken = calibrated(feature.detach(), scores, is_seen, config["sigma"], tuple(target.shape[1:]))
            for name, found in (("labels_plain", whole), ("labels", taken)):
                yield golden.check(f"out.{name}", torch.tensor(ids)[found.argmax(1)].to(torch.uint8))


RUNNERS = {"S_spnet": spnet, "S_strict": strict, "S_joint": joint}
