"""CLIP's vision transformer with deep prompts and region tokens: the tower of ZegCLIP and CLIP-RC.

Sources: Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023 (deep prompt
tuning, after Jia et al., "Visual Prompt Tuning", 2022); Zhang et al., "Exploring Regional Clues in CLIP for
Zero-Shot Semantic Segmentation" (CLIP-RC), CVPR 2024 (region-level bridge).
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastzs.clip.blocks import Block, Rotation
from fastzs.clip.memo import Memo
from fastzs.clip.packable import unpack_if_trained
from fastzs.clip.products import Linear
from fastzs.clip.vision import VisionTransformer
from fastzs.ops import TokenLayout, bridged_attention
from fastzs.trace import traced


class Encoded(NamedTuple):
    """What the tower gives, in the text space, every vector of unit length."""

    patches: Tensor  # [B, h * w, D], row by row
    cls: Tensor  # [B, D]
    bridge: Tensor | None  # [B, rh * rw, D], row by row
    grid: tuple[int, int]


class PromptedVisionTransformer(VisionTransformer):
    """A CLIP ViT that sees learnt prompt tokens in every layer, and optionally a bridge of region tokens.

    Parameters carry the published checkpoints' names (``backbone.`` there).

    Args:
        prompts: number of prompt tokens of a layer.
        deep_prompts: layers after the first that get prompts of their own, in place of what the layer before made of
            its prompts; all of them if omitted. Layers after these get none (``total_d_layer`` in the published
            configurations). With 0 the first layer's prompts are carried through, and ``prompt_norm`` is not used.
        bridge: rows and columns of region tokens, see :class:`fastzs.ops.TokenLayout`; None in ZegCLIP.
        prompt_dropout: on the prompt tokens in training; published: 0.1.
        prompt_norm_eps: published: 1e-6, where all other norms have 1e-5.
        tower: sizes and switches of :class:`VisionTransformer`; ``double_class_embedding=True`` is published.
    """

    def __init__(
        self,
        *,
        prompts: int,
        deep_prompts: int | None = None,
        bridge: tuple[int, int] | None = None,
        prompt_dropout: float = 0.1,
        prompt_norm_eps: float = 1e-6,
        **tower,
    ):
        super().__init__(**tower)
        layers = len(self.transformer.resblocks)
        deep = layers - 1 if deep_prompts is None else deep_prompts
        if prompts < 0 or not 0 <= deep < layers:
            raise ValueError(
                f"prompts={prompts}, deep_prompts={deep_prompts}; expected at least 0, and 0 to {layers - 1} layers"
            )
        self.prompts = prompts
        self.bridge = None if bridge is None else (bridge[0], bridge[1])
        self.prompt_dropout = prompt_dropout
        width = self.width
        if prompts:
            bound = math.sqrt(6 / (3 * self.patch_size**2 + width))
            self.prompt_embeddings = nn.Parameter(torch.empty(1, prompts, width).uniform_(-bound, bound))
            if deep:
                self.deep_prompt_embeddings = nn.Parameter(torch.empty(deep, prompts, width).uniform_(-bound, bound))
                self.prompt_norm = nn.LayerNorm(width, eps=prompt_norm_eps)
            self.prompt_proj = Linear(width, width)
            nn.init.kaiming_normal_(self.prompt_proj.weight, mode="fan_out")
        if self.bridge:
            self.region_level_bridge = nn.Parameter(torch.empty(self.bridge[0] * self.bridge[1], width))
            self.reset_bridge()
        self.checkpointing = False  # compute the layers' activations again in backward
        self._prompt_kv: Memo[list[tuple[Tensor, Tensor]]] = Memo()

    @property
    def blocks(self) -> list[Block]:
        found = cast(list[Block], list(self.transformer.resblocks))
        unpack_if_trained(self, found)
        return found

    @property
    def deep_prompts(self) -> int:
        return len(self.deep_prompt_embeddings) if hasattr(self, "deep_prompt_embeddings") else 0

    @torch.no_grad()
    def reset_bridge(self) -> None:
        """All region tokens as CLS enters, but with the class embedding added once (published; CLS has it twice).

        In a tower without CLS they start as the mean of the positional table.
        """
        self.region_level_bridge.zero_()
        if self.prefix:
            self.region_level_bridge.add_(self.class_embedding)
        if self.variant.positions and self.prefix and self.variant.prefix_position:
            self.region_level_bridge.add_(self.positional_embedding[0])
        elif self.variant.positions:
            self.region_level_bridge.add_(self.positional_embedding.mean(0))

    @torch.no_grad()
    def start_from(self, plain: VisionTransformer) -> None:
        """Take the weights of a CLIP ViT of the same sizes; its positions are resized to this tower's grid."""
        state = plain.state_dict()
        if self.variant.positions:
            state["positional_embedding"] = plain.positions((self.grid, self.grid))
        self.load_state_dict(state, strict=False)
        if self.bridge:
            self.reset_bridge()

    def prompt_tokens(self, batch: int) -> list[Tensor]:
        """Prompts of the layers that have their own, each [1, M, C], or [B, M, C] under dropout."""
        embeddings: list[Tensor] = [self.prompt_embeddings]
        if self.deep_prompts:
            embeddings.append(self.deep_prompt_embeddings)
        tokens = self.prompt_proj(torch.cat(embeddings))  # [1 + deep, M, C]
        if self.training and self.prompt_dropout:
            return [F.dropout(layer.expand(batch, -1, -1), self.prompt_dropout) for layer in tokens]
        return list(tokens.unsqueeze(1))

    def prompt_kv(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1 or B, H, M, d] of the prompts in the layers that have their own.

        They depend on no picture, so in evaluation they are computed once.
        """
        blocks = self.blocks[: 1 + self.deep_prompts]

        def compute() -> list[tuple[Tensor, Tensor]]:
            return [keys_values(*pair) for pair in zip(blocks, self.prompt_tokens(batch), strict=True)]

        if self.training and self.prompt_dropout:
            return compute()
        sources = [self.prompt_embeddings, self.deep_prompt_embeddings, *self.prompt_proj.parameters()]
        for block in blocks:
            sources += [*block.ln_1.parameters(), *block.attn.sources]
        return self._prompt_kv(sources, compute)

    @traced("model.tower")
    def encode(self, images: Tensor) -> Encoded:
        """Features of the patches, of the picture and of the regions.

        Prompts are never queries where the next layer replaces them: they enter as keys and values only.

        Args:
            images: [B, 3, H, W], normalised; sides that are not multiples of the patch are padded with zeros.

        Raises:
            ValueError: the picture has fewer patches along a side than the bridge has tokens.
        """
        tokens, grid = self.embed(images)
        layout, rotation = TokenLayout(self.prefix, grid, self.bridge), self.rotation(grid)
        if self.bridge:
            regions = self.region_level_bridge.to(tokens).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([tokens, regions], dim=1)
        x = self.ln_pre(tokens)  # [B, prefix + N + R, C]
        blocks = self.blocks
        if not self.deep_prompts:
            x = self._carry(x, layout, rotation) if self.prompts else _run(blocks, x, layout, rotation)
        else:
            prompts = self.prompt_kv(x.shape[0])
            for i, block in enumerate(blocks):
                x = self._layer(block, x, layout, prompts[i] if i < len(prompts) else None, rotation)
            # the published code leaves the bridge out here
            x = torch.cat([self.prompt_norm(x[:, : layout.shared]), x[:, layout.shared :]], dim=1)
        y = F.normalize(self.to_text(x), dim=-1)
        patches, bridge = y[:, self.prefix : layout.shared], y[:, layout.shared :]
        if self.variant.pool == "token":
            cls = y[:, 0]
        else:
            cls = F.normalize(self.embedding(x[:, : layout.shared]), dim=-1)
        return Encoded(patches, cls, bridge if self.bridge else None, grid)

    def _layer(
        self,
        block: Block,
        x: Tensor,
        layout: TokenLayout,
        prompt_kv: tuple[Tensor, Tensor] | None,
        rotation: Rotation | None,
    ) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(step, block, x, layout, prompt_kv, rotation, use_reentrant=False))
        return step(block, x, layout, prompt_kv, rotation)

    def _carry(self, x: Tensor, layout: TokenLayout, rotation: Rotation | None) -> Tensor:
        """All layers with the first one's prompts as tokens; the last layer computes only the rows that are read."""
        (prompts,) = self.prompt_tokens(x.shape[0])
        first, last = self.prefix, self.prefix + self.prompts
        x = torch.cat([x[:, :first], prompts.expand(x.shape[0], -1, -1), x[:, first:]], dim=1)
        blocks = self.blocks
        shifted = rotation and rotation._replace(first=last)
        x = _run(blocks[:-1], x, TokenLayout(last, layout.grid, layout.bridge), shifted)
        prompt_kv = keys_values(blocks[-1], x[:, first:last])
        return step(blocks[-1], torch.cat([x[:, :first], x[:, last:]], dim=1), layout, prompt_kv, rotation)


def keys_values(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens [B, M, C] in a layer, each [B, H, M, d]."""
    k, v = block.attn.project(block.seen(tokens), "kv")
    return k, v


@traced("model.tower.block")
def step(
    block: Block,
    x: Tensor,
    layout: TokenLayout,
    prompt_kv: tuple[Tensor, Tensor] | None,
    rotation: Rotation | None = None,
) -> Tensor:
    """One layer: tokens [B, layout.length, C] -> the same; prompts and regions have no rotary positions."""
    q, k, v = block.project(x, rotation)
    x = block.add_attended(x, bridged_attention(q, k, v, layout, prompt_kv=prompt_kv))
    return block.add_mlp(x)


def _run(blocks: list[Block], x: Tensor, layout: TokenLayout, rotation: Rotation | None) -> Tensor:
    for block in blocks:
        x = step(block, x, layout, None, rotation)
    return x
