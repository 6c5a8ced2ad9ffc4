"""Published checkpoints of DeOP: their names and sizes in terms of ours.

They are detectron2's. The proposals' network is MaskFormer's published one on a ResNet in DeepLab's form (101c). Left
out are the text's learnt prefix, CLIP's text tower, the proposals' own embeddings, which only the first stage of
training uses, and the norm of the anchors' layers, on which no output depends.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastzs.clip import WeightsError
from fastzs.clip.vision import mlp_ratio
from fastzs.models.trained import count_layers

VISUAL = "clip_adapter.clip_model.visual."
BLOCK_POSITION = re.escape(VISUAL) + r"transformer\.resblocks\.(\d+)\.learned_position"
CLIP_HEAD = 64  # channels of a head in every CLIP
KNOWN = {(768, 12, 16, 512): "ViT-B-16", (1024, 24, 14, 768): "ViT-L-14"}  # whose text tower belongs to it

# the proposals' network: patterns of published names, and ours
PREDICTOR = r"sem_seg_head\.predictor\."
PIXELS = r"sem_seg_head\.pixel_decoder\."
NAMES = (
    (r"backbone\.stem\.conv1\.weight", r"pyramid.stem.0.weight"),
    (r"backbone\.stem\.conv1\.norm\.", r"pyramid.stem.1."),
    (r"backbone\.stem\.conv1_(\d)\.weight", lambda m: f"pyramid.stem.{3 * int(m[1]) - 3}.weight"),
    (r"backbone\.stem\.conv1_(\d)\.norm\.", lambda m: f"pyramid.stem.{3 * int(m[1]) - 2}."),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.weight", lambda m: f"{_block(m)}conv{m[3]}.weight"),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"{_block(m)}bn{m[3]}."),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.weight", lambda m: f"{_block(m)}downsample.0.weight"),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.", lambda m: f"{_block(m)}downsample.1."),
    (PIXELS + r"adapter_(\d)\.weight", lambda m: f"pixels.lateral.{int(m[1]) - 1}.0.weight"),
    (PIXELS + r"adapter_(\d)\.norm\.", lambda m: f"pixels.lateral.{int(m[1]) - 1}.1."),
    (PIXELS + r"layer_4\.weight", r"pixels.coarsest.0.0.weight"),
    (PIXELS + r"layer_4\.norm\.", r"pixels.coarsest.0.1."),
    (PIXELS + r"layer_(\d)\.weight", lambda m: f"pixels.output.{int(m[1]) - 1}.0.0.weight"),
    (PIXELS + r"layer_(\d)\.norm\.", lambda m: f"pixels.output.{int(m[1]) - 1}.0.1."),
    (PIXELS + r"mask_features\.", r"pixels.embed."),
    (PREDICTOR + r"query_embed\.weight", r"queries"),
    (PREDICTOR + r"input_proj\.", r"project."),
    (PREDICTOR + r"mask_embed\.layers\.(\d)\.", lambda m: f"to_mask.{2 * int(m[1])}."),
    (PREDICTOR + r"transformer\.decoder\.norm\.", r"norm."),
    (PREDICTOR + r"transformer\.decoder\.layers\.(\d+)\.self_attn\.", r"layers.\1.among."),
    (PREDICTOR + r"transformer\.decoder\.layers\.(\d+)\.multihead_attn\.", r"layers.\1.to_picture."),
    (PREDICTOR + r"transformer\.decoder\.layers\.(\d+)\.", r"layers.\1."),
)


def _block(match: re.Match) -> str:
    """The place of a residual block: res2 is the first stage."""
    return f"pyramid.stages.{int(match[1]) - 2}.{match[2]}."


def recognised(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors of these names are a whole DeOP, published or ours."""
    return "anchors.queries" in state or (VISUAL + "learned_position" in state and "query_embedding.weight" in state)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by our names.

    Published ones have no counters of batches, and two layers where we have one to name proposals with in the first
    stage of training: that one starts anew.
    """
    if "anchors.queries" in state:
        return dict(state)
    out = naming(state) | proposing(state)
    if "maskformer.queries" in out and "no_object" in out:
        fresh = nn.Linear(out["maskformer.queries"].shape[-1], out["no_object"].shape[-1])
        out |= {f"project.{name}": tensor for name, tensor in fresh.state_dict().items()}
    for name in [name for name in out if name.endswith("running_mean")]:
        out.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return out


def proposing(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network of the proposals."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, ours in NAMES:
            if re.match(pattern, name):
                out["maskformer." + re.sub(pattern, ours, name, count=1)] = tensor
                break
    return out


def naming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower, the anchors and the vector of "no object"."""
    out: dict[str, Tensor] = {}
    blocks = sorted(int(n.split("resblocks.")[1].split(".")[0]) for n in state if re.fullmatch(BLOCK_POSITION, n))
    for name, tensor in state.items():
        if name == "query_embedding.weight":
            out["anchors.queries"] = tensor
        elif name == "clip_adapter.non_object_embedding":
            out["no_object"] = tensor
        elif name == VISUAL + "learned_position":
            out["tower.first"] = tensor
        elif found := re.fullmatch(BLOCK_POSITION, name):
            out[f"tower.more.{blocks.index(int(found[1]))}"] = tensor
        elif name.startswith(VISUAL):
            out[f"tower.tower.{name.removeprefix(VISUAL)}"] = tensor
        elif found := re.fullmatch(r"decoder\.outlayer\.multihead_attn_my\.in_proj_(weight|bias)", name):
            query, key, _ = tensor.chunk(3)  # values are pooled as they are
            out |= {f"anchors.query.{found[1]}": query, f"anchors.key.{found[1]}": key}
        elif name.startswith("decoder.outlayer."):
            rest = name.removeprefix("decoder.outlayer.")
            out["anchors." + rest.replace("self_attn.", "among.").replace("norm1.", "among_norm.")] = tensor
        elif name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.")
            out["anchors." + rest.replace("self_attn.", "among.").replace("multihead_attn_my.", "to_picture.")] = tensor
    return out


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments from tensors by our names; KeyError names one that is missing.

    Blocks with positions of their own are taken to be those after the first, as published.
    """
    tower, decoder = "tower.tower.", "maskformer.layers."
    width, output_dim = state[f"{tower}proj"].shape
    layers = count_layers(state, f"{tower}transformer.resblocks.")
    patch_size = state[f"{tower}conv1.weight"].shape[-1]
    side = math.isqrt(len(state["tower.first"]) - 1)
    return {
        "backbone": KNOWN.get((width, layers, patch_size, output_dim), ""),
        "weights": "openai",
        "sizes": {
            "width": width,
            "layers": layers,
            "heads": max(1, width // CLIP_HEAD),
            "patch_size": patch_size,
            "grid": math.isqrt(len(state[f"{tower}positional_embedding"]) - 1),
            "output_dim": output_dim,
            "mlp_ratio": mlp_ratio(len(state[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"]), width),
        },
        "resnet": _resnet(state),
        "pretrained": None,
        "proposals": {
            "width": len(state["maskformer.project.weight"]),
            "queries": len(state["maskformer.queries"]),
            "layers": count_layers(state, decoder),
            "hidden": len(state[f"{decoder}0.linear1.weight"]),
        },
        "added": list(range(1, 1 + sum(name.startswith("tower.more.") for name in state))),
        "added_side": side,
        "anchor_layers": count_layers(state, "anchors.layers."),
        "anchor_hidden": len(state["anchors.layers.0.linear1.weight"]),
    }


def _resnet(state: Mapping[str, Tensor]) -> str:
    """The name of the proposals' ResNet; all have bottlenecks."""
    third = count_layers(state, "maskformer.pyramid.stages.2.")
    deep = "maskformer.pyramid.stem.6.weight" in state
    name = {6: "resnet50", 23: "resnet101"}.get(third)
    if name is None:
        raise WeightsError(f"DeOP: expected a ResNet-50 or 101, got one with {third} blocks in its third stage")
    return name + "c" * deep
