"""CaGNet: a generator that also knows each pixel's surroundings makes features for a classifier of all classes.

Source: Gu et al., "Context-aware Feature Generation for Zero-shot Semantic Segmentation", ACM MM 2020, and its code. A
DeepLabV2 network gives h; a contextual module gives a latent code Z ~ N(mu, exp lv) of each pixel's surroundings, and
the features are x = sigmoid(h + h sigmoid Z). A generator makes x~ = G([w_y, Z]) from the words of labels y; a
discriminator D tells x from x~ and, with one more layer, classifies both. Its classes are fixed by training.
Minimised together, each by its own parameters::

    L_D = |D(x) - 1| + |D(x~)| + a CE(x_1..x_4) + b CE(x~)       x_1..x_4: the image at 1, 1/2, 3/4, and the maximum
    L_B = 100 KLD + 0.5 CE(x_1..x_4)                             network and contextual module
    L_G = |D(x~) - 1| + 50 MMD(x~, x)                            per run of equal labels in raster order

Stages (``stage``): "step1" trains all, with a, b = 1, 0; in "mixed" the network is fixed, and 100 steps of step1
(a, b = 0.75, 0.25) and 100 of step2 take turns. In step2 every pixel has a random class (an unseen one 1 + r times as
likely) and Z ~ N(0, 1); the classifier, and with ``generator_step2`` the generator, learn from these made features. No
layout of unseen classes is read from labels anywhere.

Unlike the published code: the three losses share one backward pass, so that D is not stepped before the others'
gradients are taken; ``fc_1``, which was in no group of the optimiser, is trained; there is no extra class without
labels unless ``extra_class`` (which published checkpoints need; its score is dropped in testing); images are not warped
to squares; and there is one optimiser.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.clip import WeightsError
from fastzs.decoders.contextual import Contextual
from fastzs.decoders.deeplab import SumHead
from fastzs.decoders.generator import PixelMLP, grouped_mmd, runs
from fastzs.decoders.multi_scale import greatest, nearest_labels, reductions
from fastzs.decoders.resnet import blocks_of, from_caffe
from fastzs.models.base import Features
from fastzs.models.trained import OWN
from fastzs.models.words import FixedClasses, scale_loss, wide
from fastzs.registry import register
from fastzs.trace import span
from fastzs.windows import next_multiple

SIGMAS = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
REDUCTIONS = (0.5, 0.75)
TURN = 100  # steps of one kind in a row
KLD, REAL, CONTENT = 100.0, 0.5, 50.0  # weights of the losses

Stage = Literal["step1", "mixed"]


@dataclass(frozen=True)
class ContextFeatures(Features):
    """What the classifier sees."""

    maps: Tensor  # x, [B, D, h, w] in (0, 1)


class Discriminator(nn.Module):
    """One layer shared by "is it real", [N], and the classes, [N, C], of rows [N, D]."""

    def __init__(self, dim: int, hidden: int, classes: int, dropout: float = 0.5):
        super().__init__()
        self.shared, self.real, self.classify = nn.Linear(dim, hidden), nn.Linear(hidden, 1), nn.Linear(hidden, classes)
        self.dropout = dropout

    def forward(self, x: Tensor, *, fixed: bool = False) -> tuple[Tensor, Tensor]:
        """Rows [..., D] -> probability of being real [...], logits [..., C]; ``fixed``: no gradient for the weights."""

        def linear(layer: nn.Linear, y: Tensor) -> Tensor:
            return F.linear(y, layer.weight.detach(), layer.bias.detach()) if fixed else layer(y)

        y = F.dropout(linear(self.shared, x).relu(), self.dropout, self.training)
        return linear(self.real, y)[..., 0].sigmoid(), linear(self.classify, y)


@register(
    "cagnet",
    paper="CaGNet (Gu et al., ACM MM 2020)",
    does="a DeepLabV2, a contextual module, a classifier of fixed classes",
    trained="a DeepLabV2 (ResNet), a generator, a discriminator",
    needs="masks of the seen classes; word vectors, or CLIP's text tower",
    checkpoints=f"published .pth, {OWN}",
)
class CaGNet(FixedClasses):
    """CaGNet for images of any size; the classes are those it was trained for.

    Args:
        classes: their names, or how many.
        backbone, weights, options: see :class:`fastzs.models.words.WordModel`.
        features: width D of the pixel features; published: 600.
        context: width of the contextual module; published: 256.
        generator: widths of the generator's hidden layers.
        generator_dropout: after each of them.
        hidden, dropout: of the discriminator's shared layer; published: 1024, 0.5.
        stage: see the module's text.
        extra_class: the classifier has a class more than there are, as published.
        unseen_rate: r; published: 9 (VOC), 14 (PASCAL-Context), 59 (COCO-Stuff).
        step2_weight: of the classifier's loss in step2; published: 0.125, COCO-Stuff 1.
        generator_step2: weight of the same loss for the generator; published: 0, COCO-Stuff 1.
    """

    REDUCED_EPS: ClassVar[float] = 0.0
    _iter_counter: Tensor

    def __init__(
        self,
        classes: Sequence[str] | int,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        features: int = 600,
        context: int = 256,
        generator: Sequence[int] = (1024, 960, 864, 784, 720),
        generator_dropout: Sequence[float] = (0.1, 0.1, 0.3, 0.5, 0.5),
        hidden: int = 1024,
        dropout: float = 0.5,
        stage: Stage = "step1",
        extra_class: bool = False,
        unseen_rate: float = 9.0,
        step2_weight: float = 0.125,
        generator_step2: float = 0.0,
        **options: Any,
    ):
        if stage not in ("step1", "mixed"):
            raise ValueError(f"{type(self).__name__}: stage must be 'step1' or 'mixed', got {stage!r}")
        super().__init__(classes, backbone, weights, **options)
        self.head = SumHead(self.network.channels[-1], features)
        self.contextual = Contextual(features, context)
        self.generator = PixelMLP((self.text_dim + features, *generator, features), generator_dropout, sigmoid=True)
        self.discriminator = Discriminator(features, hidden, self.classes + extra_class, dropout)
        self.register_buffer("_iter_counter", torch.zeros((), dtype=torch.int64))
        self.unseen_rate, self.step2_weight, self.generator_step2 = unseen_rate, step2_weight, generator_step2
        self.settings.update(
            features=features, context=context, generator=list(generator), generator_dropout=list(generator_dropout),
            hidden=hidden, dropout=dropout, extra_class=extra_class, unseen_rate=unseen_rate,
            step2_weight=step2_weight, generator_step2=generator_step2,
        )  # fmt: skip
        self.stage: Stage = stage
        self.settings["stage"] = stage
        if stage == "mixed":
            for part in (self.network, self.head, self.contextual):
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.stage == "mixed":
            self.network.eval()
        return self

    def spatial(self, h: Tensor) -> Tensor:
        """What SIGN adds: nothing here."""
        return h

    def latent(self, h: Tensor, sample: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features x, code Z, its mean and logarithm of variance, all [B, D, h, w], of h."""
        h = self.spatial(h)
        mean, log_variance = self.contextual(h)
        code = mean + self.draw(mean) * (log_variance / 2).exp() if sample else mean
        return (h + h * code.sigmoid()).sigmoid(), code, mean, log_variance

    def draw(self, like: Tensor) -> Tensor:
        """Normal noise."""
        return torch.randn_like(like)

    def h(self, images: Tensor) -> Tensor:
        """The network's features [B, D, h, w] of images as it wants them."""
        return self.head(self.network(images)[-1])

    def encode(self, images: Tensor) -> ContextFeatures:
        with span("model.tower"):
            return ContextFeatures(self.latent(self.h(self.as_trained(images)), sample=False)[0])

    def score(self, features: ContextFeatures, text: Tensor) -> Tensor:
        self.check_classes(text)
        return wide(self.classify(features.maps))[:, : self.classes]

    def classify(self, maps: Tensor, *, fixed: bool = False) -> Tensor:
        """Logits of all outputs, [B, D, h, w] -> [B, C, h, w]."""
        return self.discriminator(maps.movedim(1, -1), fixed=fixed)[1].movedim(-1, 1)

    def parts(
        self,
        images: Tensor,
        target: Tensor,
        text: Tensor,
        seen: Sequence[int],
        ignore_index: int,
        *,
        self_labelled: bool = False,
        pixel_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if not self_labelled:
            known = torch.isin(target, torch.tensor(list(seen), device=target.device))
            target = target.masked_fill(~known, ignore_index)
        step = int(self._iter_counter)
        if self.training:
            self._iter_counter += 1
        if self.stage == "mixed" and step // TURN % 2:
            h, w = (next_multiple(side, 8) // 8 for side in images.shape[2:])
            return self.step2((len(images), h, w), text, seen)
        weights = (1.0, 0.0) if self.stage == "step1" else (0.75, 0.25)
        return self.step1(images, target, text, weights, ignore_index, pixel_weights)

    def step1(
        self,
        images: Tensor,
        target: Tensor,
        text: Tensor,
        weights: tuple[float, float],
        ignore_index: int = 255,
        pixel_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """L_D, L_B and L_G in their parts; ``weights`` are a and b."""
        found = [self.latent(self.h(x), sample=True) for x in reductions(self.as_trained(images), REDUCTIONS)]
        features = [x for x, *_ in found]
        features.append(greatest(features))
        real, code, mean, log_variance = found[0]
        labels = nearest_labels(target, real.shape[2:])
        kept = labels != ignore_index
        words, rows = text[labels[kept]], real.movedim(1, -1)[kept]
        made = self.generator(torch.cat([words, code.detach().movedim(1, -1)[kept].to(words)], dim=1))

        def of_maps(maps: Sequence[Tensor], fixed: bool) -> Tensor:
            out = [self.class_loss(self.classify(x, fixed=fixed), target, ignore_index, pixel_weights) for x in maps]
            return torch.stack(out).mean()

        divergence = 1 + log_variance - mean.square() - log_variance.exp()
        out = {
            "real": (self.discriminator(rows.detach())[0] - 1).abs(),
            "made": self.discriminator(made.detach())[0].abs(),
            "fool": (self.discriminator(made, fixed=True)[0] - 1).abs(),
            "divergence": -0.5 * KLD * divergence.movedim(1, -1)[kept].mean(-1),
        }
        out = {name: value.sum() / max(1, len(value)) for name, value in out.items()}
        a, b = weights
        out["class_real"] = a * of_maps([x.detach() for x in features], False) + REAL * of_maps(features, True)
        if b:
            whole = made.detach().new_zeros(*labels.shape, made.shape[1]).index_put((kept,), made.detach())
            out["class_made"] = b * self.class_loss(
                self.classify(whole.movedim(-1, 1)), target, ignore_index, pixel_weights
            )
        groups = runs(labels[kept])
        content = grouped_mmd(wide(made), wide(rows.detach()), groups, SIGMAS) / 2**0.5
        out["content"] = CONTENT * content.sum() / max(1, len(content))
        return out

    def step2(self, shape: tuple[int, int, int], text: Tensor, seen: Sequence[int]) -> dict[str, Tensor]:
        """The losses of features made for random labels of ``shape`` [B, h, w]."""
        prior = text.new_full((len(text),), 1 + self.unseen_rate)
        prior[list(seen)] = 1.0
        labels = prior.multinomial(shape[0] * shape[1] * shape[2], replacement=True)
        code = torch.randn(len(labels), self.head.convs[0].out_channels).to(text)
        loss, for_generator = self.made_losses(labels, code, text)
        return {"class_made": self.step2_weight * loss, "generator": self.generator_step2 * for_generator}

    def made_losses(self, labels: Tensor, code: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of features made for labels [N] and codes [N, D]: for the classifier and for the generator.

        All weights of the stage get a gradient, some of zero.
        """
        made = self.generator(torch.cat([text[labels], code], dim=1))
        real, logits = self.discriminator(made.detach())
        loss = self.mean_loss(F.cross_entropy(wide(logits), labels, reduction="none"))
        fixed = self.discriminator(made, fixed=True)[1]
        return loss + 0 * real.sum(), self.mean_loss(F.cross_entropy(wide(fixed), labels, reduction="none"))

    def mean_loss(self, losses: Tensor) -> Tensor:
        return losses.sum() / (len(losses) + self.REDUCED_EPS)

    def class_loss(self, logits: Tensor, target: Tensor, ignore_index: int, weights: Tensor | None) -> Tensor:
        return scale_loss(logits, target, ignore_index, pixel_weights=weights, eps=self.REDUCED_EPS)

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if "dis.cls.weight" not in state and "discriminator.classify.weight" not in state:
            raise WeightsError(f"{path}: is no checkpoint of {cls.__name__}")

    @classmethod
    def _renamed(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "network.conv1.weight" in state:
            return dict(state)
        used = {f"network.{name}": tensor for name, tensor in from_caffe(state, "back.scale.").items()}
        for name, tensor in state.items():
            for pattern, new in NAMES:
                if re.match(pattern, name):
                    tensor = tensor.flatten(1) if name.startswith(("dis.", "gen.")) and tensor.ndim == 4 else tensor
                    used[re.sub(pattern, new, name)] = tensor
        return used | {"_iter_counter": torch.tensor(0)}

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        linears = sorted(name for name in state if re.fullmatch(r"generator\.linears\.\d+\.weight", name))
        outputs, features = len(state["discriminator.classify.weight"]), len(state["head.convs.0.weight"])
        return {
            "classes": outputs - bool(options.get("extra_class", True)),
            "extra_class": True,
            "backbone": "",
            "text_dim": state["generator.linears.0.weight"].shape[1] - features,
            "resnet": blocks_of(state, "network."),
            "width": len(state["network.conv1.weight"]),
            "features": features,
            "context": len(state["contextual.gated.steps.0.weight"]),
            "generator": [len(state[name]) for name in linears[:-1]],
            "generator_dropout": [0.5] * (len(linears) - 1),
            "hidden": len(state["discriminator.shared.weight"]),
        } | options


NAMES = (
    (r"^back\.scale\.aspp\.stages\.c(\d)\.", r"head.convs.\1."),
    (r"^back\.scale\.contextual(\d)\.conv\.", lambda m: f"contextual.gated.steps.{int(m[1]) - 1}."),
    (r"^back\.scale\.fc_1\.conv\.", "contextual.gated.gate."),
    (r"^back\.scale\.contextualpool\.conv\.", "contextual.gated.pool."),
    (r"^back\.scale\.contextuallocalmu\.conv\.", "contextual.mean."),
    (r"^back\.scale\.contextuallocalsigma\.conv\.", "contextual.log_variance."),
    (r"^back\.scale\.positional(\d)\.conv\.", lambda m: f"positional.gated.steps.{int(m[1]) - 1}."),
    (r"^back\.scale\.fc_2\.conv\.", "positional.gated.gate."),
    (r"^back\.scale\.positionalpool\.conv\.", "positional.gated.pool."),
    (r"^back\.scale\.positional_conv1\.conv\.", "positional.enter."),
    (r"^back\.scale\.positional_feedforward0\.conv\.", "positional.reduce."),
    (r"^back\.scale\.positional_feedforward1\.conv\.", "positional.between."),
    (r"^back\.scale\.positional_feedforward2\.conv\.", "positional.leave."),
    (r"^back\.scale\.positional_self_att(\d)\.f\.", lambda m: f"positional.attention.{int(m[1]) - 1}.query."),
    (r"^back\.scale\.positional_self_att(\d)\.g\.", lambda m: f"positional.attention.{int(m[1]) - 1}.key."),
    (r"^back\.scale\.positional_self_att(\d)\.h\.", lambda m: f"positional.attention.{int(m[1]) - 1}.value."),
    (r"^back\.scale\.positional_self_att(\d)\.out_conv\.", lambda m: f"positional.attention.{int(m[1]) - 1}.out."),
    (r"^gen\.mlp\.(\d)\.(conv\.)?", r"generator.linears.\1."),
    (r"^dis\.fc\.conv\.", "discriminator.shared."),
    (r"^dis\.pred\.", "discriminator.real."),
    (r"^dis\.cls\.", "discriminator.classify."),
)
