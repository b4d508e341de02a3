"""Stage `dedup`: keeps one of several duplicate rows, and drops rows that copy evaluation text.

Exact duplicates have the same normalised text: NFKC, case folded, without punctuation, symbols, white space and format
characters. Near duplicates have 64-bit SimHash fingerprints within a Hamming distance; the features of SimHash are
character n-grams of the normalised text. Deduplication is greedy: a row is dropped only if it duplicates a kept row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from corpusprep.arrow import U64, hash_strings
from corpusprep.errors import SettingsError
from corpusprep.stage import PROVENANCE, Outcome, StageSettings, split
from corpusprep.stages.dedup.rows import (
    EvaluationIndex,
    compare_with_reference,
    fingerprint,
    flaws,
    leaks,
    protect,
    reference,
    reference_fingerprint,
)

__all__ = [
    "DedupSettings",
    "EvaluationIndex",
    "compare_with_reference",
    "decide",
    "dedup",
    "fingerprint",
    "flaws",
    "protect",
    "reference",
    "reference_fingerprint",
]

REASONS = ["dedup.exact", "dedup.near"]


class DedupSettings(StageSettings):
    """Settings of the stage `dedup`."""

    exact: bool = True
    """Drop rows whose normalised text equals that of a kept row (`dedup.exact`)."""

    near: bool = True
    """Drop rows whose fingerprint is within `max_distance` of a kept row's fingerprint (`dedup.near`)."""

    max_distance: int = Field(default=3, ge=0, le=8)
    """Maximum Hamming distance of near duplicates, in bits of 64; 0 requires equal fingerprints."""

    ngram: int = Field(default=4, ge=1, le=16)
    """Characters of a SimHash feature. Longer features distinguish more rows."""

    on: Literal["pair", "source", "target"] = "pair"
    """Text that is compared: both sides together, or one side."""

    scope: Literal["pair", "all"] = "pair"
    """Rows that are compared: those of one language pair, or all."""

    keep: Literal["form", "first", "score"] = "form"
    """Which duplicate is kept: `form` keeps the best-formed row (see `flaws`), the earliest if several are equal;
    `first` keeps the earliest row; `score` keeps the row with the highest score (rows without a score come last)."""

    clusters: bool = False
    """Report which kept row each row duplicates. For a whole table this is a column `cluster` (int64): the index of
    that row in the input table, or the row's own index."""

    against: tuple[str, ...] = ()
    """Evaluation text to protect: files, folders or globs of text (one column, or two separated by a tab), JSON lines
    or Parquet. A row is dropped if one of its sides copies evaluation text (`dedup.evaluation`)."""

    evaluation_overlap: float = Field(default=0.5, gt=0, le=1)
    """A side copies an evaluation sentence if it repeats at least this share of the sentence's character 8-grams."""

    evaluation_min_chars: int = Field(default=25, ge=8)
    """Sides with fewer normalised characters, of rows and of evaluation text, are compared only as whole pairs."""


def dedup(
    table: pa.Table, settings: DedupSettings = DedupSettings(), seed: int = 1, index: EvaluationIndex | None = None
) -> Outcome:
    """Drops duplicates and copies of evaluation text from a whole table.

    Args:
        table: n rows of any language pairs.
        settings: the stage's settings.
        seed: not used, because nothing here is random.
        index: the evaluation text; if not given, it is read from `settings.against`.

    Returns:
        Kept and dropped rows, both with `fingerprint` (uint64). The reasons are `dedup.evaluation`, `dedup.exact` and
        `dedup.near`. Rows that copy evaluation text are not compared with other rows.

    Raises:
        InputError: a file of `settings.against` cannot be read.
        SettingsError: `keep = "score"`, and the column `score` is missing.

    Examples:
        >>> src = ["The bridge near the old village is closed today.", "THE BRIDGE NEAR THE OLD VILLAGE IS CLOSED TODAY!"]
        >>> tgt = ["Die Brücke bei dem alten Dorf ist heute gesperrt."] * 2
        >>> table = pa.table({"src": src, "tgt": tgt, "src_lang": ["en"] * 2, "tgt_lang": ["de"] * 2})
        >>> kept, dropped = dedup(table)
        >>> kept["src"].to_pylist(), dropped["reason"].to_pylist()
        (['The bridge near the old village is closed today.'], ['dedup.exact'])
    """
    if index is None and settings.against:
        index = EvaluationIndex.from_files(settings.against, settings)
    table = fingerprint(table, settings)
    n = table.num_rows
    verdict = np.zeros(n, np.uint8)
    cluster = np.arange(n, dtype=np.int64)
    if index is not None:
        verdict[leaks(table, index, settings)] = 3
    fingerprints, hashes = _uint64(table, "fingerprint"), _uint64(table, "text_hash")
    rank = _rank(table, settings)
    for rows in _partitions(table, settings, rank[verdict[rank] == 0]):
        found, keeper = decide(fingerprints[rows], hashes[rows], settings)
        verdict[rows] = found
        cluster[rows] = rows[keeper]
    table = table.drop_columns(["text_hash"])
    if settings.clusters:
        table = table.append_column("cluster", pa.array(cluster, mask=verdict == 3))
    return split(table, verdict, [*REASONS, "dedup.evaluation"])


def decide(
    fingerprint: U64, text_hash: U64, settings: DedupSettings, threads: int = 1
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Finds the duplicates in one partition.

    Args:
        fingerprint, text_hash: uint64 (n,), n < 2**31, best row first.
        settings: `exact`, `near` and `max_distance` are used.
        threads: number of threads; the result does not depend on it.

    Returns:
        verdict: uint8 (n,); 0 kept, 1 exact duplicate, 2 near duplicate.
        keeper: int64 (n,); the earliest kept row that the row duplicates; the row itself if it is kept.
    """
    from corpusprep.stages.dedup import greedy as _greedy

    return _greedy.decide(
        np.ascontiguousarray(fingerprint, np.uint64), np.ascontiguousarray(text_hash, np.uint64),
        settings.max_distance, settings.exact, settings.near, threads,
    )  # fmt: skip


def _uint64(table: pa.Table, name: str) -> U64:
    return np.ascontiguousarray(table[name].to_numpy(), np.uint64)


def _partitions(
    table: pa.Table, settings: DedupSettings, rows: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Splits rows, in order, into groups that are compared with each other: one per language pair, or all rows."""
    if settings.scope == "all" or rows.size == 0:
        yield rows
        return
    key = hash_strings(table["tgt_lang"], hash_strings(table["src_lang"]))[rows]
    order = np.argsort(key, kind="stable")
    yield from np.split(rows[order], np.flatnonzero(np.diff(key[order])) + 1)


def _rank(table: pa.Table, settings: DedupSettings) -> npt.NDArray[np.int64]:
    """Indices of all rows, preferred rows first."""
    keys: list[tuple[str, Literal["ascending", "descending"]]] = []
    columns: dict[str, Any] = {}
    if settings.keep == "score":
        if "score" not in table.column_names:
            raise SettingsError('dedup.keep = "score" needs the column "score", which is missing. Use "first".')
        scores = table["score"].cast(pa.float64()).to_numpy()
        columns["score"] = np.where(np.isnan(scores), -np.inf, scores)
        keys.append(("score", "descending"))
    elif settings.keep == "form":
        columns["flaws"] = flaws(table)
        keys.append(("flaws", "ascending"))
    for name in PROVENANCE:
        if name in table.column_names:
            columns[name] = table[name]
            keys.append((name, "ascending"))
    columns["place"] = np.arange(table.num_rows)
    keys.append(("place", "ascending"))
    return np.asarray(pc.sort_indices(pa.table(columns), keys)).astype(np.int64)
