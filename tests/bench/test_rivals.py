"""The bench's helper: rivals that are wrong are refused, rounds are interleaved, rows have all that they should."""

import time
from pathlib import Path

import pytest
import torch

from bench import machine, rivals
from bench.machine import in_fresh_process, peak_megabytes, scratch_folder
from bench.rivals import Contest, Rival, Unavailable, hold

SIZE = 1 << 20


def slow(x):
    time.sleep(0.03)
    return x * x


def wrong(x):
    return x * x + 1e-3


def not_here(x):
    raise Unavailable("nobody has it")


def holds_more(x):
    return (x.repeat(8) ** 2)[:SIZE]


def contest(order=()):
    def logged(name, run):
        def logging(x):
            order.append(name) if isinstance(order, list) else None
            return run(x)

        return logging

    runs = {"slow": slow, "fast": torch.square, "wrong": wrong, "not here": not_here, "holds more": holds_more}
    return Contest(
        group="squares",
        device="cpu",
        inputs=lambda seed, dtype: (torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype),),
        rivals={name: Rival(logged(name, run)) for name, run in runs.items()}
        | {"left out": Rival(logged("left out", slow), unavailable="too slow")},
        judge=torch.square,
        nbytes=8 * SIZE,
        operations=SIZE,
        info={"size": SIZE},
        seconds=0.5,
    )


def fails_in_a_call(x):
    raise MemoryError


def fresh_contest():
    own = {"info": {"group": "another problem"}, "details": lambda: {"details": 7}}
    rivals = {
        "first": Rival(torch.square),
        "own problem": Rival(slow, prepare=lambda: None, **own),
        "fails later": Rival(fails_in_a_call, answer=torch.square),
        "wrong for its own judge": Rival(torch.square, judge=lambda x: x),
    }
    inputs = contest().inputs
    return Contest("squares", "cpu", inputs, rivals, torch.square, seconds=0.1, fresh=True)


@pytest.fixture(scope="module")
def found():
    return hold(contest, ())


@pytest.mark.slow
def test_a_rival_that_disagrees_with_the_judge_has_no_row(found):
    assert isinstance(found["wrong"], AssertionError)
    assert "wrong is refused in squares: error 1.00e-03, at most 1.00e-04 allowed" in str(found["wrong"])


def test_a_rival_that_cannot_run_says_why(found):
    assert isinstance(found["not here"], Unavailable)
    assert str(found["not here"]) == "nobody has it"


def test_a_rival_that_is_left_out_is_not_called():
    order = []
    left_out = hold(contest, (order,))["left out"]
    assert isinstance(left_out, Unavailable)
    assert str(left_out) == "too slow"
    assert "left out" not in order


def test_rows_have_times_per_round_and_the_distance_to_the_floor(found):
    fast = found["fast"]
    assert len(fast["seconds"]) == len(found["slow"]["seconds"]) >= rivals.LEAST_ROUNDS
    assert fast["faster"] == rivals.ratio(found["slow"]["seconds"], fast["seconds"]) > 2
    assert found["slow"]["faster"] == 1
    assert fast["times the floor"] == fast["median seconds"] / fast["floor seconds"]
    assert fast["floor seconds"] == max(8 * SIZE / fast["copy bytes/s"], SIZE / fast["matrix operations/s"])
    assert {"device", "torch", "threads", "dtype", "error", "size"} <= fast.keys()


def test_memory_is_what_a_call_takes_beyond_its_inputs(found):
    one = SIZE * 4 / 1e6
    assert found["fast"]["peak MB"] == pytest.approx(one, abs=2.5)
    assert found["holds more"]["peak MB"] == pytest.approx(16 * one, abs=5)


def test_rounds_are_interleaved_and_begin_with_another_rival_each(monkeypatch):
    order = []
    monkeypatch.setattr(rivals, "_peak", lambda *args: 0.0)
    monkeypatch.setattr(rivals, "sampler", lambda run, sets, device: lambda: {"seconds": float(run(*sets[0]).any())})
    hold(contest, (order,))
    judged, rounds = order[:5], order[5:]
    assert judged == ["slow", "fast", "wrong", "not here", "holds more"]
    names = ["slow", "fast", "holds more"]
    assert [rounds[i : i + 3] for i in (0, 3, 6)] == [names[i:] + names[:i] for i in range(3)]


def test_a_fresh_contest_times_each_call_in_a_process_of_its_own():
    found = hold(fresh_contest, ())
    assert set(found["own problem"]["seconds"]) == {found["own problem"]["median seconds"]}
    assert 0.03 < found["own problem"]["median seconds"] < 3
    assert found["own problem"]["group"] == "another problem"
    assert found["own problem"]["faster"] == 1
    assert found["own problem"]["details"] == 7
    assert found["first"]["faster"] == 1
    assert found["first"]["peak MB"] == pytest.approx(SIZE * 4 / 1e6, abs=2.5)
    assert "fails later failed in a process of its own" in str(found["fails later"])
    assert isinstance(found["wrong for its own judge"], AssertionError)


def test_nan_is_refused():
    assert rivals.largest_error([torch.tensor([1.0, float("nan")])], [torch.ones(2).double()]) == float("inf")


def test_labels_are_compared_by_the_share_that_differs():
    got, right = torch.tensor([0, 1, 2, 3], dtype=torch.uint8), torch.tensor([0, 1, 2, 2])
    assert rivals.share_of_labels([got], [right]) == 0.25


def fails():
    raise MemoryError


def test_a_fresh_process_that_fails_gives_none():
    assert in_fresh_process(fails) is None


class Owner:
    pass


OWNERS = []  # that live as long as their process


def leaves_files() -> str:
    OWNERS.append(Owner())
    place = scratch_folder(OWNERS[-1])
    (place / "large.bin").write_bytes(bytes(100))
    return str(place)


def test_what_a_fresh_process_leaves_is_removed():
    found = in_fresh_process(leaves_files)
    assert found is not None
    assert not Path(found).parent.exists()


def test_a_scratch_folder_goes_with_its_owner():
    owner = Owner()
    place = scratch_folder(owner)
    assert place.is_dir()
    del owner
    assert not place.exists()


def test_peak_counts_what_was_freed_again():
    def run():
        torch.ones(25_000_000)

    assert peak_megabytes(run, "cpu") == pytest.approx(100, abs=5)


def test_a_row_below_its_floor_fails(monkeypatch):
    row = {"group": "squares", "times the floor": 0.9, "floor seconds": 0.01, "seconds": [0.009]}
    monkeypatch.setattr(rivals, "_FOUND", {(contest.__module__, contest.__qualname__, ()): {"fast": row}})
    with pytest.raises(AssertionError, match=r"fast takes 0\.90 times its floor"):
        rivals.compete(None, "fast", contest)


def test_what_a_busy_machine_did_is_measured_again_where_a_row_is_below_its_floor(monkeypatch):
    rates = iter([100.0, 400.0, 300.0])
    monkeypatch.setattr(machine, "RATES", {})
    monkeypatch.setattr(rivals, "copy_bandwidth", lambda device, most=0, again=False: 1e12)
    monkeypatch.setattr(rivals, "matrix_rate", machine._best(lambda device, dtype: next(rates)))
    it = contest()
    row = {"group": it.group, "rival": "fast", "bytes": 8, "operations": 800, "seconds": [4.0, 4.0]}
    row |= rivals._floor(it, it.rivals["fast"], row)
    assert row["floor seconds"] == 8
    rivals._compare(it, {"fast": row})
    assert row["floor seconds"] == 2
    assert row["times the floor"] == 2
    row |= {"seconds": [1.0, 1.0]}  # a floor that is wrong stays wrong: the better rate is kept
    rivals._compare(it, {"fast": row})
    assert row["floor seconds"] == 2
    assert row["times the floor"] == 0.5


def test_the_ceiling_of_a_copy_is_that_of_its_size_where_a_cache_is_faster(monkeypatch):
    def fastest(copy, device):
        copy()
        return next(seconds)

    monkeypatch.setattr(machine, "LARGE", 8000)
    monkeypatch.setattr(machine, "_fastest", fastest)
    monkeypatch.setattr(machine, "RATES", {})
    seconds = iter([0.1, 1.0, 10.0])  # of 400 bytes moved, of 2,000, of 600
    assert machine.copy_bandwidth("cpu", 400) == 4000
    assert machine.copy_bandwidth("cpu", 600) == machine.copy_bandwidth("cpu") == 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_the_ceiling_is_that_of_the_best_product(dtype, monkeypatch):
    a, b = (torch.eye(128).to(dtype) for _ in range(2))
    products = machine._products(a, b)
    assert len(products) >= (2 if machine.MISSING is None else 1)
    assert all(torch.equal(product().float(), torch.eye(128)) for product in products)
    times = iter([3.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr(machine, "_fastest", lambda product, device: next(times))
    monkeypatch.setattr(machine, "RATES", {})
    assert machine.matrix_rate("cpu", dtype) == 2 * 1024**3 / 2.0
