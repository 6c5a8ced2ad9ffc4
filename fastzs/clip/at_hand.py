"""CLIPs made of models that are at hand: open_clip's, and transformers' CLIPModel and SiglipModel."""

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import get_clean_fn
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from fastzs.clip import of_transformers
from fastzs.clip.causal import TextPart
from fastzs.clip.state import WeightsError
from fastzs.clip.text import TextEncoder
from fastzs.clip.weights import OPENAI_MEAN, OPENAI_STD, Clip

CLIPS_WORDS, CONTEXT = 49408, 77  # of CLIP's own tokenizer


def from_model(model: nn.Module, tokenizer: Callable[..., Any] | None = None) -> Clip:
    """The CLIP of a model that is at hand. Towers are copies, on the CPU and in fp32; the model is left as it is.

    Args:
        model: ``CLIP``, ``CustomTextCLIP`` or ``CoCa`` of open_clip, ``CLIPModel`` or ``SiglipModel`` of transformers.
            Its weights are read when a tower is built, so it must not change before.
        tokenizer: open_clip's or transformers' for the model, or anything that makes int64 [n, context] of n texts.
            Omitted: CLIP's own, where the vocabulary has its size; without one the text tower cannot be used.

    Raises:
        WeightsError: another object, or an architecture that is not supported.
    """
    clean: Callable[[str], str] | None
    if isinstance(model, CLIP | CustomTextCLIP | CoCa):
        fields, clean = _of_open_clip(model), None
    elif _is_of_transformers(model):
        fields, clean = _of_transformers(model)
    else:
        raise WeightsError(
            "backbone: expected the name of an architecture, an open_clip model, or a CLIPModel or SiglipModel of "
            f"transformers, got {_name(model)}"
        )
    text, visual = fields["config"]["text_cfg"], fields.pop("visual", None)
    read = _Tokens(tokenizer, text["context_length"], text["vocab_size"], clean)
    identity = [fields[key] for key in ("backbone", "config", "quick_gelu", "mean", "std")] + [read.identity]
    clip = Clip(
        source=fields["backbone"],
        fingerprint=_fingerprint(identity, fields["tensors"]),
        tokenizer=read,
        visual=visual,
        **fields,
    )
    if visual is not None:
        clip._text.append(TextEncoder(_text_part(model), read).requires_grad_(False).eval())
    return clip


def _name(model: object) -> str:
    return f"{type(model).__module__.split('.')[0]} {type(model).__qualname__}"


def _of_open_clip(model: Any) -> dict[str, Any]:
    text = getattr(model, "text", model)
    if isinstance(model, CLIP):
        projection: Any = model.text_projection
        width = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
    else:
        width = text.output_dim
    size = model.visual.image_size
    vision: dict[str, Any] = {"image_size": size if isinstance(size, int) else size[0]}
    if isinstance(model.visual, ModifiedResNet):
        vision["layers"] = [len(stage) for stage in (model.visual.layer1, model.visual.layer2)]
    # of a text model of transformers open_clip reads as much as of others, not all that its positions allow
    length = CONTEXT if isinstance(text, HFTextEncoder) else model.context_length
    words = {"context_length": length, "vocab_size": text.vocab_size}
    return {
        "backbone": _name(model),
        "config": {"embed_dim": width, "vision_cfg": vision, "text_cfg": words},
        "quick_gelu": any(isinstance(module, QuickGELU) for module in model.modules()),
        "mean": getattr(model.visual, "image_mean", None) or OPENAI_MEAN,
        "std": getattr(model.visual, "image_std", None) or OPENAI_STD,
        "tensors": model.state_dict(),
        "visual": model.visual,
    }


def _is_of_transformers(model: object) -> bool:
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    return any(kind.__name__ in ("CLIPModel", "SiglipModel") for kind in kinds)


def _of_transformers(model: Any) -> tuple[dict[str, Any], Callable[[str], str]]:
    theirs = model.config.to_dict()
    config = of_transformers.open_clip_config(theirs, _name(model))
    mean, std = of_transformers.preprocessing(theirs)
    fields = {
        "backbone": _name(model),
        "config": config,
        "quick_gelu": config["quick_gelu"],
        "mean": mean,
        "std": std,
        "tensors": of_transformers.renamed(model.state_dict(), config, _name(model)),
    }
    return fields, get_clean_fn(of_transformers.cleaning(theirs))


def _text_part(model: nn.Module) -> TextPart:
    """The model without its vision tower."""
    unneeded = {name: module for name, module in model.named_children() if name in ("visual", "text_decoder")}
    part = copy.deepcopy(model, {id(module): nn.Identity() for module in unneeded.values()})
    return TextPart(part.cpu().float())


class _Tokens:
    """Texts to token ids, by whatever tokenizer was given."""

    def __init__(self, given: Any, context_length: int, vocab_size: int, clean: Callable[[str], str] | None):
        if given is None and vocab_size == CLIPS_WORDS:
            given = open_clip.SimpleTokenizer(context_length=context_length)
        self.given, self.context_length, self.vocab_size, self.clean = given, context_length, vocab_size, clean

    @property
    def identity(self) -> str:
        return f"{_name(self.given)} {getattr(self.given, 'name_or_path', '')}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [n, context].

        Raises:
            WeightsError: there is no tokenizer, or it gives something else.
        """
        if self.given is None:
            raise WeightsError(
                f"the text tower has a vocabulary of {self.vocab_size} tokens, which is not CLIP's own; pass the "
                "model's tokenizer, too: tokenizer=..."
            )
        transformers = sys.modules.get("transformers")
        if transformers is not None and isinstance(self.given, transformers.PreTrainedTokenizerBase):
            cleaned = [text if self.clean is None else self.clean(text) for text in texts]
            options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            ids = self.given(cleaned, max_length=self.context_length, **options)["input_ids"]
        else:
            ids = self.given(list(texts))
        wanted = [len(texts), self.context_length]
        if not isinstance(ids, Tensor) or ids.is_floating_point() or list(ids.shape) != wanted:
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise WeightsError(f"tokenizer: expected token ids int64 {wanted}, got {got}")
        return ids.long()


def _fingerprint(identity: object, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
