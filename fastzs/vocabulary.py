"""Names in, text vectors out: synonyms and prompt templates."""

import copy
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.clip.templates import TEMPLATES
from fastzs.clip.weights import Clip
from fastzs.files import open_file
from fastzs.text_cache import encode

if TYPE_CHECKING:
    from fastzs.models.base import SegmentationModel


class Vocabulary:
    """The classes of one segmentation, in order.

    Args:
        entries: class names, or mappings from a name to its synonyms: ``["cat", {"sofa": ["couch", "settee"]}]``; or
            one such mapping; or numbers from 0 with a name each, as in a YOLO data set. A class is asked for under its
            name and every synonym.
        templates: a name in :data:`fastzs.clip.TEMPLATES`, or a list of strings with ``{}`` for the name; the model's
            own choice if omitted. The unit vectors of all templates are averaged and normalised again.
        synonyms: how synonyms of a class join: ``"max"`` of their logits or ``"mean"`` of their embeddings.
        embeddings: text vectors [number of classes, D] to use instead of a text tower: an array, a tensor or a path
            of an ``.npy`` file. They are used as given (published fp16 vectors are not normalised again).

    Raises:
        ValueError: no names, an empty name, something that is no name, names that are equal once case and spacing are
            ignored, unknown templates or templates without ``{}``, embeddings that cannot be read or do not fit.
    """

    def __init__(
        self,
        entries: Sequence[str | Mapping[str, Sequence[str]]] | Mapping[str, Sequence[str]] | Mapping[int, str],
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
        for name, others in _named(entries):
            for phrase in (name, *others):
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
        self.repeats = False  # whether a phrase may stand in two classes

    @classmethod
    def of_phrases(
        cls,
        names: Sequence[str],
        phrases: Sequence[Sequence[str]],
        templates: str | Sequence[str] | None = None,
    ) -> "Vocabulary":
        """Classes that are asked for under ``phrases`` only, as benchmarks have it: their names are just printed.

        A phrase may stand in two classes ("bed" is a class of COCO-Object and one of its background's words); the first
        of them wins.

        Raises:
            ValueError: a class without phrases, or more or fewer lists of phrases than names.
        """
        if len(names) != len(phrases) or not all(phrases):
            raise ValueError(f"vocabulary: expected phrases for each of {len(names)} names, got {len(phrases)} lists")
        out = cls(list(names), templates)
        out.phrases = tuple(_clean(phrase) for some in phrases for phrase in some)
        out.groups = torch.tensor([i for i, some in enumerate(phrases) for _ in some])
        out.repeats = True
        return out

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

        Every phrase is encoded once, see :mod:`fastzs.text_cache`.

        Raises:
            ValueError: given embeddings are not ``clip.embed_dim`` wide; two classes are one to the text tower, such as
                names that differ only behind what it reads.
            WeightsError: the weights have no text tower.
        """
        if self.embeddings is not None:
            if self.embeddings.shape[1] != clip.embed_dim:
                raise ValueError(
                    f"vocabulary: expected embeddings of width {clip.embed_dim} for {clip.source}, "
                    f"got {self.embeddings.shape[1]}"
                )
            return self.embeddings
        templates = self.templates or TEMPLATES[clip.templates or default_templates]
        vectors = encode(clip, templates, self.phrases)
        if not self.repeats:
            self._check_distinct(vectors)
        if self.synonyms == "mean" and len(self.phrases) > len(self.names):
            mean = torch.zeros(len(self), vectors.shape[1]).index_add_(0, self.groups, vectors)
            return F.normalize(mean, dim=-1)
        return vectors

    def _check_distinct(self, vectors: Tensor) -> None:
        first: dict[bytes, int] = {}
        for row, vector in enumerate(vectors.numpy()):
            other = first.setdefault(vector.tobytes(), row)
            if self.groups[other] != self.groups[row]:
                one, two = (f"class {self.groups[i]}, {_short(self.phrases[i])}," for i in (other, row))
                raise ValueError(
                    f"vocabulary: the text tower reads {one} and {two} as the same text, so the second could "
                    "never win; shorten them, or tell them apart at their beginning"
                )

    def with_class(self, name: str, phrases: Sequence[str]) -> "Vocabulary":
        """This vocabulary with one more class at the end, asked for under ``phrases`` only.

        Phrases that are already names here are left out.

        Raises:
            ValueError: ``name`` exists already, no phrase is left, or embeddings were given as an array.
        """
        if isinstance(phrases, str):
            raise ValueError(f"vocabulary: expected a list of names for {name!r}, got the single text {phrases!r}")
        if not phrases:
            raise ValueError(f"vocabulary: expected names for {name!r}, got none")
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


def _named(entries: Iterable[Any] | Mapping[Any, Any]) -> Iterator[tuple[str, Sequence[str]]]:
    """Each class's name and its synonyms."""
    if isinstance(entries, Mapping):
        if entries and list(entries) == list(range(len(entries))):
            entries = list(entries.values())
        else:
            entries = [entries]
    if isinstance(entries, set | frozenset):
        raise ValueError("vocabulary: expected a list of names, got a set, which has no order; use sorted(...)")
    for entry in entries:
        if not isinstance(entry, str | Mapping):
            raise ValueError(
                f"vocabulary: expected a name, or a mapping from a name to its synonyms, got {type(entry).__name__} "
                f"{entry!r}"
            )
        for name, others in {entry: ()}.items() if isinstance(entry, str) else entry.items():
            others = [others] if isinstance(others, str) else () if others is None else others
            if not isinstance(others, Iterable) or isinstance(others, Mapping):
                raise ValueError(f"vocabulary: expected a list of synonyms of {name!r}, got {others!r}")
            yield name, list(others)


def _clean(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError(f"vocabulary: expected a name, got {type(name).__name__} {name!r}; names are texts")
    text = " ".join(unicodedata.normalize("NFKC", name).split())
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


def _read_embeddings(path: Path) -> np.ndarray:
    """An array of numbers from an ``.npy`` file."""
    try:
        with open_file(path) as stream:
            array = np.load(stream, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"embeddings {path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what is no array, or one of objects, which would run code
        raise ValueError(f"embeddings {path}: expected an array as numpy.save writes it: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        archive = isinstance(array, np.lib.npyio.NpzFile)
        what = f"an archive of {', '.join(array.files)}" if archive else f"an array of {array.dtype}"
        raise ValueError(f"embeddings {path}: expected one array of numbers as numpy.save writes it, got {what}")
    return array


def _embeddings(given: Tensor | np.ndarray | str | Path, count: int) -> Tensor:
    if isinstance(given, str | Path):
        given = _read_embeddings(Path(os.path.expanduser(given)))
    rows = given if isinstance(given, Tensor) else torch.as_tensor(np.array(given))  # arrays may be read-only
    rows = rows.detach().to("cpu", torch.float32)
    if rows.ndim != 2 or rows.shape[0] != count:
        raise ValueError(f"vocabulary: expected embeddings [{count}, D] for {count} names, got {list(rows.shape)}")
    if not torch.isfinite(rows).all():
        raise ValueError("vocabulary: NaN or infinite values in the embeddings")
    return rows


def _short(phrase: str) -> str:
    return repr(phrase if len(phrase) <= 60 else f"{phrase[:57]}...")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
