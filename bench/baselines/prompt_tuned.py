"""CLIP-RC and ZegCLIP in the published order of work, eagerly: the bar for :mod:`bench.test_models` and, in training,
for :mod:`bench.test_train_step`.

Prompts are tokens with queries of their own, the region mask is a dense additive matrix, all regions' maps are made
before their mean, every decoder layer's maps are made, windows run one after the other, and scores of all classes are
held at full resolution and resized to the picture. Parameters have the published names.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mask_loss import published as full_resolution_losses

CALIBRATION = 0.1


class LayerNorm(nn.LayerNorm):
    """In fp32 whatever the input, as CLIP's."""

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x, mask):  # [L, B, C]
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    class_embedding: nn.Parameter
    positional_embedding: nn.Parameter
    prompt_embeddings: nn.Parameter
    deep_prompt_embeddings: nn.Parameter
    proj: nn.Parameter

    def __init__(self, state, heads, grid):
        super().__init__()
        width, self.output_dim = state["proj"].shape
        self.grid = grid
        self.bridge = round(len(state["region_level_bridge"]) ** 0.5) if "region_level_bridge" in state else 0
        self.prompts = state["prompt_embeddings"].shape[1]
        layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer."))
        for name in ("class_embedding", "positional_embedding", "proj", "prompt_embeddings", "deep_prompt_embeddings"):
            self.register_parameter(name, nn.Parameter(torch.empty_like(state[name])))
        if self.bridge:
            self.region_level_bridge = nn.Parameter(torch.empty_like(state["region_level_bridge"]))
        patch = state["conv1.weight"].shape[-1]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.prompt_norm = LayerNorm(width, eps=1e-6)
        self.prompt_proj = nn.Linear(width, width)
        self.prompt_dropout = nn.Dropout(0.1)
        mlp_width = len(state["transformer.resblocks.0.mlp.c_fc.weight"])
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(Block(width, heads, mlp_width) for _ in range(layers))}
        )
        self.mask = self.attention_mask() if self.bridge else None
        self.load_state_dict(state)

    def attention_mask(self):
        r, g, m = self.bridge, self.grid, self.prompts
        first, length = 1 + m + g * g, 1 + m + g * g + r * r
        mask = torch.zeros(length, length)
        mask[first:] = -torch.inf
        mask[:, first:] = -torch.inf
        size = g // r
        for i in range(r):
            for j in range(r):
                token = first + i * r + j
                mask[token, token] = 0
                for y in range(i * size, (i + 1) * size):
                    for x in range(j * size, (j + 1) * size):
                        mask[token, 1 + m + y * g + x] = 0
                        mask[1 + m + y * g + x, token] = 0
        return mask

    def forward(self, images):
        batch, g, m = len(images), self.grid, self.prompts
        x = self.conv1(images).flatten(2).transpose(1, 2)
        cls = self.class_embedding + torch.zeros_like(x[:, :1])
        position = self.positional_embedding + 0
        position[0] += self.class_embedding
        grid = position[1:].T.reshape(1, -1, g, g)
        grid = F.interpolate(grid, (g, g), mode="bilinear").flatten(2)[0].T
        x = torch.cat([cls, x], dim=1) + torch.cat([position[:1], grid])
        if self.bridge:
            x = torch.cat([x, self.region_level_bridge.expand(batch, -1, -1)], dim=1)
        x = self.ln_pre(x)
        prompts = self.prompt_dropout(self.prompt_proj(self.prompt_embeddings).expand(batch, -1, -1))
        x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1).transpose(0, 1)
        mask = None if self.mask is None else self.mask.to(x)
        tokens = 1 + m + g * g
        blocks = list(self.transformer["resblocks"].children())
        for i, block in enumerate(blocks):
            if i:
                deep = self.prompt_proj(self.deep_prompt_embeddings[i - 1]).expand(batch, -1, -1)
                x = torch.cat([x[:1], self.prompt_dropout(deep).transpose(0, 1), x[1 + m :]])
            x = block(x, mask)
            if i >= len(blocks) - 2:  # of the last but one layer it is thrown away
                normed = self.prompt_norm(x[:tokens])
        x = torch.cat([normed, x[tokens:]]).transpose(0, 1)
        x = self.ln_post(x) @ self.proj
        cls = x[:, 0] / x[:, 0].norm(dim=1, keepdim=True)
        patches, bridge = x[:, 1 + m : tokens], x[:, tokens:]
        patches = patches.transpose(1, 2).reshape(batch, -1, g, g)
        patches = patches / patches.norm(dim=1, keepdim=True)
        if self.bridge:
            bridge = bridge.transpose(1, 2).reshape(batch, -1, self.bridge, self.bridge)
            bridge = bridge / bridge.norm(dim=1, keepdim=True)
        return cls, patches, bridge


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x, memory):
        batch, count, dim = x.shape
        q, k, v = (
            linear(y).reshape(batch, -1, self.heads, dim // self.heads).permute(0, 2, 1, 3)
            for linear, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        scores = q @ k.transpose(-2, -1) * self.scale
        kept = scores.clone()
        weights = self.attn_drop(scores.softmax(dim=-1))
        out = (weights @ v).transpose(1, 2).reshape(batch, count, dim)
        return self.proj(out), kept.sum(dim=1) / self.heads


class DecoderLayer(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.multihead_attn = CrossAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, memory):
        out, scores = self.multihead_attn(x, memory)
        x = self.norm2(x + self.dropout(out))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return x, scores


class Recovery(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.decouple_q, self.decouple_v = (nn.ModuleList([DecoderLayer(dim, heads, hidden)]) for _ in range(2))
        self.linear_q_in, self.linear_k_in, self.linear_k_out = (nn.Linear(dim, dim) for _ in range(3))
        self.linear_q_out = nn.Linear(dim, 2 * dim)

    def forward(self, q, z):
        q, z = self.linear_q_in(q), self.linear_k_in(z)
        q, z = self.decouple_q[0](q, z)[0], self.decouple_v[0](z, q)[0]
        return self.linear_q_out(q), self.linear_k_out(z)


def decoder(dim, heads, hidden, layers):
    return nn.ModuleDict({"layers": nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(layers))})


def _layers(stack):
    return list(stack["layers"])


class Published(nn.Module):
    """A published model from its checkpoint's tensors; ``kind`` is "clip_rc" or "zegclip"."""

    def __init__(self, kind, state, heads, decoder_heads, crop):
        super().__init__()
        self.kind, self.crop = kind, crop
        body = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
        patch = body["conv1.weight"].shape[-1]
        self.backbone = Tower(body, heads, crop // patch)
        head = {name.removeprefix("decode_head."): t for name, t in state.items() if name.startswith("decode_head.")}
        dim = self.backbone.output_dim
        streams = ("decoder_q", "decoder_v") if kind == "clip_rc" else ("decoder_1",)
        first = f"{streams[0]}.layers."
        layers = 1 + max(int(name.removeprefix(first).split(".")[0]) for name in head if name.startswith(first))
        hidden = len(head[f"{first}0.linear1.weight"])
        parts: dict[str, nn.Module] = {name: decoder(dim, decoder_heads, hidden, layers) for name in streams}
        parts["q_proj"] = nn.Linear(2 * dim, dim)
        if kind == "clip_rc":
            parts["lateral_proj"] = nn.Linear(3 * dim, dim)
        if "recovery_decoder.linear_q_in.weight" in head:
            parts["recovery_decoder"] = Recovery(dim, decoder_heads, hidden)
        self.decode_head = nn.ModuleDict(parts)
        wanted = self.decode_head.state_dict()
        # ZegCLIP's last layer has parts here that influence nothing; they may be missing
        self.decode_head.load_state_dict({name: head.get(name, t) for name, t in wanted.items()})

    def low_resolution(self, images, text):
        """Logits [B, C, g, g]."""
        cls, patches, bridge = self.backbone(images)
        return self.head(cls, patches, bridge, text)[0]

    def losses(self, images, target, text, focal, dice, recovery):
        """The training's loss of 512 x 512 crops; target [B, H, W] with 255 for ignored pixels."""
        cls, patches, bridge = self.backbone(images)
        logits, before, after = self.head(cls, patches, bridge, text)
        logits = F.interpolate(logits, (self.crop, self.crop), mode="bilinear", align_corners=False)
        mask, overlap = full_resolution_losses(logits, target)
        total = focal * mask + dice * overlap
        if "recovery_decoder" not in self.decode_head:
            return total
        assert before is not None
        assert after is not None
        q, z = self.decode_head["recovery_decoder"](*after)
        return total + recovery * (F.l1_loss(q, before[0].detach()) + F.l1_loss(z, before[1].detach()))

    def head(self, cls, patches, bridge, text):
        """Logits [B, C, g, g]; of CLIP-RC also the queries and patches before the decoder, and both streams after."""
        batch, g = len(cls), patches.shape[-1]
        memory = patches.flatten(2).transpose(1, 2)
        head = self.decode_head
        if self.kind == "zegclip":
            texts = text.expand(batch, -1, -1)
            q = head["q_proj"](torch.cat([cls[:, None] * texts, texts], dim=-1))
            for layer in _layers(head["decoder_1"]):
                q, scores = layer(q, memory)
            return scores.reshape(batch, -1, g, g), None, None
        regions = bridge.flatten(2).transpose(1, 2)  # [B, L, D]
        count = regions.shape[1]
        texts = text.expand(batch, count, -1, -1)
        relation = (regions + cls[:, None])[:, :, None] * texts
        descriptor = torch.cat([relation, texts], dim=-1).flatten(1, 2)
        q = head["q_proj"](descriptor)
        enlarged = F.interpolate(bridge, (g, g), mode="bilinear", align_corners=False)
        whole = cls[:, :, None, None].expand_as(patches)
        z = head["lateral_proj"](torch.cat([enlarged, whole, patches], dim=1).flatten(2).transpose(1, 2))
        for layer_q, layer_v in zip(_layers(head["decoder_q"]), _layers(head["decoder_v"]), strict=True):
            q, z = layer_q(q, z)[0], layer_v(z, q)[0]
        maps = torch.einsum("bqd,bnd->bqn", q, z).reshape(batch, count, -1, g, g)
        mean = maps[:, 0]
        for i in range(1, count):
            mean += maps[:, i]
        return mean / count, (descriptor, memory), (q, z)

    def scores(self, window, text, seen):
        """Probabilities of one window at its own resolution, [1, C, crop, crop], the seen classes' lowered."""
        logits = self.low_resolution(window, text)
        logits = F.interpolate(logits, (self.crop, self.crop), mode="bilinear", align_corners=False)
        probabilities = logits.sigmoid()
        if seen is not None:
            probabilities[:, seen] -= CALIBRATION
        return probabilities

    @torch.no_grad()
    def segment(self, image, text, stride, size, seen=None):
        """Labels [H', W'] of a resized, normalised picture [1, 3, H, W], for a picture of ``size``."""
        crop = self.crop
        height, width = image.shape[2:]
        total = image.new_zeros(1, len(text), height, width)
        visits = image.new_zeros(1, 1, height, width)
        for i in range(max(height - crop + stride - 1, 0) // stride + 1):
            for j in range(max(width - crop + stride - 1, 0) // stride + 1):
                bottom, right = min(i * stride + crop, height), min(j * stride + crop, width)
                top, left = max(bottom - crop, 0), max(right - crop, 0)
                scores = self.scores(image[:, :, top:bottom, left:right], text, seen)
                total += F.pad(scores, (left, width - right, top, height - bottom))
                visits[:, :, top:bottom, left:right] += 1
        total = total / visits
        total = F.interpolate(total, size, mode="bilinear", align_corners=False)
        return total.softmax(dim=1).argmax(dim=1)[0]
