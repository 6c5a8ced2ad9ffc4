"""SIGN: CaGNet whose latent code also knows where in the image a pixel is.

Source: Cheng et al., "SIGN: Spatial-information Incorporated Generative Network for Generalized Zero-shot Semantic
Segmentation", ICCV 2021, and its code. Before the contextual module, h is joined with positions: u = h + SP([sigmoid
h, PE]), or, in the attention form, u = SP([sigmoid h, PE]); features are x = sigmoid(u + u sigmoid Z). Every
cross-entropy is sum(w CE) / (sum w + 1e-6). All else is :class:`fastzs.models.CaGNet`.

Which form of SP the published numbers are of cannot be told from the code: its configurations were not kept. Its
"annealed" self-training is a rule of :mod:`fastzs.pseudo`, as it is meant; the released code gives all pseudo labels a
weight of 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fastzs.decoders.contextual import SpatialAttention, SpatialGates
from fastzs.models.cagnet import CaGNet
from fastzs.models.trained import OWN
from fastzs.registry import register


@register(
    "sign",
    paper="SIGN (Cheng et al., ICCV 2021)",
    does="as CaGNet, with positions",
    trained="a DeepLabV2 (ResNet), a generator, a discriminator",
    needs="masks of the seen classes; word vectors, or CLIP's text tower",
    checkpoints=f"published .pth, {OWN}",
)
class SIGN(CaGNet):
    """SIGN for images of any size; the classes are those it was trained for.

    Args:
        classes, backbone, weights, options: see :class:`fastzs.models.CaGNet`.
        positions: "gates" (the code's default) or "attention" (its network type 7).
        positions_hidden: width of that module; published: 256 or 128.
    """

    REDUCED_EPS: ClassVar[float] = 1e-6

    def __init__(
        self,
        classes: Sequence[str] | int,
        backbone: str = "ViT-B-16",
        weights: str = "openai",
        *,
        positions: Literal["gates", "attention"] = "gates",
        positions_hidden: int | None = None,
        **options: Any,
    ):
        if positions not in ("gates", "attention"):
            raise ValueError(f"SIGN: positions must be 'gates' or 'attention', got {positions!r}")
        super().__init__(classes, backbone, weights, **options)
        width = self.head.convs[0].out_channels
        gates = positions == "gates"
        hidden = positions_hidden or (256 if gates else 128)
        self.positional: nn.Module = SpatialGates(width, hidden) if gates else SpatialAttention(width, hidden)
        if self.stage == "mixed":
            self.positional.requires_grad_(False)
        self.settings.update(positions=positions, positions_hidden=hidden)

    def spatial(self, h: Tensor) -> Tensor:
        return self.positional(h)

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        gates = "positional.gated.gate.weight" in state
        inner = state["positional.gated.steps.0.weight" if gates else "positional.reduce.weight"]
        options = {"positions": "gates" if gates else "attention", "positions_hidden": len(inner)} | options
        return super()._sizes(state, options)
