"""What many small parts and shards cost: the driver's own time a part and step, and a run on many files of one row.

    python tests/benchmarks/units.py [--parts 10000] [--files 5000] [--workers N]

The driver's time is that of `Run.derive` with an engine that does nothing. `again` is a run that finds all files.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deciding import processor

from corpusprep import RunResult, load_recipe, run
from corpusprep.derive import Run
from corpusprep.engines import Call, Engine
from corpusprep.engines.local import LocalEngine
from corpusprep.parts import Part, Work, by_pair, one_by_one
from corpusprep.report.accounts import Accounts
from corpusprep.report.progress import Progress
from corpusprep.store import Store, write_table


def number(work: Work) -> None:
    (part,) = work.parts
    work.write(part, {"verdict": np.zeros(part.rows, np.uint8)})


def total(work: Work) -> None:
    work.write_value(sum(int(work.columns["numbers"].array(part, "verdict").sum()) for part in work.parts))


class Idle(Engine):
    """Says that all tasks are done."""

    def run(self, call: Call[Any], tasks: Iterator[Any]) -> Iterator[Any]:
        for task in tasks:
            yield dict.fromkeys(task.outputs, "0" * 64)


def begin(folder: Path, engine: Engine) -> Run:
    store = Store(folder / "parts")
    store.begin()
    recipe = load_recipe(None, sources=["tsv=none.en-de.tsv"])
    return Run(recipe, folder, store, engine, Progress(), RunResult(Accounts([])))


def report(name: str, seconds: float, count: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:44}{seconds:8.2f} s{1e3 * seconds / count:9.3f} ms each{peak:8.2f} GiB", flush=True)


def parts_cost(folder: Path, count: int, workers: int) -> None:
    file = folder / "part.parquet"
    write_table(pa.table({"row": np.arange(3)}), file)
    parts = [
        Part(f"u{k:06d}.en-{k % 16}", "k" * 20, f"en-{k % 16}", ((str(file), 3),), "source", f"shard-{k}", (0, k, 0))
        for k in range(count)
    ]
    for name, engine in (("driver alone", Idle()), ("one worker", LocalEngine(1)), ("again", LocalEngine(1))):
        where = folder / name.replace("again", "one worker")
        where.mkdir(exist_ok=True)
        context = begin(where, engine)
        start = time.perf_counter()
        numbers = context.derive("numbers", "", number, one_by_one(parts), None)
        report(f"a column, a task a part: {name}", time.perf_counter() - start, count)
        start = time.perf_counter()
        context.derive("total", "", total, by_pair(parts), None, of={"numbers": numbers}, whole=True)
        report(f"a value a pair of it: {name}", time.perf_counter() - start, count)


def files_cost(folder: Path, count: int, workers: int) -> None:
    data = folder / "data"
    data.mkdir()
    for k in range(count):
        text = f"This is line number {k} of the whole corpus.\tDas ist die Zeile Nummer {k} des ganzen Korpus.\n"
        (data / f"f{k:05d}.en-de.tsv").write_text(text, encoding="utf-8")
    recipe = load_recipe(None, sources=[f"tsv={data}"])
    for name in ("first run", "again"):
        start = time.perf_counter()
        result = run(recipe, folder / "out", workers=workers)
        report(f"{count:,} files of one row: {name}", time.perf_counter() - start, count)
    assert sum(result.accounts.read.values()) == count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    print(f"{processor()}, {arguments.workers} workers")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.parts:
            parts_cost(Path(scratch), arguments.parts, arguments.workers)
        if arguments.files:
            files_cost(Path(scratch), arguments.files, arguments.workers)


if __name__ == "__main__":
    main()
