"""A small training: a data set of drawn scenes, and models that train on it in milliseconds.

python -m tests.training OUTPUT [max_steps=9 ...]     train there, with changes to the recipe
"""

import ast
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from fastzs import cli
from fastzs.data import shapes
from fastzs.models import ClipRC, ZegCLIP
from fastzs.ranks import join, leave
from fastzs.recipe import Recipe
from fastzs.train import Outcome, train

SIZES = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "grid": 4, "output_dim": 16}
CLASSES = ("red disc", "blue ring", "green star", "pink moon", *shapes.GROUNDS)
SEEN = [0, 1, 4, 5, 6, 7]
TEXT = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(3)), dim=1)


class Scenes:
    """Drawn scenes with labels of CLASSES."""

    classes = CLASSES

    def __init__(self, count: int = 10, size: int = 32):
        scenes = shapes.draw(count, (size, size), radius=(5, 12), pairs=CLASSES[:4])
        self.images, self.masks = scenes.images, scenes.labels(CLASSES)
        self.names = [f"scene {i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return tv_tensors.Image(self.images[index]), tv_tensors.Mask(self.masks[index])


def flipped(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise, and mirror every other time."""
    image = (image.float() / 255 - 0.45) / 0.22
    return (image.flip(-1), mask.flip(-1)) if torch.rand(()) < 0.5 else (image, mask)


def small(kind: type = ClipRC, **options) -> ClipRC | ZegCLIP:
    torch.manual_seed(5)
    bridge = {"bridge": (2, 2)} if kind is ClipRC else {}
    return kind(weights="random", sizes=SIZES, prompts=3, crop=32, **bridge, **options)


def settings(*arguments: str) -> dict[str, Any]:
    """What ``fastzs train`` makes of its arguments."""
    given, _ = cli._config_first(["train", "--output", "out", *arguments])
    return cli._parser().parse_args(given)["train"].as_dict()


def recipe(**changes) -> Recipe:
    plain = {"max_steps": 6, "batch_size": 4, "lr": 1e-3, "warmup": 2, "workers": 0, "log_every": 1}
    plain |= {"precision": "fp32"}
    return Recipe(**(plain | changes))


def equal_states(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def scores(model: torch.nn.Module) -> dict[str, float]:
    """An evaluation: the share of pixels labelled as drawn."""
    right = total = 0
    for image, mask in (Scenes(4)[i] for i in range(4)):
        logits = model(((image.float() / 255 - 0.45) / 0.22)[None], TEXT)
        labels = torch.nn.functional.interpolate(logits, mask.shape, mode="bilinear").argmax(1)
        right, total = right + (labels == mask).sum().item(), total + mask.numel()
    return {"hIoU": right / total}


def train_small(output: Path, transform=flipped, **changes) -> Outcome:
    """Without dropout, which differs between processes."""
    plan = recipe(**changes)
    return train(small(dropout=0.0), Scenes(), transform, TEXT, plan, output, seen=SEEN, evaluate=scores)


def slowly(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    time.sleep(0.02)
    return flipped(image, mask)


if __name__ == "__main__":
    changes = {key: ast.literal_eval(value) for key, value in (item.split("=") for item in sys.argv[2:])}
    join(torch.device("cpu"))
    print(train_small(Path(sys.argv[1]), slowly, **changes))
    leave()
