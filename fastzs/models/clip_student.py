"""A CLIP vision transformer with a DPT decoder, as a network that starts from what CLIP knows and may then change.

Source: Ranftl, Bochkovskiy, Koltun, "Vision Transformers for Dense Prediction", ICCV 2021, for the decoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastzs.clip import Clip
from fastzs.decoders.dpt import DPTDecoder, enlarged, quarters
from fastzs.models.lseg import Encoder, clip_tower


class ClipStudent(nn.Module):
    """Images to features that are 8 to a patch's side, so of half the images' size with patches of 16.

    Args:
        model: name of the system, for messages.
        clip: whose image tower it starts from.
        sizes: the tower's sizes, to build it without weights; those of ``clip`` if omitted.
        pretrained: start from the weights of ``clip`` if ``sizes`` are omitted.
        output_dim: channels D of the result.
        reassemble: channels of the four levels, fine to coarse.
        features: channels inside the decoder.

    Attributes:
        sizes: of the tower.

    Raises:
        WeightsError: the tower is not CLIP's own vision transformer.
    """

    def __init__(
        self,
        model: str,
        clip: Clip | None,
        sizes: Mapping[str, Any] | None,
        pretrained: bool,
        output_dim: int,
        *,
        reassemble: Sequence[int] = (256, 512, 1024, 1024),
        features: int = 256,
    ):
        super().__init__()
        tower, self.sizes = clip_tower(model, clip, sizes, pretrained)
        self.hooks = quarters(self.sizes["layers"])
        self.encoder = Encoder(tower, self.sizes["width"], reassemble, "project")
        self.decoder = DPTDecoder(reassemble, features, output_dim)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, h, w]. Sides are first enlarged to multiples of two patches."""
        images = enlarged(images, self.sizes["patch_size"])
        return self.decoder(self.encoder.levels(*self.encoder.tokens(images, self.hooks)))
