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
)
from corpusprep.sources.settings import SourceSettings

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


def open_source(settings: SourceSettings, *, whole: bool = False) -> Source:
    """The source of a `[[source]]` table; nothing is read before its shards are asked for.

    Args:
        settings: the table.
        whole: read whole tables, for one stage on one file. A batch of tsv, jsonl or parquet then has all columns of the file,
            in its order and with its types: src, tgt, src_lang, tgt_lang and score under these names, the others under their
            own. It has no columns of the reader (source, shard, row) unless the file has them. Languages that only the
            settings or the path name come last. Sides are not swapped: src is the first side of the file; line pairs have no
            first side, and src is the language that the settings name as src_lang, else the source side of a run. The path
            may be `-`, standard input. Rejects are those of a run, plus rows in which another column
            cannot be read.
    """
    # A name that is computed: the keys of parts follow the class that is returned, as they cannot follow this.
    module = importlib.import_module(f"corpusprep.sources.{settings.format}")
    source: Source = getattr(module, f"{settings.format.capitalize()}Source")(settings, whole)
    return source
