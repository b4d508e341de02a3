"""Stage `dedup`: keeps one of several duplicate rows, and drops rows that copy evaluation text.

Exact duplicates have the same normalised text: NFKC, case folded, without punctuation, symbols, white space and format
characters. Near duplicates have 64-bit SimHash fingerprints within a Hamming distance; the features of SimHash are
character n-grams of the normalised text. Deduplication is greedy: a row is dropped only if it duplicates a kept row.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from corpusprep.arrow import U64, hash_strings, string_buffers
from corpusprep.errors import SettingsError
from corpusprep.stage import PROVENANCE, Agreement, Outcome, StageSettings, split

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
        verdict[_leaks(table, index, settings)] = 3
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


def fingerprint(table: pa.Table, settings: DedupSettings) -> pa.Table:
    """Adds columns `fingerprint`, the SimHash, and `text_hash`, the exact hash of the normalised text (both uint64).

    The features of a pair are the n-grams of the source and of the target. Each is hashed with its side, so that the
    two do not mix. The fingerprint equals `simhash.Simhash(features, hashfunc=…)`; see `reference_fingerprint`.
    """
    from corpusprep.stages.dedup import text as _text

    fingerprints, hashes = np.empty(table.num_rows, np.uint64), np.empty(table.num_rows, np.uint64)
    sides = {"source": 1, "target": 2, "pair": 3}[settings.on]
    _text.fingerprints(
        *string_buffers(table["src"]), *string_buffers(table["tgt"]), sides, settings.ngram, _text.tables(),
        fingerprints, hashes,
    )  # fmt: skip
    for name, values in (("fingerprint", fingerprints), ("text_hash", hashes)):
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(values))
    return table


def flaws(table: pa.Table) -> npt.NDArray[np.uint8]:
    """Number of formal flaws of n rows, uint8 of shape (n,); 0 is best.

    A side has one flaw each if it does not end like a sentence, begins with a dash, is all in capitals, or has a space
    before a full stop or comma. Sides that end in different marks are one more flaw. Flaws mean little for a single
    row, but among duplicates they distinguish a damaged copy from its original.
    """
    from corpusprep.stages.dedup import form as _form

    return _form.flaws(table["src"], table["tgt"])


def reference_fingerprint(src: str, tgt: str, settings: DedupSettings) -> int:
    """The fingerprint of one row, computed with the `simhash` package and plain Python (slow: for checks)."""
    import simhash

    from corpusprep.stages.dedup import text as _text

    features: list[str] = []
    for marker, text in ((_text.SOURCE, src), (_text.TARGET, tgt)):
        if settings.on == ("target" if marker == _text.SOURCE else "source"):
            continue
        text = _text.normalise(text)
        last = max(1, len(text) - settings.ngram + 1)
        features += [chr(marker) + text[i : i + settings.ngram] for i in range(last) if text]
    if not features:
        return 0

    def hash_feature(data: bytes) -> int:
        feature = data.decode()
        return _text.feature_hash(ord(feature[0]), feature[1:]) if feature[0] in "\1\2" else 0

    return int(simhash.Simhash(features, f=64, hashfunc=hash_feature).value)


def compare_with_reference(table: pa.Table, settings: DedupSettings) -> Agreement:
    """Compares fingerprints with those of the `simhash` package (slow: for samples).

    Args:
        table: n rows with `src`, `tgt` and `fingerprint`.
        settings: the settings that made the fingerprints.

    Returns:
        n comparisons; the difference is in bits.
    """
    wrong = []
    columns = (table["src"].to_pylist(), table["tgt"].to_pylist(), table["fingerprint"].to_pylist())
    for row, (src, tgt, found) in enumerate(zip(*columns, strict=True)):
        right = reference_fingerprint(src or "", tgt or "", settings)
        if found != right:
            wrong.append((row, f"{found:016x}", f"{right:016x}"))
    apart = max((bin(int(a, 16) ^ int(b, 16)).count("1") for _, a, b in wrong), default=0)
    return Agreement(reference(), table.num_rows, apart, wrong)


def reference() -> str:
    """The package that `compare_with_reference` compares with, and its version."""
    return f"simhash {importlib.metadata.version('simhash')}"


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


class EvaluationIndex:
    """Index of the evaluation text. It depends only on the text, not on its order, and can be pickled.

    Attributes:
        digest: hash of the content, for the keys of results that depend on the index.
        texts: number of distinct sentences and short pairs.
    """

    def __init__(self, arrays: Any, min_chars: int) -> None:
        self._arrays, self._min_chars = arrays, min_chars
        self.digest: str = f"{arrays.digest()}-{min_chars}"
        self.texts: int = arrays.minimizers.size + arrays.short.size

    @classmethod
    def from_texts(cls, columns: Sequence[Any], settings: DedupSettings) -> EvaluationIndex:
        """Builds the index from string columns: each item is one column, or a tuple of two columns with pairs as rows.

        Sides with fewer than `settings.evaluation_min_chars` normalised characters are indexed only as pairs.
        """
        from corpusprep.stages.dedup import evaluation as _evaluation
        from corpusprep.stages.dedup import text as _text

        sides: list[pa.Array[Any]] = []
        first, second, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for item in columns:
            parts = item if isinstance(item, tuple) else (item,)
            if len({len(part) for part in parts}) > 1:
                raise SettingsError("The two columns of evaluation text differ in length.")
            for part in parts:
                chunks = part.chunks if isinstance(part, pa.ChunkedArray) else [part]
                sides += [chunk.cast(pa.large_string()) for chunk in chunks]
            size = len(parts[0])
            if len(parts) == 2:
                first.append(np.arange(count, count + size))
                second.append(np.arange(count + size, count + 2 * size))
            count += size * len(parts)
        text = pa.concat_arrays(sides) if sides else pa.array([], pa.large_string())
        arrays = _evaluation.build(
            *string_buffers(text), np.concatenate(first), np.concatenate(second), _text.tables(),
            settings.evaluation_min_chars,
        )  # fmt: skip
        return cls(arrays, settings.evaluation_min_chars)

    @classmethod
    def from_files(cls, paths: Sequence[str], settings: DedupSettings) -> EvaluationIndex:
        """Builds the index from files, folders and globs.

        Raises:
            InputError: a file is missing or damaged.
        """
        from corpusprep.sources.texts import read_texts

        return cls.from_texts(read_texts(paths), settings)

    def shares(self, table: pa.Table, settings: DedupSettings) -> npt.NDArray[np.float32]:
        """For each row, the largest share of an evaluation text's n-grams that one of its sides repeats, shape (n,).

        Shares well below `settings.evaluation_overlap` may be returned as 0.
        """
        from corpusprep.stages.dedup import evaluation as _evaluation
        from corpusprep.stages.dedup import text as _text

        out = np.zeros(table.num_rows, np.float32)
        _evaluation.shares(
            *string_buffers(table["src"]), *string_buffers(table["tgt"]), _text.tables(), self._arrays,
            self._min_chars, settings.evaluation_overlap, out,
        )  # fmt: skip
        return out


def protect(table: pa.Table, index: EvaluationIndex, settings: DedupSettings) -> Outcome:
    """Drops rows if a side, or the whole pair if a side is short, copies evaluation text: `dedup.evaluation`."""
    return split(table, _leaks(table, index, settings).astype(np.uint8), ["dedup.evaluation"])


def _leaks(table: pa.Table, index: EvaluationIndex, settings: DedupSettings) -> npt.NDArray[np.bool_]:
    return index.shares(table, settings) >= np.float32(settings.evaluation_overlap)


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
