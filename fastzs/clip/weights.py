"""Where CLIP weights come from: an open_clip tag, a hub id, a file, a folder, the package itself, or nowhere."""

import difflib
import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import huggingface_hub
import open_clip
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from torch import Tensor

from fastzs.clip.resnet import ResNet
from fastzs.clip.state import (
    WeightsError,
    file_fingerprint,
    fit,
    is_maskclip,
    is_torchscript,
    read_state,
    to_openai_names,
)
from fastzs.clip.text import TextEncoder, WordTokenizer
from fastzs.clip.vision import VisionTransformer

HUB_NAMES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
SHAPES = Path(__file__).parent / "shapes"
OPENAI_MEAN, OPENAI_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
_VIT_OPTIONS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_RESNET_OPTIONS = {"image_size", "layers", "width", "patch_size", "head_width"}


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
            fit(tower, state, self.source)
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
                fit(encoder.tower, {k: v for k, v in state.items() if k in wanted}, self.source)
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
        openai = is_torchscript(path) or is_maskclip(read_state(path))
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
    path = next((folder / name for name in HUB_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"weights folder {folder}: none of {', '.join(HUB_NAMES)} is in it")
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
    repository = source.removeprefix("hf-hub:")
    config = _hub_file(source, repository, ("open_clip_config.json",))
    _hub_file(source, repository, HUB_NAMES)
    return _from_folder(config.parent, source)


def _download(backbone: str, tag: str, pretrained: dict) -> Path:
    what = f"{backbone}/{tag}"
    if pretrained.get("hf_hub"):
        repository, filename = os.path.split(pretrained["hf_hub"])
        return _hub_file(what, repository, (filename,) if filename else HUB_NAMES)
    try:
        return Path(open_clip.download_pretrained(pretrained))
    except Exception as error:
        raise _cannot_fetch(what, "it", pretrained.get("url", ""), type(error).__name__) from error


def _hub_file(what: str, repository: str, names: Sequence[str]) -> Path:
    """The first of ``names`` that the hub's cache has, else that can be fetched; without a network it fails at once."""
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    if not _online():
        raise _cannot_fetch(what, names[0], repository, "no network")
    last: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except Exception as error:
            last = last or error
    raise _cannot_fetch(what, names[0], repository, type(last).__name__) from last


def _online() -> bool:
    """Whether the hub can be asked at all: its name resolves, or a proxy is set that may know it."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _cannot_fetch(what: str, filename: str, where: str, reason: str) -> WeightsError:
    return WeightsError(
        f"the weights {what} are not in the cache and could not be fetched ({reason}); on a machine with a network "
        f"fetch {filename} from {where} and pass its path as weights, or use weights='shapes' (drawn shapes only) or "
        "weights='random' (no meaning, only the path) now"
    )


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(known)[:8]
    return f"unknown {what}: {name!r}; nearest known: {', '.join(near)}"
