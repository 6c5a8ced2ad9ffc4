"""Weights files as plain tensors by name: reading them safely, and bringing them to OpenAI's names.

Files are data: safetensors, or ``torch.load(weights_only=True)``, or OpenAI's TorchScript archives of which only the
tensors are read. No pickled code runs.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class WeightsError(ValueError):
    """Weights that cannot be found, read or fitted; the message says which and what to do."""


def file_fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


class _Opaque:
    """Stands for an object of a checkpoint that is not looked at: it takes whatever it is given and does nothing."""

    def __new__(cls, *_args, **_options):
        return super().__new__(cls)

    def __init__(self, *_args, **_options):
        pass

    def __setstate__(self, _state):
        pass


def read_state(path: Path, opaque: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors of a weights file by name: safetensors, torch (weights only) or TorchScript; wrappers are opened.

    All but TorchScript's are maps of the file: what is not used is not read.

    Args:
        opaque: packages whose objects may be in the file; they are not made, and nothing of these packages runs.

    Raises:
        WeightsError: unreadable, truncated, not a dictionary of tensors, or a pickle that wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        mapped = zipfile.is_zipfile(path)  # other files are of an old format, which is read whole
        with torch.serialization.safe_globals(_stand_ins(path, opaque)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, since reading it would run code or create objects other than tensors "
            f"({str(error).splitlines()[0]}); save its state_dict with safetensors and use that"
        ) from error
    except Exception as error:
        raise WeightsError(f"{path}: cannot be read as weights ({type(error).__name__}: {error})") from error
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if isinstance(content, dict) and isinstance(content.get("clip"), dict):  # MaskCLIP's ViT16_clip_weights.pth
        content = content["clip"] | {f"proj.{k}": v for k, v in content.get("proj", {}).items()}
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    state = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return state


def _stand_ins(path: Path, opaque: Sequence[str]) -> list[Callable | tuple[Callable, str]]:
    if not opaque or not zipfile.is_zipfile(path):
        return []
    found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(_Opaque, name) for name in found if name.split(".")[0] in opaque]


_MASKCLIP_NAMES = (
    # vision transformers
    ("cls_token", "class_embedding"),
    ("pos_embed", "positional_embedding"),
    ("patch_embed.projection.", "conv1."),
    ("ln0.", "ln_pre."),
    ("ln1.", "ln_post."),
    ("layers.", "transformer.resblocks."),
    ("attn.attn.", "attn."),
    ("ffn.layers.0.0.", "mlp.c_fc."),
    ("ffn.layers.1.", "mlp.c_proj."),
    (".ln1.", ".ln_1."),
    (".ln2.", ".ln_2."),
    # residual networks
    ("stem.0.", "conv1."),
    ("stem.1.", "bn1."),
    ("stem.3.", "conv2."),
    ("stem.4.", "bn2."),
    ("stem.6.", "conv3."),
    ("stem.7.", "bn3."),
    ("downsample.1.", "downsample.0."),
    ("downsample.2.", "downsample.1."),
)


def is_maskclip(state: dict[str, Tensor]) -> bool:
    return any(key.removeprefix("backbone.") in ("cls_token", "stem.0.weight") for key in state)


def to_openai_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring MaskCLIP's converted checkpoints, which use mmsegmentation's names, to OpenAI's.

    The projections into the text space are taken from the decode head (``head.``, ``decode_head.`` or no prefix).
    Anything else passes unchanged.
    """
    if not is_maskclip(state):
        return state
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        head, _, leaf = key.removeprefix("decode_").removeprefix("head.").rpartition(".")
        if head == "proj":
            out["visual.proj"] = value.flatten(1).T  # [D, C, 1, 1] -> [C, D]
        elif head in ("q_proj", "k_proj", "v_proj", "c_proj"):
            out[f"visual.attnpool.{head}.{leaf}"] = value.flatten(1) if leaf == "weight" else value
        elif key.startswith(prefix):
            out[f"visual.{_openai_name(key.removeprefix(prefix))}"] = value
    for key in ("visual.class_embedding", "visual.positional_embedding"):
        if key in out:
            out[key] = out[key].flatten(0, -2) if key.endswith("positional_embedding") else out[key].flatten()
    return out


def _openai_name(name: str) -> str:
    for old, new in _MASKCLIP_NAMES:
        if old[0] == "." or old.startswith(("attn.", "ffn.", "downsample.")):
            name = name.replace(old, new)
        elif name == old or (old.endswith(".") and name.startswith(old)):
            name = new + name.removeprefix(old)
    return name


def fit(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    wrong = [
        f"{k} is {list(state[k].shape)}, wanted {list(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if names
        ]
        raise WeightsError(f"{source}: the weights do not fit the backbone; " + "; ".join(parts))
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise WeightsError(f"{source}: NaN or infinite values in {', '.join(bad[:6])}")
    module.load_state_dict(state)
