"""What the tests of sources share: reading all of a source into plain lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from corpusprep.sources import RAW_SCHEMA, REJECT_SCHEMA, Shard, Source, SourceSettings, open_source


class Reading(NamedTuple):
    rows: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    problems: list[str]
    batches: list[int]


def source(format: str, path: Path | str, **settings: Any) -> Source:
    return open_source(SourceSettings(format=format, path=str(path), **settings))  # type: ignore[arg-type]


def read(of: Source, shards: list[Shard] | None = None, **bounds: int) -> Reading:
    """All rows of the shards, with the promises that hold for every batch checked."""
    tables, rejected, problems, batches = [RAW_SCHEMA.empty_table()], [REJECT_SCHEMA.empty_table()], [], []
    for shard in of.shards() if shards is None else shards:
        last = -1
        for batch in of.read(shard, **bounds):
            assert batch.table.schema == RAW_SCHEMA
            assert batch.rejected.schema == REJECT_SCHEMA
            batch.table.validate(full=True)
            batch.rejected.validate(full=True)
            rows = sorted(batch.table["row"].to_pylist() + batch.rejected["row"].to_pylist())
            assert len(set(rows)) == len(rows)
            assert not rows or rows[0] > last
            last = rows[-1] if rows else last
            tables.append(batch.table)
            rejected.append(batch.rejected)
            problems.extend(batch.problems)
            batches.append(len(rows))
    return Reading(pa.concat_tables(tables).to_pylist(), pa.concat_tables(rejected).to_pylist(), problems, batches)


def texts(reading: Reading) -> list[tuple[str, str]]:
    return [(row["src"], row["tgt"]) for row in reading.rows]


def reasons(reading: Reading) -> list[tuple[int, str]]:
    return [(row["row"], row["reason"]) for row in reading.rejects]
