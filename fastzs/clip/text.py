"""CLIP's text tower: names in, unit vectors out. The transformer and the BPE tokenizer are open_clip's."""

from collections.abc import Callable, Sequence

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn


class WordTokenizer:
    """Tokenizer for closed vocabularies: one id per known word, start and end as in CLIP.

    Ids are 0 padding, 1 start, then the words, and last the end, so that the end has the highest id, which is
    where CLIP's text tower reads its output.
    """

    def __init__(self, words: Sequence[str], context_length: int):
        self.words = tuple(words)
        self.context_length = context_length
        self.ids = {word: 2 + i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        return len(self.words) + 3

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [n, context_length].

        Raises:
            ValueError: a text holds an unknown word or too many words.
        """
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            words = text.lower().split()
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise ValueError(
                    f"{text!r}: these weights do not know the word {unknown[0]!r}; "
                    f"they know only: {', '.join(self.words)}"
                )
            if len(words) + 2 > self.context_length:
                raise ValueError(f"{text!r} has {len(words)} words; at most {self.context_length - 2} fit")
            ids = [1, *(self.ids[word] for word in words), self.vocab_size - 1]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


class TextEncoder(nn.Module):
    """Text tower with its tokenizer.

    Args:
        config: open_clip's ``text_cfg``.
        output_dim: width of the joint space, D.
        quick_gelu: OpenAI's activation.
        tokenizer: texts -> int64 [n, context]; CLIP's BPE tokenizer if omitted.
    """

    def __init__(
        self,
        config: dict,
        output_dim: int,
        quick_gelu: bool,
        tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
    ):
        super().__init__()
        known = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
        unsupported = sorted(set(config) - known)
        if unsupported:
            raise ValueError(f"text tower options {unsupported} are not supported; known are {sorted(known)}")
        context_length = config.get("context_length", 77)
        self.tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=context_length)
        self.tower = TextTransformer(**config, output_dim=output_dim, act_layer=QuickGELU if quick_gelu else nn.GELU)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [n, context] -> unit vectors [n, D]."""
        return F.normalize(self.tower(tokens), dim=-1)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Texts -> unit vectors fp32 [n, D], ``batch`` at a time on the tower's device."""
        device = self.tower.token_embedding.weight.device
        rows = [
            self(self.tokenizer(list(texts[i : i + batch])).to(device)).float() for i in range(0, len(texts), batch)
        ]
        return torch.cat(rows)
