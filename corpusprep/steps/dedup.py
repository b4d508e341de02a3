"""Step 3: which rows are duplicates. It reads fingerprints, not text."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import order_of
from corpusprep.parts import Column, Group, Part, Work, by_pair
from corpusprep.stages import dedup

if TYPE_CHECKING:
    from corpusprep.derive import Run

_BYTES = 110  # that a row takes if its group is decided in memory
_PIECE = 1 << 20  # rows that are read at a time if it is not
_PREFERENCE = {"form": ["flaws"], "score": ["score"], "first": []}  # columns of a part by which its rows are ranked


def find_duplicates(run: Run, parts: Sequence[Part]) -> Column:
    """The column of verdicts: 0, `dedup.exact` or `dedup.near`; with `dedup.clusters` also the row that is kept instead.

    Rows are compared within their language pair, or all with each other (`dedup.scope`).
    """
    settings = run.recipe.dedup
    groups = by_pair(parts)
    if settings.scope == "all" and parts:
        groups = [Group("all", tuple(sorted(parts, key=lambda part: (part.rank, part.pair))))]
    scratch = str(run.store.scratch())
    return run.derive("dedup", "find duplicates", mark_duplicates, groups, settings, hints={"scratch": scratch})


def mark_duplicates(work: Work) -> None:
    """Decides which rows of a group are duplicates; writes `verdict` (uint8), aligned to each part."""
    settings: dedup.DedupSettings = work.settings
    if not settings.enabled:
        for part in work.parts:
            work.write(part, {"verdict": np.zeros(part.rows, np.uint8)})
        return
    if _BYTES * work.group.rows > work.memory:
        _mark_on_disk(work, settings)
        return
    columns = ["fingerprint", "text_hash", "row", *_PREFERENCE[settings.keep]]
    rows = pa.concat_tables([part.read(*columns) for part in work.parts])
    sizes = [part.rows for part in work.parts]
    part_of = np.repeat(np.arange(len(sizes)), sizes)
    order = _order(work.parts, rows, part_of, settings)
    fingerprints, hashes = rows["fingerprint"].to_numpy(), rows["text_hash"].to_numpy()
    if order is not None:
        fingerprints, hashes = fingerprints[order], hashes[order]
    verdict, keeper = dedup.decide(fingerprints, hashes, settings, _threads(work))
    if order is not None:
        unordered, keepers = np.empty_like(verdict), np.empty_like(keeper)
        unordered[order], keepers[order] = verdict, order[keeper]
        verdict, keeper = unordered, keepers
    start = 0
    for part in work.parts:
        mine = slice(start, start + part.rows)
        found: dict[str, Any] = {"verdict": verdict[mine]}
        if settings.clusters:
            found |= _provenance(work.parts, rows, part_of, keeper[mine])
        work.write(part, found)
        start += part.rows


def _threads(work: Work) -> int:
    return min(work.threads, os.cpu_count() or 1)


def _order(
    parts: Sequence[Part], rows: pa.Table, part_of: npt.NDArray[np.int64], settings: dedup.DedupSettings
) -> npt.NDArray[np.int64] | None:
    """The rows with the best first; None where they stand in that order already."""
    keys: list[npt.NDArray[Any]] = []
    if len({part.pair for part in parts}) > 1:  # else parts and their rows are in rank order, and sorting is stable
        ranks = np.array([part.rank for part in parts], np.int64).reshape(-1, 3)
        keys = [rows["row"].to_numpy(), ranks[part_of, 1], ranks[part_of, 0]]
    if settings.keep == "score":
        score = np.asarray(rows["score"].to_numpy(zero_copy_only=False), np.float32)
        keys.append(-np.where(np.isnan(score), -np.inf, score))
    elif settings.keep == "form":
        keys.append(rows["flaws"].to_numpy())
    return np.lexsort(keys) if keys else None


# ------------------------------------------------------------------------------------------------------------- on disk


def _mark_on_disk(work: Work, settings: dedup.DedupSettings) -> None:
    """The same for a group that memory does not hold."""
    folder = Path(tempfile.mkdtemp(dir=_made(Path(work.hints["scratch"]))))
    try:
        _write_from_disk(work, settings, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_from_disk(work: Work, settings: dedup.DedupSettings, folder: Path) -> None:
    from corpusprep.stages.dedup import on_disk

    pieces = _pieces(work.parts)

    def rows() -> Iterator[on_disk.Rows]:
        for found, _ in _read_ahead(pieces, ["fingerprint", "text_hash", *_PREFERENCE[settings.keep]]):
            yield on_disk.Rows(
                found["fingerprint"].to_numpy(), found["text_hash"].to_numpy(), _rank_by(found, settings)
            )

    decision = on_disk.decide(rows, work.group.rows, settings, folder, work.memory, _threads(work))
    place = 0
    places = _Provenance(work.parts, pieces, folder) if settings.clusters else None
    for units in pieces:
        for unit in units:
            count = sum(part.rows for part in unit)
            mine = slice(place, place + count)
            order = _by_row(unit)
            verdict = _unordered(decision.verdict[mine], order)
            keeper = _unordered(decision.keeper[mine], order) if decision.keeper is not None else None
            start = 0
            for part in unit:
                some = slice(start, start + part.rows)
                columns: dict[str, Any] = {"verdict": verdict[some]}
                if places is not None and keeper is not None:
                    columns |= places.of(keeper[some])
                work.write(part, columns)
                start += part.rows
            place += count


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


Unit = Sequence[Part]
"""Parts of one batch: one, or one for each pair, whose rows alternate in their shard."""


def _pieces(parts: Sequence[Part]) -> list[list[Unit]]:
    """The parts, units together, in pieces of about a million rows."""
    pieces: list[list[Unit]] = [[]]
    rows = 0
    for _, unit in itertools.groupby(parts, key=lambda part: part.rank):
        members = list(unit)
        if rows >= _PIECE:
            pieces.append([])
            rows = 0
        pieces[-1].append(members)
        rows += sum(part.rows for part in members)
    return pieces


def _by_row(unit: Unit) -> npt.NDArray[np.int64] | None:
    """The order of a unit's rows in their shard; None if it has one part, whose rows are in order."""
    if len(unit) == 1:
        return None
    return np.argsort(np.concatenate([part.read("row")["row"].to_numpy() for part in unit]), kind="stable")


def _unordered(values: npt.NDArray[Any], order: npt.NDArray[np.int64] | None) -> npt.NDArray[Any]:
    """Values of rows in the order of their shard, as the unit's parts have the rows."""
    if order is None:
        return np.asarray(values)
    found = np.empty_like(values)
    found[order] = values
    return found


def _read_ahead(pieces: Sequence[Sequence[Unit]], columns: list[str]) -> Iterator[tuple[pa.Table, Sequence[Unit]]]:
    """Columns of the rows of each piece, in the order of their shards; the next piece is read meanwhile."""

    def read(units: Sequence[Unit]) -> pa.Table:
        tables = []
        for unit in units:
            table = pa.concat_tables([part.read(*columns) for part in unit])
            order = _by_row(unit)
            tables.append(table if order is None else table.take(order))
        return pa.concat_tables(tables)

    with ThreadPoolExecutor(1) as pool:
        coming: deque[Any] = deque()
        for units in pieces:
            coming.append((pool.submit(read, units), units))
            if len(coming) > 1:
                done, those = coming.popleft()
                yield done.result(), those
        for done, those in coming:
            yield done.result(), those


def _rank_by(rows: pa.Table, settings: dedup.DedupSettings) -> npt.NDArray[np.uint32] | None:
    """Numbers that order rows, the best with the lowest."""
    if settings.keep == "form":
        return np.asarray(rows["flaws"].to_numpy(), np.uint32)
    if settings.keep == "first":
        return None
    score = np.asarray(rows["score"].to_numpy(zero_copy_only=False), np.float32)
    return order_of(-np.where(np.isnan(score), np.float32(-np.inf), score))


class _Provenance:
    """Source, shard and row of each place, from mapped files."""

    def __init__(self, parts: Sequence[Part], pieces: Sequence[Sequence[Unit]], folder: Path) -> None:
        self._sources = pa.array([part.source for part in parts], pa.string())
        self._shards = pa.array([part.shard for part in parts], pa.string())
        number = {part.name: n for n, part in enumerate(parts)}
        n = sum(part.rows for part in parts)
        self._part = np.memmap(folder / "part", np.uint32, "w+", shape=(max(1, n),))
        self._row = np.memmap(folder / "row", np.int64, "w+", shape=(max(1, n),))
        place = 0
        for units in pieces:
            for unit in units:
                rows = np.concatenate([part.read("row")["row"].to_numpy() for part in unit])
                of = np.repeat([number[part.name] for part in unit], [part.rows for part in unit])
                order = np.argsort(rows, kind="stable")
                self._row[place : place + rows.size], self._part[place : place + rows.size] = rows[order], of[order]
                place += rows.size

    def of(self, places: npt.NDArray[Any]) -> dict[str, Any]:
        at = self._part[places].astype(np.int64)
        return {
            "keeper_source": self._sources.take(pa.array(at)),
            "keeper_shard": self._shards.take(pa.array(at)),
            "keeper_row": self._row[places],
        }


def _provenance(
    parts: Sequence[Part], rows: pa.Table, part_of: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Source, shard and row of rows of the group."""
    sources = pa.array([part.source for part in parts], pa.string())
    shards = pa.array([part.shard for part in parts], pa.string())
    at = part_of[chosen]
    return {
        "keeper_source": sources.take(at),
        "keeper_shard": shards.take(at),
        "keeper_row": rows["row"].to_numpy()[chosen],
    }
