"""Reads supervised fastText models, `.bin` and `.ftz`, into NumPy arrays.

The layout is that of fastText files, versions 11 and 12: header, dictionary, input matrix, output matrix. Each matrix
is either dense or product-quantised (Joulin et al. 2016, "FastText.zip", arXiv:1612.03651). Each length in the file is
checked against the file before it is used, so that a damaged file only gives an error message.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.errors import InputError
from corpusprep.stages.langid.features import (
    HIERARCHICAL,
    ONE_VS_ALL,
    SOFTMAX,
    Arrays,
    index_rows,
    index_words,
    scan_entries,
)

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

LABEL_PREFIX = b"__label__"
_MAGIC, _VERSIONS = 793712314, (11, 12)
_HIERARCHICAL, _NEGATIVE, _SOFTMAX, _ONE_VS_ALL = 1, 2, 3, 4
_SUPERVISED = 3
# A quantised matrix of up to this many bytes is expanded when it is read, so that the kernel adds whole rows.
_EXPAND_BELOW = 256 << 20
# A larger dense matrix stays memory-mapped, so that processes share it.
_COPY_BELOW = 64 << 20


class Model(NamedTuple):
    """A supervised model.

    Attributes:
        path: path of the file.
        labels: the labels without `__label__`, in the model's order.
        counts: number of training examples of each label, int64.
        arrays: the model as arrays for the kernel.
    """

    path: str
    labels: list[str]
    counts: npt.NDArray[np.int64]
    arrays: Arrays


class _Reader:
    """The bytes of a file, and a position that never passes their end."""

    def __init__(self, path: str, raw: U8) -> None:
        self.path, self.raw, self.position = path, raw, 0

    def bad(self, problem: str) -> InputError:
        return InputError(self.path, problem, "Give the path of a supervised fastText model (.bin or .ftz)")

    def take(self, count: int, what: str) -> U8:
        if count < 0 or count > self.raw.size - self.position:
            raise self.bad(f"the model ends within its {what}: it is truncated or damaged")
        self.position += count
        return self.raw[self.position - count : self.position]

    def values(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), what).tobytes())

    def floats(self, count: int, what: str) -> F32:
        return self.take(4 * count, what).view("<f4")


class _Matrix(NamedTuple):
    """A matrix of shape (rows, columns): `dense`, or `codes`, `norms` and `centroids` of a product quantiser."""

    rows: int
    columns: int
    dense: F32
    codes: U8
    norms: F32
    centroids: F32


def read_model(path: str) -> Model:
    """Reads the model at `path`. A large dense matrix stays memory-mapped, so that processes share it.

    Raises:
        InputError: the file is missing, not a supervised fastText model, or damaged.
    """
    reader = _Reader(path, _map(path))
    magic, version = reader.values("2i", "header") if reader.raw.size >= 8 else (0, 0)
    if magic != _MAGIC:
        raise reader.bad("not a fastText model")
    if version not in _VERSIONS:
        raise reader.bad(f"fastText model version {version} is not supported (supported: 11 and 12)")
    dim, _, _, _, _, word_ngrams, loss, kind, bucket, minn, maxn, _, _ = reader.values("12id", "header")
    if kind != _SUPERVISED:
        raise reader.bad("a model of word vectors, which has no labels")
    if loss not in (_HIERARCHICAL, _NEGATIVE, _SOFTMAX, _ONE_VS_ALL):
        raise reader.bad(f"a fastText model with the unknown loss {loss}")
    if version == 11:  # supervised models of that version were trained without character n-grams
        maxn = 0
    hashed = maxn > 0 or word_ngrams > 1
    if not (0 < dim < 1 << 16 and maxn < 1 << 10 and bucket >= (1 if hashed else 0)):
        raise reader.bad("the header has invalid values")

    size, words, labels, _, pruned = reader.values("3i2q", "dictionary")
    fits = 10 * size <= reader.raw.size  # an entry takes at least ten bytes
    if not (fits and 0 < labels <= size and words >= 0 and words + labels == size and -1 <= pruned <= max(bucket, 0)):
        raise reader.bad("the dictionary has invalid sizes: it is truncated or damaged")
    starts, ends, counts = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    kinds = np.empty(size, np.uint8)
    begin = reader.position
    end = scan_entries(reader.raw, begin, starts, ends, counts, kinds)
    if end < 0:
        raise reader.bad("the model ends within its dictionary: it is truncated or damaged")
    if kinds[:words].any() or (kinds[words:] != 1).any() or (counts < 0).any():
        raise reader.bad("the dictionary is damaged")
    reader.position = int(end)
    pairs = reader.take(8 * max(pruned, 0), "dictionary").view("<i4").astype(np.int32).reshape(-1, 2)

    inputs = _read_matrix(reader, "input matrix")
    if pruned >= 0 and inputs.dense.size:
        raise reader.bad("the model is pruned but not quantised, which fastText does not allow")
    outputs = _read_matrix(reader, "output matrix")
    ngrams = 0 if not hashed else bucket if pruned < 0 else pruned
    if inputs.columns != dim or outputs.columns != dim or inputs.rows < words + ngrams or outputs.rows != labels:
        raise reader.bad("the matrices do not fit the dictionary")
    if pairs.size and not (pairs.min() >= 0 and pairs[:, 0].max() < bucket and pairs[:, 1].max() < inputs.rows - words):
        raise reader.bad("the dictionary is damaged")
    weights = _expand(outputs)
    if not np.isfinite(weights).all():
        raise reader.bad("the output matrix has values that are not finite")

    keys = pairs[:0, 0]
    if pruned > 0:  # the rows of kept buckets in the buckets' order; of a bucket that is there twice the last counts
        keys, last = np.unique(pairs[::-1, 0], return_index=True)
        order = np.concatenate([np.arange(words), words + pairs[::-1, 1][last]])
        inputs = inputs._replace(codes=inputs.codes[order], norms=inputs.norms[order], rows=len(order))
    if inputs.codes.size and 4 * inputs.rows * inputs.columns <= _EXPAND_BELOW:
        inputs = inputs._replace(dense=_expand(inputs), codes=inputs.codes[:0], norms=inputs.norms[:0])
    text = np.array(reader.raw[begin:end])
    starts -= begin
    ends -= begin
    names = [bytes(text[a:b]) for a, b in zip(starts[words:], ends[words:], strict=True)]
    tree = _huffman(counts[words:]) if loss == _HIERARCHICAL else (np.zeros(0, np.int32), np.zeros(0, np.int32))
    if tree is None:
        raise reader.bad("the dictionary's label counts are damaged")
    left, right = tree
    bits = max(4, math.ceil(math.log2(2 * size + 1)))
    slots = index_words(text, starts, ends, np.full((1 << bits, 2), -1, np.int32))
    seen = np.zeros((bucket >> 6) + 1 if pruned >= 0 else 1, np.uint64)
    ranks = np.zeros(seen.size, np.int32)
    index_rows(keys, seen, ranks)
    arrays = Arrays(
        loss={_HIERARCHICAL: HIERARCHICAL, _SOFTMAX: SOFTMAX}.get(loss, ONE_VS_ALL),
        minn=minn,
        maxn=max(maxn, 0),
        word_ngrams=word_ngrams if pruned else 0,
        bucket=bucket,
        words=words,
        pruned=pruned >= 0,
        text=text,
        starts=starts,
        ends=ends,
        slots=slots,
        seen=seen,
        ranks=ranks,
        dense=inputs.dense,
        codes=inputs.codes,
        norms=inputs.norms,
        centroids=inputs.centroids,
        weights=np.ascontiguousarray(weights.T if loss != _HIERARCHICAL else weights[: labels - 1].T),
        left=left,
        right=right,
    )
    shown = [name.removeprefix(LABEL_PREFIX).decode("utf-8", "replace") for name in names]
    return Model(path, shown, counts[words:], arrays)


def _map(path: str) -> U8:
    try:
        with Path(path).open("rb") as file:
            if Path(path).stat().st_size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            path,
            f"the language model cannot be read ({reason})",
            "Give the path of a supervised fastText model (.bin or .ftz)",
        ) from None


def _read_matrix(reader: _Reader, what: str) -> _Matrix:
    none = np.zeros(0, np.uint8)
    (quantised,) = reader.values("B", what)
    if quantised not in (0, 1):
        raise reader.bad(f"the {what} is damaged")
    if not quantised:
        rows, columns = reader.values("2q", what)
        if rows < 0 or columns <= 0:
            raise reader.bad(f"the {what} is damaged")
        dense = reader.floats(rows * columns, what).reshape(rows, columns)
        if dense.nbytes < _COPY_BELOW:  # also aligns it; an unaligned array would need another compiled kernel
            dense = dense.copy()
        return _Matrix(
            rows, columns, dense, none.reshape(0, 0), np.zeros(0, np.float32), np.zeros((0, 0, 0), np.float32)
        )
    with_norms, rows, columns, size = reader.values("B2qi", what)
    codes = reader.take(size, what)
    width, parts, part, last = reader.values("4i", what)
    if not (
        rows > 0 and 0 < part <= columns and width == columns and parts == -(-columns // part)
        and last == columns - (parts - 1) * part and size == rows * parts
    ):  # fmt: skip
        raise reader.bad(f"the {what} is damaged")
    flat = reader.floats(256 * columns, what)
    # One block of 256 centroids per part; the last part can be narrower and is padded with zeros.
    centroids = np.zeros((parts, 256, part), np.float32)
    centroids[:-1] = flat[: (parts - 1) * 256 * part].reshape(parts - 1, 256, part)
    centroids[-1, :, :last] = flat[(parts - 1) * 256 * part :].reshape(256, last)
    norms = np.ones(rows, np.float32)
    if with_norms:
        which = reader.take(rows, what)
        if reader.values("4i", what) != (1, 1, 1, 1):
            raise reader.bad(f"the {what} is damaged")
        norms = reader.floats(256, what)[which]
    if not (np.isfinite(centroids).all() and np.isfinite(norms).all()):
        raise reader.bad(f"the {what} has values that are not finite")
    return _Matrix(rows, columns, np.zeros((0, 0), np.float32), codes.reshape(rows, parts), norms, centroids)


def _expand(matrix: _Matrix) -> F32:
    if not matrix.codes.size:
        return matrix.dense
    parts = matrix.codes.shape[1]
    wide = matrix.centroids[np.arange(parts), matrix.codes].reshape(matrix.rows, -1)[:, : matrix.columns]
    return np.ascontiguousarray(wide * matrix.norms[:, None])


def _huffman(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
    """The children of the n - 1 inner nodes of the label tree, built as in training; inner node i has number n + i.
    None if the counts do not give a tree."""
    n = counts.size
    weight = np.full(2 * n - 1, 10**15, np.int64)
    weight[:n] = counts
    left, right = np.zeros(n - 1, np.int32), np.zeros(n - 1, np.int32)
    leaf, node = n - 1, n
    for i in range(n - 1):
        chosen = []
        for _ in range(2):
            if leaf >= 0 and weight[leaf] < weight[node]:
                chosen.append(leaf)
                leaf -= 1
            else:
                chosen.append(node)
                node += 1
        if max(chosen) >= n + i:
            return None
        left[i], right[i] = chosen
        weight[n + i] = weight[chosen[0]] + weight[chosen[1]]
    return left, right
