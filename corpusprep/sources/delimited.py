"""Tab-separated lines: no quoting, every line with as many columns as its file has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.kernels import kernel
from corpusprep.sources.base import (
    COLUMNS,
    LANGUAGE,
    SCORE,
    Extent,
    RawBatch,
    Shard,
    empty_batch,
    make_batch,
    row_languages,
)
from corpusprep.sources.files import blocks, printable
from corpusprep.sources.lines import Bytes, LineCutter, Lines, Spans, batches_of, check_text, decode, gather, head
from corpusprep.sources.settings import SourceSettings
from corpusprep.sources.whole import whole_batch

_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
Verdicts = npt.NDArray[np.int8]


class Columns(NamedTuple):
    """Where a file's fields are, by column from 0.

    Attributes:
        width: how many columns a line has.
        first, second: the text of either side.
        score: a number.
        languages: the codes of either side, where lines name them; in a whole table lines may name one of the two.
        header: whether the first line names the columns and is no row.
        names: of a whole table, name and place of each column in the batch.
        kinds: of a whole table, the types of columns, by place, that hold numbers, besides the score.
    """

    width: int
    first: int
    second: int
    score: int | None = None
    languages: tuple[int | None, int | None] | None = None
    header: bool = False
    names: tuple[tuple[str, int], ...] = ()
    kinds: tuple[tuple[int, pa.DataType], ...] = ()


class Table(NamedTuple):
    """Lines and where their columns end: column k of line i is `data[cuts[i, k] + 1:cuts[i, k + 1]]`; `counts` are
    the columns of each line."""

    lines: Lines
    cuts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int32]

    def spans(self, column: int) -> tuple[Spans, Spans]:
        """Start and end of a column's field in each line."""
        return self.cuts[:, column] + 1, self.cuts[:, column + 1]


@kernel
def _cut(data: Bytes, starts: Spans, ends: Spans, cuts: npt.NDArray[np.int64], counts: npt.NDArray[np.int32]) -> None:
    width = cuts.shape[1] - 1
    for i in range(starts.size):
        cuts[i, 0] = starts[i] - 1
        n, k, end = 0, starts[i], ends[i]
        while n < width and k < end:
            stop = min(k + 32, end)
            if k + 32 <= end:
                chunk = data[k : k + 32]
                hit = np.uint8(0)
                for j in range(32):
                    hit |= np.uint8(1) if chunk[j] == 9 else np.uint8(0)
                if hit == 0:
                    k = stop
            while k < stop:
                k += 1
                if data[k - 1] == 9:
                    n += 1
                    cuts[i, n] = k - 1
                    if n == width:
                        break
        rest = data[k:end]
        for j in range(rest.size):  # a sum of comparisons, which the compiler makes a vector loop
            n += rest[j] == 9
        n += 1
        counts[i] = n
        for column in range(n, width + 1):
            cuts[i, column] = end


@kernel
def _decimals(
    data: Bytes, starts: Spans, ends: Spans, out: npt.NDArray[np.float64], state: npt.NDArray[np.int8]
) -> None:
    """Reads decimal numbers of up to 15 digits, exactly; state 0 is read, 1 empty, 2 for another to judge."""
    for i in range(starts.size):
        k, end = starts[i], ends[i]
        out[i] = 0.0
        if k == end:
            state[i] = 1
            continue
        negative = data[k] == 45
        if negative or data[k] == 43:
            k += 1
        mantissa, digits, scale, dotted = 0, 0, 1.0, False
        state[i] = 0
        while k < end:
            byte = data[k]
            if 48 <= byte <= 57:
                mantissa = mantissa * 10 + (byte - 48)
                digits += 1
                if dotted:
                    scale *= 10.0
            elif byte == 46 and not dotted:
                dotted = True
            else:
                digits = 0
                break
            if digits > 15:
                break
            k += 1
        if k < end or digits == 0:
            state[i] = 2
            continue
        # Both are below 2**53, so the quotient is the float64 nearest to the decimal.
        out[i] = -(mantissa / scale) if negative else mantissa / scale


@kernel
def _cut_and_read(
    data: Bytes,
    starts: Spans,
    ends: Spans,
    cuts: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int32],
    column: int,
    out: npt.NDArray[np.float64],
    state: npt.NDArray[np.int8],
) -> None:
    """`_cut`, and `_decimals` of a column while its lines are in the cache."""
    for i in range(0, starts.size, 1024):
        part = slice(i, min(i + 1024, starts.size))
        _cut(data, starts[part], ends[part], cuts[part], counts[part])
        _decimals(data, cuts[part, column] + 1, cuts[part, column + 1], out[part], state[part])


def cut(lines: Lines, width: int) -> Table:
    """Finds the first `width` columns of each line, and how many it has."""
    n = lines.starts.size
    cuts = np.empty((n, width + 1), np.int64)
    counts = np.empty(n, np.int32)
    _cut(lines.data, lines.starts, lines.ends, cuts, counts)
    return Table(lines, cuts, counts)


def cut_and_read(lines: Lines, width: int, column: int) -> tuple[Table, npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """`cut`, and `numbers` of one of the columns."""
    n = lines.starts.size
    table = Table(lines, np.empty((n, width + 1), np.int64), np.empty(n, np.int32))
    values, state = np.empty(n, np.float64), np.empty(n, np.int8)
    _cut_and_read(lines.data, lines.starts, lines.ends, table.cuts, table.counts, column, values, state)
    return table, *_narrow(lines.data, *table.spans(column), values, state)


def numbers(data: Bytes, starts: Spans, ends: Spans) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Fields as float32, and for each whether it is a number: 0 it is, 1 it is empty or NaN, 2 it is something else."""
    values = np.empty(starts.size, np.float64)
    state = np.empty(starts.size, np.int8)
    _decimals(data, starts, ends, values, state)
    return _narrow(data, starts, ends, values, state)


def _narrow(
    data: Bytes, starts: Spans, ends: Spans, values: npt.NDArray[np.float64], state: npt.NDArray[np.int8]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Reads with Python what the kernel left, and makes float32 of all."""
    for i in np.flatnonzero(state == 2).tolist():
        field = data[starts[i] : ends[i]].tobytes().strip(b" \r")
        if _NUMBER.fullmatch(field):
            values[i], state[i] = float(field), 0
        elif field.lower() in (b"", b"nan"):
            state[i] = 1
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    state[~np.isfinite(narrow)] = 2
    return narrow, state


def typed(data: Bytes, starts: Spans, ends: Spans, kind: pa.DataType) -> tuple[pa.Array[Any], npt.NDArray[np.bool_]]:
    """Fields of UTF-8 as numbers of a type, null where they are empty, and which of them are something else."""
    if pa.types.is_floating(kind):
        values, state = numbers(data, starts, ends)
        return pa.array(values, mask=state != 0).cast(kind), state == 2
    text: Any = pc.utf8_trim(gather(data, starts, ends), " \r")
    text = pc.if_else(pc.equal(text, pa.scalar("", text.type)), pa.scalar(None, text.type), text)
    odd = np.zeros(starts.size, np.bool_)
    try:
        return text.cast(kind), odd
    except pa.ArrowInvalid:
        for i, field in enumerate(text):
            try:
                field.cast(kind)
            except pa.ArrowInvalid:
                odd[i] = True
        return pc.if_else(pa.array(odd), pa.scalar(None, text.type), text).cast(kind), odd


def read_delimited(
    settings: SourceSettings,
    shard: Shard,
    layout: Callable[[Lines], tuple[Columns, list[str]]],
    extent: Extent,
    whole: bool = False,
) -> Iterator[RawBatch]:
    """Reads a tab-separated file.

    Args:
        layout: tells the columns from the head of the file, with warnings; it may raise InputError.
        extent: how much of it to read.
        whole: whether batches are whole tables.
    """
    keep = settings.on_error == "keep"
    problems = list(shard.lost)
    cutter = LineCutter(blocks(shard.files[0], salvage=keep), keep=keep, problems=problems)
    first = head(cutter)
    if not first.starts.size:
        problems = problems or [f"{printable(shard.files[0])}: it is empty."]
        yield whole_batch(shard, {}, settings, problems=problems) if whole else empty_batch(shard, problems)
        return
    columns, warnings = layout(first)
    problems += warnings
    if columns.header:
        cutter.drop(1)
    if extent.limit is not None:
        extent = extent._replace(limit=extent.limit + int(columns.header))
    any_rows = False
    for lines in batches_of(cutter, extent):
        batch = _batch(shard, lines, columns, settings, problems)
        problems.clear()
        any_rows = True
        yield batch
    if not any_rows:
        problems.append(f"{printable(shard.files[0])}: it has no rows.")
    if whole and problems:
        none = Lines(first.data, first.starts[:0], first.ends[:0], cutter.row, {})
        yield _batch(shard, none, columns, settings, problems)
    elif problems:
        yield empty_batch(shard, problems)


def _batch(shard: Shard, lines: Lines, columns: Columns, settings: SourceSettings, problems: list[str]) -> RawBatch:
    fields = [columns.first, columns.second, *(place for place in columns.languages or () if place is not None)]
    if columns.score is not None:
        fields.append(columns.score)
    width = columns.width if columns.names else max(fields) + 1
    score: npt.NDArray[np.float32] | None = None
    state: npt.NDArray[np.int8] | None = None
    if columns.score is None:
        table = cut(lines, width)
    else:
        table, score, state = cut_and_read(lines, width, columns.score)
    data = lines.data
    verdict = np.zeros(lines.starts.size, np.int8)
    verdict[table.counts != columns.width] = COLUMNS
    for i, reason in lines.spoilt.items():
        verdict[i] = reason
    check_text(data, lines.starts, lines.ends, verdict)
    if state is not None:
        verdict[(state == 2) & (verdict == 0)] = SCORE
    sound = np.flatnonzero(verdict == 0)
    typed_columns = {}
    for place, kind in columns.kinds:
        begins, finishes = table.spans(place)
        values, odd = typed(data, begins[sound], finishes[sound], kind)
        typed_columns[place] = (sound, values)
        verdict[sound[odd]] = SCORE
    languages: tuple[pa.Array[Any], pa.Array[Any]] | None = None
    swap: npt.NDArray[np.bool_] | None = None
    if columns.languages is not None and shard.pair is None:
        sound = np.flatnonzero(verdict == 0)
        codes: list[Any] = []
        for named, given in zip(columns.languages, (settings.src_lang, settings.tgt_lang), strict=True):
            if named is None:
                codes.append(pa.repeat(pa.scalar(given, pa.string()), sound.size))
                continue
            begins, finishes = table.spans(named)
            codes.append(gather(data, begins[sound], finishes[sound]))
        labels = row_languages(codes[0], codes[1], None if columns.names else settings.wanted())
        verdict[sound] = labels.verdict
        chosen = labels.verdict == 0
        mask = pa.array(chosen)
        languages = (labels.languages[0].filter(mask), labels.languages[1].filter(mask))
        swap = labels.swap[chosen]
    rows = np.arange(lines.first, lines.first + verdict.size)
    sides = [table.spans(columns.first), table.spans(columns.second)]
    rejects: list[tuple[int, str | None, str | None, int]] = []
    if verdict.any():
        for i in np.flatnonzero(verdict > 0).tolist():
            reason = int(verdict[i])
            if reason in (SCORE, LANGUAGE) or (reason > COLUMNS and table.counts[i] == columns.width):
                texts: list[str | None] = [decode(data, starts[i], ends[i]) for starts, ends in sides]
            else:
                texts = [decode(data, lines.starts[i], lines.ends[i]), None]
            rejects.append((lines.first + i, texts[0], texts[1], reason))
        good = verdict == 0
        rows = rows[good]
        sides = [(starts[good], ends[good]) for starts, ends in sides]
        if score is not None and state is not None:
            score, state = score[good], state[good]
    scores = None if score is None or state is None else pa.array(score, mask=state != 0)
    if columns.names:
        arrays: dict[str, Any] = {}
        for name, place in columns.names:
            if name == "score" and columns.score is not None:
                arrays[name] = scores
            elif name in ("src_lang", "tgt_lang"):
                assert languages is not None
                arrays[name] = languages[int(name == "tgt_lang")]
            elif place in typed_columns:
                of, values = typed_columns[place]
                arrays[name] = values.filter(pa.array(verdict[of] == 0))
            else:
                arrays[name] = _text(table, place, columns.width, verdict)
        return whole_batch(shard, arrays, settings, rejects=rejects, problems=problems)
    src, tgt = (gather(data, *side) for side in sides)
    return make_batch(
        shard, rows, src, tgt, score=scores, languages=languages, swap=swap, rejects=rejects, problems=problems
    )


def _text(table: Table, column: int, width: int, verdict: Verdicts) -> pa.Array[Any]:
    """A column of the good rows of a whole table; a carriage return before the line feed belongs to the line feed."""
    starts, ends = table.spans(column)
    if verdict.any():
        starts, ends = starts[verdict == 0], ends[verdict == 0]
    if column == width - 1 and starts.size:
        ends = ends - ((ends > starts) & (table.lines.data[np.maximum(ends - 1, 0)] == 13))
    return gather(table.lines.data, starts, ends)
