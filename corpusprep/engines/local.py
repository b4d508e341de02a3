"""The default engine: processes on this machine, started by spawn and kept between passes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from corpusprep.arrow import leave_pandas_out
from corpusprep.engines import Call, Engine, arranged
from corpusprep.errors import CorpusprepError, RunError

T = TypeVar("T")
R = TypeVar("R")

_LOOK_AHEAD = 1  # tasks in a worker's pipe beside the one it runs: the worker does not wait, and tasks do not pile up


class LocalEngine(Engine):
    """Runs tasks in `workers` processes, or in this process if `workers` is 1.

    Workers end with the process that started them, however it ends.

    Args:
        workers: number of processes, from 1.
        gpus: names of the GPUs, as in CUDA_VISIBLE_DEVICES; by default those that PyTorch sees. Tasks that need a GPU
            run in this process if there are fewer than two GPUs, else in one additional process per GPU.
    """

    def __init__(self, workers: int = 1, gpus: Sequence[str] | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        self.workers = workers
        self._gpus = gpus
        self._on_gpus: LocalEngine | None = None
        self._environments: Sequence[Mapping[str, str]] = ()  # one per worker
        self._processes: list[tuple[Any, Connection]] = []
        self._calls = 0

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        for process, connection in self._processes:
            with contextlib.suppress(OSError):
                connection.send(None)
            connection.close()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = []
        if self._on_gpus is not None:
            self._on_gpus.close()

    def run(self, call: Call[R], tasks: Iterator[T]) -> Iterator[R]:
        """See `corpusprep.engines.Engine.map`."""
        engine = self
        if call.resources.get("gpu"):
            if self._gpus is None:
                self._gpus = visible_gpus()
            if len(self._gpus) < 2:
                return _inline(call, tasks)
            if self._on_gpus is None:
                self._on_gpus = LocalEngine(len(self._gpus))
                self._on_gpus._environments = [{"CUDA_VISIBLE_DEVICES": name} for name in self._gpus]
            engine = self._on_gpus
        elif self.workers == 1:
            return _inline(call, tasks)
        return arranged(call, engine._spread(call, tasks))

    def _spread(self, call: Call[R], tasks: Iterator[T]) -> Generator[tuple[int, R]]:
        self._calls += 1
        call_id = self._calls
        exhausted, sent = False, 0
        load: dict[Connection, int] = {}
        try:
            while True:
                while not exhausted:
                    target = self._free(load, call_id, call)
                    if target is None:
                        break
                    try:
                        task = next(tasks)
                    except StopIteration:
                        exhausted = True
                        break
                    self._send(target, (call_id, sent, task))
                    load[target] += 1
                    sent += 1
                if exhausted and not any(load.values()):
                    break
                for connection in wait([c for c, n in load.items() if n]):
                    assert isinstance(connection, Connection)
                    numbered = self._receive(connection)
                    load[connection] -= 1
                    yield numbered
        except BaseException:
            # The pipes may still hold results: end the workers, so that a later call does not read these.
            for process, connection in self._processes:
                connection.close()
                process.kill()
                process.join()
            self._processes = []
            raise

    def _free(self, load: dict[Connection, int], call_id: int, call: Call[Any]) -> Connection | None:
        """The worker for the next task: an idle one, else a new one, else one with room in its pipe."""
        idle = next((c for c, n in load.items() if n == 0), None)
        if idle is not None:
            return idle
        if len(load) < self.workers:
            if len(self._processes) <= len(load):
                self._start(self.workers)
            connection = self._processes[len(load)][1]
            self._send(connection, (call_id, call.function, call.setup))
            load[connection] = 0
            return connection
        least = min(load, key=lambda c: load[c])
        return least if load[least] <= _LOOK_AHEAD else None

    def _start(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # Polars, Numba, Arrow and tokenizers size their pools at import: without this, each worker would use all cores.
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        names = ("POLARS_MAX_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS")
        own = dict.fromkeys(names, threads)
        if self._environments:
            own |= self._environments[len(self._processes)]
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        self._processes.append((process, ours))

    def _send(self, connection: Connection, message: tuple[Any, ...]) -> None:
        try:
            connection.send(message)
        except OSError:
            raise self._death(connection) from None

    def _death(self, connection: Connection) -> RunError:
        process = next(p for p, c in self._processes if c is connection)
        process.join(timeout=5)
        return RunError(
            f"A worker process ended unexpectedly (exit code {process.exitcode}), probably because memory ran out. "
            "Start the run again with fewer workers or a smaller --memory: it continues where it stopped."
        )

    def _receive(self, connection: Connection) -> tuple[int, Any]:
        try:
            number, result, error, trace = connection.recv()
        except (EOFError, ConnectionError):
            raise self._death(connection) from None
        if error is not None:
            if not isinstance(error, CorpusprepError):
                error.add_note(f"In a worker:\n{trace}")
            raise error
        return number, result


def visible_gpus() -> list[str]:
    """Names of the GPUs that PyTorch sees, as in CUDA_VISIBLE_DEVICES; none without PyTorch."""
    try:
        import torch
    except (ImportError, OSError):
        return []
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if len(named) >= count else [str(k) for k in range(count)]


def _inline(call: Call[R], tasks: Iterator[Any]) -> Iterator[R]:
    context: tuple[Any, ...] | None = None
    for task in tasks:
        if context is None:
            context = () if call.setup is None else (call.setup(),)
        yield call.function(*context, task)


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(connection: Connection) -> None:
    """The loop of a worker. Message (call, function, setup) opens a call; (call, number, task) is one of its tasks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    leave_pandas_out()
    function: Callable[..., Any] | None = None
    setup: Callable[[], Any] | None = None
    context: tuple[Any, ...] | None = None
    opened = -1
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        if message is None:
            return
        if message[0] != opened:
            opened, function, setup = message
            context = None
            continue
        assert function is not None
        result, error, trace = None, None, ""
        try:
            if context is None:
                context = () if setup is None else (setup(),)
            result = function(*context, message[2])
        except Exception as caught:
            error, trace = caught, traceback.format_exc()
        try:
            connection.send((message[1], result, error, trace))
        except (BrokenPipeError, ConnectionError):
            return
        except Exception as caught:  # an exception that cannot be pickled
            connection.send(
                (message[1], None, RuntimeError(f"{type(error or caught).__name__}: {error or caught}"), trace)
            )
