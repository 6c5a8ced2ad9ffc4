"""Weights files as plain tensors by name: reading them safely, and bringing them to OpenAI's names.

Files are data: safetensors, or ``torch.load(weights_only=True)``, or OpenAI's TorchScript archives of which only the
tensors are read. No pickled code runs.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastzs.errors import FastzsError

_LFS = b"version https://git-lfs"
_SAVED = (b"PK", b"\x80")  # how what torch.save wrote begins: an archive, or a pickle


class WeightsError(FastzsError, ValueError):
    """Weights that cannot be found, read or fitted; the message says which and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        WeightsError: there is no such file, or it is no JSON, or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path.parent}: there is no {path.name} in it") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def contents(path: Path) -> str:
    """What is in a weights file, as a digest; files in the hub's cache are called by theirs, others are read."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", real.name):
        return f"sha:{real.name}"
    return file_fingerprint(path)


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes."""
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
        with path.open("rb") as file:
            start = file.read(len(_LFS))
        if start == _LFS:
            raise WeightsError(f"{path}: is a pointer of git-lfs, not the weights; fetch them with 'git lfs pull'")
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        mapped = zipfile.is_zipfile(path)  # other files are of an old format, which is read whole
        if not start.startswith(_SAVED):
            raise WeightsError(f"{path}: is not a weights file; expected safetensors, or what torch.save wrote")
        with torch.serialization.safe_globals(_stand_ins(path, opaque)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, since reading it would run code or create objects other than tensors "
            f"({_what_was_refused(error)}); save its state_dict with safetensors and use that"
        ) from error
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{path}: cannot be read as weights ({type(error).__name__}: {error})") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):  # "model": detectron2's
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


def _what_was_refused(error: Exception) -> str:
    """The object that torch did not want to make, by its name, out of a message of many lines."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()[0]


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


_OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
# beside the towers: of the loss, of CoCa's decoder, and buffers that are computed
_OTHER = re.compile(
    r"logit_scale|logit_bias|attn_mask|text_decoder\..*|text\.transformer\.embeddings\.position_ids|"
    r"text\.attn_mask|backbone\..*|decode_head\..*|" + "|".join(_OPENAI_MARKS)
)


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors under OpenAI's names are OpenAI's own, saved again.

    They bring numbers that only OpenAI's archives hold, or are half in fp16 and half in fp32, as OpenAI's code leaves
    them.
    """
    if any(mark in state for mark in _OPENAI_MARKS):
        return True
    pair = [state.get(name) for name in ("visual.proj", "visual.ln_post.weight")]
    return (
        pair[0] is not None and pair[1] is not None and (pair[0].dtype, pair[1].dtype) == (torch.float16, torch.float32)
    )


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The vision tower's tensors, the text tower's, and what belongs to neither, under their own names."""
    visual, text, other = {}, {}, {}
    for key, value in state.items():
        if key.startswith("visual."):
            visual[key.removeprefix("visual.")] = value
        elif _OTHER.fullmatch(key):
            other[key] = value
        else:
            text[key.removeprefix("text.").removeprefix("text_encoder.")] = value
    return visual, text, other


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


def _finite(tensor: Tensor) -> bool:
    lowest, highest = tensor.aminmax()  # one pass, no copy; NaN comes through
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))


def check(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Whether ``state`` has the tensors of ``wanted``, of the same shapes, no others, and none with NaN.

    Raises:
        WeightsError: it does not; the message names keys.
    """
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    wrong = [
        f"{k} is {list(state[k].shape)}, expected {list(wanted[k].shape)}"
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
    bad = [k for k, v in state.items() if v.is_floating_point() and v.numel() and not _finite(v)]
    if bad:
        raise WeightsError(f"{source}: NaN or infinite values in {', '.join(bad[:6])}")


def fit(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load ``state`` into ``module``, strictly.

    Raises:
        WeightsError: see :func:`check`.
    """
    check(module.state_dict(), state, source)
    module.load_state_dict(state)
