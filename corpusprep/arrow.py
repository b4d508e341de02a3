"""Arrow strings as plain NumPy arrays, and the hashes that order rows."""

from __future__ import annotations

import contextlib
import sys
from importlib.abc import MetaPathFinder
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.kernels import kernel

U64 = npt.NDArray[np.uint64]


def string_buffers(
    column: pa.Array[Any] | pa.ChunkedArray[Any],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The UTF-8 bytes of a string column, without a copy of the text if it is one chunk.

    Args:
        column: n strings of any Arrow string type; null counts as empty.

    Returns:
        offsets, int64 of shape (n + 1,), and data, uint8: row i is `data[offsets[i]:offsets[i + 1]]`.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.ChunkedArray):  # combine_chunks of an empty or very large column
        column = pa.concat_arrays(
            [chunk.cast(pa.large_string()) for chunk in column.chunks] or [pa.array([], pa.large_string())]
        )
    if not pa.types.is_large_string(column.type):
        column = column.cast(pa.large_string())
    if column.null_count:
        column = column.fill_null("")
    n = len(column)
    buffers: list[Any] = column.buffers()
    _, offsets_buffer, data_buffer = buffers
    if n == 0 or offsets_buffer is None:
        return np.zeros(n + 1, np.int64), np.zeros(0, np.uint8)
    offsets = np.frombuffer(offsets_buffer, np.int64, count=n + 1, offset=8 * column.offset)
    data = (
        np.frombuffer(data_buffer, np.uint8) if data_buffer is not None and data_buffer.size else np.zeros(0, np.uint8)
    )
    return offsets, data


class _NoPandas(MetaPathFinder):
    """An import hook that hides pandas."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def leave_pandas_out() -> None:
    """Keeps pyarrow from importing pandas, where it is installed, as soon as it meets a list: 0.1 s and 30 MB of each process. It is
    imported all the same where something asks for it, such as `to_pandas`. For commands and worker processes; the process of a user
    of the library is left alone."""
    if "pandas" not in sys.modules:
        finder = _NoPandas()
        sys.meta_path.insert(0, finder)
        try:
            pa.array([0])
        finally:
            sys.meta_path.remove(finder)


def let_pandas_in() -> None:
    """Undoes `leave_pandas_out`, where pandas is installed: a user's function is about to run, which may use it."""
    with contextlib.suppress(ImportError):  # not installed, or too old for pyarrow
        pa.lib._pandas_api.pd  # noqa: B018


@kernel
def mix64(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64: a bijection of 64-bit integers; each output bit depends on every input bit."""
    value = np.uint64(value)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@kernel(leaf=True)
def hash_bytes(data: npt.NDArray[np.uint8], start: int, end: int, seed: np.uint64) -> np.uint64:
    """64-bit hash of `data[start:end]`, the same on every machine: eight bytes per step, through `mix64`."""
    prime = np.uint64(0x9E3779B97F4A7C15)
    state = mix64(np.uint64(seed) ^ (np.uint64(end - start) * prime))
    i = start
    while i + 8 <= end:
        word = np.uint64(0)
        for k in range(8):
            word |= np.uint64(data[i + k]) << np.uint64(8 * k)
        state = mix64(state ^ word) + prime
        i += 8
    word = np.uint64(0)
    k = 0
    while i < end:
        word |= np.uint64(data[i]) << np.uint64(8 * k)
        i += 1
        k += 1
    return mix64(state ^ word)


@kernel
def _hash_all(offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8], seeds: U64, out: U64) -> None:
    for i in range(out.size):
        out[i] = hash_bytes(data, offsets[i], offsets[i + 1], seeds[i])


def hash_strings(column: pa.Array[Any] | pa.ChunkedArray[Any], seed: int | U64 = 0) -> U64:
    """64-bit hashes of n strings, shape (n,); `seed` is one integer, or n of them to chain columns."""
    offsets, data = string_buffers(column)
    out = np.empty(len(offsets) - 1, np.uint64)
    seeds = np.full(out.size, seed, np.uint64) if isinstance(seed, int) else np.ascontiguousarray(seed, np.uint64)
    _hash_all(offsets, data, seeds, out)
    return out


@kernel
def _mix_all(values: U64, keys: U64, out: U64) -> None:
    for i in range(out.size):
        out[i] = mix64(values[i] ^ mix64(keys[i] + np.uint64(0x9E3779B97F4A7C15)))


def order_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Numbers that sort as float32 values do: equal for equal values, the highest for NaN."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits >> np.uint32(31) == 0, bits | np.uint32(1 << 31), ~bits)
    return np.where(np.isnan(values), np.uint32(0xFFFFFFFF), ordered)


def value_of(order: int) -> float:
    """The value whose `order_of` this is."""
    bits = order & 0x7FFFFFFF if order >> 31 else order ^ 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def combine(hashes: U64, keys: npt.NDArray[np.integer] | int) -> U64:
    """Hashes of (hash, integer) pairs, shape (n,)."""
    out = np.empty(hashes.size, np.uint64)
    _mix_all(hashes, np.broadcast_to(np.asarray(keys).astype(np.uint64), hashes.shape), out)
    return out


def row_keys(table: pa.Table, seed: int) -> U64:
    """One seeded 64-bit hash per row, of its provenance (`source`, `shard`, `row`), shape (n,).

    It orders rows for samples, quotas and the shuffle, and depends only on the provenance and the seed.
    """
    hashes = hash_strings(table["shard"], hash_strings(table["source"], seed))
    return combine(hashes, table["row"].to_numpy())


def shaped(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table's columns in the order and types of a schema; missing columns are null."""
    arrays: list[Any] = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema
    ]
    return pa.Table.from_arrays(
        [a if isinstance(a, pa.ChunkedArray) else pa.chunked_array([a], a.type) for a in arrays], schema=schema
    )


def join(*columns: Any, separator: str) -> pa.ChunkedArray[Any]:
    """Columns of text joined row by row."""
    function: Any = pc.binary_join_element_wise
    joined: pa.ChunkedArray[Any] = function(*columns, separator)
    return joined


def count_values(column: pa.ChunkedArray[Any] | pa.Array[Any]) -> dict[str, int]:
    """How often each value occurs in a column."""
    counts: Any = pc.value_counts(column)
    return dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
