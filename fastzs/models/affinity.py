"""Another network's features as the measure of which patches belong together, for ProxyCLIP."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
from torch import Tensor, nn

from fastzs.clip.state import WeightsError

NAMES = {"dino": "vit_base_patch8_224.dino", "dinov2": "vit_base_patch14_reg4_dinov2.lvd142m"}


class Affinity(nn.Module):
    """A timm vision transformer that is shown what CLIP is shown.

    Args:
        network: "dino", "dinov2", any name of timm's vision transformers; a module or function that gives features
            [B, C, h, w] of images [B, 3, H, W] normalised with its own ``mean`` and ``std``; or features [C, h, w] that
            one has already, of the one image that is asked for.
        mean, std: what the images that come in are normalised with.

    Raises:
        ValueError: features that are not [C, h, w].
        WeightsError: timm does not know the name, or its weights cannot be fetched.
    """

    def __init__(self, network: str | Tensor | Callable[[Tensor], Tensor], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if isinstance(network, Tensor) and network.ndim != 3:
            raise ValueError(f"affinity: expected features [C, h, w] of one image, got {list(network.shape)}")
        if isinstance(network, str):
            network = _timm(NAMES.get(network, network))
        elif isinstance(network, Tensor):
            network = nn.Parameter(network.detach().clone(), requires_grad=False)
        self.network: Any = network
        config = getattr(network, "pretrained_cfg", {})
        own_mean, own_std = mean, std
        if not isinstance(network, Tensor):
            own_mean = config.get("mean", getattr(network, "mean", mean))
            own_std = config.get("std", getattr(network, "std", std))
        self.factor = [theirs / own for theirs, own in zip(std, own_std, strict=True)]
        self.shift = [(a - b) / own for a, b, own in zip(mean, own_mean, own_std, strict=True)]
        self.patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1,))[0]

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, C, h, w] after the network's last norm, of images [B, 3, H, W]."""
        if isinstance(self.network, Tensor):
            return self.network[None].to(images)
        factor, shift = (images.new_tensor(values)[:, None, None] for values in (self.factor, self.shift))
        images = images * factor + shift
        if hasattr(self.network, "forward_intermediates"):
            found = self.network.forward_intermediates(
                images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
            return found[-1]
        return self.network(images)


def _timm(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True).eval()
    except Exception as error:
        raise WeightsError(
            f"affinity {name!r}: timm could not make it with its weights ({str(error).splitlines()[0]}); give 'dino', "
            "'dinov2', the name of a timm vision transformer, or a module"
        ) from error
