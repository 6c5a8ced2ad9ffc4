"""CLIP and SigLIP as transformers saves them, read without transformers: configuration, tokenizer, tensors' names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastzs.clip import tokenizers
from fastzs.clip.state import WeightsError, read_json, read_state
from fastzs.clip.vision import mlp_ratio

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
FILES = (*WEIGHTS[:1], "preprocessor_config.json", *tokenizers.FILES)
# what their configurations leave out, since it is the default of transformers' classes
_CLIP = {"projection_dim": 512, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
_CLIP_TEXT |= {"num_attention_heads": 8, "max_position_embeddings": 77, "eos_token_id": 49407}
_CLIP_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_VISION |= {"image_size": 224, "patch_size": 32}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIGLIP_TEXT = {"vocab_size": 32000, "max_position_embeddings": 64}
_SIGLIP_VISION = {"image_size": 224, "patch_size": 16}
_GELUS = {"quick_gelu": {}, "gelu": {}, "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}}}


def describe(folder: Path, source: str) -> dict[str, Any]:
    """Fields of a :class:`fastzs.clip.Clip` for a folder that ``CLIPModel`` or ``SiglipModel`` was saved in.

    Raises:
        WeightsError: another model, an option that is not known, or files that are missing or damaged.
    """
    config = read_json(folder / "config.json")
    model = open_clip_config(config, f"{folder / 'config.json'}")
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"weights folder {folder}: none of {', '.join(WEIGHTS)} is in it")
    if not (folder / "tokenizer.json").is_file():
        raise WeightsError(
            f"weights folder {folder}: there is no tokenizer.json in it; save the tokenizer beside the model with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    length = model["text_cfg"]["context_length"]
    preprocessor = folder / "preprocessor_config.json"
    preprocess = read_json(preprocessor) if preprocessor.is_file() else {}
    mean, std = preprocessing(config)
    return {
        "backbone": source,
        "source": source,
        "config": model,
        "path": path,
        "quick_gelu": model["quick_gelu"],
        "mean": preprocess.get("image_mean", mean),
        "std": preprocess.get("image_std", std),
        "tokenizer": tokenizers.FileTokenizer(folder, length, cleaning(config)),
        "layout": "transformers",
    }


OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def open_clip_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's configuration of a ``CLIPConfig`` or ``SiglipConfig``, given as a mapping.

    Args:
        where: it comes from, for messages.

    Raises:
        WeightsError: it is of another model, or has an option that is not known.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise WeightsError(
            f"{where}: model_type is {kind!r}; expected 'clip' or 'siglip' (transformers), "
            "or a folder with open_clip_config.json"
        )
    return _clip(config, where) if kind == "clip" else _siglip(config, where)


def preprocessing(config: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """The usual mean and standard deviation of images, where nothing else is said."""
    half = [0.5] * 3
    return (half, half) if config["model_type"] == "siglip" else (OPENAI_MEAN, OPENAI_STD)


def cleaning(config: Mapping[str, Any]) -> str:
    """open_clip's name of what is done to texts before they become tokens."""
    return "canonicalize" if config["model_type"] == "siglip" else "whitespace"


def _sizes(config: Mapping[str, Any], part: str, defaults: dict[str, Any], where: str) -> dict[str, Any]:
    sizes = defaults | {k: v for k, v in config.get(f"{part}_config", {}).items() if v is not None}
    if sizes["hidden_act"] not in _GELUS:
        raise WeightsError(f"{where}: {part}_config has hidden_act={sizes['hidden_act']!r}, not known here")
    return sizes


def _text(text: dict[str, Any], **options) -> dict[str, Any]:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": mlp_ratio(text["intermediate_size"], text["hidden_size"]),
        "norm_kwargs": {"eps": text["layer_norm_eps"]},
        **_GELUS[text["hidden_act"]],
        **options,
    }


def _clip(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's configuration of a ``CLIPConfig``."""
    text = _sizes(config, "text", _CLIP | _CLIP_TEXT, where)
    vision = _sizes(config, "vision", _CLIP | _CLIP_VISION, where)
    if vision["hidden_act"] != text["hidden_act"]:
        raise WeightsError(f"{where}: the towers have different activations, which is not known here")
    # saved before transformers 4.31 they have 2 there, and the end of a text is the highest id
    end = {"pool_type": "argmax"} if text["eos_token_id"] == 2 else {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    return {
        "embed_dim": config.get("projection_dim", _CLIP["projection_dim"]),
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": mlp_ratio(vision["intermediate_size"], vision["hidden_size"]),
            "norm_kwargs": {"eps": vision["layer_norm_eps"]},
            **_GELUS[vision["hidden_act"]],
        },
        "text_cfg": _text(text, **end),
    }


def _siglip(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration of a ``SiglipConfig``: open_clip's for the text, and this package's own for the vision tower."""
    text = _sizes(config, "text", _SIGLIP | _SIGLIP_TEXT, where)
    vision = _sizes(config, "vision", _SIGLIP | _SIGLIP_VISION, where)
    tanh = vision["hidden_act"] == "gelu_pytorch_tanh"
    width, out = vision["hidden_size"], text.get("projection_size") or text["hidden_size"]
    sizes = {
        "width": width,
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "grid": vision["image_size"] // vision["patch_size"],
        "output_dim": width,
        "mlp_ratio": mlp_ratio(vision["intermediate_size"], width),
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "norm_eps": vision["layer_norm_eps"],
        "variant": {
            "stem_bias": True,
            "prefix": 0,
            "norm_input": False,
            "tanh_gelu": tanh,
            "pool": "attention",
            "pool_heads": vision["num_attention_heads"],
            "pool_width": width,
            "pool_mlp": vision["intermediate_size"],
            "pool_tanh_gelu": tanh,
            "projection": False,
        },
    }
    return {
        "embed_dim": out,
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": vision["image_size"], "patch_size": vision["patch_size"], "sizes": sizes},
        "text_cfg": _text(text, no_causal_mask=True, pool_type="last", proj_bias=True),
    }


_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def read(path: Path, config: dict) -> dict[str, Tensor]:
    """The tensors of a file that a ``CLIPModel`` or ``SiglipModel`` was saved in, see :func:`renamed`."""
    return renamed(_all_files(path), config, str(path))


def renamed(state: Mapping[str, Tensor], config: dict, where: str) -> dict[str, Tensor]:
    """The tensors of a ``CLIPModel`` or ``SiglipModel`` under open_clip's names, the SigLIP vision tower's under this
    package's.

    Args:
        config: see :func:`open_clip_config`.
        where: they come from, for messages.

    Raises:
        WeightsError: tensors are missing or left over; the message has their names.
    """
    siglip = "sizes" in config["vision_cfg"]
    layers = config["vision_cfg"]["sizes"]["layers"] if siglip else config["vision_cfg"]["layers"]
    names = {"token_embedding.weight": "text_model.embeddings.token_embedding.weight"}
    names["positional_embedding"] = "text_model.embeddings.position_embedding.weight"
    names["logit_scale"] = "logit_scale"
    names["visual.positional_embedding"] = "vision_model.embeddings.position_embedding.weight"
    names["visual.conv1.weight"] = "vision_model.embeddings.patch_embedding.weight"
    layer_names = [("ln_final", "text_model.final_layer_norm"), ("visual.ln_post", "vision_model.post_layernorm")]
    towers = (("", "text_model", config["text_cfg"]["layers"]), ("visual.", "vision_model", layers))
    for prefix, theirs, count in towers:
        for index in range(count):
            ours, other = f"{prefix}transformer.resblocks.{index}", f"{theirs}.encoder.layers.{index}"
            layer_names += [(f"{ours}.{a}", f"{other}.{b}") for a, b in _LAYER.items()]
    if siglip:
        names |= {"visual.conv1.bias": "vision_model.embeddings.patch_embedding.bias", "logit_bias": "logit_bias"}
        layer_names += [
            ("text_projection", "text_model.head"),
            ("visual.pool.out", "vision_model.head.attention.out_proj"),
        ]
        layer_names += [("visual.pool.norm", "vision_model.head.layernorm")]
        layer_names += [(f"visual.pool.mlp.{i}", f"vision_model.head.mlp.fc{j}") for i, j in ((0, 1), (2, 2))]
    else:
        names["visual.class_embedding"] = "vision_model.embeddings.class_embedding"
        layer_names += [("visual.ln_pre", "vision_model.pre_layrnorm")]
    for a, b in layer_names:
        names |= {f"{a}.{leaf}": f"{b}.{leaf}" for leaf in ("weight", "bias")}
    attention = {
        f"{prefix}transformer.resblocks.{index}.attn.in_proj_{leaf}": [
            f"{theirs}.encoder.layers.{index}.self_attn.{which}_proj.{leaf}" for which in "qkv"
        ]
        for prefix, theirs, count in towers
        for index in range(count)
        for leaf in ("weight", "bias")
    }
    pool, query = "vision_model.head.attention.in_proj", "vision_model.head.probe"
    projections = ["visual_projection.weight", "text_projection.weight"]
    others = [f"{pool}_weight", f"{pool}_bias", query] if siglip else projections
    _exactly([*names.values(), *(part for parts in attention.values() for part in parts), *others], state, where)
    out = {ours: state[theirs] for ours, theirs in names.items()}
    out |= {ours: torch.cat([state[part] for part in parts]) for ours, parts in attention.items()}
    if siglip:
        weights, biases = state[f"{pool}_weight"].chunk(3), state[f"{pool}_bias"].chunk(3)
        out["visual.pool.query"] = weights[0] @ state[query].flatten() + biases[0]
        for index, name in ((1, "key"), (2, "value")):
            out |= {f"visual.pool.{name}.weight": weights[index], f"visual.pool.{name}.bias": biases[index]}
        return out | {name: out[name].reshape(()) for name in ("logit_scale", "logit_bias")}
    return out | {"visual.proj": state[projections[0]].T, "text_projection": state[projections[1]].T}


def _exactly(wanted: Sequence[str], state: Mapping[str, Tensor], where: str) -> None:
    left = sorted(name for name in set(state) - set(wanted) if not name.endswith("position_ids"))
    missing = [name for name in wanted if name not in state]
    parts = [
        f"{what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
        for what, names in (("missing", missing), ("unexpected", left))
        if names
    ]
    if parts:
        raise WeightsError(f"{where}: the weights do not fit config.json; " + "; ".join(parts))


def _all_files(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".json":
        return read_state(path)
    index = read_json(path)
    try:
        files = sorted(set(index["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: expected weight_map, a mapping of tensors to files") from error
    state: dict[str, Tensor] = {}
    for name in files:
        state |= read_state(path.parent / Path(name).name)
    return state
