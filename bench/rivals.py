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

import functools
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

from .machine import (
    FRESH_PROCESS_SECONDS,
    LARGE,
    copy_bandwidth,
    describe,
    in_fresh_process,
    matrix_rate,
    peak_megabytes,
)
from .timing import sampler, sets_beyond_cache, timed

# Largest error against the fp64 judge, as a share of its largest value, where a rival names no bound of its own.
BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SECONDS = 5.0  # for the rounds of one contest
LEAST_ROUNDS, MOST_ROUNDS = 3, 25


class Unavailable(Exception):
    """A rival that has no row; the message says why. Rivals raise it where that shows in their first call only."""


@dataclass
class Rival:
    """One way to compute it.

    Attributes:
        run: takes the contest's inputs; returns a tensor or a tuple of tensors (gradients among them, where the
            backward pass is timed). Everything it needs besides is made in the first call.
        dtype: of the inputs it is given, and what its products are held against.
        products: what its products are computed in, if not in ``dtype``.
        bound: largest error it may have.
        answer: what is judged, where that is not what ``run`` returns; takes the same inputs.
        judge: of this answer, where the rivals compute different things.
        unavailable: why it cannot run on this machine or is left out; it has no row then.
        prepare: makes what ``run`` needs, in place of a first call, where a contest is ``fresh``. The next call is then
            measured for memory, and the one after it is timed, since memory measured cold costs time.
        once: one call after ``prepare`` is both timed and measured for memory: for calls of many seconds.
        details: what else to measure of it, once the rounds are over.
        info: for its row alone; a "group" in it lists the row under a problem of its own.
    """

    run: Callable[..., Any]
    dtype: torch.dtype = torch.float32
    products: torch.dtype | None = None
    bound: float | None = None
    answer: Callable[..., Any] | None = None
    judge: Callable[..., Any] | None = None
    unavailable: str | None = None
    prepare: Callable[[], object] | None = None
    once: bool = False
    details: Callable[[], dict[str, Any]] | None = None
    info: dict[str, Any] = field(default_factory=dict)


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
        info: what else a row should have: its "op", sizes that plots are drawn over ("classes", "height", "batch" ...),
            and "headline" where it stands for the op in docs/performance.md.
        seconds: for all the rounds.
        fresh: each call on a CPU is timed in a process of its own, which is also measured for memory; for calls of
            many seconds and models that need not all be there at a time. One round is the least then.
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
    fresh: bool = False


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
    if found.get("times the floor", 1.0) < 1.0:
        raise AssertionError(
            f"{rival} takes {found['times the floor']:.2f} times its floor of {found['floor seconds']:.3g} s in "
            f"{found['group']}: what it must do, or what the machine can, is measured wrong"
        )
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
    torch.compiler.reset()  # every problem is compiled for its own shapes
    it = contest(*args)
    fresh = it.fresh and it.device == "cpu"
    rows: dict[str, dict[str, Any]] = {}
    problems: dict[str, Exception] = {}
    samplers: dict[str, Callable[[], dict[str, float]]] = {}
    right: dict[torch.dtype, Sequence[Tensor]] = {}
    sets: dict[torch.dtype, list[tuple]] = {}
    for name, rival in it.rivals.items():
        if rival.unavailable:
            problems[name] = Unavailable(rival.unavailable)
            continue
        if rival.dtype not in sets:
            first = it.inputs(0, rival.dtype)
            count = sets_beyond_cache(sum(x.nbytes for x in first if isinstance(x, Tensor)), it.device)
            sets[rival.dtype] = [first, *(it.inputs(seed, rival.dtype) for seed in range(1, count))]
        inputs = sets[rival.dtype][0]
        try:
            answer = _tensors((rival.answer or rival.run)(*inputs))
            if rival.judge is not None:
                wanted = _tensors(rival.judge(*(_double(x) for x in inputs)))
            else:
                if rival.dtype not in right:
                    right[rival.dtype] = _tensors(it.judge(*(_double(x) for x in inputs)))
                wanted = right[rival.dtype]
            error = it.error(answer, wanted)
            bound = BOUNDS[rival.dtype] if rival.bound is None else rival.bound
            if not error <= bound:
                raise AssertionError(f"{name} is refused in {it.group}: error {error:.2e}, at most {bound:.2e} allowed")
            row = _row(it, name, rival, error, bound)
            if fresh:
                samplers[name] = functools.partial(_alone, contest, args, name)
            else:
                if rival.answer is not None:
                    rival.run(*inputs)
                samplers[name] = sampler(rival.run, sets[rival.dtype], it.device)
            rows[name] = row
        except Exception as problem:  # this rival's test reports it, and the others run
            problems[name] = problem
    for name, found in _rounds(samplers, it.seconds, 1 if fresh else LEAST_ROUNDS).items():
        if isinstance(found, Exception):
            problems[name] = found
            del rows[name]
        else:
            rows[name] |= found
    _compare(it, rows)
    for name, row in rows.items():
        if details := it.rivals[name].details:
            row |= details()
    del sets, samplers
    for name, row in rows.items():
        row["peak MB"] = max(row["peak MB"]) if fresh else _peak(it, contest, args, name)
    return rows | problems


def _row(it: Contest, name: str, rival: Rival, error: float, bound: float) -> dict[str, Any]:
    row = {
        "group": it.group,
        "rival": name,
        "dtype": str(rival.dtype).removeprefix("torch."),
        "products": str(rival.products or rival.dtype).removeprefix("torch."),
        **it.info,
        **describe(it.device),
        "error": error,
        "error allowed": bound,
        "bytes": it.nbytes,
        "operations": it.operations,
        **rival.info,
    }
    return row | _floor(it, rival, row)


def _floor(it: Contest, rival: Rival, row: dict[str, Any], again: bool = False) -> dict[str, float]:
    """The least time that the machine would take, and the rates it follows from."""
    rates = {
        "copy bytes/s": copy_bandwidth(it.device, row["bytes"] or LARGE, again=again),
        "memory bytes/s": copy_bandwidth(it.device, again=again),
        "matrix operations/s": matrix_rate(it.device, rival.products or rival.dtype, again=again),
    }
    least = max(row["bytes"] / rates["copy bytes/s"], row["operations"] / rates["matrix operations/s"])
    return rates | {"floor seconds": least}


def _rounds(
    samplers: dict[str, Callable[[], dict[str, float]]], budget: float, least: int
) -> dict[str, dict[str, list[float]] | Exception]:
    """Each rival's measurements, one a round, or its failure; all are in every round, another one first each time."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in samplers}
    failed: dict[str, Exception] = {}
    names = list(samplers)
    spent, rounds = 0.0, 0
    while names and rounds < MOST_ROUNDS and (rounds < least or spent * (1 + 1 / rounds) < budget):
        start = time.perf_counter()
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            try:
                for kind, value in samplers[name]().items():
                    found[name].setdefault(kind, []).append(value)
            except Exception as problem:
                failed[name] = problem
        names = [name for name in names if name not in failed]
        spent += time.perf_counter() - start
        rounds += 1
    return found | failed


def _compare(it: Contest, rows: dict[str, dict[str, Any]]) -> None:
    first: dict[str, str] = {}  # of each problem
    for name, rival in it.rivals.items():
        first.setdefault(rival.info.get("group", it.group), name)
    for row in rows.values():
        row["median seconds"] = statistics.median(row["seconds"])
        if it.pictures:
            row["pictures per second"] = it.pictures / row["median seconds"]
        if row["median seconds"] < row["floor seconds"]:  # the machine may have been busy when its rates were measured
            row |= _floor(it, it.rivals[row["rival"]], row, again=True)
        if row["floor seconds"]:
            row["times the floor"] = row["median seconds"] / row["floor seconds"]
        if "graph seconds" in row:
            row["launch overhead seconds"] = row["median seconds"] - statistics.median(row["graph seconds"])
        if first[row["group"]] in rows:
            row["faster"] = ratio(rows[first[row["group"]]]["seconds"], row["seconds"])


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over the rounds of ``slow / fast``."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _peak(it: Contest, contest: Callable[..., Contest], args: tuple, name: str) -> float | None:
    if it.device == "cuda":
        return _memory(contest, args, name)
    return in_fresh_process(_memory, contest, args, name)


def _alone(contest: Callable[..., Contest], args: tuple, name: str) -> dict[str, float]:
    found = in_fresh_process(_one_call, contest, args, name)
    if found is None:
        raise RuntimeError(f"{name} failed in a process of its own, or took longer than {FRESH_PROCESS_SECONDS} s")
    return found


def _one_call(contest: Callable[..., Contest], args: tuple, name: str) -> dict[str, float]:
    """Seconds and peak MB of a rival's second call; where it prepares, MB of the first call after that."""
    it = contest(*args)
    rival = it.rivals[name]
    inputs = it.inputs(0, rival.dtype)
    if rival.prepare is None:
        rival.run(*inputs)
    else:
        rival.prepare()
    found: dict[str, float] = {}
    peak = peak_megabytes(lambda: found.update(timed(rival.run, [inputs], 1)), it.device)
    if rival.prepare is not None and not rival.once:
        found = timed(rival.run, [inputs], 1)
    return found | {"peak MB": round(peak, 1)}


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
