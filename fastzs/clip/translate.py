"""From open_clip's and timm's vision transformers to this package's: their sizes, and their weights' names.

Everything is read from the module, which may be without weights (device "meta"). What two tensors do one after the
other with nothing between is multiplied into one: layer scales go into the output projection and the MLP's last layer,
the query of an attention pool is computed. So results differ from theirs by rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from timm.layers.activations import GELU, GELUTanh
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from fastzs.clip.state import WeightsError
from fastzs.clip.variants import Variant
from fastzs.clip.vision import mlp_ratio

State = dict[str, Tensor]


def _only(value: Any, wanted: Any, name: str, what: str) -> None:
    if value != wanted:
        raise WeightsError(f"backbone {name!r} has {what}, which this package does not compute")


def open_clip_sizes(tower: Any, name: str) -> dict[str, Any]:
    """Arguments of :class:`fastzs.clip.VisionTransformer` for an open_clip ViT."""
    block: Any = tower.transformer.resblocks[0]
    _only(type(block), ResidualAttentionBlock, name, "blocks with norms or scales of heads")
    _only(getattr(tower, "attn_pool_contrastive", None), None, name, "two attention pools")
    pool, gelu = tower.attn_pool, block.mlp.gelu
    options: dict[str, Any] = {"norm_input": not isinstance(tower.ln_pre, nn.Identity)}
    if pool is not None:
        options |= {"pool": "attention", "pool_heads": pool.attn.num_heads, "pool_width": pool.attn.embed_dim}
        options |= {"pool_norm": True, "norm_after_pool": True}
    else:
        options |= {"pool": {"tok": "token", "avg": "mean"}[tower.pool_type]}
        options |= {"norm_after_pool": tower.final_ln_after_pool and tower.pool_type == "avg"}
    return {
        "width": tower.conv1.out_channels,
        "layers": len(tower.transformer.resblocks),
        "heads": block.attn.num_heads,
        "patch_size": tower.patch_size[0],
        "grid": tower.grid_size[0],
        "output_dim": tower.output_dim,
        "mlp_ratio": mlp_ratio(block.mlp.c_fc.out_features, tower.conv1.out_channels),
        "quick_gelu": not isinstance(gelu, nn.GELU),
        "norm_eps": tower.ln_post.eps,
        "variant": Variant(**options, tanh_gelu=getattr(gelu, "approximate", "none") == "tanh"),
    }


def from_open_clip(state: State) -> State:
    """A state dict of open_clip's ViT under this package's names."""
    out = {}
    for key, value in state.items():
        if key.startswith("attn_pool."):
            continue
        block, _, leaf = key.partition(".ls_")
        if leaf:
            continue
        out[block] = value
    for key, value in state.items():
        block, _, leaf = key.partition(".ls_")
        if leaf:
            _scale(out, f"{block}.attn.out_proj" if leaf[0] == "1" else f"{block}.mlp.c_proj", value)
    if "attn_pool.query" in state:
        out |= _queries(state)
    return out


def _scale(state: State, layer: str, by: Tensor) -> None:
    state[f"{layer}.weight"] = state[f"{layer}.weight"] * by[:, None]
    state[f"{layer}.bias"] = state[f"{layer}.bias"] * by


def _queries(state: State) -> State:
    """CoCa's pool of many queries, the first of which makes the image embedding."""
    pool = {key.removeprefix("attn_pool."): value for key, value in state.items() if key.startswith("attn_pool.")}
    if "attn.in_proj_weight" in pool:
        weights = pool["attn.in_proj_weight"].chunk(3)
    else:
        weights = [pool[f"attn.{which}_proj_weight"] for which in "qkv"]
    biases = pool["attn.in_proj_bias"].chunk(3)
    first = pool["query"][0]
    query = F.layer_norm(first, first.shape, pool["ln_q.weight"], pool["ln_q.bias"])
    return {
        "pool.query": F.linear(query, weights[0], biases[0]),
        "pool.key.weight": weights[1],
        "pool.key.bias": biases[1],
        "pool.value.weight": weights[2],
        "pool.value.bias": biases[2],
        "pool.out.weight": pool["attn.out_proj.weight"],
        "pool.out.bias": pool["attn.out_proj.bias"],
        "pool.norm_in.weight": pool["ln_k.weight"],
        "pool.norm_in.bias": pool["ln_k.bias"],
    }


def timm_sizes(tower: Any, name: str) -> dict[str, Any]:
    """Arguments of :class:`fastzs.clip.VisionTransformer` for an open_clip tower around a timm ViT.

    Raises:
        WeightsError: the ViT has something that this package does not compute; the message says what.
    """
    trunk = tower.trunk
    block: Any = trunk.blocks[0]
    mlp: Any = block.mlp
    attention, embed = block.attn, trunk.patch_embed
    width = trunk.embed_dim
    _only(trunk.reg_token is not None, False, name, "register tokens")
    _only(attention.gate is not None, False, name, "gated attention")
    _only(isinstance(attention.q_norm, nn.Identity), True, name, "norms of queries and keys")
    _only(attention.head_dim * attention.num_heads, width, name, "heads wider than its tokens")
    options: dict[str, Any] = {
        "stem_bias": isinstance(embed, PatchEmbed) and embed.proj.bias is not None,
        "prefix": trunk.num_prefix_tokens,
        "prefix_position": not trunk.no_embed_class,
        "positions": trunk.pos_embed is not None,
        "norm_input": not isinstance(trunk.norm_pre, nn.Identity),
        "attention_norm": not isinstance(attention.norm, nn.Identity),
        "norm_last": type(block).__name__ == "EvaBlockPostNorm",
    }
    if not isinstance(embed, PatchEmbed):
        options["stem"] = trunk.default_cfg["architecture"]
    if isinstance(mlp, SwiGLU):
        options |= {"gate": "silu", "mlp_norm": None if isinstance(mlp.norm, nn.Identity) else "hidden"}
        hidden = mlp.fc1_x.out_features
    elif isinstance(mlp, GeGluMlp):
        options |= {"gate": "gelu", "mlp_norm": "input"}
        hidden = mlp.w1.out_features
    else:
        gelu = {nn.GELU: False, GELU: False, GELUTanh: True}.get(type(mlp.act))
        plain = isinstance(mlp, Mlp) and gelu is not None and isinstance(mlp.norm, nn.Identity)
        _only(plain, True, name, f"MLPs of the kind {type(mlp).__name__} with {type(mlp.act).__name__}")
        options["tanh_gelu"] = gelu
        last: Any = mlp.fc1
        hidden = last.out_features
    rope = getattr(trunk, "rope", None)
    if rope is not None:
        usual = isinstance(rope, RotaryEmbeddingCat) and not rope.rotate_half and not rope.in_pixels
        _only(usual, True, name, f"rotary positions of the kind {type(rope).__name__}")
        kept = ("temperature", "grid_offset", "grid_indexing", "ref_feat_shape")
        options["rotary"] = {key: getattr(rope, key) for key in kept if getattr(rope, key) is not None}
    options |= _pool_options(trunk)
    linear = _projection(tower)
    _only(linear is None or isinstance(linear, nn.Linear), True, name, "a projection that is not linear")
    options |= {"projection": linear is not None, "projection_bias": getattr(linear, "bias", None) is not None}
    return {
        "width": width,
        "layers": len(trunk.blocks),
        "heads": attention.num_heads,
        "patch_size": trunk.feature_info[-1]["reduction"],
        "grid": embed.grid_size[0],
        "output_dim": width if linear is None else linear.out_features,
        "mlp_ratio": mlp_ratio(hidden, width),
        "quick_gelu": False,
        "norm_eps": block.norm1.eps,
        "variant": Variant(**options),
    }


def _pool_options(trunk: Any) -> dict[str, Any]:
    pool = trunk.attn_pool
    if isinstance(pool, AttentionPoolLatent):
        hidden = pool.mlp.fc1.out_features if pool.mlp is not None else 0
        tanh = pool.mlp is not None and isinstance(pool.mlp.act, GELUTanh)
        # EVA's forward gives its pool every token, the ViT's leaves CLS out unless told otherwise
        options = {"pool": "attention", "pool_prefix": isinstance(trunk, Eva) or trunk.pool_include_prefix}
        options |= {"pool_tanh_gelu": tanh}
        return options | {"pool_heads": pool.num_heads, "pool_width": pool.out_features, "pool_mlp": hidden}
    return {
        "pool": {"token": "token", "avg": "mean"}[trunk.global_pool],
        "norm_after_pool": isinstance(trunk.norm, nn.Identity),
    }


def _projection(tower: Any) -> Any:
    """The layer into the text space: open_clip's, or the classifier of timm's ViT, or None."""
    layers = [layer for layer in (tower.trunk.head, *tower.head) if not isinstance(layer, nn.Identity | nn.Dropout)]
    return layers[0] if len(layers) == 1 else layers or None


_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.proj": "attn.out_proj",
    "attn.norm": "attn.norm",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "mlp.fc1_g": "mlp.gate",
    "mlp.fc1_x": "mlp.c_fc",
    "mlp.w0": "mlp.gate",
    "mlp.w1": "mlp.c_fc",
    "mlp.w2": "mlp.c_proj",
    "mlp.norm": "mlp.norm",
}
_POOL = {"proj": "out", "norm": "norm", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}


def from_timm(state: State, sizes: dict[str, Any]) -> State:
    """A state dict of open_clip's tower around a timm ViT under this package's names."""
    variant: Variant = sizes["variant"]
    trunk = {key.removeprefix("trunk."): value for key, value in state.items() if key.startswith("trunk.")}
    out: State = {}
    for key, value in trunk.items():
        layer, _, leaf = key.rpartition(".")
        if key.startswith("patch_embed."):
            out["conv1." + key.removeprefix("patch_embed." if variant.stem else "patch_embed.proj.")] = value
        elif layer == "norm_pre":
            out[f"ln_pre.{leaf}"] = value
        elif layer in ("norm", "fc_norm"):
            out[f"ln_post.{leaf}"] = value
    if variant.prefix:
        out["class_embedding"] = trunk["cls_token"].flatten()
    if variant.positions:
        out["positional_embedding"] = trunk["pos_embed"][0]
    for index in range(sizes["layers"]):
        inside = {k.removeprefix(f"blocks.{index}."): v for k, v in trunk.items() if k.startswith(f"blocks.{index}.")}
        out |= {f"transformer.resblocks.{index}.{key}": value for key, value in _block(inside).items()}
    if variant.pool == "attention":
        pool = {k.removeprefix("attn_pool."): v for k, v in trunk.items() if k.startswith("attn_pool.")}
        out |= {f"pool.{key}": value for key, value in _latent(pool).items()}
    if variant.projection:
        weight = "head.proj" if "head.proj.weight" in state else "trunk.head"
        out["proj"] = state[f"{weight}.weight"].T
        if variant.projection_bias:
            out["proj_bias"] = state[f"{weight}.bias"]
    return out


def _block(state: State) -> State:
    out: State = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if layer in _BLOCK:
            out[f"{_BLOCK[layer]}.{leaf}"] = value
    if "attn.qkv.weight" in state:
        weight = state["attn.qkv.weight"]
        bias = state.get("attn.qkv.bias")
        if bias is None:
            zero = torch.zeros(len(weight) // 3, dtype=weight.dtype)
            bias = torch.cat([state.get("attn.q_bias", zero), zero, state.get("attn.v_bias", zero)])
    else:
        weights = [state[f"attn.{which}_proj.weight"] for which in "qkv"]
        zero = torch.zeros(len(weights[0]), dtype=weights[0].dtype)
        weight = torch.cat(weights)
        bias = torch.cat([state.get(f"attn.{which}_proj.bias", zero) for which in "qkv"])
    out |= {"attn.in_proj_weight": weight, "attn.in_proj_bias": bias}
    for layer, names in (("attn.out_proj", ("ls1.gamma", "gamma_1")), ("mlp.c_proj", ("ls2.gamma", "gamma_2"))):
        for name in names:
            if name in state:
                _scale(out, layer, state[name])
    return out


def _latent(state: State) -> State:
    out: State = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if layer in _POOL:
            out[f"{_POOL[layer]}.{leaf}"] = value
    for leaf in ("weight", "bias"):
        out[f"key.{leaf}"], out[f"value.{leaf}"] = state[f"kv.{leaf}"].chunk(2)
    out["query"] = F.linear(state["latent"].flatten(), state["q.weight"], state["q.bias"])
    return out
