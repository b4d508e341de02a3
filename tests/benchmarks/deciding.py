"""Runs the steps that decide about many rows on narrow columns of one pair, without text, and prints time and memory.

    python tests/benchmarks/deciding.py --rows 20000000 --memory 4G [--data random|clustered|skewed] [--compare]

`random`: a tenth of the rows are copies of others, a twentieth differ from another one in two bits. `clustered`: ten rows
around each of many fingerprints. `skewed`: half of the rows have the same 16 bits. `--compare` decides about duplicates in
memory, too, and compares the verdicts. Memory is the resident set of all processes together, sampled ten times a second;
it counts mapped pages of files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from corpusprep import RunResult, load_recipe
from corpusprep.arrow import combine
from corpusprep.derive import Run
from corpusprep.engines.local import LocalEngine
from corpusprep.parts import Column, Part, Work, one_by_one
from corpusprep.pipeline import data_memory
from corpusprep.report.accounts import Accounts
from corpusprep.report.progress import Progress
from corpusprep.steps.balance import at_hand, choose
from corpusprep.steps.dedup import find_duplicates
from corpusprep.steps.quality import apply_thresholds, find_cutoffs
from corpusprep.store import Store, write_table

KINDS = ("random", "clustered", "skewed")


def fingerprints(kind: str, begin: int, end: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints and hashes of text of some rows of n."""
    place = np.arange(begin, end, dtype=np.uint64)
    draw, other = combine(place, 1), combine(place, 2) % np.maximum(place, np.uint64(1))
    two_bits = (np.uint64(1) << (draw >> np.uint64(50) & np.uint64(63))) | (
        np.uint64(1) << (draw >> np.uint64(40) & np.uint64(63))
    )
    if kind == "clustered":
        values = combine(place % np.uint64(max(1, n // 10)), 3) ^ two_bits
        return values, combine(place, 4)
    share = draw % np.uint64(20)
    values = combine(np.where(share < 3, other, place), 3)
    hashes = np.where(share < 2, combine(other, 4), combine(place, 4))
    values = np.where(share == 2, values ^ two_bits, values)
    if kind == "skewed":
        values = np.where(values >> np.uint64(63) == 0, values & ~np.uint64(0xFFFF), values)
    return values, hashes


def make_part(work: Work) -> None:
    """Writes the narrow columns of a part: those of the first step, its scores, and its tokens."""
    (part,), (kind, n, rows) = work.parts, work.settings
    begin = part.rank[2] * rows
    values, hashes = fingerprints(kind, begin, begin + part.rows, n)
    place = np.arange(begin, begin + part.rows, dtype=np.uint64)
    table = {
        "row": place.astype(np.int64), "key": combine(place, 5), "fingerprint": values, "text_hash": hashes,
        "flaws": (combine(place, 6) % np.uint64(4)).astype(np.uint8),
    }  # fmt: skip
    path = Path(part.pieces[0][0])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.table(table), path)
    scores = (combine(place, 7) >> np.uint64(40)).astype(np.float32) / 2**24
    work.write(part, {"quality": scores, "tokens": (combine(place, 8) % np.uint64(90) + 20).astype(np.int32)})


def score(work: Work) -> None:
    (part,) = work.parts
    scores = work.columns["made"].floats(part, "quality").copy()
    scores[~work.columns["verdicts"].kept(part)] = np.nan
    work.write(part, {"quality": pa.array(scores, from_pandas=True)})


def count(work: Work) -> None:
    (part,) = work.parts
    verdict = work.columns["verdicts"].array(part, "verdict")
    work.write(part, {"verdict": verdict, "tokens": work.columns["made"].array(part, "tokens") * (verdict == 0)})


class Peak(threading.Thread):
    """Samples the resident memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.over = threading.Event()

    def run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self.over.wait(0.1):
            total = 0
            for pid in family(os.getpid()):
                with contextlib.suppress(OSError, ValueError, IndexError):
                    total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            self.bytes = max(self.bytes, total)


def family(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


@contextlib.contextmanager
def timed(name: str, rows: int) -> Iterator[None]:
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    peak.over.set()
    peak.join()
    print(f"{name:22}{seconds:9.1f} s{1e9 * seconds / rows:9.1f} ns a row{peak.bytes / 2**30:8.2f} GiB", flush=True)


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def digest(column: Column, parts: Sequence[Part]) -> str:
    state = hashlib.sha256()
    for part in parts:
        for values in column.read(part).columns:
            state.update(
                str(values.to_pylist()).encode() if values.type == pa.string() else values.to_numpy().tobytes()
            )
    return state.hexdigest()[:16]


def measure(kind: str, rows: int, memory: int, part_rows: int, workers: int, folder: Path, compare: bool) -> None:
    overrides = ["quality.quantile=0.1", "quality.scorer=column", f"balance.budget={max(1, 20 * rows)}"]
    recipe = load_recipe(None, sources=["tsv=none.en-de.tsv"], overrides=overrides)
    starts = range(0, rows, part_rows)
    parts = [
        Part(f"u{k:05d}.en-de", "k", "en-de", ((str(folder / "made" / f"{k}.parquet"), min(part_rows, rows - begin)),), "s", "f", (0, 0, k))
        for k, begin in enumerate(starts)
    ]  # fmt: skip
    store = Store(folder / "parts")
    store.begin()
    print(
        f"{kind}, {rows:,} rows in {len(parts)} parts, memory {memory / 2**30:.1f} GiB, {workers} workers, {processor()}"
    )
    with LocalEngine(workers) as engine:
        result = RunResult(Accounts([]))
        run = Run(recipe, folder, store, engine, Progress(), result, data_memory(memory, workers))
        made = run.derive("made", "make", make_part, one_by_one(parts), (kind, rows, part_rows))
        whole = time.perf_counter()
        with timed("dedup", rows):
            duplicates = find_duplicates(run, parts)
        scores = run.derive("quality", "", score, one_by_one(parts), None, of={"made": made, "verdicts": duplicates})
        with timed("cut-off", rows):
            cutoffs = find_cutoffs(run, parts, scores, Column("state"))
        with timed("threshold", rows):
            passed = apply_thresholds(run, parts, duplicates, scores, cutoffs)
        tokens = run.derive("tokens", "", count, one_by_one(parts), None, of={"made": made, "verdicts": passed})
        with timed("token plan", rows):
            counts = at_hand(run, parts, tokens)
        with timed("balance and selection", rows):
            plan, outcome = choose(run, parts, tokens, counts, scores)
        assert plan is not None
        print(f"all {time.perf_counter() - whole:.1f} s with what lies between; targets {plan.targets}")
        print(f"digests: duplicates {digest(duplicates, parts)}, outcome {digest(outcome, parts)}", flush=True)
        if compare:
            run.memory = 1 << 50
            store.forget(("dedup",))
            with timed("dedup in memory", rows):
                again = find_duplicates(run, parts)
            same = digest(again, parts) == digest(duplicates, parts)
            print("the same verdicts in memory" if same else "OTHER VERDICTS IN MEMORY")


def size(text: str) -> int:
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    return int(float(text[:-1]) * (1 << units[text[-1].upper()])) if text[-1].upper() in units else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--memory", type=size, default=4 << 30)
    parser.add_argument("--data", choices=KINDS, default="random")
    parser.add_argument("--part-rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where files are written; by default in the temporary folder")
    parser.add_argument("--compare", action="store_true")
    arguments: Any = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        measure(
            arguments.data, arguments.rows, arguments.memory, arguments.part_rows, arguments.workers, Path(scratch), arguments.compare
        )  # fmt: skip


if __name__ == "__main__":
    main()
