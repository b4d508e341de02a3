"""Stage `dedup`: one row of those that say the same, and none that repeats evaluation text.

Exact duplicates have the same normalised text: NFKC, case folded, without punctuation, symbols, white space and format
characters. Near duplicates have 64-bit SimHash fingerprints, over character n-grams of the normalised text, within a
Hamming distance. Duplicates are decided greedily: a row is dropped only if it is the duplicate of a row that is kept.
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
    """Drop rows whose fingerprint lies within `max_distance` of that of a kept row (`dedup.near`)."""

    max_distance: int = Field(default=3, ge=0, le=8)
    """Hamming distance, in bits of 64, up to which rows are near duplicates; 0 asks for equal fingerprints."""

    ngram: int = Field(default=4, ge=1, le=16)
    """Characters of a SimHash feature. Longer ones tell more rows apart."""

    on: Literal["pair", "source", "target"] = "pair"
    """What is compared: both sides together, or one of them."""

    scope: Literal["pair", "all"] = "pair"
    """Where duplicates are sought: among the rows of one language pair, or among all."""

    keep: Literal["form", "first", "score"] = "form"
    """Which of several duplicates is kept: the best-formed (see `flaws`) and of those the earliest, the earliest, or the
    one of highest score (rows without one come last)."""

    clusters: bool = False
    """Say which kept row each row duplicates. On a whole table this is a column `cluster` (int64): the place, in the
    table given, of that row, or the row's own."""

    against: tuple[str, ...] = ()
    """Evaluation text to protect: files, folders or globs; text of one column, or two separated by a tab, JSON lines or
    Parquet. A row of which a side copies it is dropped (`dedup.evaluation`)."""

    evaluation_overlap: float = Field(default=0.5, gt=0, le=1)
    """A side copies an evaluation sentence when it repeats at least this share of the sentence's character 8-grams."""

    evaluation_min_chars: int = Field(default=25, ge=8)
    """Sides, of rows and of evaluation text, with fewer normalised characters count only as a whole pair."""


def dedup(
    table: pa.Table, settings: DedupSettings = DedupSettings(), seed: int = 1, index: EvaluationIndex | None = None
) -> Outcome:
    """Drops duplicates and copies of evaluation text from a whole table.

    Args:
        table: n rows of pairs, of any languages.
        settings: what counts as a duplicate.
        seed: not used: nothing here is random.
        index: the evaluation text; read from `settings.against` where it is not given.

    Returns:
        The rows kept and the rows dropped, both with `fingerprint` (uint64). The reasons are `dedup.evaluation`,
        `dedup.exact` and `dedup.near`. Rows that copy evaluation text do not take part in what follows.

    Raises:
        InputError: a file of `settings.against` cannot be read.
        SettingsError: `keep = "score"`, and the table has no column `score`.

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
    """The table with `fingerprint`, the SimHash, and `text_hash`, the exact hash of the normalised text (uint64 both).

    Features of a pair are the n-grams of the source and those of the target, each hashed with its side, so that the
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
    """Flaws of form of n rows, uint8 of shape (n,): none is best.

    One each for a side that does not end as a sentence, begins with a dash, is in capitals throughout, or has a space
    before a full stop or comma, and one for sides that end in different marks. They say little of a row by itself;
    among rows that say the same they tell a damaged copy from its original.
    """
    from corpusprep.stages.dedup import form as _form

    return _form.flaws(table["src"], table["tgt"])


def reference_fingerprint(src: str, tgt: str, settings: DedupSettings) -> int:
    """The fingerprint of one row, made with the `simhash` package and plain Python (slow: for checks)."""
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
    """Compares fingerprints with those that the `simhash` package makes (slow: for samples).

    Args:
        table: n rows with `src`, `tgt` and `fingerprint`.
        settings: those that the fingerprints were made with.

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
    """Which rows of one partition are duplicates.

    Args:
        fingerprint, text_hash: uint64 (n,), n < 2**31, the best row first.
        settings: `exact`, `near` and `max_distance` count here.
        threads: how many to use; the result does not depend on it.

    Returns:
        verdict: uint8 (n,); 0 kept, 1 exact duplicate, 2 near duplicate.
        keeper: int64 (n,); the earliest kept row that the row duplicates, itself where it is kept.
    """
    from corpusprep.stages.dedup import greedy as _greedy

    return _greedy.decide(
        np.ascontiguousarray(fingerprint, np.uint64), np.ascontiguousarray(text_hash, np.uint64),
        settings.max_distance, settings.exact, settings.near, threads,
    )  # fmt: skip


class EvaluationIndex:
    """Evaluation text that rows are compared with. It depends on the text alone, in whatever order, and can be pickled.

    Attributes:
        digest: hash of the content, for the key of what was made with it.
        texts: how many different sentences and short pairs it holds.
    """

    def __init__(self, arrays: Any, min_chars: int) -> None:
        self._arrays, self._min_chars = arrays, min_chars
        self.digest: str = f"{arrays.digest()}-{min_chars}"
        self.texts: int = arrays.minimizers.size + arrays.short.size

    @classmethod
    def from_texts(cls, columns: Sequence[Any], settings: DedupSettings) -> EvaluationIndex:
        """The index of string columns: each item is one column, or a tuple of two that hold pairs row by row.

        Sides with fewer than `settings.evaluation_min_chars` normalised characters enter as pairs only.
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
        """The index of files, folders and globs.

        Raises:
            InputError: a file is missing or damaged.
        """
        from corpusprep.sources.texts import read_texts

        return cls.from_texts(read_texts(paths), settings)

    def shares(self, table: pa.Table, settings: DedupSettings) -> npt.NDArray[np.float32]:
        """The largest share of an evaluation text's n-grams that a side of each row repeats, shape (n,).

        Shares well below `settings.evaluation_overlap` may be given as 0.
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
    """Drops rows of which a side, or the pair where a side is short, copies evaluation text: `dedup.evaluation`."""
    return split(table, _leaks(table, index, settings).astype(np.uint8), ["dedup.evaluation"])


def _leaks(table: pa.Table, index: EvaluationIndex, settings: DedupSettings) -> npt.NDArray[np.bool_]:
    return index.shares(table, settings) >= np.float32(settings.evaluation_overlap)


def _uint64(table: pa.Table, name: str) -> U64:
    return np.ascontiguousarray(table[name].to_numpy(), np.uint64)


def _partitions(
    table: pa.Table, settings: DedupSettings, rows: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Parts rows, in order, into those that are compared with each other: of one language pair, or all."""
    if settings.scope == "all" or rows.size == 0:
        yield rows
        return
    key = hash_strings(table["tgt_lang"], hash_strings(table["src_lang"]))[rows]
    order = np.argsort(key, kind="stable")
    yield from np.split(rows[order], np.flatnonzero(np.diff(key[order])) + 1)


def _rank(table: pa.Table, settings: DedupSettings) -> npt.NDArray[np.int64]:
    """All rows, the preferred ones first."""
    keys: list[tuple[str, Literal["ascending", "descending"]]] = []
    columns: dict[str, Any] = {}
    if settings.keep == "score":
        if "score" not in table.column_names:
            raise SettingsError('dedup.keep = "score" needs a column "score", which this table lacks. Use "first".')
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
