"""Where CLIP weights come from: an open_clip tag, a hub id, a file, a folder, the package itself, or nowhere (random).

Files are data: safetensors, or ``torch.load(weights_only=True)``, or OpenAI's TorchScript archives of which only the
tensors are read. No pickled code runs.
"""

import difflib
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastzs.clip.resnet import ResNet
from fastzs.clip.text import TextEncoder, WordTokenizer
from fastzs.clip.vision import VisionTransformer

SHAPES = Path(__file__).parent / "shapes"
OPENAI_MEAN, OPENAI_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
_VIT_OPTIONS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_RESNET_OPTIONS = {"image_size", "layers", "width", "patch_size", "head_width"}


class WeightsError(ValueError):
    """Weights that cannot be found, read or fitted; the message says which and what to do."""


@dataclass(frozen=True)
class Clip:
    """One CLIP: its configuration and where its tensors are. Towers are built when asked for.

    Attributes:
        backbone: open_clip's model name.
        source: what the user called the weights, for messages and run records.
        config: open_clip's model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``).
        quick_gelu: OpenAI's activation.
        mean, std: per channel on the 0 to 1 scale.
        fingerprint: identifies the weights in caches.
        tokenizer, templates, background: of weights with a closed vocabulary: theirs, else ``None``.
        published: these are OpenAI's weights, the ones that published systems build on.
    """

    backbone: str
    source: str
    config: dict
    quick_gelu: bool
    mean: Sequence[float]
    std: Sequence[float]
    fingerprint: str
    path: Path | None = None
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None
    templates: str | None = None
    background: tuple[str, ...] | None = None
    published: bool = False
    _text: list[TextEncoder] = field(default_factory=list, repr=False)

    @property
    def embed_dim(self) -> int:
        return self.config["embed_dim"]

    @cached_property
    def is_resnet(self) -> bool:
        return isinstance(self.config["vision_cfg"].get("layers"), list | tuple)

    def vision(self, **options) -> VisionTransformer | ResNet:
        """The vision tower with its weights, frozen, in evaluation mode.

        ``options`` go to :class:`VisionTransformer` (``quick_gelu``, ``norm_eps``, ``position_mode``,
        ``double_class_embedding``) or :class:`ResNet` (``output_stride``).

        Raises:
            WeightsError: unsupported architecture, tensors that do not fit, NaN among them.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if not self.is_resnet:
                options = {"quick_gelu": self.quick_gelu} | options
            tower = build_vision(self.backbone, self.config, **options)
        if self.path is not None:
            state = {k.removeprefix("visual."): v for k, v in self._state().items() if k.startswith("visual.")}
            if not state:
                raise WeightsError(f"{self.source}: the file holds no vision tower (no keys under 'visual.')")
            _fit(tower, state, self.source)
        return tower.requires_grad_(False).eval()

    def text(self) -> TextEncoder:
        """The text tower with its weights, frozen; built once, at the first call.

        Raises:
            WeightsError: the weights hold no text tower, or tensors that do not fit.
        """
        if not self._text:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                encoder = TextEncoder(self.config["text_cfg"], self.embed_dim, self.quick_gelu, self.tokenizer)
            if self.path is not None:
                state = {
                    k.removeprefix("text.").removeprefix("text_encoder."): v
                    for k, v in self._state().items()
                    if not k.startswith("visual.") and not k.startswith("backbone.")
                }
                if "token_embedding.weight" not in state:
                    raise WeightsError(
                        f"{self.source}: the file holds no text tower; give text embeddings as an array "
                        "(Vocabulary(names, embeddings=...)) or use weights that have one"
                    )
                wanted = encoder.tower.state_dict()
                _fit(encoder.tower, {k: v for k, v in state.items() if k in wanted}, self.source)
            self._text.append(encoder.requires_grad_(False).eval())
        return self._text[0]

    def _state(self) -> dict[str, Tensor]:
        assert self.path is not None
        return to_openai_names(read_state(self.path))


def build_vision(backbone: str, config: dict, **options) -> VisionTransformer | ResNet:
    """A vision tower of open_clip's configuration, randomly initialised.

    Raises:
        WeightsError: the configuration asks for something other than a CLIP ViT or CLIP ResNet.
    """
    vision = config["vision_cfg"]
    resnet = isinstance(vision.get("layers"), list | tuple)
    unsupported = sorted(set(vision) - (_RESNET_OPTIONS if resnet else _VIT_OPTIONS))
    if unsupported:
        raise WeightsError(
            f"backbone {backbone!r} is not a plain CLIP ViT or ResNet (its configuration sets {', '.join(unsupported)})"
        )
    head_width = vision.get("head_width", 64)
    if resnet:
        return ResNet(
            vision["layers"],
            config["embed_dim"],
            vision["width"] * 32 // head_width,
            vision.get("image_size", 224),
            vision["width"],
            **options,
        )
    return VisionTransformer(
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // head_width,
        patch_size=vision["patch_size"],
        grid=vision.get("image_size", 224) // vision["patch_size"],
        output_dim=config["embed_dim"],
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        **options,
    )


def load(backbone: str = "ViT-B-16", weights: str | Path = "openai") -> Clip:
    """Resolve ``weights`` for ``backbone``.

    Args:
        backbone: an open_clip model name: a CLIP ViT ("ViT-B-16", "ViT-L-14-336", "ViT-H-14", ...) or ResNet
            ("RN50", "RN50x16", ...). Ignored where the weights bring their own configuration ("shapes", hub ids
            and folders with an open_clip_config.json).
        weights: "shapes" (the package's own small model), "random", an open_clip tag of the backbone ("openai",
            "laion2b_s34b_b88k", ...), a hub id ("hf-hub:org/name"), a file, or a folder with
            ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    Raises:
        WeightsError: unknown backbone or weights (the nearest known are named), not downloaded and no network.
    """
    name = str(weights)
    if name == "shapes":
        return _from_folder(SHAPES, "shapes")
    if Path(name).is_dir():
        return _from_folder(Path(name), name)
    if name.startswith("hf-hub:"):
        return _from_hub(name)
    config = open_clip.get_model_config(backbone)
    if config is None:
        raise WeightsError(_unknown("backbone", backbone, open_clip.list_models()))
    quick_gelu = config.get("quick_gelu", False)
    common = {"backbone": backbone, "config": config}
    if name == "random":
        fingerprint = f"random:{backbone}"
        return Clip(
            **common, source="random", quick_gelu=quick_gelu, mean=OPENAI_MEAN, std=OPENAI_STD, fingerprint=fingerprint
        )
    if Path(name).is_file():
        path = Path(name).resolve()
        openai = _is_torchscript(path) or _is_maskclip(read_state(path))
        return Clip(
            **common,
            source=name,
            path=path,
            quick_gelu=quick_gelu or openai,
            published=openai,
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
            fingerprint=file_fingerprint(path),
        )
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    if name not in tags:
        if Path(name).suffix or "/" in name:
            raise WeightsError(f"weights {name!r}: there is no such file or folder")
        raise WeightsError(_unknown(f"weights for {backbone}", name, [*tags, "shapes", "random"]))
    pretrained = open_clip.get_pretrained_cfg(backbone, name)
    return Clip(
        **common,
        source=name,
        path=_download(backbone, name, pretrained),
        quick_gelu=pretrained.get("quick_gelu", quick_gelu),
        published=name == "openai",
        mean=pretrained.get("mean") or OPENAI_MEAN,
        std=pretrained.get("std") or OPENAI_STD,
        fingerprint=f"open_clip:{backbone}/{name}",
    )


def _from_folder(folder: Path, source: str) -> Clip:
    """A folder as open_clip and the hub lay it out; ``words.json`` beside the weights makes a closed vocabulary."""
    config_path = folder / "open_clip_config.json"
    if not config_path.is_file():
        raise WeightsError(f"weights folder {folder}: there is no open_clip_config.json in it")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    names = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
    path = next((folder / n for n in names if (folder / n).is_file()), None)
    if path is None:
        raise WeightsError(f"weights folder {folder}: none of {', '.join(names)} is in it")
    model, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
    words_path = folder / "words.json"
    closed = json.loads(words_path.read_text(encoding="utf-8")) if words_path.is_file() else None
    tokenizer = WordTokenizer(closed["words"], model["text_cfg"]["context_length"]) if closed else None
    return Clip(
        backbone=source,
        source=source,
        config=model,
        path=path,
        quick_gelu=model.get("quick_gelu", False),
        mean=preprocess.get("mean", OPENAI_MEAN),
        std=preprocess.get("std", OPENAI_STD),
        fingerprint=file_fingerprint(path),
        tokenizer=tokenizer,
        templates="shapes" if closed else None,
        background=tuple(closed["background"]) if closed else None,
    )


def _from_hub(source: str) -> Clip:
    from huggingface_hub import hf_hub_download

    repository = source.removeprefix("hf-hub:")
    try:
        folder = Path(hf_hub_download(repository, "open_clip_config.json")).parent
        hf_hub_download(repository, "open_clip_model.safetensors")
    except Exception as error:
        raise WeightsError(_offline(source, repository, "open_clip_model.safetensors", error)) from error
    return _from_folder(folder, source)


def _download(backbone: str, tag: str, pretrained: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(pretrained))
    except Exception as error:
        where = (pretrained.get("hf_hub") or pretrained.get("url") or "").rstrip("/")
        raise WeightsError(_offline(f"{backbone}/{tag}", where, "open_clip_model.safetensors", error)) from error


def _offline(what: str, where: str, filename: str, error: Exception) -> str:
    return (
        f"the weights {what} are not in the cache and could not be fetched ({type(error).__name__}); on a machine with "
        f"a network fetch {filename} from {where} and pass its path as weights, or use weights='shapes' (drawn shapes "
        "only) or weights='random' (no meaning, only the path) now"
    )


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(known)[:8]
    return f"unknown {what}: {name!r}; nearest known: {', '.join(near)}"


def file_fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file by name: safetensors, torch (weights only) or TorchScript; wrappers are opened.

    Raises:
        WeightsError: unreadable, truncated, not a dictionary of tensors, or a pickle that wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, since reading it would run code or create objects other than tensors "
            f"({str(error).splitlines()[0]}); save its state_dict with safetensors and use that"
        ) from error
    except Exception as error:
        raise WeightsError(f"{path}: cannot be read as weights ({type(error).__name__}: {error})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, dict) and isinstance(content.get("clip"), dict):  # MaskCLIP's ViT16_clip_weights.pth
        content = content["clip"] | {f"proj.{k}": v for k, v in content.get("proj", {}).items()}
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    state = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return state


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


def _is_maskclip(state: dict[str, Tensor]) -> bool:
    return any(key.removeprefix("backbone.") in ("cls_token", "stem.0.weight") for key in state)


def to_openai_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring MaskCLIP's converted checkpoints, which use mmsegmentation's names, to OpenAI's.

    The projections into the text space are taken from the decode head (``head.``, ``decode_head.`` or no prefix).
    Anything else passes unchanged.
    """
    if not _is_maskclip(state):
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


def _fit(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
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
