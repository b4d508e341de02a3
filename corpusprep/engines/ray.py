"""The engine for several machines: actors of a Ray cluster.

All nodes must see the run's folder and the sources under the same paths, and have the same version of corpusprep installed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from corpusprep.engines import WORKER_MEMORY, Call, Engine, arranged
from corpusprep.errors import CorpusprepError, RunError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # tasks that an actor has at a time, so that it does not wait for the next
_TRIES = 3  # times that a task may end its worker
_PATIENCE = 120.0  # seconds to wait for a worker where none is left


# Where the cluster is lost, Ray ends this process at once, without an exception. So another one says what happened, if its pipe
# is closed without a word.
_WATCH = """
import sys
if sys.stdin.read() != "end":
    print("error: the run ended all at once: its Ray cluster was lost, or it was killed. Start the cluster and the run again: it "
          "continues where it stopped.", file=sys.stderr)
"""


class RayEngine(Engine):
    """Runs tasks in actors of a Ray cluster: one for each CPU, and one for each GPU where tasks ask for it.

    A task whose worker or node is lost is done again by another. Results do not depend on it.

    Args:
        address: of the cluster, `ray://host:10001` or `host:6379`; if not given, the one that `RAY_ADDRESS` names or that runs
            on this machine, else Ray is started here.
        workers: number of actors for CPUs, at most; by default one for each CPU of the cluster.
        memory: bytes that the actors of one node may use; by default what Ray counts as the memory of the node.

    Raises:
        RunError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, memory: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise RunError(
                "The engine ray needs Ray. Install it on all nodes: pip install 'corpusprep[ray]'."
            ) from None
        self._ray = ray
        self._own = not ray.is_initialized()
        try:
            _knock(address or os.environ.get("RAY_ADDRESS"))
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            named = address or os.environ.get("RAY_ADDRESS") or "a local cluster"
            raise RunError(
                f"Ray: {named} cannot be reached ({_first_line(error)}). Start it with ray start --head, or correct the address."
            ) from None
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-c", _WATCH], stdin=subprocess.PIPE, start_new_session=True
        )
        atexit.register(self._farewell)
        self._memory = memory
        total = sum(map(self._room, self._nodes()))
        self.workers = max(1, min(workers or total, total))
        self._pools: dict[str, _Pool] = {}

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors, and the connection if this engine made it."""
        for pool in self._pools.values():
            for actor in pool.actors:
                with contextlib.suppress(Exception):
                    self._ray.kill(actor.handle)
        self._pools = {}
        if self._own:
            self._ray.shutdown()
        self._farewell()
        atexit.unregister(self._farewell)

    def _farewell(self) -> None:
        """Tells the process that watches that this one ends as it should."""
        if self._watcher.stdin is not None and not self._watcher.stdin.closed:
            with contextlib.suppress(OSError):
                self._watcher.communicate(b"end")

    @property
    def workers_here(self) -> int:
        """See `Engine`."""
        return min(self.workers, max(map(self._room, self._nodes()), default=1))

    @property
    def memory_here(self) -> int | None:
        """See `Engine`."""
        return min((self._memory_of(node) for node in self._nodes()), default=None)

    def _memory_of(self, node: dict[str, Any]) -> int:
        own = int(node["Resources"].get("memory", 4 << 30))
        return min(own, self._memory) if self._memory is not None else own

    def _room(self, node: dict[str, Any]) -> int:
        """Actors that a node has room for."""
        return min(int(node["Resources"]["CPU"]), max(1, self._memory_of(node) // WORKER_MEMORY))

    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that have CPUs."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def check(self, folder: Path, files: Sequence[str]) -> None:
        """See `Engine`."""
        ray = self._ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

        marker = folder.absolute() / f".seen-by-all-{secrets.token_hex(4)}"
        marker.write_text("", encoding="utf-8")
        paths = [str(marker), *(os.path.abspath(file) for file in files if os.path.exists(file))]
        try:
            looks = {}
            for node in self._nodes():
                options = {"num_cpus": 0, "scheduling_strategy": OnNode(node["NodeID"], soft=False)}
                looks[node["NodeID"]] = (
                    node["NodeManagerHostname"],
                    ray.remote(_unseen).options(**options).remote(paths),
                )
            for name, look in looks.values():
                try:
                    unseen = ray.get(look, timeout=_PATIENCE)
                except Exception as error:
                    raise RunError(
                        f"Ray: the node {name} cannot run corpusprep ({_first_line(error)}). Install the same version there."
                    ) from None
                if unseen:
                    lost = str(folder.absolute()) if unseen[0] == str(marker) else unseen[0]
                    raise RunError(
                        f"Ray: the node {name} does not see {lost}. The folder of a run and its sources must lie on a file system "
                        "that all nodes mount under the same path."
                    )
        finally:
            marker.unlink(missing_ok=True)

    def run(self, call: Call[R], tasks: Iterator[T]) -> Iterator[R]:
        """See `corpusprep.engines.Engine.map`."""
        kind = "gpu" if call.resources.get("gpu") else "cpu"
        if kind not in self._pools:
            count = self.workers
            if kind == "gpu":
                count = int(self._ray.cluster_resources().get("GPU", 0))
                if not count:
                    raise RunError(
                        "The scorer asks for a GPU, and no node of this Ray cluster has one. Add a node with a GPU (ray start "
                        "--num-gpus), or run without --engine ray, on the CPUs of one machine."
                    )
            self._pools[kind] = _Pool(self._ray, kind, count)
        pool = self._pools[kind]
        try:
            yield from arranged(call, pool.run(call, tasks))
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise RunError(
                f"Ray: the cluster is lost ({_first_line(error)}). Start it and the run again: it continues where it stopped."
            ) from None
        finally:
            pool.drop_tasks()


def _knock(address: str | None) -> None:
    """Raises OSError if nobody listens at an address: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _unseen(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


class _Worker:
    """An actor: keeps the function and the context of the call that it works for."""

    def __init__(self, path: list[str], folder: str) -> None:
        with contextlib.suppress(OSError):  # where all paths are absolute, a node need not have it
            os.chdir(folder)
        sys.path += [folder for folder in path if folder not in sys.path]  # where a user's own functions are
        # Polars, Numba, Arrow and tokenizers size their pools at import: each actor has one CPU.
        for name in ("POLARS_MAX_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ.setdefault(name, "1")

    def ready(self) -> None:
        pass

    def open(self, work: tuple[Callable[..., Any], Callable[[], Any] | None]) -> None:
        self.function, self.setup = work
        self.context: tuple[Any, ...] | None = None

    def do(self, task: Any) -> tuple[Any, BaseException | None, str]:
        try:
            if self.context is None:
                self.context = () if self.setup is None else (self.setup(),)
            return self.function(*self.context, task), None, ""
        except Exception as error:
            known = isinstance(error, CorpusprepError | OSError | MemoryError)
            return None, error if known else RuntimeError(repr(error)), traceback.format_exc()


@dataclass(eq=False)
class _Actor:
    handle: Any
    ready: Any
    """A reference that is there once the actor runs; None from then on."""
    opened: int = -1
    """The call that it works for."""
    opening: Any = None
    """A reference that is there once it has the function of the call."""
    tasks: set[int] = field(default_factory=set)
    """Numbers of the tasks that it has."""


class _Pool:
    """Actors with the same resources."""

    def __init__(self, ray: Any, kind: str, count: int) -> None:
        self.ray = ray
        # The actors for CPUs stay where they are, idle, while those for GPUs work: these must not wait for a CPU.
        needs = {"num_cpus": 0, "num_gpus": 1} if kind == "gpu" else {"num_cpus": 1}
        options = {**needs, "scheduling_strategy": "SPREAD"}
        errors = ray.exceptions
        self.losses = (
            errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError,
            errors.ActorUnschedulableError,
        )  # fmt: skip
        self.make = ray.remote(_Worker).options(**options).remote
        self.actors: list[_Actor] = []
        self.calls = 0
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        handle = self.make(sys.path, os.getcwd())
        self.actors.append(_Actor(handle, handle.ready.remote()))

    def run(self, call: Call[R], tasks: Iterator[T]) -> Generator[tuple[int, R]]:
        self.calls += 1
        call_id, opening = self.calls, self.ray.put((call.function, call.setup))
        waiting: deque[tuple[int, T]] = deque()  # tasks whose worker was lost
        tries: dict[int, int] = {}
        flying: dict[Any, tuple[_Actor, int, T]] = {}  # reference of a result -> who makes it, of what
        number, exhausted = 0, False
        alone_since: float | None = None
        while True:
            while (actor := self._free()) is not None:
                if waiting:
                    which, task = waiting.popleft()
                elif exhausted:
                    break
                else:
                    try:
                        which, task = number, next(tasks)
                    except StopIteration:
                        exhausted = True
                        break
                    number += 1
                if actor.opened != call_id:
                    actor.opened, actor.opening = call_id, actor.handle.open.remote(opening)
                flying[actor.handle.do.remote(task)] = actor, which, task
                actor.tasks.add(which)
            if exhausted and not flying and not waiting:
                return
            coming = {actor.ready: actor for actor in self.actors if actor.ready is not None}
            found, _ = self.ray.wait([*flying, *coming], timeout=1.0)
            alone_since = self._check_alone(alone_since)
            for reference in found:
                if reference in coming:
                    self._arrived(coming[reference])
                    continue
                if reference not in flying:
                    continue  # of an actor that was lost meanwhile
                actor, which, task = flying.pop(reference)
                try:
                    result, error, trace = self.ray.get(reference)
                except self.losses:
                    lost = [(which, task), *((w, t) for a, w, t in flying.values() if a is actor)]
                    flying = {ref: entry for ref, entry in flying.items() if entry[0] is not actor}
                    self._lost(actor)
                    first = min(w for w, _ in lost)  # the one that it worked on
                    tries[first] = tries.get(first, 0) + 1
                    if tries[first] >= _TRIES:
                        raise RunError(
                            f"A task ended {_TRIES} workers, probably because memory ran out on their nodes. Start the run again "
                            "with a smaller --memory: it continues where it stopped."
                        ) from None
                    waiting.extend(sorted(lost))
                    continue
                actor.tasks.discard(which)
                if error is not None:
                    self._check_opened(actor)
                    if not isinstance(error, CorpusprepError):
                        error.add_note(f"In a worker:\n{trace}")
                    raise error
                yield which, result

    def drop_tasks(self) -> None:
        """Replaces the actors that still have tasks, after a failure or where nobody wants more results."""
        for actor in [actor for actor in self.actors if actor.tasks]:
            with contextlib.suppress(Exception):
                self.ray.kill(actor.handle)
                self._lost(actor)

    def _free(self) -> _Actor | None:
        """The actor for the next task: the one that has fewest, if there is room."""
        ready = [actor for actor in self.actors if actor.ready is None]
        least = min(ready, key=lambda actor: len(actor.tasks), default=None)
        return least if least is not None and len(least.tasks) < _AHEAD else None

    def _arrived(self, actor: _Actor) -> None:
        try:
            self.ray.get(actor.ready)
        except self.losses:
            self._lost(actor)
            return
        actor.ready = None

    def _check_opened(self, actor: _Actor) -> None:
        """Raises RunError if the actor could not even load the function."""
        try:
            self.ray.get(actor.opening)
        except Exception as error:
            raise RunError(
                f"Ray: a worker cannot load what it is to do ({_last_line(error)}). All nodes need the same version of corpusprep, and "
                "your own modules under the same path."
            ) from None

    def _lost(self, actor: _Actor) -> None:
        """Asks for another one, which comes as soon as a node has room for it."""
        self.actors.remove(actor)
        self._start()

    def _check_alone(self, since: float | None) -> float | None:
        """Raises RunError if there has been no worker for a while; returns since when there is none."""
        if any(actor.ready is None for actor in self.actors):
            return None
        since = time.monotonic() if since is None else since
        if time.monotonic() - since > _PATIENCE:
            raise RunError(
                f"Ray: no node has had room for a worker for {_PATIENCE:.0f} seconds. Look at ray status, and start the run again: it "
                "continues where it stopped."
            )
        return since
