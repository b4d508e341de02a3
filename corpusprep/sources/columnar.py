"""Arrow tables as rows of a source: which columns they are, and their text checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.errors import InputError, Wording
from corpusprep.sources.base import (
    ENCODING,
    LANGUAGE,
    NUL,
    Extent,
    RawBatch,
    Shard,
    empty_batch,
    is_language,
    make_batch,
    pair_in_path,
    row_languages,
)
from corpusprep.sources.files import open_binary, printable
from corpusprep.sources.jsonl import translation_pairs
from corpusprep.sources.lines import decode, gather, valid_utf8
from corpusprep.sources.remedies import LANGUAGES, NAME_SIDES, OR_NAME_LANGUAGES, or_keep
from corpusprep.sources.settings import SourceSettings
from corpusprep.sources.whole import finite, shadowed, whole_batch
from corpusprep.stage import PAIR_COLUMNS

Told = Callable[[tuple[bool, bool], str], list[tuple[str, str] | None]]

_PIECE = 8192
_REPAIR = ("Fetch it again", or_keep("to read what is sound"))


class Layout(NamedTuple):
    """Where a table's fields are: each a column, or a column and a field of its struct.

    Attributes:
        first, second: the text of either side.
        languages: the codes of either side, where rows name them; in a whole table rows may name one of the two.
        score: a number, if there is one.
        names: of a whole table, name in the batch and column of all that it holds, in the order of the file.
        given: of a whole table, the codes of the sides whose codes rows do not name.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    languages: tuple[str | None, str | None] | None
    score: str | None
    names: tuple[tuple[str, str], ...] = ()
    given: tuple[str | None, str | None] = (None, None)

    def columns(self) -> list[str]:
        """The top-level columns that are needed."""
        if self.names:
            return list(dict.fromkeys(column for _, column in self.names))
        codes = [name for name in self.languages or () if name is not None]
        names = [self.first[0], self.second[0], *codes, *([self.score] if self.score else [])]
        return list(dict.fromkeys(names))


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds text, or bytes that may be text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_null,
    )
    return any(check(kind) for check in checks)


def languages_of(
    schema: pa.Schema, settings: SourceSettings, file: str, path: str, whole: Told | None = None
) -> list[tuple[tuple[str, str] | None, tuple[str, ...]]]:
    """The pairs that a table holds, with the two fields of its struct that are a pair's sides; the pair None where
    rows name their own languages.

    Args:
        file: how messages name the table.
        path: where a pair is looked for that the table does not name.
        whole: of a whole table, `Source._told`.

    Raises:
        InputError: columns or languages are not to be found.
    """
    columns = {field: str(column) for field, column in settings.columns.items()}
    struct = columns.get("translation", "translation")
    if "src" not in columns and columns.get("src", "src") not in schema.names and struct in schema.names:
        kind = schema.field(struct).type
        names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        pairs = translation_pairs(settings, [[name for name in names if is_language(name)]])
        if not pairs:
            raise InputError(
                file,
                f"its column {struct!r} is {kind}, where a struct of two languages is wanted",
                NAME_SIDES,
            )
        return [(pair, pair) for pair in pairs]
    layout(schema, settings, file, whole=whole is not None)
    codes = columns.get("src_lang", "src_lang"), columns.get("tgt_lang", "tgt_lang")
    if whole is not None:
        told = whole((codes[0] in schema.names, codes[1] in schema.names), path)
        if told:
            return [(told[0], ())]
    elif settings.src_lang is not None and settings.tgt_lang is not None:
        return [((settings.src_lang, settings.tgt_lang), ())]
    elif set(codes) <= set(schema.names):
        return [(None, ())]
    languages = pair_in_path(path) if whole is None else None
    if languages is None:
        raise InputError(
            file,
            "nothing tells its languages",
            ("Give ", LANGUAGES, *OR_NAME_LANGUAGES),
        )
    return [(languages, ())]


def layout(
    schema: pa.Schema, settings: SourceSettings, file: str, shard: Shard | None = None, whole: bool = False
) -> Layout:
    """The columns of a shard's table; in a whole table a column `score` that the settings do not name may hold text.

    Raises:
        InputError: one is missing or is not of its type.
    """
    columns: dict[str, str] = {field: str(column) for field, column in settings.columns.items()}
    score = columns.get("score", "score")
    if score not in schema.names:
        if "score" in columns:
            raise _no_column(schema, score, file)
        score = ""
    elif whole and "score" not in columns and not _is_number(schema.field(score).type):
        score = ""
    elif not _is_number(schema.field(score).type):
        remedy = [Wording("Set columns.score", "Give --column score=NAME")]
        raise InputError(file, f"its column {score!r} is {schema.field(score).type}, not a number", remedy)
    if shard is not None and shard.members:
        struct = columns.get("translation", "translation")
        if struct not in schema.names:
            raise _no_column(schema, struct, file)
        kind = schema.field(struct).type
        for member in shard.members:
            if not pa.types.is_struct(kind) or kind.get_field_index(member) < 0:
                raise InputError(file, f"its column {struct!r} has no field {member!r}", "Check the file's languages")
            if not is_text(kind.field(member).type):
                problem = f"the field {member!r} of its column {struct!r} is {kind.field(member).type}, not text"
                raise InputError(file, problem, "Check the file")
        return Layout((struct, shard.members[0]), (struct, shard.members[1]), None, score or None)
    names = [columns.get("src", "src"), columns.get("tgt", "tgt")]
    codes: list[str | None] = []
    if shard is not None and shard.pair is None:
        for field, given in (("src_lang", settings.src_lang), ("tgt_lang", settings.tgt_lang)):
            name = columns.get(field, field)
            codes.append(None if given is not None and name not in schema.names else name)
    for name in [*names, *(code for code in codes if code is not None)]:
        if name not in schema.names:
            raise _no_column(schema, name, file)
        if not is_text(schema.field(name).type):
            raise InputError(file, f"its column {name!r} is {schema.field(name).type}, not text", "Name another column")
    languages = (codes[0], codes[1]) if codes else None
    return Layout((names[0],), (names[1],), languages, score or None)


def whole_layout(schema: pa.Schema, settings: SourceSettings, file: str, shard: Shard) -> tuple[Layout, list[str]]:
    """The columns of a whole table, and warnings.

    Raises:
        InputError: one is missing or is not of its type, or two have one name.
    """
    place = layout(schema, settings, file, shard, whole=True)
    twice = [name for i, name in enumerate(schema.names) if name in schema.names[:i]]
    if twice:
        raise InputError(file, f"it has two columns {printable(twice[0])!r}", "Rename one of them")
    taken = {"src": place.first[0], "tgt": place.second[0]}
    codes = zip(("src_lang", "tgt_lang"), place.languages or (), strict=False)
    taken |= {field: column for field, column in codes if column is not None}
    taken |= {"score": place.score} if place.score is not None else {}
    struct = {} if len(place.first) == 1 else dict.fromkeys(("src_lang", "tgt_lang"), place.first[0])
    names: list[tuple[str, str]] = []
    for column in schema.names:
        held = [field for field, at in taken.items() if at == column]
        names += [(field, column) for field in held or ([] if column in taken | struct else [column])]
    place = place._replace(names=tuple(names), given=(settings.src_lang, settings.tgt_lang))
    return place, shadowed(schema.names, taken | struct, file)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _no_column(schema: pa.Schema, name: str, file: str) -> InputError:
    there = ", ".join(repr(printable(each)) for each in schema.names[:20])
    return InputError(file, f"it has no column {name!r}; it has {there}", NAME_SIDES)


def _bytes(column: pa.ChunkedArray[Any] | pa.Array[Any]) -> pa.ChunkedArray[Any]:
    """A text column as large_binary without null, unchecked."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary()).fill_null(pa.scalar(b"", pa.large_binary()))


def flatten(table: pa.Table, place: Layout, first_row: int) -> pa.Table:
    """The fields of a table as columns first, second, languages and score of fixed types, and the row numbers; of a whole
    table, its other columns too, with "+" before their names."""
    texts = []
    for path in (place.first, place.second):
        column: Any = table[path[0]]
        if len(path) > 1:
            column = pc.struct_field(column, path[1])
        texts.append(_bytes(column))
    arrays: dict[str, Any] = {"first": texts[0], "second": texts[1]}
    for name, field, given in zip(("first_lang", "second_lang"), place.languages or (), place.given, strict=False):
        code: Any = table[field] if field is not None else pa.repeat(pa.scalar(given, pa.string()), table.num_rows)
        arrays[name] = _bytes(code)
    for name, column in place.names:
        if name not in PAIR_COLUMNS:
            arrays[f"+{name}"] = finite(table[column]) if name == "score" else _filterable(table[column])
    if place.score is not None and not place.names:
        arrays["score"] = table[place.score].cast(pa.float32(), safe=False)
    arrays["row"] = pa.array(np.arange(first_row, first_row + table.num_rows))
    return pa.table(arrays)


def _filterable(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    """Arrow filters no views."""
    kinds: dict[Any, Any] = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    return column.cast(kinds[column.type]) if column.type in kinds else column


def recut(tables: Iterator[pa.Table], max_rows: int, max_bytes: int) -> Iterator[pa.Table]:
    """Flat tables cut anew by rows and bytes of text, wherever the ones that come in end."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        size += int(_sizes(table).sum())
        if rows < max_rows and size <= max_bytes:
            continue
        rest = pa.concat_tables(held)
        total = _sizes(rest).cumsum()
        begin = 0
        while begin < rest.num_rows:
            base = int(total[begin - 1]) if begin else 0
            count = max(1, int(np.searchsorted(total[begin:], base + max_bytes, "right")))
            if begin + min(count, max_rows) >= rest.num_rows and count <= max_rows:
                break  # the next table may have rows that belong here
            count = min(count, max_rows)
            yield rest.slice(begin, count)
            begin += count
        held = [rest.slice(begin)] if begin < rest.num_rows else []
        rows, size = rest.num_rows - begin, int(total[-1]) - (int(total[begin - 1]) if begin else 0)
    if rows:
        yield pa.concat_tables(held)


def _sizes(table: pa.Table) -> npt.NDArray[np.int64]:
    lengths = [pc.binary_length(table[name]).to_numpy() for name in ("first", "second")]
    return np.asarray(lengths[0] + lengths[1], np.int64)


class _Text(NamedTuple):
    data: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def of(self, i: int) -> str:
        return decode(self.data, int(self.starts[i]), int(self.ends[i]))


def _spans(column: pa.ChunkedArray[Any], verdict: npt.NDArray[np.int8]) -> _Text:
    """The bytes of a large_binary column, with bad ones marked in the verdicts that are still 0."""
    array: Any = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    n = len(array)
    _, offsets_buffer, data_buffer = array.buffers()
    if n == 0 or offsets_buffer is None:
        return _Text(np.empty(0, np.uint8), np.zeros(n, np.int64), np.zeros(n, np.int64))
    offsets = np.frombuffer(memoryview(offsets_buffer), np.int64, n + 1, 8 * array.offset)
    has_data = data_buffer is not None and data_buffer.size
    data = np.frombuffer(memoryview(data_buffer), np.uint8) if has_data else np.empty(0, np.uint8)
    text = _Text(data, offsets[:-1], offsets[1:])
    try:
        array.view(pa.large_string()).validate(full=True)
    except pa.ArrowInvalid:
        for i in np.flatnonzero(verdict == 0).tolist():
            if not valid_utf8(data, text.starts[i], text.ends[i]):
                verdict[i] = ENCODING
    used = data[offsets[0] : offsets[-1]]
    if used.size and used.min() == 0:
        zeros = np.flatnonzero(used == 0) + offsets[0]
        holding = np.unique(np.searchsorted(offsets, zeros, "right") - 1)
        verdict[holding[verdict[holding] == 0]] = NUL
    return text


def flat_batch(
    flat: pa.Table, shard: Shard, settings: SourceSettings, problems: list[str], place: Layout | None
) -> RawBatch:
    """The batch of a flat table.

    Args:
        place: of a whole table, its columns.
    """
    flat = flat.combine_chunks() if place is not None else flat
    n = flat.num_rows
    verdict = np.zeros(n, np.int8)
    sides = [_spans(flat[name], verdict) for name in ("first", "second")]
    for name in flat.schema.names:
        if name.startswith("+"):
            _check(flat[name], verdict)
    languages: tuple[pa.Array[Any], pa.Array[Any]] | None = None
    swap: npt.NDArray[np.bool_] | None = None
    if "first_lang" in flat.schema.names:
        odd = np.zeros(n, np.int8)
        codes = [_spans(flat[name], odd) for name in ("first_lang", "second_lang")]
        verdict[(odd != 0) & (verdict == 0)] = LANGUAGE
        sound = verdict == 0
        if place is None:
            named = [gather(code.data, code.starts[sound], code.ends[sound]) for code in codes]
        else:
            named = [_strings(flat[name], sound) for name in ("first_lang", "second_lang")]
        labels = row_languages(named[0], named[1], settings.wanted() if place is None else None)
        verdict[sound] = labels.verdict
        chosen = pa.array(labels.verdict == 0)
        languages = (labels.languages[0].filter(chosen), labels.languages[1].filter(chosen))
        swap = labels.swap[labels.verdict == 0]
    rows = flat["row"].to_numpy()
    rejects: list[tuple[int, str | None, str | None, int]] = [
        (int(rows[i]), sides[0].of(i), sides[1].of(i), int(verdict[i])) for i in np.flatnonzero(verdict > 0).tolist()
    ]
    good = verdict == 0
    if place is not None:
        texts = [_strings(flat[name], good) for name in ("first", "second")]
        found: dict[str, Any] = dict(zip(PAIR_COLUMNS, (*texts, *(languages or ())), strict=False))
        rest = flat if good.all() else flat.filter(pa.array(good))
        columns = {name: found[name] if name in found else rest[f"+{name}"] for name, _ in place.names}
        return whole_batch(shard, columns | found, settings, rejects=rejects, problems=problems)
    texts = [gather(side.data, side.starts[good], side.ends[good]) for side in sides]
    score = None
    if "score" in flat.schema.names:
        values = flat["score"].to_numpy()[good]
        score = pa.array(values, pa.float32(), mask=~np.isfinite(values))
    rows = np.ascontiguousarray(rows[good])
    return make_batch(
        shard, rows, *texts, score=score, languages=languages, swap=swap, rejects=rejects, problems=problems
    )


def _strings(column: pa.ChunkedArray[Any], good: npt.NDArray[np.bool_]) -> pa.Array[Any]:
    """The good rows of a large_binary column as text, without a kernel that a short command would have to load."""
    chosen = column if good.all() else column.filter(pa.array(good))
    chunks: list[Any] = [chunk.view(pa.large_string()).cast(pa.string()) for chunk in chosen.chunks]
    if len(chunks) == 1:
        only: pa.Array[Any] = chunks[0]
        return only
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.string())


def _check(column: pa.ChunkedArray[Any], verdict: npt.NDArray[np.int8]) -> None:
    """Marks values that are no text, though their type says so, in the verdicts that are still 0."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for i in np.flatnonzero(verdict == 0).tolist():
            try:
                column.slice(i, 1).validate(full=True)
            except pa.ArrowInvalid:
                verdict[i] = ENCODING


def read_tables(
    tables: Callable[[list[str]], Iterator[pa.Table]],
    settings: SourceSettings,
    shard: Shard,
    file: str,
    extent: Extent,
    place: Layout | None = None,
    none: pa.Table | None = None,
) -> Iterator[RawBatch]:
    """Reads flat tables that a function streams; it may add to the list of problems that it is given, and raise
    InputError, which ends the reading under `on_error = "keep"`.

    Args:
        place, none: of a whole table, its columns, and a flat table of no rows.
    """
    problems = list(shard.lost)
    state = {"rows": 0}

    def stream() -> Iterator[pa.Table]:
        left = extent.limit
        try:
            for table in tables(problems):
                if left is not None:
                    table = table.slice(0, left)
                    left -= table.num_rows
                state["rows"] += table.num_rows
                if table.num_rows:
                    yield table
                if left == 0:
                    return
        except InputError as error:
            if settings.on_error == "stop":
                raise
            row = "" if error.row is None else f", row {error.row}"
            problems.append(f"{error.file}{row}: {error.problem}; what follows is lost.")

    for flat in recut(stream(), extent.max_rows, extent.max_bytes):
        batch = flat_batch(flat, shard, settings, problems, place)
        problems.clear()
        yield batch
    if not state["rows"] and not problems:
        problems.append(f"{file}: it is empty.")
    if problems and none is not None:
        yield flat_batch(none, shard, settings, problems, place)
    elif problems:
        yield empty_batch(shard, problems)


def read_parquet(settings: SourceSettings, shard: Shard, extent: Extent, whole: bool = False) -> Iterator[RawBatch]:
    """Reads one Parquet file, a row group after the other.

    Args:
        whole: whether batches are whole tables.
    """
    file = printable(shard.files[0])
    place: Layout | None = None
    none: pa.Table | None = None
    warnings: list[str] = []
    if whole:
        try:
            with open_binary(shard.files[0]) as stream:
                schema = open_parquet(stream, file).schema_arrow
        except InputError as error:
            if settings.on_error == "stop":
                raise
            yield whole_batch(shard, {}, settings, problems=[f"{error.file}: {error.problem}; what follows is lost."])
            return
        place, warnings = whole_layout(schema, settings, file, shard)
        none = flatten(schema.empty_table(), place, 0)

    def tables(problems: list[str]) -> Iterator[pa.Table]:
        problems += warnings
        with open_binary(shard.files[0]) as stream:
            parquet = open_parquet(stream, file)
            where = place or layout(parquet.schema_arrow, settings, file, shard)
            row = 0
            for group in range(parquet.num_row_groups):
                meta = parquet.metadata.row_group(group)
                after = row + meta.num_rows
                # As many rows at a time as a batch of a whole table has, if they are not large.
                fitting = extent.max_bytes * meta.num_rows // max(meta.total_byte_size, 1) if whole else 0
                piece = max(_PIECE, min(extent.max_rows, fitting))
                try:
                    for batch in parquet.iter_batches(piece, row_groups=[group], columns=where.columns()):
                        yield flatten(pa.Table.from_batches([batch]), where, row)
                        row += batch.num_rows
                except PARQUET_ERRORS as error:
                    detail = str(error).splitlines()[0] if str(error) else type(error).__name__
                    problem = f"its row group {group} is damaged ({detail})"
                    if settings.on_error == "stop":
                        raise InputError(file, problem, _REPAIR, row) from None
                    problems.append(f"{file}, row {row}: {problem}; {max(after - row, 0)} rows are lost.")
                row = max(row, after)  # damaged metadata may count fewer rows than there are

    yield from read_tables(tables, settings, shard, file, extent, place, none)


# Arrow's errors are ValueErrors, KeyErrors, OSErrors and NotImplementedErrors too; OverflowError and MemoryError come
# from sizes that a damaged file claims.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError, NotImplementedError)


def open_parquet(stream: BinaryIO, file: str) -> Any:
    """An open Parquet file.

    Raises:
        InputError: it is none, or is damaged.
    """
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(stream)
        _ = parquet.schema_arrow
        return parquet
    except PARQUET_ERRORS as error:
        detail = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise InputError(file, f"it is not a Parquet file that can be read ({detail})", "Fetch it again") from None
