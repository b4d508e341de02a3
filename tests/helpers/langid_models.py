"""Writes fastText model files: of any loss, dense or quantised, with weights at random or as asked."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = 793712314
HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL = 1, 2, 3, 4
Matrix = npt.NDArray[np.float32]


def _dense(matrix: Matrix) -> bytes:
    return b"\0" + struct.pack("<2q", *matrix.shape) + matrix.astype("<f4").tobytes()


def _quantiser(draw: np.random.Generator, columns: int, part: int, scale: float) -> bytes:
    parts = -(-columns // part)
    head = struct.pack("<4i", columns, parts, part, columns - (parts - 1) * part)
    return head + (draw.standard_normal(256 * columns) * scale).astype("<f4").tobytes()


def _quantised(draw: np.random.Generator, rows: int, columns: int, part: int, norms: bool) -> bytes:
    """A quantised matrix at random: codes, centroids, and norms if asked."""
    codes = draw.integers(0, 256, rows * -(-columns // part)).astype(np.uint8)
    out = b"\1" + struct.pack("<B2qi", norms, rows, columns, codes.size) + codes.tobytes()
    out += _quantiser(draw, columns, part, 1.0)
    if norms:
        out += draw.integers(0, 256, rows).astype(np.uint8).tobytes() + struct.pack("<4i", 1, 1, 1, 1)
        out += (draw.random(256) * 2).astype("<f4").tobytes()
    return out


def write_model(
    path: Path,
    words: Sequence[str],
    labels: Sequence[str],
    *,
    counts: Sequence[int] | None = None,
    inputs: Matrix | None = None,
    outputs: Matrix | None = None,
    dim: int = 10,
    loss: int = SOFTMAX,
    kind: int = 3,
    word_ngrams: int = 1,
    bucket: int = 0,
    minn: int = 0,
    maxn: int = 0,
    quantised: bool = False,
    part: int = 2,
    norms: bool = False,
    kept: int = -1,
    seed: int = 0,
) -> str:
    """Writes a model and returns its path.

    Args:
        counts: lines of each label in training, falling; by default 1,000, 990, …
        inputs, outputs: the matrices, of shapes (words + bucket, dim) and (labels, dim); by default random.
        quantised: with `part` columns a code and, if `norms`, norms apart; both matrices are.
        kept: how many of the buckets a pruned model has kept; -1 for one that is not pruned.
    """
    draw = np.random.default_rng(seed)
    counts = counts or [1000 - 10 * i for i in range(len(labels))]
    out = struct.pack("<2i", MAGIC, 12)
    out += struct.pack("<12id", dim, 5, 5, 1, 5, word_ngrams, loss, kind, bucket, minn, maxn, 100, 1e-4)
    out += struct.pack("<3i2q", len(words) + len(labels), len(words), len(labels), 10**6, kept)
    for number, word in enumerate(words):
        out += word.encode() + b"\0" + struct.pack("<qb", 10**5 - number, 0)
    for label, count in zip(labels, counts, strict=True):
        out += b"__label__" + label.encode() + b"\0" + struct.pack("<qb", count, 1)
    if kept > 0:
        for row, key in enumerate(draw.permutation(bucket)[:kept].tolist()):
            out += struct.pack("<2i", key, row)
    rows = len(words) + (bucket if kept < 0 else kept)
    if quantised:
        out += _quantised(draw, rows, dim, part, norms) + _quantised(draw, len(labels), dim, part, norms)
    else:
        inputs = draw.standard_normal((rows, dim)).astype(np.float32) if inputs is None else inputs
        outputs = draw.standard_normal((len(labels), dim)).astype(np.float32) if outputs is None else outputs
        out += _dense(inputs) + _dense(outputs)
    path.write_bytes(out)
    return str(path)


def write_table(path: Path, table: dict[str, dict[str, float]], counts: Sequence[int] | None = None) -> str:
    """Writes a model that gives a line of one word the probabilities in the table: {word: {label: probability}}.

    The end of the line is a word of the model's as well and weighs nothing, so logits are doubled before the mean.
    """
    labels = list(dict.fromkeys(label for row in table.values() for label in row))
    inputs = np.full((len(table) + 1, len(labels)), -60, np.float32)
    for i, row in enumerate(table.values()):
        for label, probability in row.items():
            inputs[i, labels.index(label)] = 2 * np.log(probability)
    inputs[-1] = 0
    eye = np.eye(len(labels), dtype=np.float32)
    return write_model(
        path,
        [*table, "</s>"],
        labels,
        counts=counts or [1000] * len(labels),
        inputs=inputs,
        outputs=eye,
        dim=len(labels),
    )
