"""Names in, text embeddings out: synonyms, prompt templates, and a cache so that text is encoded once."""

import copy
import hashlib
import json
import logging
import os
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastzs.clip.templates import TEMPLATES
from fastzs.clip.weights import Clip
from fastzs.trace import traced

if TYPE_CHECKING:
    from fastzs.models.base import SegmentationModel

log = logging.getLogger(__name__)
_memory: dict[str, Tensor] = {}


class Vocabulary:
    """The classes of one segmentation, in order.

    Args:
        entries: class names, or mappings from a name to its synonyms: ``["cat", {"sofa": ["couch", "settee"]}]``.
            A class is asked for under its name and every synonym.
        templates: a name in :data:`fastzs.clip.TEMPLATES`, or a list of strings with ``{}`` for the name; the model's
            own choice if omitted. The unit vectors of all templates are averaged and normalised again.
        synonyms: how synonyms of a class join: ``"max"`` of their logits or ``"mean"`` of their embeddings.
        embeddings: text vectors [number of classes, D] to use instead of a text tower: an array, a tensor or a path
            of an ``.npy`` file. They are used as given (published fp16 vectors are not normalised again).

    Raises:
        ValueError: no names, an empty name, names that are equal once case and spacing are ignored, unknown
            templates or templates without ``{}``, embeddings that do not fit.
    """

    def __init__(
        self,
        entries: Sequence[str | Mapping[str, Sequence[str]]],
        templates: str | Sequence[str] | None = None,
        *,
        synonyms: Literal["max", "mean"] = "max",
        embeddings: Tensor | np.ndarray | str | Path | None = None,
    ):
        if isinstance(entries, str):
            raise ValueError(f"vocabulary: expected a list of names, got the single string {entries!r}")
        phrases: list[str] = []
        groups: list[int] = []
        names: list[str] = []
        for entry in entries:
            for name, others in {entry: ()}.items() if isinstance(entry, str) else entry.items():
                for phrase in (name, *([others] if isinstance(others, str) else others or ())):
                    phrases.append(_clean(phrase))
                    groups.append(len(names))
                names.append(_clean(name))
        if not names:
            raise ValueError("vocabulary: no class names given")
        first: dict[str, str] = {}
        for phrase in phrases:
            normal = normal_name(phrase)
            if normal in first:
                raise ValueError(f"vocabulary: {phrase!r} is the same name as {first[normal]!r}")
            first[normal] = phrase
        if synonyms not in ("max", "mean"):
            raise ValueError(f"vocabulary: synonyms must be 'max' or 'mean', got {synonyms!r}")
        self.names = tuple(names)
        self.phrases = tuple(phrases)
        self.synonyms = synonyms
        self.templates = _templates(templates)
        self.groups = torch.tensor(groups)
        self.embeddings = None if embeddings is None else _embeddings(embeddings, len(names))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} names: {', '.join(self.names[:6])}{', ...' if len(self) > 6 else ''})"

    @property
    def hash(self) -> str:
        """Identifies names, synonyms, templates and given embeddings, for run records."""
        given = "" if self.embeddings is None else hashlib.sha256(self.embeddings.numpy().tobytes()).hexdigest()
        content = [self.names, self.phrases, self.groups.tolist(), self.templates, self.synonyms, given]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def row_groups(self) -> Tensor | None:
        """The class of each row of :meth:`embed`, int64; None if each row is a class."""
        one_each = self.embeddings is not None or self.synonyms == "mean" or len(self.phrases) == len(self)
        return None if one_each else self.groups

    def embed(self, clip: Clip, default_templates: str = "single") -> Tensor:
        """Text embeddings of every phrase, fp32 [phrases, D] (of every class, [C, D], with ``synonyms="mean"``).

        Embeddings come from memory, then from the folder ``$FASTZS_CACHE`` (``~/.cache/fastzs``), then from the
        text tower, which is not even loaded unless it is needed.

        Raises:
            ValueError: given embeddings are not ``clip.embed_dim`` wide.
            WeightsError: the weights have no text tower.
        """
        if self.embeddings is not None:
            if self.embeddings.shape[1] != clip.embed_dim:
                raise ValueError(
                    f"vocabulary: the embeddings are {self.embeddings.shape[1]} wide, "
                    f"{clip.source} wants {clip.embed_dim}"
                )
            return self.embeddings
        templates = self.templates or TEMPLATES[clip.templates or default_templates]
        vectors = _encode(clip, templates, self.phrases)
        if self.synonyms == "mean" and len(self.phrases) > len(self.names):
            mean = torch.zeros(len(self), vectors.shape[1]).index_add_(0, self.groups, vectors)
            return F.normalize(mean, dim=-1)
        return vectors

    def with_class(self, name: str, phrases: Sequence[str]) -> "Vocabulary":
        """This vocabulary with one more class at the end, asked for under ``phrases`` only.

        Phrases that are already names here are left out.

        Raises:
            ValueError: ``name`` exists already, no phrase is left, or embeddings were given as an array.
        """
        if self.embeddings is not None:
            raise ValueError(f"vocabulary: {name!r} cannot be added to embeddings given as an array; add its row there")
        taken = {normal_name(phrase) for phrase in (*self.names, *self.phrases)}
        if normal_name(name) in taken:
            raise ValueError(f"vocabulary: there is a class {name!r} already")
        added = [_clean(phrase) for phrase in phrases if normal_name(phrase) not in taken]
        if not added:
            raise ValueError(f"vocabulary: every phrase of {name!r} is a class already: {', '.join(phrases)}")
        out = copy.copy(self)
        out.names = (*self.names, name)
        out.phrases = (*self.phrases, *added)
        out.groups = torch.cat([self.groups, torch.full((len(added),), len(self.names))])
        return out


def text_vectors(model: "SegmentationModel", vocabulary: Vocabulary) -> Tensor:
    """What a model is asked for: text vectors [T, D] on the CPU, fp32; rows as of :meth:`Vocabulary.row_groups`.

    Raises:
        ValueError: they are not as wide as the model's joint space.
        WeightsError: the model has no text tower.
    """
    given = vocabulary.embeddings
    text = vocabulary.embed(model.clip, model.default_templates) if given is None else given
    if text.shape[1] != model.text_dim:
        raise ValueError(
            f"{type(model).__name__}: expected text vectors {model.text_dim} wide, the joint space of its CLIP; the "
            f"vocabulary's are {text.shape[1]} wide"
        )
    return text


def class_indices(seen: Sequence, names: Sequence[str], *, among: bool = False) -> list[int]:
    """Positions of the seen classes, given by name or index, among ``names``, ascending.

    Args:
        among: names that are not among ``names`` are left out, and so may all be.

    Raises:
        ValueError: a class is not among the names, an index is too large, a class is given twice.
    """
    place = {normal_name(name): i for i, name in enumerate(names)}
    indices, unknown = [], []
    for item in seen:
        if isinstance(item, str):
            index = place.get(normal_name(item))
        else:
            index = int(item) if 0 <= int(item) < len(names) else None
        if index is None and among and isinstance(item, str):
            continue
        (unknown if index is None else indices).append(item if index is None else index)
    if unknown or not (indices or among):
        what = f"{_some([str(item) for item in unknown])} is not among" if unknown else "no class is among"
        raise ValueError(
            f"seen classes: {what} the {len(names)} names ({_some(list(names))}); write them as the vocabulary does"
        )
    if len(set(indices)) < len(indices):
        raise ValueError(f"seen classes: {len(indices) - len(set(indices))} of them are given twice")
    return sorted(indices)


def normal_name(phrase: str) -> str:
    """What two names have in common that are the same but for case, underscores and spacing."""
    return " ".join(phrase.casefold().replace("_", " ").split())


def _clean(name: object) -> str:
    text = " ".join(unicodedata.normalize("NFKC", str(name)).split())
    if not text:
        raise ValueError(f"vocabulary: empty class name {name!r}")
    return text


def _templates(templates: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if templates is None:
        return None
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(f"vocabulary: templates={templates!r} is unknown; known are {', '.join(TEMPLATES)}")
        return TEMPLATES[templates]
    bad = [template for template in templates if template.count("{}") != 1]
    if bad or not templates:
        raise ValueError(f"vocabulary: a template holds {{}} once, for the class name; got {bad or 'none'}")
    return tuple(templates)


def _embeddings(given: Tensor | np.ndarray | str | Path, count: int) -> Tensor:
    if isinstance(given, str | Path):
        given = np.load(given, allow_pickle=False)
    rows = torch.as_tensor(given).detach().to("cpu", torch.float32)
    if rows.ndim != 2 or rows.shape[0] != count:
        raise ValueError(f"vocabulary: {count} names want embeddings [{count}, D], got {list(rows.shape)}")
    if not torch.isfinite(rows).all():
        raise ValueError("vocabulary: NaN or infinite values in the embeddings")
    return rows


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _encode(clip: Clip, templates: Sequence[str], phrases: Sequence[str]) -> Tensor:
    content = json.dumps([clip.fingerprint, list(templates), list(phrases)])
    key = hashlib.sha256(content.encode()).hexdigest()
    if key in _memory:
        return _memory[key]
    path = cache_folder() / "text" / f"{key}.safetensors"
    vectors = _read_cache(path)
    if vectors is None:
        vectors = _run_tower(clip, templates, phrases)
        _write_cache(path, vectors)
    _memory[key] = vectors
    return vectors


@traced("model.text")
def _run_tower(clip: Clip, templates: Sequence[str], phrases: Sequence[str]) -> Tensor:
    encoder = clip.text()
    at_once = max(1, 256 // len(templates))
    starts = range(0, len(phrases), at_once)
    quiet = len(phrases) * len(templates) < 2000
    rows = []
    for start in track(starts, "encoding names", console=Console(stderr=True), disable=quiet, transient=True):
        some = phrases[start : start + at_once]
        texts = [template.replace("{}", phrase) for phrase in some for template in templates]
        vectors = encoder.encode(texts).cpu().unflatten(0, (len(some), len(templates)))
        rows.append(F.normalize(vectors.mean(1), dim=-1))
    return torch.cat(rows)


def cache_folder() -> Path:
    """Where embeddings are kept: ``$FASTZS_CACHE``, else ``$XDG_CACHE_HOME/fastzs``, else ``~/.cache/fastzs``."""
    if folder := os.environ.get("FASTZS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastzs"


def _read_cache(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        return load_file(path)["embeddings"]
    except Exception as error:
        log.warning("%s is damaged (%s) and will be written again", path, error)
        return None


def _write_cache(path: Path, vectors: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file({"embeddings": vectors.contiguous()}, Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)
    except OSError as error:
        log.warning("text embeddings are not kept: %s", error)
