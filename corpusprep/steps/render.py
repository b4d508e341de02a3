"""What the units become: examples, sorted by the file of the mix that they go into, and rejects."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from corpusprep.arrow import count_values, shaped
from corpusprep.keys import digest
from corpusprep.parts import Column, Part, Unit
from corpusprep.stage import PAIR_COLUMNS, PROVENANCE
from corpusprep.stages.instruct.examples import Examples
from corpusprep.steps.taken import validation_hashes
from corpusprep.steps.verdicts import DUPLICATES, VERDICTS
from corpusprep.store import ready, write_tables, writing

if TYPE_CHECKING:
    from corpusprep.recipe import Recipe

T = TypeVar("T")

VALIDATION = -1  # the number of the file of the validation split


@dataclass(frozen=True)
class RenderTask:
    """Some units: their kept rows become examples, the dropped rows of each a file of rejects."""

    units: tuple[Unit, ...]
    columns: Mapping[str, Column]
    """`outcome`, `tokens` and `scores` of the units' parts, and with `dedup.clusters` also `duplicates`."""
    files: int
    """Number of files of the mix."""
    validation: int | None
    """Rows whose validation hash is not above this are the validation split."""
    compressed: bool
    """Whether the examples are compressed until they are in the mix."""
    folder: str
    """Where examples, rejects, and what says that they are done, are written."""
    recipe: Recipe

    @property
    def name(self) -> str:
        """The first unit's name, and a digest of all names: another choice of units has another name."""
        return f"{self.units[0].name}.{digest([unit.name for unit in self.units])}"

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    @property
    def done(self) -> str:
        return f"{self.folder}/done/{self.name}.json"

    def examples(self, number: int) -> str:
        return f"{self.folder}/examples/{self.name}.{number}.arrow"

    def rejects(self, unit: Unit) -> str:
        return f"{self.folder}/rejects/{unit.name}.parquet"

    def recall(self) -> Rendered | None:
        """The result, if the units are done and their files are there."""
        found = recall(self.done, Rendered)
        if found is None or not all(map(ready, (*found.examples, *found.rejects))):
            return None
        return found


@dataclass(frozen=True)
class Rendered:
    """What came of some units."""

    name: str
    examples: Sequence[str]
    """Paths."""
    groups: Sequence[tuple[int, int, int]]
    """(number in `examples`, file of the mix (-1: validation), record batch)"""
    rejects: Mapping[str, int]
    """Path -> rows, of each unit that dropped some."""
    dropped: Sequence[tuple[str, str, str, int]]
    """(stage, pair, reason, rows) of the drops that follow the first step."""
    kept: Sequence[tuple[str, int, int]]
    """(pair, rows, examples)"""


_REJECT_FIELDS: list[tuple[str, pa.DataType]] = [
        ("source", pa.string()), ("shard", pa.string()), ("row", pa.int64()),
        ("src_lang", pa.string()), ("tgt_lang", pa.string()), ("src", pa.string()), ("tgt", pa.string()),
        ("stage", pa.string()), ("reason", pa.string()),
        ("src_lid", pa.string()), ("src_lid_prob", pa.float32()), ("tgt_lid", pa.string()), ("tgt_lid_prob", pa.float32()),
        ("fingerprint", pa.uint64()), ("quality", pa.float32()), ("tokens", pa.int32()), ("score", pa.float32()),
        ("keeper_source", pa.string()), ("keeper_shard", pa.string()), ("keeper_row", pa.int64()),
]  # fmt: skip
REJECT_COLUMNS = pa.schema(_REJECT_FIELDS)
_HELD = 50_000  # copies of rows that are held until they are rendered
_WITHOUT_TEXT = {"judged": ("dedup.exact", "quality.not_needed", "balance.quota"), "all": (), "none": None}


def render(task: RenderTask) -> Rendered:
    """Writes the examples of some units, sorted by their file of the mix, and the rejects of each."""
    rejected: dict[str, int] = {}
    made = _Made(task)
    for unit in task.units:
        if count := write_tables(_render_unit(unit, task, made), task.rejects(unit)):
            rejected[task.rejects(unit)] = count
    made.write()
    result = Rendered(
        task.name, made.files, made.groups, rejected, [(*names, n) for names, n in sorted(made.dropped.items())],
        [(pair, rows, count) for pair, (rows, count) in sorted(made.kept.items())],
    )  # fmt: skip
    remember(result, task.done)
    return result


def _render_unit(unit: Unit, task: RenderTask, made: _Made) -> Iterator[pa.Table]:
    """Renders the rows of a unit that are kept, and yields its rejects, batch by batch."""
    for first, judged in _batches(unit, task.columns):
        rejects = [shaped(first, REJECT_COLUMNS)]
        for pair, table, keepers in judged:
            lost = _lost(table, keepers)
            for reason, count in count_values(lost["reason"]).items():
                made.dropped[reason.partition(".")[0], pair, reason] += count
            rejects.append(shaped(lost, REJECT_COLUMNS))
            chosen = table.filter(pc.equal(table["verdict"], pa.scalar(0, pa.uint8())))
            if chosen.num_rows:
                made.add(pair, chosen)
        yield _as_written(rejects, task.recipe)


class _Made:
    """What a task of rendering makes. Rows are rendered when there are many of them.

    Attributes:
        files: of examples.
        groups: (number of such a file, file of the mix, record batch).
        dropped: (stage, pair, reason) -> rows.
        kept: pair -> rows, examples.
    """

    def __init__(self, task: RenderTask) -> None:
        self.files: list[str] = []
        self.groups: list[tuple[int, int, int]] = []
        self.dropped: Counter[tuple[str, str, str]] = Counter()
        self.kept: dict[str, list[int]] = {}
        self._task = task
        self._held: list[tuple[str, pa.Table]] = []
        self._copies = 0

    def add(self, pair: str, rows: pa.Table) -> None:
        """Holds rows: what examples are made of, since a user's stage may give other columns another type in each batch."""
        names = dict.fromkeys(
            (*PAIR_COLUMNS, "key", "copies", "tokens", *PROVENANCE, *self._task.recipe.instruct.carry)
        )
        rows = rows.select([name for name in names if name in rows.column_names])
        for at, name in enumerate(PAIR_COLUMNS):
            rows = rows.set_column(at, name, rows[name].cast(pa.large_string()))
        self._held.append((pair, rows))
        self._copies += pc.sum(rows["copies"]).as_py()
        if self._copies >= _HELD:
            self.write()

    def write(self) -> None:
        """Renders the rows that are held, and writes their examples, a record batch for each file of the mix."""
        if not self._held:
            return
        rows = pa.concat_tables([table for _, table in self._held], promote_options="default")
        examples, files = _examples(rows, self._task)
        begin = 0
        for pair, table in self._held:
            entry, end = self.kept.setdefault(pair, [0, 0]), begin + table.num_rows
            first, last = np.searchsorted(examples.row, [begin, end])
            entry[0], entry[1] = entry[0] + table.num_rows, entry[1] + int(last - first)
            begin = end
        path = self._task.examples(len(self.files))
        written = _write_examples(examples, files, path, self._task.compressed)
        self.groups += [(len(self.files), *found) for found in written]
        self.files.append(path)
        self._held, self._copies = [], 0


def _batches(
    unit: Unit, columns: Mapping[str, Column]
) -> Iterator[tuple[pa.Table, list[tuple[str, pa.Table, pa.Table | None]]]]:
    """Of each batch of a unit: its first rejects; and of each pair its rows with all that was derived of them, and with
    `dedup.clusters` the rows that are kept instead of duplicates."""
    derived = {part.pair: _derived(part, columns) for part in unit.parts}
    keepers = {part.pair: columns["duplicates"].read(part) for part in unit.parts if "duplicates" in columns}
    begins = dict.fromkeys(derived, 0)
    for batch in unit.batches:
        first = pq.read_table(batch.rejects)
        judged = []
        for part in unit.parts:
            pair = part.pair
            if pair not in batch.kept:
                continue
            table, begin = pq.read_table(batch.file(pair)), begins[pair]
            more = derived[pair].slice(begin, table.num_rows)
            for name in more.column_names:
                table = table.append_column(name, more[name])
            others = keepers[pair].slice(begin, table.num_rows) if keepers else None
            judged.append((pair, table, others))
            begins[pair] = begin + table.num_rows
        yield first.drop_columns(["stage"] if "stage" in first.column_names else []), judged


def _derived(part: Part, columns: Mapping[str, Column]) -> pa.Table:
    """What was derived of a part's rows: `quality` if they have scores, `tokens`, `copies`, and the final `verdict`."""
    fate, scores = columns["outcome"].read(part), columns["scores"]
    counts = columns["tokens"].array(part, "tokens")
    found: dict[str, Any] = {}
    if part in scores:
        found["quality"] = scores.read(part, "quality")["quality"]
    tokens = pa.array(counts, pa.int32(), mask=counts == 0)
    return pa.table(found | {"tokens": tokens, "copies": fate["copies"], "verdict": fate["verdict"]})


def _lost(table: pa.Table, keepers: pa.Table | None) -> pa.Table:
    """The rows that go, with their reasons."""
    verdict = table["verdict"].to_numpy()
    mask = pa.array(verdict != 0)
    lost = table.filter(mask)
    names = pa.array(VERDICTS, pa.string()).take(pa.array(verdict[verdict != 0].astype(np.int64)))
    lost = lost.append_column("reason", names)
    if keepers is not None:
        instead = keepers.drop_columns(["verdict"]).filter(mask)
        duplicate = pc.is_in(names, value_set=pa.array(DUPLICATES))
        for name in instead.column_names:
            column = instead[name].combine_chunks()
            lost = lost.append_column(name, pc.if_else(duplicate, column, pa.scalar(None, column.type)))
    return lost


def _examples(rows: pa.Table, task: RenderTask) -> tuple[Examples, npt.NDArray[np.int64]]:
    """The examples of kept rows, and the number of the file of the mix of each."""
    recipe = task.recipe
    if task.validation is None:
        examples = Examples(rows, recipe.instruct, recipe.seed)
        return examples, file_of(examples.key, task.files)
    held = validation_hashes(rows["key"].to_numpy(), recipe.seed) <= np.uint64(task.validation)
    copies = np.where(held, 1, rows["copies"].to_numpy())  # a row of the validation split is there once
    at = rows.column_names.index("copies")
    examples = Examples(rows.set_column(at, "copies", pa.array(copies)), recipe.instruct, recipe.seed)
    return examples, np.where(held[examples.row], VALIDATION, file_of(examples.key, task.files))


def file_of(keys: npt.NDArray[np.uint64], files: int) -> npt.NDArray[np.int64]:
    """The file of the mix that a key falls into: equal ranges of the keys, in order, up to 2^32 files."""
    return ((keys >> np.uint64(32)) * np.uint64(files) >> np.uint64(32)).astype(np.int64)


def _write_examples(
    examples: Examples, files: npt.NDArray[np.int64], path: str, compressed: bool
) -> list[tuple[int, int]]:
    """Writes examples, in record batches of one file of the mix each; returns (file, record batch)."""
    order = np.argsort(files, kind="stable")
    files, begin = files[order], 0
    batches: list[int] = []
    with writing(path) as scratch, contextlib.ExitStack() as stack:
        writer = None
        for piece in examples.rendered(order):
            if writer is None:
                options = ipc.IpcWriteOptions(compression="zstd" if compressed else None)
                writer = stack.enter_context(ipc.new_file(str(scratch), piece.schema, options=options))
            present = files[begin : begin + piece.num_rows]
            starts = np.flatnonzero(np.diff(present, prepend=VALIDATION - 1)).tolist()
            for start, end in itertools.pairwise([*starts, piece.num_rows]):
                for batch in piece.slice(start, end - start).combine_chunks().to_batches():
                    writer.write_batch(batch)
                    batches.append(int(present[start]))
            begin += piece.num_rows
    return [(file, number) for number, file in enumerate(batches)]


def _as_written(tables: list[pa.Table], recipe: Recipe) -> pa.Table:
    """The rejects of a batch in the order in which they were read, without the text that the recipe does not want there."""
    table = pa.concat_tables(tables)
    table = table.take(pc.sort_indices(table, [("shard", "ascending"), ("row", "ascending")]))
    stage = pc.replace_substring_regex(table["reason"], pattern=r"\..*", replacement="")
    table = table.set_column(REJECT_COLUMNS.get_field_index("stage"), "stage", stage)
    silent = _WITHOUT_TEXT[recipe.rejects.text]
    if silent is None or silent:
        hide: Any = True if silent is None else pc.is_in(table["reason"], value_set=pa.array(silent))
        for name in ("src", "tgt"):
            column = pc.if_else(hide, pa.scalar(None, pa.string()), table[name])
            if isinstance(column, pa.Scalar):
                column = pa.nulls(table.num_rows, pa.string())
            table = table.set_column(table.column_names.index(name), name, column)
    return table if recipe.dedup.clusters else table.drop_columns(["keeper_source", "keeper_shard", "keeper_row"])


def remember(result: Any, marker: str) -> None:
    """Writes a task's result beside its files, last: an interrupted run finds there what is done."""
    with writing(marker) as scratch:
        scratch.write_text(json.dumps(asdict(result)), encoding="utf-8")


def recall(marker: str, kind: type[T]) -> T | None:
    try:
        return kind(**json.loads(Path(marker).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
