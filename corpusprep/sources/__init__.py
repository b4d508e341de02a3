"""Sources: where raw bitext comes from, one module a format, all read the same way."""

from __future__ import annotations

import importlib

from corpusprep.sources.base import (
    MAX_BYTES,
    MAX_ROWS,
    RAW_SCHEMA,
    REASONS,
    REJECT_SCHEMA,
    RawBatch,
    Shard,
    Source,
    SourceSettings,
)

__all__ = [
    "MAX_BYTES",
    "MAX_ROWS",
    "RAW_SCHEMA",
    "REASONS",
    "REJECT_SCHEMA",
    "RawBatch",
    "Shard",
    "Source",
    "SourceSettings",
    "open_source",
]


def open_source(settings: SourceSettings) -> Source:
    """The source of a `[[source]]` table; nothing is read before its shards are asked for."""
    module = importlib.import_module(f"corpusprep.sources.{settings.format}")
    source: Source = getattr(module, f"{settings.format.capitalize()}Source")(settings)
    return source
