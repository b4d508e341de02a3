"""JSON records as Arrow tables with all their fields."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.errors import InputError
from corpusprep.sources.base import ENCODING, JSON
from corpusprep.sources.lines import Lines

_DEEPEST = 64  # levels of nesting that a table may have
_EXACT = 1 << 53  # a double holds every integer below
_BLOCK = 1 << 20


class RecordTables:
    """Turns the records of a file into tables, batch by batch.

    Arrow parses a batch at once. If it cannot, Python parses the lines one by one: a repeated field, a lone surrogate, NaN.
    Text that looks like a timestamp stays text, and integers beyond int64 become uint64 if they fit.

    Args:
        file: how messages name the file.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._kinds: dict[str, Any] = {}  # types that Arrow would infer differently
        self._order: dict[str, None] = {}  # of the fields; Arrow puts those with a given type first

    def read(self, lines: Lines, places: npt.NDArray[np.int64], sound: bool) -> tuple[pa.Table, dict[int, int]]:
        """The table of some of the lines.

        Args:
            lines: all lines.
            places: the indexes of the lines to read; each line holds one JSON object.
            sound: whether all of them are nested so little that Arrow can parse them.

        Returns:
            The table, and the verdicts of the lines that it lacks, by index.

        Raises:
            InputError: no type fits all values of a field.
        """
        if not places.size:
            return pa.table({}), {}
        table = self._at_once(lines, places) if sound else None
        return (table, {}) if table is not None else self._one_by_one(lines, places)

    def _at_once(self, lines: Lines, places: npt.NDArray[np.int64]) -> pa.Table | None:
        starts, ends = lines.starts[places], lines.ends[places]
        if places.size == lines.starts.size:
            block: Any = pa.py_buffer(lines.data[starts[0] : ends[-1]])  # type: ignore[arg-type]
        else:
            spans = zip(starts.tolist(), ends.tolist(), strict=True)
            block = pa.py_buffer(b"\n".join(lines.data[start:end].tobytes() for start, end in spans))
        size = max(_BLOCK, int((ends - starts).max()) + 2)
        try:
            table = _parse(block, size, self._kinds)
            self._order |= dict.fromkeys(name for name in table.column_names if name not in self._kinds)
            found = {field.name: kind for field in table.schema if (kind := _better(field)) != field.type}
            if found:
                table = _parse(block, size, self._kinds | found)
                self._kinds |= found
            for name in _large(table):
                table = _exact(table, block, size, self._kinds, name)
        except pa.ArrowException:
            return None
        if table.num_rows != places.size:
            return None
        unused = {name for name in self._kinds if table[name].null_count == table.num_rows}
        return table.select([name for name in self._order if name in table.column_names and name not in unused])

    def _one_by_one(self, lines: Lines, places: npt.NDArray[np.int64]) -> tuple[pa.Table, dict[int, int]]:
        records: list[dict[str, Any]] = []
        rows: list[int] = []
        bad: dict[int, int] = {}
        for place in places.tolist():
            line = lines.data[lines.starts[place] : lines.ends[place]].tobytes()
            try:
                record = json.loads(line.decode("utf-8-sig"))
                if b"\\u" in line:
                    json.dumps(record, ensure_ascii=False).encode()
            except UnicodeError:
                bad[place] = ENCODING
            except (ValueError, RecursionError):
                bad[place] = JSON
            else:
                if _depth(line) > _DEEPEST:
                    bad[place] = JSON
                    continue
                records.append(record)
                rows.append(lines.first + place)
        keys = dict.fromkeys(key for record in records for key in record)
        return pa.table({key: self._column(key, [record.get(key) for record in records], rows) for key in keys}), bad

    def _column(self, key: str, values: list[Any], rows: list[int]) -> pa.Array[Any]:
        try:
            column = _array(values)
            whole = pa.types.is_integer(column.type) and (pc.min(column).as_py() or 0) >= 0
            return column.cast(pa.uint64()) if key == "fingerprint" and whole else column
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            low, high = 0, len(values)  # the first `low` values have a common type, the first `high` do not
            while high - low > 1:
                middle = (low + high) // 2
                try:
                    _array(values[:middle])
                    low = middle
                except (pa.ArrowException, OverflowError, UnicodeError):
                    high = middle
            problem = f"the type of its field {key!r} changes here ({error})"
            raise InputError(self._file, problem, "Give the field one type, or leave it out", rows[high - 1]) from None


def _parse(block: pa.Buffer, size: int, kinds: dict[str, Any]) -> pa.Table:
    import pyarrow.json as pj

    options = pj.ParseOptions(explicit_schema=pa.schema(kinds)) if kinds else None
    stream: Any = pa.BufferReader(block)
    return pj.read_json(stream, read_options=pj.ReadOptions(block_size=size), parse_options=options)


def _better(field: pa.Field[Any]) -> pa.DataType:
    """The type that a field should have, given the one that Arrow infers."""
    if field.name == "fingerprint" and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
        return pa.uint64()
    return _without_times(field.type)


def _without_times(kind: Any) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_times(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_without_times(kind.field(i).type)) for i in range(kind.num_fields)])
    same: pa.DataType = kind
    return same


def _large(table: pa.Table) -> list[str]:
    """The fields of doubles that may be integers too large for a double."""
    found = []
    for field in table.schema:
        if pa.types.is_floating(field.type):
            ends: Any = pc.min_max(table[field.name])
            if any(end.is_valid and abs(end.as_py()) >= _EXACT for end in (ends["min"], ends["max"])):
                found.append(field.name)
    return found


def _exact(table: pa.Table, block: pa.Buffer, size: int, kinds: dict[str, Any], name: str) -> pa.Table:
    """The table with a field of doubles as uint64, if the file has integers there."""
    try:
        whole = _parse(block, size, kinds | {name: pa.uint64()})
    except pa.ArrowInvalid:
        return table
    return table.set_column(table.column_names.index(name), name, whole[name])


def _array(values: list[Any]) -> pa.Array[Any]:
    array: pa.Array[Any]
    try:
        array = pa.array(values)
        return array
    except (pa.ArrowException, OverflowError):
        if not all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values
        ):
            raise
    try:
        return pa.array(values, pa.uint64())
    except (pa.ArrowException, OverflowError):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())


def _depth(line: bytes) -> int:
    """The deepest nesting of brackets in a line; brackets in text count too."""
    if line.count(b"[") + line.count(b"{") <= _DEEPEST:
        return 0
    data = np.frombuffer(line, np.uint8)
    opened = ((data == 91) | (data == 123)).astype(np.int64)
    return int((opened - ((data == 93) | (data == 125))).cumsum().max())
