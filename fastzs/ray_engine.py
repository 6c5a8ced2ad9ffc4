"""Ray Data shares work out among actors, processes that keep their model loaded, on one or many machines.

Without the variable ``RAY_ADDRESS`` a Ray of this machine's own is started, heard on 127.0.0.1 only, and ended
afterwards; with it (``ray job submit`` sets it) the work goes to that cluster, whose machines need this package and the
same files at the same paths.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from fastzs import ranks
from fastzs.needed import check_installed

A = TypeVar("A")
B = TypeVar("B")
BLOCK = 32  # items that an actor takes at a time, unless there are few: their results arrive together


class Actors:
    """A number of actors to run things in, for ``with``.

    Args:
        count: how many; one for each GPU of the cluster where ``device`` may be one, else for each CPU core.
        device: "auto", "cuda", "cpu": as :func:`fastzs.load` takes it; each actor sees only its own GPU.

    Raises:
        ValueError: the settings cannot be used with Ray.
        MissingPackage: Ray Data is not installed.
    """

    def __init__(self, count: int | None, device: str):
        if ranks.started()[1] > 1:
            raise ValueError("--engine ray shares out the images itself: start it once, without torchrun")
        if count is not None and count < 1:
            raise ValueError(f"--workers must be at least 1, got {count}")
        if ":" in device:
            raise ValueError(f"--device {device}: Ray chooses each actor's GPU; say --device {device.split(':')[0]}")
        for name in ("ray", "pyarrow", "pandas"):
            check_installed(name, name, "actors (--engine ray)", "ray")
        self.count, self.device = count or 0, device
        self.needs: dict[str, Any] = {}  # what Ray keeps free for each actor

    def __enter__(self) -> "Actors":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = "RAY_ADDRESS" not in os.environ
        if own:
            # the only switch that keeps Ray from listening on all addresses; read when ray is imported
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what fails is raised
        import ray
        import ray.data

        start = {"address": "local", "include_dashboard": False} if own else {}
        try:
            ray.init(**start, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ValueError(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {_first_line(error)}") from error
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus = 0 if self.device == "cpu" else int(sum(machine.get("GPU", 0) for machine in machines))
        cores = [int(machine["CPU"]) for machine in machines]
        self.count = self.count or gpus or sum(cores)
        if self.count > gpus > 0:
            self.__exit__()
            raise ValueError(f"--workers {self.count}: each takes a GPU, and Ray has {gpus}")
        share = min(cores) / -(-self.count // len(cores))  # of a machine's cores for each of its actors
        # Ray takes whole numbers, or less than 1 with four digits
        self.needs = {"num_gpus": 1} if gpus else {"num_cpus": int(share) or int(share * 10000) / 10000}
        return self

    def __exit__(self, *problem: object) -> None:
        import ray

        ray.shutdown()

    def run(self, function: Callable[[], B]) -> B:
        """``function()``, called where an actor would run; what it raises is raised here."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = ray.remote(_in_folder).options(**self.needs, max_retries=0).remote(os.getcwd(), function)
            return ray.get(answer)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise ValueError(f"Ray cannot run the model: {_first_line(error)}") from error

    def map(self, function: Callable[[list[A]], Iterator[B]], items: Sequence[A]) -> Iterator[B]:
        """``function(some)`` of all items, some at a time; what it gives, in the order in which they are done.

        Each actor gets its own copy of ``function`` once and keeps it. Ray starts an actor that dies anew and gives it
        the same items again.

        Raises:
            ValueError: Ray gave up, for half an hour without a result (``RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S``)
                or for another reason, which the message says.
        """
        import ray

        if not items:
            return
        actor: Any = _Actor
        # Pickled, since Ray's tables hold neither paths nor texts that are not UTF-8.
        rows = [{"item": pickle.dumps(item)} for item in items]
        blocks = max(-(-len(items) // BLOCK), min(len(items), 4 * self.count))
        results = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            actor,
            batch_size=None,  # a block
            fn_constructor_args=(os.getcwd(), function),
            compute=ray.data.ActorPoolStrategy(size=self.count),
            **self.needs,
        )
        try:
            for row in results.iter_rows():
                yield pickle.loads(row["result"])
        except Exception as error:  # Ray's own have no class in common
            raise ValueError(f"Ray gave up: {_first_line(error)}") from error


class _Actor:
    """What runs in an actor."""

    def __init__(self, folder: str, function: Callable[[list[Any]], Iterator[Any]]):
        os.chdir(folder)  # paths are as on the command line
        self.function = function

    def __call__(self, block: dict[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        results = self.function([pickle.loads(item) for item in block["item"]])
        return {"result": [pickle.dumps(result) for result in results]}


def _in_folder(folder: str, function: Callable[[], B]) -> B:
    os.chdir(folder)
    return function()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
