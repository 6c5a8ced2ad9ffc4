"""What systems there are. Each says so itself, on its class; what lists or loads systems reads it here."""

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from fastzs.models.base import SegmentationModel

Kind = TypeVar("Kind", bound="type[SegmentationModel]")


@dataclass(frozen=True)
class System:
    """What there is to say about a system beside its figures.

    Attributes:
        name: what :func:`fastzs.load` and ``--model`` call it.
        kind: its class.
        paper: who, where, when.
        does: an image's way to its scores.
        trained: the parts that training changes; empty if there is no training.
        needs: what training must be given beside images, or the system beside an image and names.
        checkpoints: which files and folders it reads.
    """

    name: str
    kind: "type[SegmentationModel]"
    paper: str
    does: str
    trained: str
    needs: str
    checkpoints: str


_systems: dict[str, System] = {}


def register(name: str, *, paper: str, does: str, trained: str, needs: str, checkpoints: str) -> Callable[[Kind], Kind]:
    """Decorator of a model's class: the system goes by ``name``; see :class:`System`."""

    def note(kind: Kind) -> Kind:
        assert name not in _systems, f"two systems are called {name}"
        _systems[name] = System(name, kind, paper, does, trained, needs, checkpoints)
        return kind

    return note


def systems() -> dict[str, System]:
    """All systems by name, in the order in which they are listed."""
    import fastzs.models  # noqa: F401 - where they register

    return dict(_systems)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the systems that :func:`fastzs.load` takes and that match a shell pattern ("*clip*")."""
    return fnmatch.filter(systems(), pattern)


def system(name: str) -> System:
    """One system.

    Raises:
        ValueError: there is none of that name (the nearest known are given).
    """
    known = systems()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)
        raise ValueError(f"unknown model {name!r}; nearest known: {', '.join(near)}")
    return known[name]


def table(*columns: str) -> str:
    """A Markdown table of all systems: their names, and these of their fields."""
    rows = [("model", *columns), ("---",) * (1 + len(columns))]
    for entry in systems().values():
        rows.append((f"`{entry.name}`", *(getattr(entry, column) or "-" for column in columns)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
