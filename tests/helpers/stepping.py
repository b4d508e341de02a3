"""What the tests of single steps share: a run that is driven step by step, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from corpusprep import Recipe, RunResult
from corpusprep.derive import Run
from corpusprep.engines import Engine
from corpusprep.engines.local import LocalEngine
from corpusprep.parts import Column, Part, write_column
from corpusprep.pipeline import open_sources
from corpusprep.report.accounts import Accounts
from corpusprep.report.progress import Progress
from corpusprep.steps.read import read
from corpusprep.store import Store


def begin(
    recipe: Recipe, folder: Path, engine: Engine | None = None, progress: Progress | None = None, memory: int = 1 << 30
) -> Run:
    """A run in a folder, as a process that starts anew has it."""
    store = Store(folder / "parts")
    store.begin()
    return Run(recipe, folder, store, engine or LocalEngine(1), progress or Progress(), RunResult(Accounts([])), memory)


def read_parts(run: Run) -> list[Part]:
    """The parts of the recipe's sources, in rank order."""
    return [part for unit in read(run, open_sources(run.recipe)) for part in unit.parts]


def nothing_dropped(folder: Path, parts: Iterable[Part]) -> Column:
    """A column of verdicts that keeps every row."""
    column = Column("kept")
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        column.files[part.identity] = str(folder / f"{part.name}.kept.parquet")
        write_column(column.file(part), part, {"verdict": np.zeros(part.rows, np.uint8)})
    return column


def with_column(parts: Sequence[Part], column: Column) -> pa.Table:
    """The rows of all parts, the earliest first, each with what a column holds of it."""
    tables = []
    for part in parts:
        table = part.read()
        found = column.read(part)
        for name in found.column_names:
            table = table.append_column(name, found[name])
        tables.append(
            table.append_column("_rank", pa.array([part.rank[0] * 1000 + part.rank[1]] * part.rows, pa.int64()))
        )
    joined = pa.concat_tables(tables, promote_options="default")
    return joined.sort_by([("_rank", "ascending"), ("row", "ascending")])


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
