"""Converts string columns between Arrow and Polars, and splits them: an Arrow `string` chunk has at most 2 GiB."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.arrow import string_buffers

if TYPE_CHECKING:
    Strings: TypeAlias = pa.Array[Any] | pa.ChunkedArray[Any]

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
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], pa.large_string())
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


def join(before: pa.Array[Any], middle: pa.Array[Any], after: pa.Array[Any]) -> pa.Array[Any]:
    """The three `large_string` arrays joined row by row."""
    joined: pa.Array[Any] = pc.call_function(
        "binary_join_element_wise", [before, middle, after, pa.scalar("", pa.large_string())]
    )
    return joined


def slices(sizes: npt.NDArray[np.integer[Any]], limit: int = PIECE_BYTES) -> list[tuple[int, int]]:
    """Splits n items into runs of at most `limit` bytes, or of one item; at least one run, which may be empty."""
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = [0]
    while cuts[-1] < ends.size:
        done = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, done + limit, side="right"))))
    return list(itertools.pairwise(cuts)) or [(0, 0)]


def pieces(table: pa.Table) -> list[pa.Table]:
    """Splits a large table into pieces of one chunk each; at least one piece, which may be empty."""
    if table.nbytes <= PIECE_BYTES:
        return [table.combine_chunks()]
    rows = max(1, table.num_rows * PIECE_BYTES // table.nbytes)
    return [table.slice(start, rows).combine_chunks() for start in range(0, table.num_rows, rows)]
