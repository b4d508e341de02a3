"""What the steps of a run share: recipe, folder, store, engine, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from corpusprep.engines import Engine
from corpusprep.passes import Part
from corpusprep.recipe import Recipe
from corpusprep.report import Accounts, Progress
from corpusprep.stage import Settings
from corpusprep.store import Store

T = TypeVar("T")


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        accounts: rows read, kept and dropped.
        manifest: the content of `manifest.json`; None where the run was to stop early.
        made: pass -> parts made in this run.
        reused: pass -> parts that were there.
        verified: stage -> how a sample agreed with a reference package.
        scored: how many scores were computed, and how many reused.
        notes: what a reader of the result must know.
    """

    accounts: Accounts
    manifest: dict[str, Any] | None = None
    made: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    verified: dict[str, dict[str, Any]] = field(default_factory=dict)
    scored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Context:
    """A run at work."""

    recipe: Recipe
    out: Path
    store: Store
    engine: Engine
    progress: Progress
    result: RunResult
    workers: int = 1
    """Processes of the engine, where it is known."""

    def map(
        self,
        title: str,
        function: Callable[..., Any],
        tasks: Iterable[tuple[T, int]],
        *,
        made: str,
        setup: Callable[[], Any] | None = None,
        resources: dict[str, float] | None = None,
        total: int | None = None,
    ) -> Iterator[Any]:
        """Runs tasks of known numbers of rows through the engine, with progress."""
        listed = list(tasks)
        self.result.made[made] = self.result.made.get(made, 0) + len(listed)
        if not listed:
            return
        self.progress.start(title, sum(rows for _, rows in listed) if total is None else total)
        sizes = (rows for _, rows in listed)
        for result in self.engine.map(function, [task for task, _ in listed], setup=setup, resources=resources):
            self.progress.advance(next(sizes))
            yield result
        self.progress.end()

    def reuse(self, kind: str, count: int) -> None:
        """Notes parts that were there."""
        self.result.reused[kind] = self.result.reused.get(kind, 0) + count


def dump(settings: Settings, *without: str) -> dict[str, Any]:
    """Settings as JSON's types, for keys."""
    return settings.model_dump(mode="json", exclude=set(without))


def by_pair(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """Parts of each pair, in rank order."""
    pairs: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        pairs.setdefault(part.pair, []).append(part)
    return dict(sorted(pairs.items()))
