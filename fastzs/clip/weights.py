"""Where CLIP weights come from: an open_clip tag, a hub id, a file, a folder, the package itself, or nowhere."""

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from fastzs.clip import hub, of_transformers, tokenizers, towers
from fastzs.clip.state import (
    WeightsError,
    contents,
    fit,
    is_maskclip,
    is_openai,
    is_torchscript,
    read_json,
    read_state,
    split,
    to_openai_names,
)
from fastzs.clip.text import TextEncoder
from fastzs.clip.tokenizers import Tokenizer
from fastzs.clip.towers import Tower
from fastzs.files import is_web_address

log = logging.getLogger(__name__)
HUB_NAMES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
SHAPES = Path(__file__).parent / "shapes"
OPENAI_MEAN, OPENAI_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


@dataclass(frozen=True)
class Clip:
    """One CLIP: its configuration and where its tensors are. Towers are built when asked for.

    Attributes:
        backbone: open_clip's model name.
        source: what the user called the weights, for messages and run records.
        config: open_clip's model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``).
        quick_gelu: OpenAI's activation.
        mean, std: per channel on the 0 to 1 scale.
        fingerprint: identifies, in caches, all that decides a text vector or an image's features: the weights'
            contents, the configuration, the activation, the preprocessing and the tokenizer.
        tokenizer: texts to token ids; CLIP's own if ``None``.
        templates, background: of weights with a closed vocabulary: theirs, else ``None``.
        published: these are OpenAI's weights, the ones that published systems build on.
        layout: how the file names its tensors: "open_clip" (and OpenAI), or "transformers".
        tensors: those of a model at hand, in place of a file's, under open_clip's names.
        visual: its vision tower, if it is open_clip's.
    """

    backbone: str
    source: str
    config: dict
    quick_gelu: bool
    mean: Sequence[float]
    std: Sequence[float]
    fingerprint: str
    path: Path | None = None
    tokenizer: Tokenizer | None = None
    templates: str | None = None
    background: tuple[str, ...] | None = None
    published: bool = False
    layout: str = "open_clip"
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)
    visual: nn.Module | None = field(default=None, repr=False)
    _text: list[TextEncoder] = field(default_factory=list, repr=False)

    @property
    def embed_dim(self) -> int:
        return self.config["embed_dim"]

    @cached_property
    def is_resnet(self) -> bool:
        return isinstance(self.config["vision_cfg"].get("layers"), list | tuple)

    @cached_property
    def sigmoid(self) -> tuple[float, float] | None:
        """Scale and bias of the logits that a model trained with the sigmoid loss gives, else None.

        The probability that a text fits is sigmoid(scale cos + bias).
        """
        if not self._has_weights:
            bias = self.config.get("init_logit_bias")
            return None if bias is None else (10.0, float(bias))  # SigLIP's initial scale
        _, _, other = split(self._state())
        if "logit_bias" not in other:
            return None
        return float(other["logit_scale"].exp()), float(other["logit_bias"])

    def vision(self, **options) -> Tower:
        """The vision tower with its weights, frozen, in evaluation mode.

        ``options`` go to :class:`VisionTransformer` (``quick_gelu``, ``norm_eps``, ``position_mode``,
        ``double_class_embedding``) or :class:`ResNet` (``output_stride``).

        Raises:
            WeightsError: unsupported architecture, tensors that do not fit, NaN among them.
        """
        if self.visual is not None:
            tower = towers.of_module(self.visual, self.embed_dim, self.backbone, **options)
            return tower.requires_grad_(False).eval()
        state = None
        if self._has_weights:
            state, _, _ = split(self._state())
            if not state:
                raise WeightsError(f"{self.source}: the file holds no vision tower (no keys under 'visual.')")
        config = self.config | {"quick_gelu": self.quick_gelu}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tower = towers.build(config, self.backbone, state, self.source, **options)
        return tower.requires_grad_(False).eval()

    def text(self) -> TextEncoder:
        """The text tower with its weights, frozen; built once, at the first call.

        Raises:
            WeightsError: the weights hold no text tower, or tensors that do not fit.
        """
        if not self._text:
            config = self.config["text_cfg"]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                encoder = TextEncoder.of_config(config, self.embed_dim, self.quick_gelu, self.tokenizer)
            if self._has_weights:
                _, state, _ = split(self._state())
                if not state:
                    raise WeightsError(
                        f"{self.source}: the file holds no text tower; give text embeddings as an array "
                        "(Vocabulary(names, embeddings=...)) or use weights that have one"
                    )
                fit(encoder.tower, state, self.source)
            self._text.append(encoder.requires_grad_(False).eval())
        return self._text[0]

    @property
    def _has_weights(self) -> bool:
        return self.path is not None or self.tensors is not None

    def _state(self) -> Mapping[str, Tensor]:
        if self.tensors is not None:
            return self.tensors
        assert self.path is not None
        if self.layout == "transformers":
            return of_transformers.read(self.path, self.config)
        return to_openai_names(read_state(self.path))


def load(backbone: str = "ViT-B-16", weights: str | Path = "openai") -> Clip:
    """Resolve ``weights`` for ``backbone``.

    Args:
        backbone: an open_clip model name ("ViT-B-16", "ViT-B-16-SigLIP2", "EVA02-L-14", "convnext_base_w", "RN50",
            ...; :func:`fastzs.list_backbones` has all). Ignored where the weights bring their own configuration
            ("shapes", hub ids and folders).
        weights: "shapes" (the package's own small model), "random", an open_clip tag of the backbone ("openai",
            "webli", "laion2b_s34b_b88k", ...), a hub id ("hf-hub:org/name"), a file, or a folder: with
            ``open_clip_config.json`` and ``open_clip_model.safetensors``, or as transformers saves CLIP and SigLIP
            (``config.json``, ``model.safetensors``, ``tokenizer.json``).

    Raises:
        WeightsError: unknown backbone or weights (the nearest known are named), not downloaded and no network, a
            package that the text tower needs is not installed.
    """
    name = os.path.expanduser(str(weights))
    if is_web_address(name):
        raise WeightsError(f"weights {name}: this is a web address; download the file and give its path")
    if name == "shapes":
        return _from_folder(SHAPES, "shapes")
    if Path(name).is_dir():
        return _from_folder(Path(name), name)
    if name.startswith("hf-hub:"):
        return _from_hub(name)
    config = open_clip.get_model_config(backbone)
    if config is None:
        raise WeightsError(_unknown("backbone", backbone, open_clip.list_models()))
    if name == "random":
        return _random(backbone, config)
    if Path(name).is_file():
        return _from_file(backbone, config, Path(name))
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    if name not in tags:
        if Path(name).suffix or "/" in name:
            raise WeightsError(f"weights {name!r}: there is no such file or folder")
        raise WeightsError(_unknown(f"weights for {backbone}", name, [*tags, "shapes", "random"]))
    pretrained = open_clip.get_pretrained_cfg(backbone, name)
    return _clip(
        backbone=backbone,
        config=_with_text_model(config, backbone),
        source=name,
        tokenizer=tokenizers.of_hub(config["text_cfg"], backbone),
        path=_download(backbone, name, pretrained),
        quick_gelu=pretrained.get("quick_gelu", config.get("quick_gelu", False)),
        published=name == "openai",
        mean=pretrained.get("mean") or OPENAI_MEAN,
        std=pretrained.get("std") or OPENAI_STD,
    )


def _clip(*, path: Path, tokenizer: Tokenizer | None = None, **fields: Any) -> Clip:
    """A Clip of a weights file with its fingerprint."""
    names = ("backbone", "config", "quick_gelu", "mean", "std", "layout")
    identity = [contents(path), {name: fields.get(name) for name in names}, _identity(tokenizer)]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()
    return Clip(path=path, tokenizer=tokenizer, fingerprint=f"sha256:{digest}", **fields)


def _identity(tokenizer: Tokenizer | None) -> object:
    if isinstance(tokenizer, tokenizers.FileTokenizer):
        return [contents(tokenizer.folder / name) for name in tokenizers.FILES] + [tokenizer.clean]
    if isinstance(tokenizer, tokenizers.WordTokenizer):
        return list(tokenizer.words)
    return type(tokenizer).__name__


def _random(backbone: str, config: dict) -> Clip:
    text = config["text_cfg"]
    tokenizer = None
    if "hf_tokenizer_name" in text and "hf_model_name" not in text:
        tokenizer = tokenizers.StandInTokenizer(text.get("context_length", 77), text["vocab_size"])
    return Clip(
        backbone=backbone,
        config=config,
        quick_gelu=config.get("quick_gelu", False),
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        source="random",
        tokenizer=tokenizer,
        fingerprint=f"random:{backbone}",
    )


def _from_file(backbone: str, config: dict, path: Path) -> Clip:
    path = path.resolve()
    state = read_state(path)
    openai = is_torchscript(path) or is_maskclip(state) or is_openai(state)
    quick_gelu = config.get("quick_gelu", False)
    if not (openai or quick_gelu) and f"{backbone}-quickgelu" in open_clip.list_models():
        log.warning(
            "%s does not say which activation its weights were trained with: GELU is taken, as %s has it; "
            "OpenAI's weights, and others of QuickGELU, need the backbone %s-quickgelu",
            path,
            backbone,
            backbone,
        )
    return _clip(
        backbone=backbone,
        config=_with_text_model(config, backbone),
        source=str(path),
        path=path,
        tokenizer=tokenizers.of_hub(config["text_cfg"], backbone) if _has_text(state) else None,
        quick_gelu=quick_gelu or openai,
        published=openai,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
    )


def _has_text(state: dict[str, Tensor]) -> bool:
    return bool(split(to_openai_names(state))[1])


def _with_text_model(config: dict, backbone: str) -> dict:
    """The configuration, with the folder of the Hugging Face text model's own one in place of its hub id.

    Raises:
        WeightsError: the model's configuration cannot be fetched.
        MissingPackage: transformers is not installed.
    """
    name = config["text_cfg"].get("hf_model_name")
    if name is None or Path(name).is_dir():
        return config
    tokenizers.need_transformers(f"text towers such as {backbone}'s ({name})")
    folder = hub.file(f"{backbone}'s text tower", name, ("config.json",)).parent
    return config | {"text_cfg": config["text_cfg"] | {"hf_model_name": str(folder)}}


def _from_folder(folder: Path, source: str) -> Clip:
    """A folder as open_clip and the hub lay it out, or as transformers does.

    ``words.json`` beside the weights makes a closed vocabulary.
    """
    if not (folder / "open_clip_config.json").is_file():
        if (folder / "config.json").is_file():
            return _clip(**of_transformers.describe(folder, source))
        raise WeightsError(f"weights folder {folder}: there is no open_clip_config.json in it, and no config.json")
    config = read_json(folder / "open_clip_config.json")
    model, preprocess = config.get("model_cfg"), config.get("preprocess_cfg", {})
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise WeightsError(
            f"{folder / 'open_clip_config.json'}: expected model_cfg with embed_dim, vision_cfg and text_cfg"
        )
    path = next((folder / name for name in HUB_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"weights folder {folder}: none of {', '.join(HUB_NAMES)} is in it")
    closed = read_json(folder / "words.json") if (folder / "words.json").is_file() else None
    return _clip(
        backbone=source,
        source=source,
        config=_with_text_model(model, source),
        path=path,
        quick_gelu=model.get("quick_gelu", False),
        mean=preprocess.get("mean", OPENAI_MEAN),
        std=preprocess.get("std", OPENAI_STD),
        tokenizer=tokenizers.of_folder(folder, model["text_cfg"], source),
        templates="shapes" if closed else None,
        background=tuple(closed["background"]) if closed else None,
    )


def _from_hub(source: str) -> Clip:
    repository = source.removeprefix("hf-hub:")
    config = hub.file(source, repository, ("open_clip_config.json", "config.json"))
    if config.name == "config.json":
        for name in of_transformers.FILES:
            hub.optional_file(source, repository, name)
    else:
        hub.file(source, repository, HUB_NAMES)
        for name in tokenizers.FILES if "hf_tokenizer_name" in str(read_json(config)) else ():
            hub.optional_file(source, repository, name)
    return _from_folder(config.parent, source)


def _download(backbone: str, tag: str, pretrained: dict) -> Path:
    what = f"{backbone}/{tag}"
    if pretrained.get("hf_hub"):
        repository, filename = os.path.split(pretrained["hf_hub"])
        return hub.file(what, repository, (filename,) if filename else HUB_NAMES)
    try:
        return Path(open_clip.download_pretrained(pretrained))
    except Exception as error:
        url = pretrained.get("url", "")
        raise hub.cannot_fetch(what, os.path.basename(url), url, type(error).__name__) from error


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(known)[:8]
    return f"unknown {what}: {name!r}; nearest known: {', '.join(near)}"
