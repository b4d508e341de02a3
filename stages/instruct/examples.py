"""Converts rows to examples: directions, copies, templates, keys, and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from corpusprep import codes
from corpusprep.arrow import U64, combine, row_keys
from corpusprep.stage import PROVENANCE
from corpusprep.stages.instruct import text
from corpusprep.stages.instruct.templates import fill, halves
from corpusprep.stages.languages import name as language_name

if TYPE_CHECKING:
    from corpusprep.stages.instruct import InstructSettings

    Ints: TypeAlias = npt.NDArray[np.int64]
    Mask: TypeAlias = npt.NDArray[np.bool_]

Direction = Literal["both", "forward", "backward"]

# Salts that are mixed with a row's key, one per purpose, so that the choices are independent of each other.
_DIRECTION_SALT, _TEMPLATE_SALT, VALIDATION_SALT = 1, 8, 0x56414C


class Pairs(NamedTuple):
    """The language pairs of a table.

    Attributes:
        sides: the codes of both sides of each pair.
        code: index of each row's pair, int32 of shape (n,).
    """

    sides: list[tuple[str, str]]
    code: npt.NDArray[np.int32]


class Examples:
    """The examples of a table as arrays, in order of row, direction and copy.

    Attributes:
        row: index of the example's row, int64.
        backward: 1 if the example translates from tgt to src, int8.
        copy: number of the row's copy, from 0, int32.
        template: index of the template, int32.
        key: sort key of the shuffle, uint64.
    """

    def __init__(self, table: pa.Table, settings: InstructSettings, seed: int) -> None:
        table = text.plain(table)
        self.table, self.settings = table, settings
        self.pairs = pairs_of(table)
        used = np.stack(_directions(self.pairs.sides, settings.directions), axis=1)[self.pairs.code]
        entry = np.flatnonzero(used)
        self.copy = np.zeros(entry.size, np.int32)
        if "copies" in table.column_names:
            copies = text.integers(table["copies"])[entry // 2]
            starts = np.cumsum(copies) - copies
            entry = np.repeat(entry, copies)
            self.copy = (np.arange(entry.size) - np.repeat(starts, copies)).astype(np.int32)
        self.row: Ints = entry // 2
        self.backward: npt.NDArray[np.int8] = (entry % 2).astype(np.int8)
        keys = keys_of_rows(table, seed)[self.row]
        self.key: U64 = combine(combine(keys, self.backward + _DIRECTION_SALT), self.copy)
        # A row's copies use the templates in turn: no template is used twice before all are used.
        count = len(settings.templates)
        first = (combine(keys, self.backward + _TEMPLATE_SALT) % np.uint64(count)).astype(np.int64)
        self.template: npt.NDArray[np.int32] = ((first + self.copy) % count).astype(np.int32)

    def shuffled(self) -> Ints:
        """Indices of the examples, sorted by key, then by provenance: the order of the rows does not matter."""
        order = np.argsort(self.key, kind="stable")
        ranked = self.key[order]
        names = [name for name in PROVENANCE if name in self.table.column_names]
        if not names or not np.any(ranked[1:] == ranked[:-1]):
            return order
        frame = pl.DataFrame(pl.from_arrow(self.table.select(names).take(self.row)))
        frame = frame.hstack(pl.DataFrame({"key": self.key, "backward": self.backward, "copy": self.copy}))
        ranks = frame.select(pl.arg_sort_by("key", *names, "backward", "copy", maintain_order=True)).to_series()
        return ranks.to_numpy().astype(np.int64)

    def rendered(self, order: Ints, piece_bytes: int = text.PIECE_BYTES) -> Iterator[pa.Table]:
        """Renders the examples with these indices, in pieces of bounded size; at least one, which may be empty."""
        n = self.table.num_rows
        texts = pa.concat_arrays([text.large(self.table["src"]), text.large(self.table["tgt"])])
        sizes = text.byte_lengths(texts)
        before, after = all_halves(self.pairs.sides, self.settings)
        for start, stop in text.slices((sizes[:n] + sizes[n:])[self.row[order]], piece_bytes):
            index = order[start:stop]
            row, backward, pair = self.row[index], self.backward[index], self.pairs.code[self.row[index]]
            which = (pair.astype(np.int64) * 2 + backward) * len(self.settings.templates) + self.template[index]
            asked, answer = row + n * backward.astype(np.int64), row + n * (1 - backward.astype(np.int64))
            prompt = text.weave([(before, which), (texts, asked), (after, which)], 3)
            yield self._table(index, text.narrow(prompt), text.narrow(text.weave([(texts, answer)], 1)))

    def _table(self, index: Ints, prompt: text.Strings, completion: text.Strings) -> pa.Table:
        pair, sides = self.pairs.code[self.row[index]], self.pairs.sides
        direction = pair * 2 + self.backward[index]
        labels = [label for a, b in sides for label in (f"{a}-{b}", f"{b}-{a}")]
        columns: dict[str, Any] = {"prompt": prompt, "completion": completion}
        if self.settings.system is not None:
            columns["system"] = _strings(fill(self.settings.system, *names) for names in _names(sides)).take(direction)
        columns["src_lang"] = _strings(a for a, _ in sides).take(pair)
        columns["tgt_lang"] = _strings(b for _, b in sides).take(pair)
        columns["direction"] = _strings(labels).take(direction)
        columns["template"] = pa.array(self.template[index])
        columns["copy"] = pa.array(self.copy[index])
        columns["key"] = pa.array(self.key[index])
        known = [name for name in dict.fromkeys((*PROVENANCE, "tokens", *self.settings.carry)) if name not in columns]
        rows = self.table.select([name for name in known if name in self.table.column_names])
        rows = rows.take(self.row[index])
        return pa.table({**columns, **dict(zip(rows.column_names, rows.columns, strict=True))})


def keys_of_rows(table: pa.Table, seed: int) -> U64:
    """The seeded hash of each row's provenance, or of its position if the provenance is unknown, shape (n,)."""
    if all(name in table.column_names for name in PROVENANCE):
        return row_keys(table, seed)
    return combine(np.full(table.num_rows, seed, np.uint64), np.arange(table.num_rows))


def pairs_of(table: pa.Table) -> Pairs:
    """The language pairs of a table, in order of their first row."""
    src, tgt = (encoded(table[name]) for name in ("src_lang", "tgt_lang"))
    both = pa.array(src.code.astype(np.int64) * max(len(tgt.values), 1) + tgt.code).dictionary_encode()
    sides = [divmod(pair, len(tgt.values)) for pair in both.dictionary.to_pylist()]
    return Pairs([(src.values[a], tgt.values[b]) for a, b in sides], both.indices.to_numpy())


class Encoded(NamedTuple):
    """A column of text: its distinct values in order of their first row, and the index of each row's value, int32."""

    values: list[str]
    code: npt.NDArray[np.int32]


def encoded(column: pa.ChunkedArray[Any]) -> Encoded:
    """The distinct values of a column; null counts as empty text."""
    array: Any = text.large(column).dictionary_encode()
    return Encoded(array.dictionary.to_pylist(), array.indices.to_numpy())


def all_halves(sides: list[tuple[str, str]], settings: InstructSettings) -> tuple[pa.Array[Any], pa.Array[Any]]:
    """The prompt before and after the text, indexed by (pair * 2 + backward) * templates + template."""
    parts = [halves(template) for template in settings.templates]
    filled = [(fill(before, *names), fill(after, *names)) for names in _names(sides) for before, after in parts]
    return tuple(_strings(both[at] for both in filled).cast(pa.large_string()) for at in (0, 1))  # type: ignore[return-value]


def _directions(sides: list[tuple[str, str]], asked: Direction | Mapping[str, Direction]) -> tuple[Mask, Mask]:
    """Whether each pair is used forward and backward."""
    default: Direction = asked if isinstance(asked, str) else asked.get("default", "both")
    named: dict[tuple[str, str], Direction] = {}
    turned: dict[Direction, Direction] = {"both": "both", "forward": "backward", "backward": "forward"}
    for key, direction in ({} if isinstance(asked, str) else asked).items():
        if key != "default":
            a, b = codes.parse_pair(key)
            named[a, b], named[b, a] = direction, turned[direction]
    plain = [(codes.canonical(a), codes.canonical(b)) for a, b in sides]
    chosen = [named.get(pair, named.get(same, default)) for pair, same in zip(sides, plain, strict=True)]
    # If both sides have the same language, there is only one direction: such rows are used once.
    forward = [direction != "backward" or a == b for direction, (a, b) in zip(chosen, sides, strict=True)]
    backward = [direction != "forward" and a != b for direction, (a, b) in zip(chosen, sides, strict=True)]
    return np.array(forward, np.bool_), np.array(backward, np.bool_)


def _names(sides: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Names of the source and the target language, indexed by pair * 2 + backward."""
    for a, b in sides:
        yield language_name(a), language_name(b)
        yield language_name(b), language_name(a)


def _strings(values: Any) -> pa.Array[Any]:
    return pa.array(list(values), pa.string())
