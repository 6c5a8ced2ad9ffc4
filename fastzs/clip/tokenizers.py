"""Texts to token ids: CLIP's own tokenizer, those of tokenizer.json files, and the one of closed vocabularies."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import get_clean_fn
from torch import Tensor

from fastzs.clip import hub
from fastzs.clip.state import WeightsError, read_json
from fastzs.needed import check_installed, needed

Tokenizer = Callable[[Sequence[str]], Tensor]
FILES = ("tokenizer.json", "tokenizer_config.json")


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


class FileTokenizer:
    """The tokenizer of a ``tokenizer.json``, by the library ``tokenizers``; transformers is not needed.

    Args:
        folder: has ``tokenizer.json``, and ``tokenizer_config.json`` with the padding token.
        context_length: length of every row; longer texts are cut, the end token kept.
        clean: open_clip's name of what is done to a text first: "canonicalize" makes it lower case, without
            punctuation (SigLIP), "whitespace" only mends spaces.
        strip_sep_token: padding in place of the separator (CLIPA).

    Raises:
        WeightsError: a file is missing or damaged.
        MissingPackage: the library is not installed.
    """

    def __init__(self, folder: Path, context_length: int, clean: str = "whitespace", strip_sep_token: bool = False):
        tokenizers = needed("tokenizers", "tokenizers", f"tokenizers such as that in {folder}", "hf")
        self.folder, self.context_length, self.clean = folder, context_length, clean
        self.clean_fn = get_clean_fn(clean)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise WeightsError(f"{folder / 'tokenizer.json'}: cannot be read as a tokenizer ({error})") from error
        config = read_json(folder / "tokenizer_config.json")
        pad = self._id(config.get("pad_token"), "pad_token")
        self.strip = self._id(config.get("sep_token"), "sep_token") if strip_sep_token else None
        side = config.get("padding_side", "right")
        self.tokenizer.enable_padding(length=context_length, pad_id=pad, direction=side)
        self.tokenizer.enable_truncation(context_length)

    def _id(self, token: Any, what: str) -> int:
        content = token.get("content") if isinstance(token, dict) else token
        index = None if content is None else self.tokenizer.token_to_id(content)
        if index is None:
            raise WeightsError(
                f"{self.folder / 'tokenizer_config.json'}: {what} is {content!r}, no token of tokenizer.json"
            )
        return index

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [n, context_length]."""
        encoded = self.tokenizer.encode_batch([self.clean_fn(text) for text in texts])
        ids = torch.tensor([row.ids for row in encoded], dtype=torch.int64).view(len(texts), self.context_length)
        return ids if self.strip is None else ids.masked_fill(ids == self.strip, 0)


class StandInTokenizer:
    """For random weights, which give texts no meaning: CLIP's ids, folded into the vocabulary."""

    def __init__(self, context_length: int, vocab_size: int):
        self.tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
        self.vocab_size = vocab_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [n, context_length]."""
        return self.tokenizer(list(texts)) % self.vocab_size


def of_folder(folder: Path, text_cfg: dict, source: str) -> Tokenizer | None:
    """The tokenizer of a weights folder; None where it is CLIP's own.

    Raises:
        WeightsError: files are missing or damaged.
    """
    if (folder / "words.json").is_file():
        words = read_json(folder / "words.json")
        return WordTokenizer(words["words"], text_cfg["context_length"])
    if "hf_tokenizer_name" not in text_cfg:
        return None
    if not (folder / "tokenizer.json").is_file():
        return of_hub(text_cfg, source)
    return _from_files(folder, text_cfg)


def of_hub(text_cfg: dict, source: str) -> Tokenizer | None:
    """The tokenizer that an open_clip configuration names; None where it is CLIP's own.

    Repositories without a ``tokenizer.json`` are read by transformers.

    Raises:
        WeightsError: it cannot be fetched.
        MissingPackage: transformers is needed and not installed.
    """
    repository = text_cfg.get("hf_tokenizer_name")
    if not repository:
        return None
    what = f"{source}'s tokenizer"
    found = hub.optional_file(what, repository, "tokenizer.json")
    if found is not None:
        hub.file(what, repository, ("tokenizer_config.json",))
        return _from_files(found.parent, text_cfg)
    need_transformers(f"tokenizers such as {source}'s ({repository})")
    hub.file(what, repository, ("tokenizer_config.json", "config.json"))  # transformers would try for a minute
    try:
        made: Any = open_clip.tokenizer.HFTokenizer(
            repository, context_length=text_cfg.get("context_length", 77), **text_cfg.get("tokenizer_kwargs", {})
        )
        return made
    except Exception as error:
        reason = type(error).__name__ if hub.online() else "no network"
        raise hub.cannot_fetch(what, "tokenizer.json", repository, reason) from error


def _from_files(folder: Path, text_cfg: dict) -> FileTokenizer:
    return FileTokenizer(folder, text_cfg.get("context_length", 77), **text_cfg.get("tokenizer_kwargs", {}))


def need_transformers(what: str) -> None:
    """Raises MissingPackage where transformers is not installed; ``what`` needs it, in the plural."""
    check_installed("transformers", "transformers", what, "hf")
