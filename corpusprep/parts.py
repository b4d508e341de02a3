"""What the steps of a run hand each other: units, parts, and the columns derived of parts."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.arrow import join
from corpusprep.errors import RunError
from corpusprep.store import write_table, writing


@dataclass(frozen=True)
class Part:
    """The kept rows of one language pair in one unit: Parquet files that are written once, one for each batch.

    Their columns are `src tgt src_lang tgt_lang source shard row score`, `key` (uint64, a seeded hash of the provenance), of langid
    `src_lid src_lid_prob tgt_lid tgt_lid_prob`, of dedup `fingerprint text_hash` and with `keep = "form"` also `flaws`, and what a
    user's own stage added.
    """

    name: str
    """Its name in the store, `UNIT.PAIR`."""
    key: str
    pair: str
    """`en-sw`."""
    pieces: tuple[tuple[str, int], ...]
    """(path, rows) of each file, in the order of the rows."""
    source: str
    shard: str | None
    """None where the unit is of several shards; the column `shard` then tells which row is of which."""
    rank: tuple[int, int, int]
    """(source, shard, unit): of duplicates, the row of the lower rank is the earlier one."""

    @property
    def identity(self) -> str:
        return f"{self.name}.{self.key}"

    @functools.cached_property
    def rows(self) -> int:
        return sum(rows for _, rows in self.pieces)

    def read(self, *columns: str) -> pa.Table:
        """Some columns of the part, or all. A task that reads text goes by pieces instead."""
        tables = [table for _, table in self.read_pieces(*columns)]
        return pa.concat_tables(tables, promote_options="default") if len(tables) > 1 else tables[0]

    def read_pieces(self, *columns: str) -> Iterator[tuple[slice, pa.Table]]:
        """The same in pieces: which rows, and their columns."""
        start = 0
        for path, rows in self.pieces:
            yield slice(start, start + rows), pq.read_table(path, columns=list(columns) or None)
            start += rows


def take_rows(files: Sequence[str], places: npt.NDArray[np.int64], *columns: str) -> pa.Table:
    """Rows of consecutive files, by their places in ascending order; some columns, or all. One file is held at a time."""
    names = list(columns) or None
    tables: list[pa.Table] = []
    start = 0
    for file in files:
        rows = pq.read_metadata(file).num_rows
        begin, end = np.searchsorted(places, (start, start + rows))
        if begin < end:
            tables.append(pq.read_table(file, columns=names).take(places[begin:end] - start))
        start += rows
    if not tables:
        nothing = pq.read_schema(files[0]).empty_table()
        return nothing.select(names) if names else nothing
    return pa.concat_tables(tables, promote_options="default")


@dataclass(frozen=True)
class Batch:
    """What the first step made of one batch of a shard: a folder with a file for each language pair, and the rejects so far."""

    name: str
    folder: str
    read: Mapping[str, int]
    """pair -> rows."""
    dropped: Sequence[tuple[str, str, str, int]]
    """(stage, pair, reason, rows)."""
    kept: Mapping[str, int]
    """pair -> rows."""
    problems: tuple[str, ...]
    """What was lost or odd in the batch, a sentence each."""

    @property
    def number(self) -> int:
        """Its place among the batches of the shard, from 0."""
        return int(self.name.rpartition("-")[2])

    def file(self, pair: str) -> str:
        """The file of the rows of a pair."""
        return f"{self.folder}/{pair}.parquet"

    @property
    def rejects(self) -> str:
        """The file of the rows that the first step dropped."""
        return f"{self.folder}/rejects.parquet"


@dataclass(frozen=True)
class Unit:
    """Batches that the steps after the first take together: one, or several consecutive ones of a large shard."""

    name: str
    batches: tuple[Batch, ...]
    parts: tuple[Part, ...]
    """One for each language pair."""
    rank: tuple[int, int, int]

    @functools.cached_property
    def read(self) -> Mapping[str, int]:
        """pair -> rows."""
        return sum((Counter(batch.read) for batch in self.batches), Counter[str]())

    @property
    def rows(self) -> int:
        return sum(self.read.values())


@dataclass(frozen=True)
class Group:
    """Parts that one task works on."""

    name: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def by_pair(parts: Iterable[Part]) -> list[Group]:
    """A group for each language pair, its parts in rank order."""
    pairs: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        pairs.setdefault(part.pair, []).append(part)
    return [Group(pair, tuple(members)) for pair, members in sorted(pairs.items())]


def one_by_one(parts: Iterable[Part]) -> list[Group]:
    """A group for each part. Parts of one pair follow each other, so that a worker can keep what belongs to the pair."""
    return [Group(part.name, (part,)) for part in sorted(parts, key=lambda part: part.pair)]


@dataclass(frozen=True)
class Column:
    """Values that a step derived of parts: which file holds those of which part.

    A file is aligned to the rows of one part; or it holds what was decided about a group of parts, such as a pair's cut-off.
    """

    kind: str
    """The folder of the store that the files lie in."""
    files: dict[str, str] = field(default_factory=dict)
    """Identity of a part -> path."""
    groups: dict[str, str] = field(default_factory=dict)
    """Name of a group -> path, where a file is of a group."""
    digests: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Path -> `content_digest` of the file, as far as it is known."""

    def __contains__(self, part: Part) -> bool:
        return part.identity in self.files

    def file(self, part: Part) -> str:
        return self.files[part.identity]

    def of(self, parts: Iterable[Part]) -> Column:
        """The column of some of its parts."""
        files = {part.identity: self.files[part.identity] for part in parts if part.identity in self.files}
        paths = set(files.values())
        groups = {name: path for name, path in self.groups.items() if path in paths}
        return Column(self.kind, files, groups, {path: self.digests[path] for path in paths if path in self.digests})

    def digest(self, part: Part) -> str | None:
        """`content_digest` of the part's file; None where the column has nothing of the part."""
        path = self.files.get(part.identity)
        if path is None:
            return None
        if path not in self.digests:
            self.digests[path] = content_digest(path)
        return self.digests[path]

    def read(self, part: Part, *columns: str) -> pa.Table:
        """Some columns of the part's file, or all."""
        return pq.read_table(self.file(part), columns=list(columns) or None)

    def array(self, part: Part, column: str) -> npt.NDArray[Any]:
        """One column of the part's file, read-only; (rows,)."""
        return np.asarray(self.read(part, column)[column].to_numpy(zero_copy_only=False))

    def floats(self, part: Part, column: str) -> npt.NDArray[np.float32]:
        """A column of numbers, NaN for null; (rows,)."""
        return np.asarray(self.array(part, column), np.float32)

    def kept(self, part: Part) -> npt.NDArray[np.bool_]:
        """Which rows of the part have the verdict 0; (rows,)."""
        return np.asarray(self.array(part, "verdict") == 0)

    def marked(self, part: Part) -> npt.NDArray[np.bool_]:
        """Which rows of the part are marked, in a column of candidates; (rows,)."""
        return np.asarray(self.array(part, "candidate"), np.bool_)

    def value(self, group: str) -> Any:
        """What was decided about a group, from JSON."""
        return json.loads(Path(self.groups[group]).read_text(encoding="utf-8"))

    def values(self) -> dict[str, Any]:
        """What was decided about each group, by its name."""
        return {group: self.value(group) for group in self.groups}


def write_column(output: str, part: Part, columns: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
    """Writes the file of one part, a value for each of its rows.

    Args:
        columns: name -> values, (rows,).
        notes: kept in the file's metadata; they say how the values were made, and are not in the digest of the column.
    """
    table = pa.table(dict(columns), metadata=dict(notes) if notes else None)
    if table.num_rows != part.rows:
        raise RunError(
            f"{part.name}: {table.num_rows} values for {part.rows} rows. This is a bug in corpusprep: please report it. "
            "--redo clean makes the part again."
        )
    with writing(output) as scratch:
        write_table(table, scratch)


def write_value(output: str, value: Any) -> None:
    """Writes what was decided about a group, as JSON."""
    with writing(output) as scratch:
        scratch.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True), encoding="utf-8")


@dataclass(frozen=True)
class Work:
    """What a task is given: a group of parts, settings, and the columns that it depends on.

    Attributes:
        group: the parts.
        settings: as `Run.derive` was given them.
        own: what is said to this group alone (`each` of `Run.derive`).
        columns: the columns named in `of`, for these parts.
        outputs: where the results go: a file for each part, or one for the group.
        hints: what helps and does not change the result.
        threads: cores that the task may use.
        memory: bytes that its data may take. The result depends neither on it nor on the threads.
    """

    group: Group
    settings: Any
    own: Any
    columns: Mapping[str, Column]
    outputs: tuple[str, ...]
    hints: Mapping[str, Any]
    threads: int = 1
    memory: int = 1 << 30

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.group.parts

    def write(self, part: Part, columns: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
        """Writes a part's values, (rows,) each."""
        write_column(self._output_of[part.identity], part, columns, notes)

    @functools.cached_property
    def _output_of(self) -> dict[str, str]:
        return {part.identity: output for part, output in zip(self.parts, self.outputs, strict=True)}

    def write_value(self, value: Any) -> None:
        """Writes what was decided about the group, as JSON."""
        write_value(self.outputs[0], value)


def run_work(task: Callable[[Work], None], work: Work) -> dict[str, str]:
    """Runs a task; returns the digests of the files that it wrote, so that nobody has to read them for that."""
    task(work)
    return {path: content_digest(path) for path in work.outputs}


def content_digest(path: str) -> str:
    """SHA-256 of a column's file: of names, types and values, without the notes that `write_column` keeps in the metadata."""
    data = Path(path).read_bytes()
    if not data[:4] == data[-4:] == b"PAR1":
        return hashlib.sha256(data).hexdigest()
    # Parquet's metadata, notes included, is a footer; the four bytes before the last four say how long it is.
    values = memoryview(data)[4 : len(data) - 8 - int.from_bytes(data[-8:-4], "little")]
    state = hashlib.sha256(str(pq.read_schema(pa.BufferReader(data)).remove_metadata()).encode())
    state.update(values)
    return state.hexdigest()


def pair_column(table: pa.Table) -> pa.ChunkedArray[Any]:
    """The pair of every row, as in `en-sw`."""
    return join(*(pc.fill_null(table[name], pa.scalar("?")) for name in ("src_lang", "tgt_lang")), separator="-")
