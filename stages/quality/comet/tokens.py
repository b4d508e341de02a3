"""Texts as the tokens that a COMET model reads, in bulk."""

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

_MAX_CHARACTERS = 1 << 16  # of a text that are looked at: far beyond the tokens that a model takes
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
        limit: the most tokens that the encoder takes.

    Raises:
        RunError: the file cannot be read, or lacks a token that the encoder needs.
    """

    def __init__(self, file: Path, limit: int) -> None:
        self._tokenizer = _open(file)
        special = [self._tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>")]
        if None in special:
            raise RunError(f"{file} has no tokens <s>, <pad> and </s>: it is no tokenizer of XLM-RoBERTa.")
        self._begin, self._pad, self._end = special
        self._limit = limit
        # COMET cuts each text to two tokens less than the model takes, with its begin and end, and then a pair to the limit.
        self._tokenizer.enable_truncation(max(limit - 4, 1))
        self._tokenizer.no_padding()
        model = self._tokenizer.model
        if hasattr(model, "_resize_cache"):  # of words that were tokenised before: 10,000 are too few for a language
            model._resize_cache(_CACHED_WORDS)
            self._tokenizer.model = model

    def check(self, file: Path, vocabulary: int, pad: int) -> None:
        """Holds the tokenizer against its encoder.

        Raises:
            RunError: they do not belong together.
        """
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > vocabulary or self._pad != pad:
            raise RunError(
                f"{file} does not belong to the model's encoder: it has {size:,} tokens and <pad> is {self._pad}, where the "
                f"encoder has {vocabulary:,} and {pad}."
            )

    def texts(self, texts: Sequence[str]) -> Tokens:
        """Each text between begin and end."""
        ids, offsets = self._encode(texts)
        return Tokens(*_wrap(ids, offsets, self._begin, self._end))

    def pairs(self, translations: Sequence[str], sources: Sequence[str]) -> Tokens:
        """Translation and source as one row each: `<s> translation </s></s> source </s>`, cut at the limit."""
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
def _join(
    left: I32, left_offsets: I64, right: I32, right_offsets: I64, begin: int, end: int, pad: int, limit: int
) -> tuple[I32, I64]:
    """A padding token that stands in a text is left out, as COMET does when it joins the two."""
    rows = left_offsets.size - 1
    out = np.empty(left.size + right.size + 4 * rows, np.int32)
    ends = np.zeros(rows + 1, np.int64)
    at = 0
    for row in range(rows):
        start = at
        out[at] = begin
        at += 1
        for k in range(left_offsets[row], left_offsets[row + 1]):
            if left[k] != pad:
                out[at] = left[k]
                at += 1
        out[at] = end
        out[at + 1] = end
        at += 2
        for k in range(right_offsets[row], right_offsets[row + 1]):
            if right[k] != pad:
                out[at] = right[k]
                at += 1
        out[at] = end
        at = min(at + 1, start + limit)
        ends[row + 1] = at
    return out[:at].copy(), ends


@kernel
def gather(ids: I32, offsets: I64, order: I64, pad: int) -> tuple[I64, I64]:
    """Rows one behind the other in an order, and their tokens' positions.

    XLM-RoBERTa counts positions from the one after its padding token's id; a padding token that stands in the text has that
    id as its position, and is not counted.
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
    """Runs each kernel on one token."""
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
    except Exception as error:  # tokenizers raises bare exceptions; transformers has many
        remedy = (
            "" if file.suffix == ".json" else " Reading a sentencepiece model needs pip install sentencepiece protobuf."
        )
        raise RunError(f"{file} cannot be read as a tokenizer: {line(error)}{remedy}") from error
