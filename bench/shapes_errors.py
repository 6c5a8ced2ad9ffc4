"""What a trained system gets wrong on drawn shapes: colours, shapes, or where objects are.

    python -m bench.shapes_errors SYSTEM RUNS/SYSTEM/seed-0-.../stage-1/last [--pictures 60]

It reads scenes of the training and others, but not those that :mod:`bench.systems_shapes` scores, so that a preset may
be chosen by what is seen here. A system that is as wrong in training has not learnt the classes; one that is right only
there knows the scenes by heart.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastzs.data.datasets import ShapesDataset
from fastzs.data.shapes import PAIRS
from fastzs.data.shapes import SHAPES as KINDS
from fastzs.segmenter import Segmenter

from .systems_shapes import SEEN, SIDE, make, settings, words

SPLITS = ("train", "tune")


def shares(truth: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Shares of pixels in percent, by what they are of.

    Args:
        truth, labels: int64, of one shape, indices of the 64 pairs and 4 grounds; what is else in ``truth`` is ignored.

    Returns:
        Of ``seen`` and ``unseen`` pairs and of ``grounds`` the share that is called a ground; of the pairs' other
        pixels those with the right ``colour``, ``shape`` and ``both``. What has no pixel is left out.
    """
    pair, seen = truth < len(PAIRS), torch.isin(truth, torch.tensor(SEEN))
    kinds = {"seen": pair & seen, "unseen": pair & ~seen, "grounds": ~pair & seen}
    out = {}
    for kind, where in kinds.items():
        if not where.any():
            continue
        true, called = truth[where], labels[where]
        object_ = called < len(PAIRS)
        hits = {"ground": ~object_}
        if kind != "grounds":
            true, called = true[object_], called[object_]
            hits["colour"] = true // len(KINDS) == called // len(KINDS)
            hits["shape"] = true % len(KINDS) == called % len(KINDS)
            hits["both"] = true == called
        out[kind] = {name: round(100 * hit.float().mean().item(), 1) for name, hit in hits.items() if len(hit)}
    return out


@torch.inference_mode()
def look(model: Any, split: str, pictures: int) -> dict[str, dict[str, float]]:
    """:func:`shares` of a model's labels."""
    dataset, segmenter, vocabulary = ShapesDataset(split, 2000, SIDE), Segmenter(model.eval()), words(model, False)
    found = [
        (torch.as_tensor(m), segmenter(torch.as_tensor(x), vocabulary).labels)
        for x, m in map(dataset.__getitem__, range(pictures))
    ]
    truth, labels = (torch.cat([maps.flatten().long() for maps in some]) for some in zip(*found, strict=True))
    return shares(truth, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system")
    parser.add_argument("folder", type=Path, help="a trained model, as save_pretrained wrote it")
    parser.add_argument("--pictures", type=int, default=60, help="scenes of each kind")
    args = parser.parse_args()
    model = make(args.system, settings(args.system)[-1], args.folder)
    for split in SPLITS:
        print(json.dumps({"scenes": split} | look(model, split, args.pictures)))


if __name__ == "__main__":
    main()
