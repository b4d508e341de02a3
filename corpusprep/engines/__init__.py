"""Engines run a function over many tasks; the pipeline knows no more of them than `Engine.map`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Runs tasks somewhere; a stand-in for tests needs this one method."""

    def map(
        self,
        function: Callable[..., R],
        tasks: Iterable[T],
        *,
        setup: Callable[[], Any] | None = None,
        resources: Mapping[str, float] | None = None,
        ordered: bool = False,
    ) -> Iterator[R]:
        """Yields `function(task)` for every task, or `function(context, task)` where there is a setup.

        Args:
            function: importable by name, as are the tasks' and results' types; data travels in files.
            tasks: taken lazily, a few more than there are workers at a time, so that whoever makes them can be
                slower or faster than the work without piling it up.
            setup: called once a worker before its first task of this call; its value is the context.
            resources: what one worker needs (`{"gpu": 1}`); an engine without it runs the tasks all the same.
            ordered: results come in the order of the tasks, else as they are done.

        Raises:
            CorpusprepError: as a task raised it.
            RunError: a worker died.
        """
        ...
