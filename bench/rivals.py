"""Rivals that compute the same: judged first, then timed in turn, round by round, each a row with all that was found.

A test file describes a :class:`Contest` in a function and asks for one row per rival::

    def contest(shape, device):
        return Contest(group, device, inputs, {"published": Rival(published), "fastzs": Rival(mask_loss)}, judge)

    @pytest.mark.parametrize("rival", ["published", "fastzs"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_cpu(benchmark, shape, rival):
        compete(benchmark, rival, contest, shape, "cpu")

The first rival's row runs the whole contest, so that rounds are interleaved; the others' report what it found.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from .machine import copy_bandwidth, describe, in_fresh_process, matrix_rate, peak_megabytes
from .timing import sampler, sets_beyond_cache

# Largest error against the fp64 judge, as a share of its largest value, where a rival names no bound of its own.
BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SECONDS = 5.0  # for the rounds of one contest
LEAST_ROUNDS, MOST_ROUNDS = 3, 25


class Unavailable(Exception):
    """Raised by a rival that cannot run on this machine; the message says why."""


@dataclass
class Rival:
    """One way to compute it.

    Attributes:
        run: takes the contest's inputs; returns a tensor or a tuple of tensors (gradients among them, where the
            backward pass is timed). Everything it needs besides is made in the first call.
        dtype: of the inputs it is given, and what its products are held against.
        bound: largest error it may have.
        answer: what is judged, where that is not what ``run`` returns; takes the same inputs.
    """

    run: Callable[..., Any]
    dtype: torch.dtype = torch.float32
    bound: float | None = None
    answer: Callable[..., Any] | None = None


@dataclass
class Contest:
    """Rivals over one problem.

    Attributes:
        group: names the problem, the same for all rivals.
        device: "cpu" or "cuda".
        inputs: ``inputs(seed, dtype)`` gives a tuple of random inputs on the device.
        rivals: by name; speeds are compared with the first one.
        judge: takes the inputs on the CPU, floating-point ones in fp64, and returns what is right.
        error: of an answer against the judge's.
        nbytes: read and written at the least, by any way of computing it (inputs once, outputs once).
        operations: additions and multiplications at the least.
        pictures: a call's, for models.
        info: what else a row should have (sizes, numbers of classes ...).
        seconds: for all the rounds.
    """

    group: str
    device: str
    inputs: Callable[[int, torch.dtype], tuple]
    rivals: dict[str, Rival]
    judge: Callable[..., Any]
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = field(default_factory=lambda: largest_error)
    nbytes: int = 0
    operations: int = 0
    pictures: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    seconds: float = SECONDS


def largest_error(got: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest difference of any tensor from the right one, as a share of the latter's largest value."""
    worst = 0.0
    for one, other in zip(got, right, strict=True):
        if one.shape != other.shape:
            raise AssertionError(f"has shape {list(one.shape)}, right is {list(other.shape)}")
        difference = (one.detach().cpu().double() - other).abs().max().item()
        share = difference / max(other.abs().max().item(), 1e-30)
        worst = max(worst, share) if share == share else float("inf")
    return worst


def share_of_labels(got: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The share of labels that differ."""
    return max((one.cpu().long() != other.long()).double().mean().item() for one, other in zip(got, right, strict=True))


def compete(benchmark, rival: str, contest: Callable[..., Contest], *args: Any) -> dict[str, Any]:
    """Fill ``benchmark`` with the row of ``rival`` in ``contest(*args)``, which runs when its first row is asked for.

    The row's "seconds" are those of each round, in the order of the rounds, which is the same for all rivals; "faster"
    is the median over the rounds of the first rival's time divided by this one's.
    """
    key = (contest.__module__, contest.__qualname__, args)
    if key not in _FOUND:
        _FOUND[key] = hold(contest, args)
    found = _FOUND[key][rival]
    if isinstance(found, Unavailable):
        pytest.skip(str(found))
    if isinstance(found, Exception):
        raise found
    benchmark.group = found["group"]
    benchmark.extra_info.update(found)
    times = iter(found["seconds"])

    def replay() -> None:
        _CLOCK[0] += next(times)

    benchmark.pedantic(replay, rounds=len(found["seconds"]))
    if path := os.environ.get("FASTZS_BENCH_ROWS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return found


_FOUND: dict[tuple, dict[str, dict[str, Any] | Exception]] = {}
_CLOCK = [0.0]


def clock() -> float:
    """The timer given to pytest-benchmark: it passes when measured rounds are replayed."""
    return _CLOCK[0]


def hold(contest: Callable[..., Contest], args: tuple) -> dict[str, dict[str, Any] | Exception]:
    """For each rival its row, or why it has none."""
    it = contest(*args)
    rows: dict[str, dict[str, Any]] = {}
    problems: dict[str, Exception] = {}
    samplers: dict[str, Callable[[], dict[str, float]]] = {}
    right: dict[torch.dtype, Sequence[Tensor]] = {}
    sets: dict[torch.dtype, list[tuple]] = {}
    for name, rival in it.rivals.items():
        if rival.dtype not in sets:
            first = it.inputs(0, rival.dtype)
            count = sets_beyond_cache(sum(x.nbytes for x in first if isinstance(x, Tensor)), it.device)
            sets[rival.dtype] = [first, *(it.inputs(seed, rival.dtype) for seed in range(1, count))]
        inputs = sets[rival.dtype][0]
        try:
            answer = _tensors((rival.answer or rival.run)(*inputs))
            if rival.dtype not in right:
                right[rival.dtype] = _tensors(it.judge(*(_double(x) for x in inputs)))
            error = it.error(answer, right[rival.dtype])
            bound = BOUNDS[rival.dtype] if rival.bound is None else rival.bound
            if not error <= bound:
                raise AssertionError(f"{name} is refused in {it.group}: error {error:.2e}, at most {bound:.2e} allowed")
            row = _row(it, name, rival, error, bound)
            samplers[name] = sampler(rival.run, sets[rival.dtype], it.device)
            rows[name] = row
        except Exception as problem:  # this rival's test reports it, and the others run
            problems[name] = problem
    for name, rounds in _rounds(samplers, it.seconds).items():
        rows[name] |= rounds
    _compare(it, rows)
    del sets, samplers
    for name, row in rows.items():
        row["peak MB"] = _peak(it, contest, args, name)
    return rows | problems


def _row(it: Contest, name: str, rival: Rival, error: float, bound: float) -> dict[str, Any]:
    row = {
        "group": it.group,
        "rival": name,
        "dtype": str(rival.dtype).removeprefix("torch."),
        **it.info,
        **describe(it.device),
        "error": error,
        "error allowed": bound,
        "bytes": it.nbytes,
        "operations": it.operations,
        "copy bytes/s": copy_bandwidth(it.device),
        "matrix operations/s": matrix_rate(it.device, rival.dtype),
    }
    return row | {"floor seconds": max(it.nbytes / row["copy bytes/s"], it.operations / row["matrix operations/s"])}


def _rounds(samplers: dict[str, Callable[[], dict[str, float]]], budget: float) -> dict[str, dict[str, list[float]]]:
    """Each rival's measurements, one a round, all rivals in every round, another one first each time."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in samplers}
    names = list(samplers)
    spent, rounds = 0.0, 0
    while names and rounds < MOST_ROUNDS and (rounds < LEAST_ROUNDS or spent * (1 + 1 / rounds) < budget):
        start = time.perf_counter()
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            for kind, value in samplers[name]().items():
                found[name].setdefault(kind, []).append(value)
        spent += time.perf_counter() - start
        rounds += 1
    return found


def _compare(it: Contest, rows: dict[str, dict[str, Any]]) -> None:
    first = rows.get(next(iter(it.rivals)))
    for row in rows.values():
        row["median seconds"] = statistics.median(row["seconds"])
        if it.pictures:
            row["pictures per second"] = it.pictures / row["median seconds"]
        if row["floor seconds"]:
            row["times the floor"] = row["median seconds"] / row["floor seconds"]
        if "graph seconds" in row:
            row["launch overhead seconds"] = row["median seconds"] - statistics.median(row["graph seconds"])
        if first is not None:
            row["faster"] = ratio(first["seconds"], row["seconds"])


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over the rounds of ``slow / fast``."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _peak(it: Contest, contest: Callable[..., Contest], args: tuple, name: str) -> float | None:
    if it.device == "cuda":
        return _memory(contest, args, name)
    return in_fresh_process(_memory, contest, args, name)


def _memory(contest: Callable[..., Contest], args: tuple, name: str) -> float:
    """Peak of a rival's second call beyond its inputs and what it keeps from the first, in MB."""
    it = contest(*args)
    rival = it.rivals[name]
    inputs = it.inputs(0, rival.dtype)
    rival.run(*inputs)
    return round(peak_megabytes(lambda: rival.run(*inputs), it.device), 1)


def _tensors(answer: Any) -> Sequence[Tensor]:
    return [answer] if isinstance(answer, Tensor) else list(answer)


def _double(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    x = x.detach().cpu()
    return x.double().requires_grad_() if x.is_floating_point() else x
