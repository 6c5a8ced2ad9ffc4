"""open_clip's architectures, small enough to be built here: fewer blocks, words and pixels, everything else as it is.

``python -m tests.clip.architectures`` writes the table that :mod:`tests.clip.test_architectures` holds against what
happens.
"""

import contextlib
import copy
import functools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import open_clip.timm_model
import timm
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from fastzs import clip
from fastzs.clip import WeightsError
from fastzs.clip.vision import VisionTransformer

TABLE = Path(__file__).with_name("architectures.md")
WORDS = 500
# keyword arguments of timm's functions, by how the model's name begins
FEWER_BLOCKS = {
    "convnext": {"depths": (1, 1, 1, 1)},
    "swin": {"depths": (1, 1, 1, 1)},
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1)},
    "fastvit_mci4": {"layers": (1, 1, 1, 1, 1)},
    "fastvit": {"layers": (1, 1, 1, 1)},
    "": {"depth": 2},
}
# the smallest configurations of Hugging Face's text models that have the shapes' kinds
TEXT_MODELS = {
    "roberta-base": ("roberta", {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40}),
    "xlm-roberta-base": ("xlm-roberta", {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40}),
    "xlm-roberta-large": ("xlm-roberta", {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40}),
    "google/mt5-base": ("mt5", {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3}),
    "google/mt5-xl": ("mt5", {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_heads": 3}),
    "facebook/nllb-200-distilled-600M": ("m2m_100", {"d_model": 24}),
    "facebook/nllb-200-distilled-1.3B": ("m2m_100", {"d_model": 32}),
}
LAYERS_OF = {"mt5": {"num_layers": 1, "num_decoder_layers": 1}, "m2m_100": {"encoder_layers": 1, "decoder_layers": 1}}
LAYERS_OF["m2m_100"] |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 40}


def fewer_pixels(size: int, patch: int) -> int:
    """The side of a small image of which as many pixels are left over as of the native one."""
    return min(size, 6 * patch + size % patch)


@contextlib.contextmanager
def fewer_blocks() -> Iterator[None]:
    """timm's models as open_clip makes them have few blocks, and those with patches a small native image."""
    create = timm.create_model

    def small(name: str, **options: Any) -> nn.Module:
        few = next(few for start, few in FEWER_BLOCKS.items() if name.startswith(start))
        patches = re.search(r"_patch(\d+)_.*?(\d+)$", name)
        if patches and not name.startswith("swin"):
            options["img_size"] = fewer_pixels(int(patches[2]), int(patches[1]))
        return create(name, **{**few, **options})

    with mock.patch.object(open_clip.timm_model.timm, "create_model", small):
        yield


def small_config(name: str, folder: Path) -> dict:
    """The configuration with few pixels, two blocks in the image tower, one in the text tower, and few words."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    patch = re.search(r"_patch(\d+)_", vision.get("timm_model_name", ""))
    vision["image_size"] = fewer_pixels(side(config), int(patch[1]) if patch else vision.get("patch_size") or 32)
    if "timm_model_name" not in vision:
        vision["layers"] = [1, 1, 1, 1] if isinstance(vision["layers"], list) else 2
    text.pop("hf_tokenizer_name", None)
    text.pop("tokenizer_kwargs", None)
    if "hf_model_name" in text:
        text["hf_model_name"] = str(text_model(text["hf_model_name"], folder))
    else:
        text |= {"layers": 1, "vocab_size": WORDS}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "vocab_size": WORDS}
    return config


def text_model(name: str, folder: Path) -> Path:
    """A folder with the configuration of a small text model of the kind that a hub id names."""
    from transformers import AutoConfig

    kind, sizes = TEXT_MODELS[name]
    layers = LAYERS_OF.get(kind, {"num_hidden_layers": 1})
    config = AutoConfig.for_model(kind, vocab_size=WORDS, max_position_embeddings=90, **sizes, **layers)
    config.architectures = None
    config.save_pretrained(folder / "text_model")
    return folder / "text_model"


@functools.cache
def noise() -> Tensor:
    """A prime number of normal values, so that repeating them gives no two equal rows."""
    return torch.randn(999_983, generator=torch.Generator().manual_seed(0))


def open_clips_own(config: dict) -> nn.Module:
    """open_clip's model of a configuration, no value left that hides an error."""
    config = copy.deepcopy(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom else CLIP
    with mock.patch.multiple(torch.nn.init, trunc_normal_=_left, _no_grad_trunc_normal_=_left, kaiming_uniform_=_left):
        model = kind(**config).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            fill(name, tensor)
    return model


def _left(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    return tensor


@torch.no_grad()
def fill(name: str, tensor: Tensor) -> None:
    """Random values: of a matrix's size for its inputs, of the order of one elsewhere."""
    count = tensor.numel()
    repeated = noise() if count <= len(noise()) else noise().repeat(-(-count // len(noise())))
    values = repeated[:count].view(tensor.shape)
    if tensor.ndim > 1 and "embed" not in name and not name.endswith(("latent", "token", "query")):
        tensor.copy_(values * tensor[0].numel() ** -0.5)
    elif "var" in name or (name.endswith("weight") and tensor.ndim == 1) or "gamma" in name:
        tensor.copy_(1 + 0.1 * values.abs())
    elif not name.startswith("logit"):
        tensor.copy_(0.1 * values)


def loaded(config: dict, model: nn.Module, folder: Path) -> clip.Clip:
    """The model saved in a folder and read from there."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    shared: dict[int, str] = {}
    state = {}
    for key, value in model.state_dict().items():
        first = shared.setdefault(value.data_ptr(), key)
        state[key] = value.contiguous() if first == key else value.clone()
    save_file(state, folder / "open_clip_model.safetensors")
    return clip.load(weights=folder)


def side(config: dict) -> int:
    """Pixels of the native image."""
    return config["vision_cfg"]["image_size"]


def outcome(name: str) -> str:
    """A row of the table: what computes the architecture, or why it is refused."""
    with tempfile.TemporaryDirectory() as folder, fewer_blocks():
        try:
            config = small_config(name, Path(folder))
            model = clip.Clip(name, "random", config, config.get("quick_gelu", False), (0,) * 3, (1,) * 3, "")
            tower = model.vision()
        except WeightsError as error:
            reason = str(error).removeprefix(f"backbone {name!r}").lstrip(": ")
            return f"| {name} | refused | {reason} |"
    kind = type(tower).__name__
    if isinstance(tower, VisionTransformer):
        kind += f", {tower.variant.pool} pooled" + (", rotary positions" if tower.variant.rotary else "")
    return f"| {name} | passes | {kind}, {tower.patch_size} pixels, {len(tower.operators)} operators |"


def main() -> None:
    rows = [outcome(name) for name in open_clip.list_models()]
    passing = sum("| passes |" in row for row in rows)
    head = "| architecture | outcome | what computes it, or why not |\n|---|---|---|\n"
    TABLE.write_text(
        f"# {passing} of open_clip's {len(rows)} architectures pass\n\n"
        "Written by `python -m tests.clip.architectures`; `pytest tests/clip/test_architectures.py -m slow` computes "
        f"each.\n\n{head}" + "\n".join(rows) + "\n"
    )
    print(passing, len(rows))


if __name__ == "__main__":
    main()
