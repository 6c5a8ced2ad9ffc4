"""CLIP's text towers: names in, unit vectors out. The transformers are open_clip's, or Hugging Face's through it."""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import _build_text_tower
from torch import Tensor, nn

from fastzs.clip import causal
from fastzs.clip.state import WeightsError
from fastzs.clip.tokenizers import Tokenizer, need_transformers


class TextEncoder(nn.Module):
    """Text tower with its tokenizer.

    Args:
        tower: token ids [n, context] -> vectors [n, D].
        tokenizer: texts -> token ids int64 [n, context].
    """

    def __init__(self, tower: nn.Module, tokenizer: Tokenizer):
        super().__init__()
        self.tower, self.tokenizer = tower, tokenizer

    @classmethod
    def of_config(
        cls, config: dict, output_dim: int, quick_gelu: bool, tokenizer: Tokenizer | None = None
    ) -> "TextEncoder":
        """An encoder with random weights.

        Args:
            config: open_clip's ``text_cfg``.
            output_dim: width of the joint space, D.
            quick_gelu: OpenAI's activation.
            tokenizer: CLIP's BPE tokenizer if omitted.

        Raises:
            WeightsError: options that open_clip's text towers do not have.
            MissingPackage: transformers is needed and not installed.
        """
        if "hf_model_name" in config:
            need_transformers(f"text towers such as {config['hf_model_name']}")
        read: Any = tokenizer or open_clip.SimpleTokenizer(context_length=config.get("context_length", 77))
        # weights come later; and the tokens, which CoCa's decoder reads, are not wanted
        options = {**config, "hf_model_pretrained": False, "output_tokens": False}
        try:
            return cls(_build_text_tower(output_dim, options, quick_gelu), read)  # pyright: ignore[reportArgumentType]
        except Exception as error:
            raise WeightsError(f"open_clip cannot build the text tower of {config} ({error})") from error

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [n, context] -> unit vectors [n, D]."""
        return F.normalize(self.tower(tokens), dim=-1)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Texts -> unit vectors fp32 [n, D], ``batch`` at a time on the tower's device."""
        device = next(self.tower.parameters()).device
        rows = []
        for start in range(0, len(texts), batch):
            tokens = self.tokenizer(list(texts[start : start + batch])).to(device)
            made = causal.vectors(self.tower, tokens) if causal.takes(self.tower) else self.tower(tokens)
            rows.append(F.normalize(made, dim=-1).float())
        return torch.cat(rows)
