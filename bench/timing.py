"""Seconds of a call: the host's clock on CPUs, CUDA events and graph replay on GPUs."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import torch

MEASUREMENT = {"cpu": 0.02, "cuda": 0.005}  # seconds that one measurement lasts at least, in as many calls as it takes
MOST_SETS, MOST_BYTES = 256, 2 * 2**30


def sets_beyond_cache(nbytes: int, device: str) -> int:
    """How many sets of inputs of ``nbytes`` to take in turn so that none is in a GPU's L2 cache when it comes up."""
    if device != "cuda":
        return 1
    wanted = 3 * torch.cuda.get_device_properties(0).L2_cache_size // max(nbytes, 1) + 2
    return max(1, min(wanted, MOST_SETS, MOST_BYTES // max(nbytes, 1)))


def sampler(run: Callable, sets: Sequence[tuple], device: str) -> Callable[[], dict[str, float]]:
    """Something that takes one measurement of ``run``, on one of the ``sets`` of inputs after the other, in each call.

    ``run`` has been called before: what it makes in its first call is there. A GPU's is warmed up besides.

    A measurement has "seconds" a call, as the caller of a running program sees it. On a CPU it also has "processor
    seconds", which other programs on the machine change least. On a GPU it also has "host seconds", how long the call
    keeps the host, and, where the call can be captured in a CUDA graph, "graph seconds": the GPU's own time, launches
    not counted.
    """
    turns = itertools.cycle(sets)
    if device == "cpu":
        return _cpu(run, turns)
    return _gpu(run, sets, turns)


def _cpu(run: Callable, turns) -> Callable[[], dict[str, float]]:
    calls = 0

    def sample() -> dict[str, float]:
        nonlocal calls
        if calls == 0:
            first = timed(run, turns, 1)
            calls = 1 + int(MEASUREMENT["cpu"] / first["seconds"])
            if calls == 1:
                return first
        return timed(run, turns, calls)

    return sample


def timed(run: Callable, turns: Iterable[tuple], calls: int) -> dict[str, float]:
    """Seconds a call on a CPU, and of all its cores together, with inputs taken from ``turns``."""
    inputs = list(itertools.islice(turns, calls))
    start, busy = time.perf_counter(), time.process_time()
    for some in inputs:
        run(*some)
    taken = {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - busy}
    return {kind: seconds / calls for kind, seconds in taken.items()}


def _gpu(run: Callable, sets: Sequence[tuple], turns) -> Callable[[], dict[str, float]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(step: Callable[[], object], calls: int) -> tuple[float, float]:
        """Seconds a call between events around the calls, and until the host had asked for them."""
        torch.cuda.synchronize()
        start.record()
        begun = time.perf_counter()
        for _ in range(calls):
            step()
        asked = time.perf_counter() - begun
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / calls, asked / calls

    def call() -> object:
        return run(*next(turns))

    measure(call, 3)  # compiles
    calls = min(1000, max(len(sets), 1 + int(MEASUREMENT["cuda"] / measure(call, 3)[0])))
    graph = _graph(run, sets)

    def sample() -> dict[str, float]:
        seconds, host = measure(call, calls)
        found = {"seconds": seconds, "host seconds": host}
        if graph is not None:
            found["graph seconds"] = measure(graph.replay, -(-calls // len(sets)))[0] / len(sets)
        return found

    return sample


def _graph(run: Callable, sets: Sequence[tuple]) -> torch.cuda.CUDAGraph | None:
    """One call on each of the sets as a CUDA graph; None where the call cannot be captured (it waits for the GPU)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for inputs in sets[:3]:
                run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for inputs in sets:
                run(*inputs)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph
