"""Converts string columns between Arrow and Polars, and splits them: an Arrow `string` chunk has at most 2 GiB."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from corpusprep.arrow import string_buffers
from corpusprep.kernels import kernel
from corpusprep.stages.bits import copy_bytes

if TYPE_CHECKING:
    Strings: TypeAlias = pa.Array[Any] | pa.ChunkedArray[Any]
    Bytes: TypeAlias = npt.NDArray[np.uint8]
    Ints: TypeAlias = npt.NDArray[np.int64]

PIECE_BYTES = 1 << 28
"""Bytes of text that are rendered or formatted at once."""


def plain(table: pa.Table) -> pa.Table:
    """Converts `string_view` columns to `large_string`, because Arrow cannot take rows of `string_view`."""
    for at, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            table = table.set_column(at, field.name, table.column(at).cast(pa.large_string()))
    return table


def series(column: Strings) -> pl.Series:
    """A Polars series from any Arrow string column; null becomes empty text."""
    return pl.Series(pl.from_arrow(column)).cast(pl.String).fill_null("")


def arrow(column: pl.Series) -> Strings:
    """An Arrow `string` column from a Polars series."""
    return narrow(large(column.to_arrow()))


def large(column: Strings) -> pa.Array[Any]:
    """One `large_string` array from any Arrow string column; null becomes empty text."""
    whole = column.cast(pa.large_string())
    if isinstance(whole, pa.ChunkedArray):
        chunks = whole.chunks or [pa.array([], pa.large_string())]
        whole = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    return whole.fill_null("") if whole.null_count else whole


def narrow(column: pa.Array[Any]) -> Strings:
    """The column as `string`, in as many chunks as its bytes need."""
    cuts = slices(byte_lengths(column))
    return pa.chunked_array([column.slice(start, stop - start).cast(pa.string()) for start, stop in cuts], pa.string())


def integers(column: pa.ChunkedArray[Any]) -> npt.NDArray[np.int64]:
    """An integer column as int64; null becomes 0."""
    return pl.Series(pl.from_arrow(column)).cast(pl.Int64).fill_null(0).to_numpy()


def byte_lengths(column: pa.Array[Any]) -> npt.NDArray[np.int64]:
    """Bytes of each of n strings of a `large_string` array, shape (n,)."""
    offsets, _ = string_buffers(column)
    lengths: npt.NDArray[np.int64] = np.diff(offsets)
    return lengths


def weave(parts: Sequence[tuple[pa.Array[Any], Ints]], each: int) -> pa.Array[Any]:
    """Texts put together row by row, in one pass over their bytes.

    Args:
        parts: `large_string` arrays, and n indices into each.
        each: a string is made of so many parts; it divides their number.

    Returns:
        A `large_string` array of n * parts / each strings: those of the first row, then those of the second.
    """
    count, n = len(parts), parts[0][1].size
    buffers = [(*string_buffers(array), rows) for array, rows in parts]
    ends = np.zeros(n * count + 1, np.int64)
    for k, (offsets, _, rows) in enumerate(buffers):
        ends[1 + k :: count] = (offsets[1:] - offsets[:-1])[rows]
    np.cumsum(ends, out=ends)
    data = np.empty(ends[-1], np.uint8)
    for k, (offsets, source, rows) in enumerate(buffers):
        _place(offsets, source, rows, ends[k::count], data)
    return strings(pa.large_string(), np.ascontiguousarray(ends[::each]), data)


def strings(kind: pa.DataType, offsets: Any, data: Any) -> pa.Array[Any]:
    """Strings whose offsets and bytes are in arrays, without a copy."""
    return pa.Array.from_buffers(kind, offsets.size - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


@kernel
def _place(offsets: Ints, source: Bytes, rows: Ints, at: Ints, data: Bytes) -> None:
    """Copies each row's text to its place."""
    for k in range(rows.size):
        start = offsets[rows[k]]
        copy_bytes(data, at[k], source, start, offsets[rows[k] + 1] - start)


def repeated(values: Sequence[str], n: int) -> pa.Array[Any]:
    """The values, n times over, as `string`."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)])
    starts = (np.arange(n)[:, None] * ends[-1] + ends[:-1]).ravel()
    offsets = np.append(starts, n * ends[-1]).astype(np.int32)
    data = np.tile(np.frombuffer(b"".join(encoded), np.uint8), n)
    return strings(pa.string(), offsets, data)


def slices(sizes: npt.NDArray[np.integer[Any]], limit: int = PIECE_BYTES) -> list[tuple[int, int]]:
    """Splits n items into runs of at most `limit` bytes, or of one item; at least one run, which may be empty."""
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = [0]
    while cuts[-1] < ends.size:
        done = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, done + limit, side="right"))))
    return list(itertools.pairwise(cuts)) or [(0, 0)]
