"""Step 3: which rows are duplicates. It reads fingerprints, not text."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
    # Parts of one pair, and their rows, are in rank order.
    ranked = len({part.pair for part in work.parts}) == 1
    shards = _Shards(_units(work.parts)) if settings.clusters or not ranked else None
    shard_of = shards.of(*work.parts) if shards is not None else None
    order = _order(rows, None if ranked else shard_of, settings)
    fingerprints, hashes = rows["fingerprint"].to_numpy(), rows["text_hash"].to_numpy()
    if order is not None:
        fingerprints, hashes = fingerprints[order], hashes[order]
    verdict, keeper = dedup.decide(fingerprints, hashes, settings, _threads(work))
    if order is not None:
        unordered, keepers = np.empty_like(verdict), np.empty_like(keeper)
        unordered[order], keepers[order] = verdict, order[keeper]
        verdict, keeper = unordered, keepers
    start = 0
    provenance = None
    if settings.clusters and shards is not None and shard_of is not None:
        provenance = _Provenance(shards, shard_of, rows["row"].to_numpy())
    for part in work.parts:
        mine = slice(start, start + part.rows)
        found: dict[str, Any] = {"verdict": verdict[mine]}
        if provenance is not None:
            found |= provenance.of(keeper[mine])
        work.write(part, found)
        start += part.rows


def _threads(work: Work) -> int:
    return min(work.threads, os.cpu_count() or 1)


def _order(
    rows: pa.Table, shard_of: npt.NDArray[np.int32] | None, settings: dedup.DedupSettings
) -> npt.NDArray[np.int64] | None:
    """The rows with the best first; None where they stand in that order already.

    Args:
        shard_of: number of the shard of each row; None if the rows are in rank order.
    """
    keys: list[npt.NDArray[Any]] = []
    if shard_of is not None:
        keys = [rows["row"].to_numpy(), shard_of]
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

    units = _units(work.parts)
    shards = _Shards(units)

    def read(*columns: str) -> Iterator[pa.Table]:
        return read_ahead([lambda: (_in_order(unit, shards, *columns) for unit in units)], 1, _AHEAD)

    def rows() -> Iterator[on_disk.Rows]:
        for table in read("fingerprint", "text_hash"):
            yield on_disk.Rows(table["fingerprint"].to_numpy(), table["text_hash"].to_numpy())

    preference = _PREFERENCE[settings.keep]
    orders = (lambda: map(_ORDER_BY[settings.keep], read(*preference))) if preference else None
    decision = on_disk.decide(rows, orders, work.group.rows, settings, folder, work.memory, _threads(work))
    provenance = None
    if settings.clusters:
        shard_of = np.memmap(folder / "shard", np.int32, "w+", shape=(work.group.rows,))
        row = np.memmap(folder / "row", np.int64, "w+", shape=(work.group.rows,))
        start = 0
        for unit in units:
            for part, places in zip(unit, _places(unit, shards), strict=True):
                shard_of[start + places], row[start + places] = shards.of(part), part.read("row")["row"].to_numpy()
            start += _rows(unit)
        provenance = _Provenance(shards, shard_of, row)
    start = 0
    for unit in units:
        for part, places in zip(unit, _places(unit, shards), strict=True):
            found: dict[str, Any] = {"verdict": decision.verdict[start + places]}
            if provenance is not None and decision.keeper is not None:
                found |= provenance.of(decision.keeper[start + places])
            work.write(part, found)
        start += _rows(unit)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _in_order(unit: _Unit, shards: _Shards, *columns: str) -> pa.Table:
    """Columns of the rows of a unit, in the order in which they were read."""
    table = pa.concat_tables([part.read(*columns) for part in unit])
    return table if len(unit) == 1 else table.take(_order_of(unit, shards))


def _places(unit: _Unit, shards: _Shards) -> list[npt.NDArray[np.int64]]:
    """Of each part of a unit, the places of its rows among those of the unit, in the order in which they were read."""
    places = np.arange(_rows(unit))
    if len(unit) > 1:
        places[_order_of(unit, shards)] = np.arange(places.size)
    return np.split(places, np.cumsum([part.rows for part in unit])[:-1])


def _order_of(unit: _Unit, shards: _Shards) -> npt.NDArray[np.int64]:
    rows = np.concatenate([part.read("row")["row"].to_numpy() for part in unit])
    return np.lexsort([rows, shards.of(*unit)])


def _rows(unit: _Unit) -> int:
    return sum(part.rows for part in unit)


_ORDER_BY: dict[str, Callable[[pa.Table], npt.NDArray[np.uint32]]] = {
    "form": lambda table: table["flaws"].to_numpy().astype(np.uint32),
    "score": lambda table: order_of(_negated(table)),
}
"""Numbers that order rows, the best with the lowest."""


def _negated(rows: pa.Table) -> npt.NDArray[np.float32]:
    """Scores with the best the lowest; rows without a score come last."""
    score = np.asarray(rows["score"].to_numpy(zero_copy_only=False), np.float32)
    return -np.where(np.isnan(score), np.float32(-np.inf), score)


_Unit = tuple[Part, ...]
"""The parts of a unit: one, or one for each pair, whose rows alternate in the shard."""


def _units(parts: Sequence[Part]) -> list[_Unit]:
    return [tuple(unit) for _, unit in itertools.groupby(parts, key=lambda part: part.rank)]


class _Shards:
    """The shards that rows of a group are of, numbered by rank.

    Args:
        units: in rank order.
    """

    def __init__(self, units: Sequence[_Unit]) -> None:
        self.names: list[tuple[str, str]] = []
        """(source, shard)."""
        self._first: dict[str, int] = {}  # part -> number of the first shard of its unit
        self._several: dict[str, pa.Array[Any]] = {}  # part -> names of its unit's shards, if they are several
        for unit in units:
            self._first.update((part.identity, len(self.names)) for part in unit)
            names = [str(unit[0].shard)]
            if unit[0].shard is None:  # shards are read in the order of their names
                found = [pc.unique(part.read("shard")["shard"]).to_pylist() for part in unit]
                names = sorted({str(name) for some in found for name in some})
                self._several.update((part.identity, pa.array(names, pa.string())) for part in unit)
            self.names += [(unit[0].source, name) for name in names]

    def of(self, *parts: Part) -> npt.NDArray[np.int32]:
        """The numbers of the shards of the rows of parts, (rows,)."""
        return np.concatenate([self._of(part) for part in parts])

    def _of(self, part: Part) -> npt.NDArray[np.int32]:
        first, names = self._first[part.identity], self._several.get(part.identity)
        if names is None:
            return np.full(part.rows, first, np.int32)
        found: Any = pc.index_in(part.read("shard")["shard"], value_set=names)
        return np.asarray(found.to_numpy() + first, np.int32)


class _Provenance:
    """Source, shard and row of the rows of a group, by their place in it.

    Args:
        shards: of the group.
        shard_of: the number of each row's shard.
        row: in its shard.
    """

    def __init__(self, shards: _Shards, shard_of: npt.NDArray[Any], row: npt.NDArray[np.int64]) -> None:
        self._sources = pa.array([source for source, _ in shards.names], pa.string())
        self._shards = pa.array([shard for _, shard in shards.names], pa.string())
        self._shard_of, self._row = shard_of, row

    def of(self, places: npt.NDArray[Any]) -> dict[str, Any]:
        at = np.asarray(self._shard_of[places], np.int64)
        return {
            "keeper_source": self._sources.take(at),
            "keeper_shard": self._shards.take(at),
            "keeper_row": self._row[places],
        }
