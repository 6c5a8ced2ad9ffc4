"""ProxyCLIP: CLIP's values, mixed by the similarity of another network's features.

Source: Lan et al., "ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation", ECCV 2024. With u_i the
unit features of the other network on its own grid, S = u u', and the last block's values brought to that grid::

    A = softmax(gamma (S - beta mean S)), where that is not negative         beta 1.2, gamma 3; the same for all heads

The last block is bare, and maps have the other network's grid. Where every score of a patch is negative, as in an image
of one colour, a patch sees itself; the published code gives NaN there.
"""

import math
from collections.abc import Callable

from torch import Tensor

from fastzs.clip import Clip, VisionTransformer
from fastzs.models.affinity import Affinity
from fastzs.models.base import weights_digest
from fastzs.models.maskclip import DenseFeatures
from fastzs.models.training_free import CHECKPOINTS, Settings, TrainingFree
from fastzs.operators import LastBlock, identity_of
from fastzs.ops import dense_attention
from fastzs.readout import Readout
from fastzs.regions import at_size, merged
from fastzs.registry import register
from fastzs.windows import Size


@register(
    "proxyclip",
    paper="ProxyCLIP (Lan et al., ECCV 2024)",
    does="windows through CLIP and a second network, whose features mix CLIP's values",
    trained="",
    needs="a CLIP ViT, and a timm ViT such as DINO",
    checkpoints=CHECKPOINTS,
)
class ProxyCLIP(TrainingFree):
    """ProxyCLIP (ECCV 2024); windows of 336 pixels at short side 336.

    Args:
        clip: weights of a vision transformer.
        affinity: see :class:`fastzs.models.affinity.Affinity`; published: "dino".
        beta, gamma: shift and scale of the similarities.
        floor: weights are the similarities of at least this instead of a softmax (CLIP-DINOiser: 0.2).
        merge: regions of an image whose mean features differ by no more count as one, as in CorrCLIP, see
            :func:`fastzs.regions.merged`.
        options: see :class:`TrainingFree`; ``multiple`` is the least common multiple of both patch sizes if omitted.

    An operator of one's own (``dense=``) finds the other network's features in ``LastBlock.affinity`` and gives rows
    for its grid, or for CLIP's.

    Raises:
        ValueError: a tower that is no vision transformer, or another operator that is built in.
        WeightsError: see :class:`fastzs.models.affinity.Affinity`.
    """

    published = Settings("proxy", True, 336, 336, 112, 56, Readout(scale=40.0, direct=True))

    def __init__(
        self,
        clip: Clip,
        *,
        affinity: str | Tensor | Callable[[Tensor], Tensor] = "dino",
        beta: float = 1.2,
        gamma: float = 3.0,
        floor: float | None = None,
        merge: float = 0.2,
        multiple: int | None = None,
        **options,
    ):
        super().__init__(clip, **options)
        if not isinstance(self.visual, VisionTransformer):
            raise ValueError(f"ProxyCLIP replaces a transformer's last attention, which {clip.backbone} lacks")
        if isinstance(self.kind, str) and self.kind != "proxy":
            raise ValueError(f"ProxyCLIP: expected the operator 'proxy' or a function, got {self.kind!r}")
        self.affinity = Affinity(affinity, self.mean, self.std)
        self.fingerprint = f"{clip.fingerprint} {weights_digest(self.affinity)}"
        self.settings |= {
            "affinity": "features" if isinstance(affinity, Tensor) else identity_of(affinity),
            "beta": beta,
            "gamma": gamma,
            "floor": floor,
            "merge": merge,
        }
        self.beta, self.gamma, self.floor, self.merge = beta, gamma, floor, merge
        self.multiple = math.lcm(self.visual.patch_size, self.affinity.patch) if multiple is None else multiple

    def encode(self, images: Tensor, regions: Tensor | None = None) -> DenseFeatures:
        """Features of every patch; not with features of a whole image as the affinity.

        Raises:
            ValueError: the affinity is a tensor.
        """
        if isinstance(self.affinity.network, Tensor):
            raise ValueError(
                "ProxyCLIP: the affinity is features of a whole image, but windows are taken one by one; use "
                "windows='stitched', where crop=0 takes the image whole, or give a function"
            )
        return super().encode(images, regions)

    def last_block(
        self, tokens: Tensor, grid: Size, maps: dict[int, Tensor], fitted: Tensor, regions: Tensor | None
    ) -> Tensor:
        """Features [B, D, h', w'] on the other network's grid, or on CLIP's if an own operator chose that."""
        tower = self.visual
        assert isinstance(tower, VisionTransformer)
        features = self.affinity(fitted)
        theirs = (features.shape[2], features.shape[3])
        if regions is not None:
            regions = merged(at_size(regions, theirs), features, self.merge)
        q, k, v = tower.projections(tokens, grid)
        if isinstance(self.kind, str):
            options = {"beta": self.beta, "gamma": self.gamma, "floor": self.floor, "regions": regions}
            attended = dense_attention(q, k, v, "proxy", grid, affinity=features, **options)
        else:
            attended = self.kind(LastBlock(tokens, q, k, v, grid, maps, features, regions))
        own = theirs if attended.shape[2] == theirs[0] * theirs[1] else grid
        return tower.read(tower.finish(tokens, attended, False, False), own)
