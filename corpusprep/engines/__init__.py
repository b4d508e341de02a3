"""Engines run a function over many tasks; the pipeline uses only `Engine.map`."""

from __future__ import annotations

import contextlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

WORKER_MEMORY = 900 << 20
"""Bytes that a worker needs; measured with the embedded models, on full batches."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Call(Generic[R]):
    """One call of `Engine.map`: its arguments but for the tasks."""

    function: Callable[..., R]
    setup: Callable[[], Any] | None
    resources: Mapping[str, float]
    ordered: bool


class Engine(ABC):
    """Runs tasks. An engine, or a stand-in for tests, implements `run`.

    Attributes:
        workers: number of processes that work at the same time.
        workers_here: how many of them share the memory of one machine, at most.
        memory_here: bytes that they may use on the machine that has least; None to ask the machine that runs the pipeline.
    """

    workers: int = 1

    @property
    def workers_here(self) -> int:
        return self.workers

    @property
    def memory_here(self) -> int | None:
        return None

    def check(self, folder: Path, files: Sequence[str]) -> None:  # noqa: B027
        """Checks before a run that every machine sees its folder and files. Nothing to do where there is only this one.

        Raises:
            RunError: a machine does not see them; the message names it.
        """

    def map(
        self,
        function: Callable[..., R],
        tasks: Iterable[T],
        *,
        setup: Callable[[], Any] | None = None,
        resources: Mapping[str, float] | None = None,
        ordered: bool = False,
    ) -> Iterator[R]:
        """Yields `function(task)` for every task, or `function(context, task)` if there is a setup.

        Args:
            function: must be importable by name, like the types of tasks and results; data is passed in files.
            tasks: consumed lazily, at most a few more than there are workers at a time, so that tasks do not pile up.
            setup: called once per worker, before its first task of this call; its result is the context.
            resources: resources that one worker needs (`{"gpu": 1}`); an engine without them still runs the tasks.
            ordered: yields results in the order of the tasks, instead of as they finish.

        Raises:
            CorpusprepError: a task raised it.
            RunError: a worker died.
        """
        return self.run(Call(function, setup, resources or {}, ordered), iter(tasks))

    @abstractmethod
    def run(self, call: Call[R], tasks: Iterator[T]) -> Iterator[R]:
        """Runs the tasks of a call; see `map`."""


def arranged(call: Call[R], results: Generator[tuple[int, R]]) -> Iterator[R]:
    """The results of a call: as they come, or in the order of their tasks if the call asks for it.

    Args:
        results: (number of the task, from 0; result), closed at the end, whatever ends it.
    """
    later: list[tuple[int, R]] = []
    given = 0
    with contextlib.closing(results):
        for number, result in results:
            if not call.ordered:
                yield result
                continue
            heapq.heappush(later, (number, result))
            while later and later[0][0] == given:
                given += 1
                yield heapq.heappop(later)[1]
