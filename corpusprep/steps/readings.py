"""What is read as one: shards, of which small ones are taken together, and how batches make units."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from corpusprep.keys import digest
from corpusprep.parts import Batch, Part, Unit
from corpusprep.sources import MAX_BYTES, MAX_ROWS, RawBatch

if TYPE_CHECKING:
    from corpusprep.sources import Shard, Source, SourceSettings

_SMALL, _MANY_SMALL = 1 << 20, 64  # bytes of a small shard; how many of a source are many
_GROUP_BYTES = 8 << 20  # of small shards that are read as one, at most; a fourth on average
_GROUP_SHARDS = 128  # that a group has on average, if they are tiny
_BYTES_A_BATCH, _MOST_TOGETHER = 2 << 30, 16  # of a shard, for each batch of a unit
_SHARES = 4  # a worker reads a shard itself if it is no more than a worker's share of all, by this number


@dataclass(frozen=True)
class Reading:
    """What is read as one: a shard, or many small ones that follow each other in a source.

    Attributes:
        settings: of the source.
        shards: in rank order.
        key: of its batches and parts.
        name: that names of its batches begin with.
        rank: (source, first shard).
        size: bytes; None where that is not known.
        together: batches that make a unit.
    """

    settings: SourceSettings
    shards: tuple[Shard, ...]
    key: str
    name: str
    rank: tuple[int, int]
    size: int | None
    together: int

    def batch_name(self, number: int) -> str:
        return f"{self.name}-{number:05d}"

    def folder(self, parent: str | Path, number: int) -> Path:
        """Where a batch lies, in the folder of all batches."""
        return Path(parent) / f"{self.batch_name(number)}.{self.key}"

    def cut(self, source: Source) -> Iterator[RawBatch]:
        """The rows in batches; where these end depends on the content of the shards alone."""
        if len(self.shards) == 1:
            yield from source.read(self.shards[0], max_rows=MAX_ROWS, max_bytes=MAX_BYTES)
            return
        held: list[RawBatch] = []
        rows = size = 0
        for shard in self.shards:
            for batch in source.read(shard, max_rows=MAX_ROWS, max_bytes=MAX_BYTES):
                more = batch.table.num_rows + batch.rejected.num_rows, batch.table.nbytes + batch.rejected.nbytes
                if held and (rows + more[0] > MAX_ROWS or size + more[1] > MAX_BYTES):
                    yield _join(held)
                    held, rows, size = [], 0, 0
                held.append(batch)
                rows, size = rows + more[0], size + more[1]
        yield _join(held)

    def units(self, batches: Sequence[Batch]) -> list[Unit]:
        """What the steps that follow take together, of all batches in their order."""
        starts = range(0, len(batches), self.together)
        return [self._unit(number, tuple(batches[k : k + self.together])) for number, k in enumerate(starts)]

    def _unit(self, number: int, batches: tuple[Batch, ...]) -> Unit:
        name, rank = batches[0].name, (*self.rank, number)
        shard = self.shards[0].shard if len(self.shards) == 1 else None
        parts = []
        for pair in sorted({pair for batch in batches for pair in batch.kept}):
            pieces = tuple((batch.file(pair), batch.kept[pair]) for batch in batches if pair in batch.kept)
            parts.append(Part(f"{name}.{pair}", self.key, pair, pieces, self.shards[0].source, shard, rank))
        return Unit(name, batches, tuple(parts), rank)


def _join(batches: Sequence[RawBatch]) -> RawBatch:
    problems = [problem for batch in batches for problem in batch.problems]
    return RawBatch(
        pa.concat_tables([batch.table for batch in batches]), pa.concat_tables([batch.rejected for batch in batches]), problems
    )  # fmt: skip


def plan(source: Source, shards: Sequence[Shard], number: int, depends: Sequence[Any]) -> list[Reading]:
    """What is read as one of a source, in rank order.

    Args:
        shards: all of the source, in rank order.
        number: of the source in the recipe.
        depends: what batches depend on besides the source's settings and the content of its shards.
    """
    settings = source.settings.model_dump(mode="json", exclude={"path", "pairs"})
    sizes = [source.size(shard) for shard in shards]
    found = []
    for some in _together(shards, sizes):
        chosen = tuple(shards[k] for k in some)
        # A shard of one pair is the same whatever other pairs the recipe names.
        inputs = [(shard.pair or source.settings.wanted(), source.identity(shard)) for shard in chosen]
        size = _sum([sizes[k] for k in some])
        together = max(1, min(_MOST_TOGETHER, (size or 0) // _BYTES_A_BATCH))
        key = digest(*depends, settings, inputs, together)
        found.append(Reading(source.settings, chosen, key, _name(chosen), (number, some[0]), size, together))
    return found


def for_workers(todo: Sequence[Reading], workers: int) -> set[str]:
    """Names of what workers read themselves: what is small beside all that there is, so that none is left alone with it at
    the end."""
    total = sum(reading.size or 0 for reading in todo)
    limit = total / (_SHARES * workers)
    return {reading.name for reading in todo if reading.size is not None and reading.size <= limit}


def _sum(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _together(shards: Sequence[Shard], sizes: Sequence[int | None]) -> list[list[int]]:
    """Numbers of shards that are read as one: small ones that follow each other, if the source has many of them.

    Where a group ends is decided by names, as far as possible: a shard that is new or gone changes the group that it lies in.
    """
    small = [size is not None and size <= _SMALL for size in sizes]
    if sum(small) < _MANY_SMALL:
        return [[k] for k in range(len(shards))]
    found: list[list[int]] = []
    size, open_ = 0, False
    for k, shard in enumerate(shards):
        more = sizes[k] or 0
        # Rows of a group are told apart by the name of their shard, and are in the order of these names.
        fits = open_ and small[k] and shards[k - 1].shard < shard.shard and size + more <= _GROUP_BYTES
        if not fits:
            found.append([])
            size = 0
        found[-1].append(k)
        size += more
        open_ = small[k] and int(digest(shard.shard)[:8], 16) * _shards_of(more) >= 1 << 32
    return found


def _shards_of(size: int) -> int:
    """After how many shards of a size a group ends on average. It changes only where a size doubles."""
    return max(1, min(_GROUP_SHARDS, _GROUP_BYTES // 4 >> size.bit_length()))


def _name(shards: Sequence[Shard]) -> str:
    """The beginning of the names of batches."""
    names = []
    for shard in shards:
        files = [os.path.basename(file) for file in shard.files]
        names.append(digest(shard.shard, shard.split, shard.pair, files)[:16])
    return f"{shards[0].source}-{names[0] if len(names) == 1 else digest(names)[:16]}"
