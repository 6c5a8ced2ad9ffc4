"""PEARL: keys turned towards the queries before they are compared, and a Laplacian that refines the cosines.

Source: "PEARL", CVPR 2026; the attention is :func:`fastzs.ops.dense_attention`'s "procrustes", the refinement
:func:`fastzs.ops.refine`'s "laplacian". The last block is bare.
"""

import torch.nn.functional as F
from torch import Tensor

from fastzs.models.maskclip import DenseFeatures
from fastzs.models.training_free import CHECKPOINTS, Settings, TrainingFree
from fastzs.readout import Readout
from fastzs.registry import register


@register(
    "pearl",
    paper="PEARL (CVPR 2026)",
    does="windows through CLIP, keys turned to queries in a bare last block, cosines refined by a Laplacian",
    trained="",
    needs="a CLIP ViT",
    checkpoints=CHECKPOINTS,
)
class PEARL(TrainingFree):
    """PEARL (CVPR 2026); windows of 224 pixels at short side 336."""

    published = Settings("procrustes", True, 336, 224, 112, 0, Readout(scale=40.0, refine="laplacian", cells=80))

    def score(self, features: DenseFeatures, text: Tensor) -> Tensor:
        """Cosines [B, T, h, w]; the text vectors are brought to unit length once more, as published."""
        return super().score(features, F.normalize(text, dim=-1))
