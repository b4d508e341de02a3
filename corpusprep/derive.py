"""A run at work, and the one way in which it derives columns of parts.

A step defines what a task does and what its result depends on. `Run.derive` makes the keys, reuses the files that exist,
runs the other tasks on the engine, and returns a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from corpusprep.engines import Engine
from corpusprep.keys import code_digest, digest, versions
from corpusprep.parts import Column, Group, Work, run_work
from corpusprep.recipe import Recipe
from corpusprep.report.accounts import Accounts
from corpusprep.report.progress import Progress
from corpusprep.store import Store, ready

T = TypeVar("T")


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        accounts: rows read, kept and dropped.
        manifest: the content of `manifest.json`; None where the run was to stop early.
        made: kind of part -> tasks done in this run.
        reused: kind of part -> tasks whose result was there already.
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
class Run:
    """A run at work."""

    recipe: Recipe
    out: Path
    store: Store
    engine: Engine
    progress: Progress
    result: RunResult
    memory: int = 1 << 30
    """Bytes that the data of all tasks at work may take together."""

    def derive(
        self,
        kind: str,
        title: str,
        task: Callable[[Work], None],
        groups: Sequence[Group],
        settings: Any,
        *,
        of: Mapping[str, Column] | None = None,
        each: Callable[[Group], Any] | None = None,
        depends: Any = None,
        hints: Mapping[str, Any] | None = None,
        whole: bool = False,
        resources: dict[str, float] | None = None,
        rows: Callable[[Group], int] | None = None,
    ) -> Column:
        """Derives a column of parts. Files that an earlier run derived in the same way are reused.

        A file's key is made of the settings, the parts, the content of the columns in `of`, `depends`, the versions of packages,
        and the code of the task: its module and all that this imports within the package.

        Args:
            kind: the folder of the store.
            title: of the progress bar; none is shown where it is empty.
            task: a function of a module, called by a worker with a `Work`; it writes all outputs.
            groups: a task for each; no part is in two.
            settings: passed to all tasks, and part of the key. Fields that do not affect the result must be left out or set to their
                defaults.
            of: name -> column that tasks read.
            each: returns what the task of a group is told beside the settings; part of the key.
            depends: what else affects the result, such as digests of models and versions of packages. JSON values.
            hints: passed to all tasks, but not part of the key, because it does not affect the result: caches, paths.
            whole: one file for a group; by default one for each part.
            resources: as engines take them.
            rows: number of rows of a group, for the progress bar; by default all its rows.
        """
        of = dict(of or {})
        common = digest(code_digest(task), versions(), settings, depends, sorted(of))
        column = Column(kind)
        todo: list[Work] = []
        for group in groups:
            own = each(group) if each is not None else None
            state = [(part.identity, [of[name].digest(part) for name in sorted(of)]) for part in group.parts]
            key = digest(common, state, own)
            names = [group.name] if whole else [part.name for part in group.parts]
            outputs = tuple(str(self.store.path(kind, name, key)) for name in names)
            column.files.update((p.identity, outputs[0 if whole else k]) for k, p in enumerate(group.parts))
            if whole:
                column.groups[group.name] = outputs[0]
            if all(map(ready, outputs)):
                self.reuse(kind, 1)
            else:
                mine = {name: wide.of(group.parts) for name, wide in of.items()}
                todo.append(Work(group, settings, own, mine, outputs, hints or {}))
        # Where there are fewer tasks than workers, a task may use the cores of several.
        threads = max(1, self.engine.workers_here // max(1, len(todo)))
        memory = self.memory // max(1, min(self.engine.workers_here, len(todo)))
        todo = [replace(work, threads=threads, memory=memory) for work in todo]
        tasks = [(work, rows(work.group) if rows else work.group.rows) for work in todo]
        for digests in self.map(title, partial(run_work, task), tasks, made=kind, resources=resources):
            column.digests.update(digests)
        return column

    def map(
        self,
        title: str,
        function: Callable[[T], Any],
        tasks: Iterable[tuple[T, int]],
        *,
        made: str,
        resources: dict[str, float] | None = None,
    ) -> Iterator[Any]:
        """Runs tasks, of so many rows each, on the engine, with a progress bar; yields results as they come."""
        listed = list(tasks)
        self.result.made[made] = self.result.made.get(made, 0) + len(listed)
        if not listed:
            return
        if title:
            self.progress.start(title, sum(rows for _, rows in listed))
        sizes = (rows for _, rows in listed)
        for result in self.engine.map(function, [task for task, _ in listed], resources=resources):
            if title:
                self.progress.advance(next(sizes))
            yield result
        if title:
            self.progress.end()

    def reuse(self, kind: str, count: int) -> None:
        """Counts tasks whose result was there."""
        self.result.reused[kind] = self.result.reused.get(kind, 0) + count
