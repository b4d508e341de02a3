"""Whole tables: batches with all columns of their file, as `open_source` describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.sources.base import RawBatch, Shard, rejected_rows
from corpusprep.sources.settings import SourceSettings
from corpusprep.stage import PAIR_COLUMNS


def whole_batch(
    shard: Shard,
    columns: Mapping[str, Any],
    settings: SourceSettings,
    *,
    rejects: Sequence[tuple[int, str | None, str | None, int]] = (),
    problems: Sequence[str] = (),
) -> RawBatch:
    """Builds a batch of a whole table.

    Args:
        shard: names the rejects, and the languages where the table does not.
        columns: n values each of the good rows, by name, in the order of the file. Missing languages are added.
        settings: name the languages where neither table nor shard does.
        rejects: as of `make_batch`.
        problems: what goes with the batch.
    """
    n = len(next(iter(columns.values()))) if columns else 0
    languages = shard.pair or (settings.src_lang, settings.tgt_lang)
    missing: dict[str, Any] = dict(zip(PAIR_COLUMNS, (None, None, *languages), strict=True))
    added = {
        name: pa.repeat(pa.scalar(value, pa.string()), n) for name, value in missing.items() if name not in columns
    }
    return RawBatch(pa.table({**columns, **added}), rejected_rows(shard, rejects), list(problems))


def finite(column: pa.ChunkedArray[Any] | pa.Array[Any]) -> Any:
    """A column of numbers with null for NaN and infinity."""
    if not pa.types.is_floating(column.type):
        return column
    wide = column.cast(pa.float32()) if pa.types.is_float16(column.type) else column
    return pc.if_else(pc.is_finite(wide), wide, pa.scalar(None, wide.type))


def shadowed(names: Sequence[str], taken: Mapping[str, str], file: str) -> list[str]:
    """Warnings about columns of a whole table that are left out, because another column takes their name.

    Args:
        names: all columns of the file.
        taken: field -> the column that holds it.
        file: how messages name the file.
    """
    return [
        f"{file}: its column {field!r} is left out, as {field} is read from {column!r}."
        for field, column in taken.items()
        if column != field and field in names
    ]
