"""What deduplication computes of each row by itself: fingerprint, flaws of form, and copies of evaluation text.

This is apart from the search for duplicates, so that a change of the search does not make the parts of a run stale.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import string_buffers
from corpusprep.errors import SettingsError
from corpusprep.stage import Agreement, Outcome, split

if TYPE_CHECKING:
    from corpusprep.stages.dedup import DedupSettings


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


class _Hashes(dict[bytes, bytes]):
    """Hashes of features as the `simhash` package asks for them; each is computed once."""

    def __missing__(self, data: bytes) -> bytes:
        from corpusprep.stages.dedup import text as _text

        feature = data.decode()
        value = _text.feature_hash(ord(feature[0]), feature[1:]) if feature[0] in "\1\2" else 0
        return self.setdefault(data, value.to_bytes(8, "big"))


def reference_fingerprint(src: str, tgt: str, settings: DedupSettings, hashes: dict[bytes, bytes] | None = None) -> int:
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
    hashes = _Hashes() if hashes is None else hashes
    return int(simhash.Simhash(features, f=64, hashfunc=hashes.__getitem__).value)


def compare_with_reference(table: pa.Table, settings: DedupSettings) -> Agreement:
    """Compares fingerprints with those of the `simhash` package (slow: for samples).

    Args:
        table: n rows with `src`, `tgt` and `fingerprint`.
        settings: the settings that made the fingerprints.

    Returns:
        n comparisons; the difference is in bits.
    """
    wrong, hashes = [], _Hashes()
    columns = (table["src"].to_pylist(), table["tgt"].to_pylist(), table["fingerprint"].to_pylist())
    for row, (src, tgt, found) in enumerate(zip(*columns, strict=True)):
        right = reference_fingerprint(src or "", tgt or "", settings, hashes)
        if found != right:
            wrong.append((row, f"{found:016x}", f"{right:016x}"))
    apart = max((bin(int(a, 16) ^ int(b, 16)).count("1") for _, a, b in wrong), default=0)
    return Agreement(reference(), table.num_rows, apart, wrong)


def reference() -> str:
    """The package that `compare_with_reference` compares with, and its version."""
    return f"simhash {importlib.metadata.version('simhash')}"


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
    return split(table, leaks(table, index, settings).astype(np.uint8), ["dedup.evaluation"])


def leaks(table: pa.Table, index: EvaluationIndex, settings: DedupSettings) -> npt.NDArray[np.bool_]:
    """Which rows copy evaluation text, shape (n,)."""
    return index.shares(table, settings) >= np.float32(settings.evaluation_overlap)
