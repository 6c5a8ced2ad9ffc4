"""``T_pamr``: pixel-adaptive refinement of maps that the official code first enlarges with ``align_corners=True``."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastzs.ops import refine
from tests.parity.golden import DTYPES, Check, Golden


def pamr(golden: Golden) -> Iterator[Check]:
    for dtype in DTYPES:
        picture = golden["in.image"].to(dtype)
        for kind, variants in (("mask", golden.config["variants"]), ("cosines", ["clip"])):
            maps = F.interpolate(golden[f"in.{kind}"].to(dtype), picture.shape[2:], mode="bilinear", align_corners=True)
            for variant in variants:
                options = golden.config["variants"][variant]
                settings = {"dilations": options["dilations"], "iterations": options["num_iter"], "return_maps": True}
                both = [refine(one[None], guide, **settings).maps for one, guide in zip(maps, picture, strict=True)]
                yield from golden.checks(f"out64.{kind}.{variant}", torch.stack(both))
                if dtype == torch.float32:  # the official run in fp32
                    yield from golden.checks(f"out.{kind}.{variant}", torch.stack(both))


RUNNERS = {"T_pamr": pamr}
