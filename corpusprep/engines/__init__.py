"""Engines run a function over many tasks; the pipeline uses only `Engine.map`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Runs tasks. A stand-in for tests needs only this method."""

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
        ...
