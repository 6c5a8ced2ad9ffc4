"""An operator of one's own: ClearCLIP's attention of queries to queries, in ten lines.

    fastzs segment photos --classes road,car,sky --operator examples/own_operator.py:queries --output masks
    fastzs evaluate --benchmarks voc20 --data DIR --model clearclip --operator examples/own_operator.py:queries

It sees the last block of CLIP for a batch of windows (see fastzs.operators.LastBlock) and gives what each patch attends
to, [B, heads, N, d]. The output projection, the way to the text space, windows, refinement and vocabularies are done by
the package, so the same file runs everywhere that a built-in operator does.
"""

import torch

from fastzs.operators import LastBlock, operator


@operator("queries")
def queries(block: LastBlock) -> torch.Tensor:
    """softmax(q q' d^-1/2) v for the patches, whose keys are all tokens (Lan et al., ClearCLIP, ECCV 2024)."""
    q = block.q[:, :, block.prefix :]  # rows: the patches, without CLS
    weights = (q @ block.q.mT * block.scale).softmax(-1)
    return weights @ block.v


@operator("earlier", blocks=(0,))
def earlier(block: LastBlock) -> torch.Tensor:
    """The attention of an earlier block in place of the last one's, to show how its map is asked for."""
    return (block.maps[0] @ block.v)[:, :, block.prefix :]
