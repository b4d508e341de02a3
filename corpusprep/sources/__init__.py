"""Sources: where raw bitext comes from, one module a format, all read the same way."""

from __future__ import annotations

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
    # Spelt out, so that the keys of parts can follow the imports.
    match settings.format:
        case "opus100":
            from corpusprep.sources.opus100 import Opus100Source

            return Opus100Source(settings)
        case "nllb":
            from corpusprep.sources.nllb import NllbSource

            return NllbSource(settings)
        case "moses":
            from corpusprep.sources.moses import MosesSource

            return MosesSource(settings)
        case "tsv":
            from corpusprep.sources.tsv import TsvSource

            return TsvSource(settings)
        case "jsonl":
            from corpusprep.sources.jsonl import JsonlSource

            return JsonlSource(settings)
        case "parquet":
            from corpusprep.sources.parquet import ParquetSource

            return ParquetSource(settings)
        case "hub":
            from corpusprep.sources.hub import HubSource

            return HubSource(settings)
