"""Tokenises texts for COMET models, in bulk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.errors import RunError
from corpusprep.kernels import kernel
from corpusprep.stages.quality.comet.files import line

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_MAX_CHARACTERS = 1 << 16  # longer texts are cut, far beyond the tokens that a model accepts
_CACHED_WORDS = 1 << 18


class Tokens(NamedTuple):
    """n rows of tokens: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: I32
    offsets: I64

    @property
    def lengths(self) -> I64:
        """Tokens of each row, (n,)."""
        return np.diff(self.offsets)


class CometTokenizer:
    """XLM-RoBERTa's tokenizer.

    Args:
        file: `tokenizer.json`, or a sentencepiece model.
        limit: maximum number of tokens of the encoder.

    Raises:
        RunError: the file cannot be read, or lacks a token that the encoder needs.
    """

    def __init__(self, file: Path, limit: int) -> None:
        self._tokenizer = _open(file)
        special = [self._tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>")]
        if None in special:
            raise RunError(f"{file} has no tokens <s>, <pad> and </s>: it is not a tokenizer of XLM-RoBERTa.")
        self._begin, self._pad, self._end = special
        self._limit = limit
        # COMET truncates each text, with begin and end, to the model's limit minus two tokens, then pairs to the limit.
        self._tokenizer.enable_truncation(max(limit - 4, 1))
        self._tokenizer.no_padding()
        model = self._tokenizer.model
        if hasattr(model, "_resize_cache"):  # cache of tokenised words: 10,000 are too few for a language
            model._resize_cache(_CACHED_WORDS)
            self._tokenizer.model = model

    def check(self, file: Path, vocabulary: int, pad: int) -> None:
        """Checks that the tokenizer matches its encoder.

        Raises:
            RunError: they do not match.
        """
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > vocabulary or self._pad != pad:
            raise RunError(
                f"{file} does not match the model's encoder: it has {size:,} tokens and <pad> is {self._pad}, but the "
                f"encoder has {vocabulary:,} and {pad}."
            )

    def texts(self, texts: Sequence[str]) -> Tokens:
        """Tokens of each text, with begin and end."""
        ids, offsets = self._encode(texts)
        return Tokens(*_wrap(ids, offsets, self._begin, self._end))

    def pairs(self, translations: Sequence[str], sources: Sequence[str]) -> Tokens:
        """Tokens of each pair as one row: `<s> translation </s></s> source </s>`, truncated to the limit."""
        left, right = self._encode(translations), self._encode(sources)
        return Tokens(*_join(*left, *right, self._begin, self._end, self._pad, self._limit))

    def _encode(self, texts: Sequence[str]) -> tuple[I32, I64]:
        cut = [text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] for text in texts]
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cut, add_special_tokens=False)]
        offsets = np.zeros(len(found) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, found), np.int64, len(found)), out=offsets[1:])
        return np.fromiter(itertools.chain.from_iterable(found), np.int32, int(offsets[-1])), offsets


@kernel
def _wrap(ids: I32, offsets: I64, begin: int, end: int) -> tuple[I32, I64]:
    rows = offsets.size - 1
    out = np.empty(ids.size + 2 * rows, np.int32)
    ends = np.zeros(rows + 1, np.int64)
    at = 0
    for row in range(rows):
        out[at] = begin
        at += 1
        for k in range(offsets[row], offsets[row + 1]):
            out[at] = ids[k]
            at += 1
        out[at] = end
        at += 1
        ends[row + 1] = at
    return out, ends


@kernel
def _append(out: I32, at: int, ids: I32, pad: int) -> int:
    for k in range(ids.size):
        if ids[k] != pad:
            out[at] = ids[k]
            at += 1
    return at


@kernel
def _join(
    left: I32, left_offsets: I64, right: I32, right_offsets: I64, begin: int, end: int, pad: int, limit: int
) -> tuple[I32, I64]:
    """Joins translations and sources. Padding tokens within a text are removed, as in COMET."""
    rows = left_offsets.size - 1
    out = np.empty(left.size + right.size + 4 * rows, np.int32)
    ends = np.zeros(rows + 1, np.int64)
    at = 0
    for row in range(rows):
        start = at
        out[at] = begin
        at += 1
        at = _append(out, at, left[left_offsets[row] : left_offsets[row + 1]], pad)
        out[at] = end
        out[at + 1] = end
        at += 2
        at = _append(out, at, right[right_offsets[row] : right_offsets[row + 1]], pad)
        out[at] = end
        at = min(at + 1, start + limit)
        ends[row + 1] = at
    return out[:at].copy(), ends


@kernel
def gather(ids: I32, offsets: I64, order: I64, pad: int) -> tuple[I64, I64]:
    """Concatenates rows in the given order. Returns their tokens and the tokens' positions.

    In XLM-RoBERTa, positions start at the padding token's id plus 1. A padding token within the text has that id as its
    position, and is not counted.
    """
    total = 0
    for row in order:
        total += offsets[row + 1] - offsets[row]
    tokens = np.empty(total, np.int64)
    positions = np.empty(total, np.int64)
    at = 0
    for row in order:
        position = pad
        for k in range(offsets[row], offsets[row + 1]):
            tokens[at] = ids[k]
            if ids[k] == pad:
                positions[at] = pad
            else:
                position += 1
                positions[at] = position
            at += 1
    return tokens, positions


def compile_kernels() -> None:
    """Compiles the kernels: runs each on one token."""
    one = np.zeros(1, np.int32), np.array([0, 1], np.int64)
    _wrap(*one, 0, 2)
    _join(*one, *one, 0, 2, 1, 512)
    gather(*one, np.zeros(1, np.int64), 1)


def _open(file: Path) -> Any:
    try:
        if file.suffix == ".json":
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(file.parent, local_files_only=True, use_fast=True).backend_tokenizer
    except Exception as error:  # tokenizers raises bare exceptions; transformers raises many types
        remedy = "" if file.suffix == ".json" else " For a sentencepiece model, run pip install sentencepiece protobuf."
        raise RunError(f"{file} cannot be read as a tokenizer: {line(error)}{remedy}") from error
