"""Maps on a Ray cluster, with Ray Data: batches of items go to its workers, results come back with their numbers.

Kept calls stay with the machine that started the build: SQLite's log does not work on a network file system, so one
actor there writes the file, and all workers ask it. Images and masks are read by the workers, under the same paths.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from segrl.curation.call_cache import Answer, CallCache
from segrl.curation.packages import require
from segrl.curation.work import Worker, run_async
from segrl.errors import SegRLError

__all__ = ["ray_async", "ray_connected", "ray_items"]

_AT_A_TIME = 4  # batches of items for each call that a worker may make at a time


class _Connection:
    """State that blocks of `ray_connected` inside each other share: their number, and an actor for each file."""

    depth: ClassVar[int] = 0
    shared: ClassVar[dict[Path | None, Any]] = {}


@contextmanager
def ray_connected() -> Iterator[None]:
    """Hold a connection to the cluster of `RAY_ADDRESS`, or to one that is started here and stopped at the end.

    A connection that is there already is used, and left.

    Raises:
        SegRLError: The extra `ray` is not installed, or the cluster cannot be reached or started.
    """
    ray = require("ray", "ray")
    require("ray.data", "ray")
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise SegRLError(
                f"no Ray cluster: {' '.join(str(error).split())[:300]}; start one with `ray start --head`, or unset "
                "RAY_ADDRESS to have one started on this machine"
            ) from error
    _Connection.depth += 1
    try:
        yield
    finally:
        _Connection.depth -= 1
        if not _Connection.depth:
            for actor in _Connection.shared.values():
                ray.kill(actor)
            _Connection.shared.clear()
        if own:
            ray.shutdown()


def ray_async(
    make: Any, items: Sequence[Any], concurrency: int, cache: Path | None, done: Callable[[], None]
) -> list[Any]:
    """As `map_async`. Workers share `concurrency`, rates and limits of an endpoint."""
    ray = require("ray", "ray")
    if not items:
        return []
    workers = max(1, min(int(ray.cluster_resources().get("CPU", 1)), concurrency, len(items)))
    each = max(1, concurrency // workers)
    shared = _shared(cache)
    worker = _RayWorker(cache, workers, shared)

    def work(batch: list[Any]) -> list[Any]:
        if _asked(shared, "stopped"):
            return []
        try:
            return run_async(make, worker, batch, each, lambda: None)
        except Exception:
            _asked(shared, "stop")
            raise

    found: dict[int, Any] = {}
    errors: list[Exception] = []
    for number, result in _batched(
        work, items, max(1, min(each * _AT_A_TIME, math.ceil(len(items) / workers))), workers
    ):
        if isinstance(result, Exception):
            errors.append(result)  # the others come to their end
            continue
        found[number] = result
        done()
    if errors:
        raise errors[0]
    return [found[number] for number in range(len(items))]


def ray_items(function: Callable[[Any], Any], items: Sequence[Any], gpus: float) -> Iterator[tuple[int, Any]]:
    """As `map_items`, in the order in which results arrive."""
    if not items:
        return
    with ray_connected():
        for number, result in _batched(lambda batch: [function(batch[0])], items, 1, None, gpus):
            if isinstance(result, Exception):
                raise result
            yield number, result


def _batched(
    work: Callable[[list[Any]], list[Any]], items: Sequence[Any], size: int, workers: int | None, gpus: float = 0
) -> Iterator[tuple[int, Any]]:
    """Yield the numbers of items and their results; of a batch that failed that of its first item and the error."""
    data: Any = require("ray.data", "ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data.DataContext.get_current().enable_progress_bars = False
    batches = [(begin, pickle.dumps(list(items[begin : begin + size]))) for begin in range(0, len(items), size)]

    def one(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"begin": row["begin"], "results": pickle.dumps(work(pickle.loads(row["items"])))}
        except Exception as error:  # of any kind: raised by the machine that started the build
            return {"begin": row["begin"], "results": pickle.dumps(error)}

    rows = data.from_items([{"begin": begin, "items": part} for begin, part in batches],
                           override_num_blocks=len(batches))  # fmt: skip
    more = {"num_gpus": gpus} if gpus else {}
    for row in rows.map(one, compute=data.TaskPoolStrategy(size=workers), **more).iter_rows():
        results = pickle.loads(row["results"])
        if isinstance(results, Exception):
            yield row["begin"], results
        else:
            yield from enumerate(results, row["begin"])


class _Shared:
    """Actor with what workers share: kept calls, and whether one of them failed."""

    def __init__(self, cache: Path | None) -> None:
        self.path, self.cache, self.failed = cache, None, False

    def ask(self, name: str, *values: Any) -> tuple[Any, Exception | None]:
        """Return the result of a method, or its error, which Ray would wrap in lines of its own."""
        try:
            if name in ("begin", "stop"):
                self.failed = name == "stop"
            if name in ("begin", "stop", "stopped"):
                return self.failed, None
            if self.cache is None:
                assert self.path is not None
                self.cache = CallCache(self.path)
            return getattr(self.cache, name)(*values), None
        except Exception as error:
            return None, error


def _shared(cache: Path | None) -> Any:
    """Return the actor of a file, on the machine that started the build."""
    ray = require("ray", "ray")
    if cache not in _Connection.shared:
        node = ray.get_runtime_context().get_node_id()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        _Connection.shared[cache] = ray.remote(_Shared).options(num_cpus=0, scheduling_strategy=here).remote(cache)
    _asked(_Connection.shared[cache], "begin")
    return _Connection.shared[cache]


def _asked(shared: Any, name: str, *values: Any) -> Any:
    result, error = require("ray", "ray").get(shared.ask.remote(name, *values))
    if error is not None:
        raise error
    return result


@dataclass(frozen=True)
class _RayWorker(Worker):
    shared: Any = None

    def open_cache(self) -> AbstractContextManager[Any]:
        return _RemoteCache(self.shared)


@dataclass(frozen=True)
class _RemoteCache:
    """`CallCache` as the workers see it."""

    shared: Any

    def get(self, key: str) -> Answer | None:
        return _asked(self.shared, "get", key)

    def put(self, key: str, model: str, label: str, answer: Answer) -> None:
        _asked(self.shared, "put", key, model, label, answer)

    def reserve(self, model: str, worst: float, max_calls: int | None, max_cost: float | None) -> str:
        return _asked(self.shared, "reserve", model, worst, max_calls, max_cost)

    def release(self, model: str, worst: float) -> None:
        _asked(self.shared, "release", model, worst)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
