"""Step 3: which rows are duplicates. It reads fingerprints, not text."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import order_of
from corpusprep.parts import Column, Group, Part, Work, by_pair
from corpusprep.sources.read_ahead import read_ahead
from corpusprep.stages import dedup

if TYPE_CHECKING:
    from corpusprep.derive import Run

_BYTES = 110  # that a row takes if its group is decided in memory
_AHEAD = 4  # batches that are read ahead if it is not
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
    provenance = _Provenance(work.parts, part_of, rows["row"].to_numpy())
    for part in work.parts:
        mine = slice(start, start + part.rows)
        found: dict[str, Any] = {"verdict": verdict[mine]}
        if settings.clusters:
            found |= provenance.of(keeper[mine])
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
        keys.append(_negated(rows))
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

    batches = [_Batch(tuple(parts)) for _, parts in itertools.groupby(work.parts, key=lambda part: part.rank)]

    def read(*columns: str) -> Iterator[pa.Table]:
        return read_ahead([lambda: (batch.read(*columns) for batch in batches)], 1, _AHEAD)

    def rows() -> Iterator[on_disk.Rows]:
        for table in read("fingerprint", "text_hash"):
            yield on_disk.Rows(table["fingerprint"].to_numpy(), table["text_hash"].to_numpy())

    preference = _PREFERENCE[settings.keep]
    orders = (lambda: map(_ORDER_BY[settings.keep], read(*preference))) if preference else None
    decision = on_disk.decide(rows, orders, work.group.rows, settings, folder, work.memory, _threads(work))
    provenance = None
    if settings.clusters:
        part_of = np.memmap(folder / "part", np.int32, "w+", shape=(work.group.rows,))
        row = np.memmap(folder / "row", np.int64, "w+", shape=(work.group.rows,))
        first, start = 0, 0
        for batch in batches:
            for number, (part, places) in enumerate(zip(batch.parts, batch.places(), strict=True), start=first):
                part_of[start + places], row[start + places] = number, part.read("row")["row"].to_numpy()
            first, start = first + len(batch.parts), start + batch.rows
        provenance = _Provenance(work.parts, part_of, row)
    start = 0
    for batch in batches:
        for part, places in zip(batch.parts, batch.places(), strict=True):
            found: dict[str, Any] = {"verdict": decision.verdict[start + places]}
            if provenance is not None and decision.keeper is not None:
                found |= provenance.of(decision.keeper[start + places])
            work.write(part, found)
        start += batch.rows


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Batch(NamedTuple):
    """Parts of one batch of a shard: one, or one for each pair, whose rows alternate there."""

    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def read(self, *columns: str) -> pa.Table:
        """Columns of the rows, in the order of the shard."""
        table = pa.concat_tables([part.read(*columns) for part in self.parts])
        return table if len(self.parts) == 1 else table.take(self._order())

    def places(self) -> list[npt.NDArray[np.int64]]:
        """Of each part, the places of its rows among those of the batch, in the order of the shard."""
        places = np.arange(self.rows)
        if len(self.parts) > 1:
            places[self._order()] = np.arange(self.rows)
        return np.split(places, np.cumsum([part.rows for part in self.parts])[:-1])

    def _order(self) -> npt.NDArray[np.int64]:
        return np.argsort(np.concatenate([part.read("row")["row"].to_numpy() for part in self.parts]), kind="stable")


_ORDER_BY: dict[str, Callable[[pa.Table], npt.NDArray[np.uint32]]] = {
    "form": lambda table: table["flaws"].to_numpy().astype(np.uint32),
    "score": lambda table: order_of(_negated(table)),
}
"""Numbers that order rows, the best with the lowest."""


def _negated(rows: pa.Table) -> npt.NDArray[np.float32]:
    """Scores with the best the lowest; rows without a score come last."""
    score = np.asarray(rows["score"].to_numpy(zero_copy_only=False), np.float32)
    return -np.where(np.isnan(score), np.float32(-np.inf), score)


class _Provenance:
    """Source, shard and row of the rows of a group, by their place in it.

    Args:
        parts: of the group.
        part_of: number of the part that each row is of.
        row: in its shard.
    """

    def __init__(self, parts: Sequence[Part], part_of: npt.NDArray[Any], row: npt.NDArray[np.int64]) -> None:
        self._sources = pa.array([part.source for part in parts], pa.string())
        self._shards = pa.array([part.shard for part in parts], pa.string())
        self._part_of, self._row = part_of, row

    def of(self, places: npt.NDArray[Any]) -> dict[str, Any]:
        at = np.asarray(self._part_of[places], np.int64)
        return {
            "keeper_source": self._sources.take(at),
            "keeper_shard": self._shards.take(at),
            "keeper_row": self._row[places],
        }
