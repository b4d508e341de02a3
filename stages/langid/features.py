"""Features of lines as Numba kernels: words and n-grams become rows of the model's matrix, and these are averaged.

Character n-grams of `<word>` are hashed by FNV-1a with signed bytes, as in fastText.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from corpusprep.kernels import kernel
from corpusprep.stages.bits import load64, popcount

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]

Int = int | np.int64

HIERARCHICAL, SOFTMAX, ONE_VS_ALL = 0, 1, 2

_FNV_OFFSET, _FNV_PRIME, _LOW = np.uint64(2166136261), np.uint64(16777619), np.uint64(0xFFFFFFFF)
# fastText hashes `int8_t` bytes widened to 32 bits: a byte above 127 sets all the upper bits.
_SIGNED = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int32).view(np.uint32).astype(np.uint64)
_SPACE = np.zeros(256, np.bool_)
_SPACE[[0x20, 0x0A, 0x0D, 0x09, 0x0B, 0x0C, 0x00]] = True
_LABEL = np.frombuffer(b"__label__", np.uint8).copy()
_END = np.frombuffer(b"</s>", np.uint8).copy()
_END_HASH = np.uint64(0xD79C9359)
_MIX, _MIX_MORE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_END_NAME = np.uint64(0xDF81CE5B55ABEFEC)  # `_name` of </s>
_ONE, _HALF = np.uint64(1), np.uint64(32)
_ALL, _LOWER, _UPPER = np.uint64(2**64 - 1), np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x8080808080808080)
_TO_UPPER = np.uint64(0x5F5F5F5F5F5F5F5F)  # 0x80 - 0x21 in each byte
MEMO_BITS = 16  # 2**16 words are cached in one call
SPARE = 512
BATCH = 2048  # row numbers gathered before the rows are added


class Arrays(NamedTuple):
    """A model as arrays for the kernels. The dictionary has n words and then m labels; the matrices have d columns.

    Attributes:
        loss: HIERARCHICAL, SOFTMAX or ONE_VS_ALL.
        minn, maxn: shortest and longest character n-gram; `maxn` is 0 if there are none.
        word_ngrams: longest n-gram of words; below 2 if there are none.
        bucket: number of hash buckets of the n-grams.
        words: n.
        pruned: whether n-grams are looked up in `keys`.
        text, starts, ends: the dictionary's entries, `text[starts[i]:ends[i]]`.
        slots: hash table of the entries, int32 (2**b, 2): number, -1 if free, and hash.
        seen: one bit per bucket, set if the bucket was kept. The kept buckets' rows follow the words' in their order.
        ranks: for each 64 buckets, the number of kept ones before them.
        dense: the input matrix, float32 of shape (rows, d); empty if the next three are used.
        codes, norms, centroids: uint8 (rows, p), float32 (rows,), float32 (p, 256, d / p).
        weights: the output matrix transposed, float32 (d, m), or (d, m - 1) for inner nodes.
        left, right: children of the m - 1 inner nodes: i < m is a label, else inner node i - m.
    """

    loss: int
    minn: int
    maxn: int
    word_ngrams: int
    bucket: int
    words: int
    pruned: bool
    text: U8
    starts: I64
    ends: I64
    slots: I32
    seen: U64
    ranks: I32
    dense: F32
    codes: U8
    norms: F32
    centroids: F32
    weights: F32
    left: I32
    right: I32


@kernel
def scan_entries(raw: U8, position: int, starts: I64, ends: I64, counts: I64, kinds: U8) -> Int:
    """Finds the dictionary's entries from `position` on; returns their end, or -1 if the file ends before."""
    for i in range(starts.size):
        starts[i] = position
        while position < raw.size and raw[position] != 0:
            position += 1
        if position + 10 > raw.size:
            return -1
        ends[i] = position
        count = np.uint64(0)
        for k in range(8):
            count |= np.uint64(raw[position + 1 + k]) << np.uint64(8 * k)
        counts[i] = np.int64(count)
        kinds[i] = raw[position + 9]
        position += 10
    return position


@kernel(leaf=True)
def _find(text: U8, starts: I64, ends: I64, slots: I32, word: U8, begin: Int, end: Int, value: np.uint64) -> Int:
    """The slot of the word `word[begin:end]` with this hash, or the free slot for it."""
    mask = slots.size // 2 - 1
    slot = np.int64(value) & mask
    while slots[slot, 0] >= 0:
        if slots[slot, 1] == np.int32(np.uint32(value)):
            entry = slots[slot, 0]
            start = starts[entry]
            if ends[entry] - start == end - begin:
                k = 0
                while k < end - begin and text[start + k] == word[begin + k]:
                    k += 1
                if k == end - begin:
                    return slot
        slot = (slot + 1) & mask
    return slot


@kernel
def index_words(text: U8, starts: I64, ends: I64, slots: I32) -> I32:
    """Fills the hash table of the dictionary's entries."""
    for i in range(starts.size):
        value = _FNV_OFFSET
        for k in range(starts[i], ends[i]):
            value = ((value ^ _SIGNED[text[k]]) * _FNV_PRIME) & _LOW
        slot = _find(text, starts, ends, slots, text, starts[i], ends[i], value)
        slots[slot, 0] = i
        slots[slot, 1] = np.int32(np.uint32(value))
    return slots


@kernel
def index_rows(keys: I32, seen: U64, ranks: I32) -> None:
    """Sets the bits of kept buckets, and counts the kept ones before each 64 buckets."""
    for i in range(keys.size):
        key = np.int64(keys[i])
        seen[key >> 6] |= _ONE << np.uint64(key & 63)
    total = 0
    for i in range(seen.size):
        ranks[i] = total
        total += popcount(seen[i])


def _sixteen(context: Any, dense: Any, batch: Any, count: Any, hidden: Any) -> Any:
    """`_add_rows` for 16 columns. As a loop over the columns it would be 16 scalar additions and as many stores, because
    Numba leaves vectors within a loop's body to LLVM's SLP pass, which it turns off. The sum is one vector of LLVM,
    which becomes one register or several."""
    signature = types.void(dense, batch, types.int64, hidden)
    tools: Any = cgutils

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        rows, numbers, out = (
            target.make_array(kind)(target, builder, value).data
            for kind, value in ((signature.args[k], values[k]) for k in (0, 1, 3))
        )
        vector = ir.VectorType(ir.FloatType(), 16)
        out = builder.bitcast(out, vector.as_pointer())
        total = tools.alloca_once_value(builder, builder.load(out, align=4))
        with tools.for_range(builder, values[2]) as loop:
            row = builder.zext(builder.load(builder.gep(numbers, [loop.index])), ir.IntType(64))
            place = builder.gep(rows, [builder.mul(row, ir.Constant(ir.IntType(64), 16))])
            value = builder.load(builder.bitcast(place, vector.as_pointer()), align=4)
            builder.store(builder.fadd(builder.load(total), value), total)
        builder.store(builder.load(total), out, align=4)
        return target.get_dummy_value()

    return signature, generate


_add_sixteen: Any = intrinsic(_sixteen)


@kernel(leaf=True)
def _add_rows(dense: F32, codes: U8, norms: F32, centroids: F32, batch: I32, count: int, hidden: F32) -> None:
    if codes.size:
        parts, width = centroids.shape[0], centroids.shape[2]
        for i in range(count):
            row = batch[i]
            norm = norms[row]
            for part in range(parts):
                code = codes[row, part]
                for k in range(width):
                    hidden[part * width + k] += norm * centroids[part, code, k]
    elif dense.shape[1] == 16:  # the size of lid.176
        _add_sixteen(dense, batch, count, hidden)
    else:
        for i in range(count):
            row = batch[i]
            for k in range(dense.shape[1]):
                hidden[k] += dense[row, k]


@kernel(forceinline=True, leaf=True)
def _kept(model: Arrays, key: Int) -> Int:
    """1 if the rows of an n-gram's bucket were kept, else 0."""
    return np.int64((model.seen[key >> 6] >> np.uint64(key & 63)) & _ONE)


@kernel(forceinline=True, leaf=True)
def _row(model: Arrays, key: Int) -> Int:
    """The row of a bucket that was kept."""
    if not model.pruned:
        return np.int64(model.words + key)
    before = model.seen[key >> 6] & ((_ONE << np.uint64(key & 63)) - _ONE)
    return np.int64(model.words + model.ranks[key >> 6] + popcount(before))


@kernel(forceinline=True, leaf=True)
def _word_rows(
    model: Arrays, word: U8, length: int, value: np.uint64, batch: I32, filled: int, hidden: F32
) -> tuple[int, int]:
    """Appends the rows of `<word>`, whose last letter is at `length - 1`, to the `filled` ones in `batch`.

    Returns the new number of rows in `batch`, and the number added to `hidden` to make room; both are -1 for a label.
    """
    bucket, minn, maxn, pruned, seen = model.bucket, model.minn, model.maxn, model.pruned, model.seen
    entry = model.slots[_find(model.text, model.starts, model.ends, model.slots, word, 1, length, value), 0]
    if entry >= model.words:
        return -1, -1
    if entry < 0 and length >= 10:
        k = 0
        while k < 9 and word[1 + k] == _LABEL[k]:
            k += 1
        if k == 9:
            return -1, -1
    if entry >= 0:
        batch[filled] = entry
        filled += 1
    added = 0
    if maxn <= 0 or (value == _END_HASH and _is_end(word, 1, length)):
        return filled, added
    # h % bucket without a division, for h < 2**32: the quotient is exact or one too small.
    shift = 32
    while bucket >> (shift - 31):
        shift += 1
    reciprocal, turn, modulus = np.uint64((1 << shift) // bucket), np.uint64(shift), np.uint64(bucket)
    word[length] = 62
    first = filled  # from here on, `batch` has buckets instead of rows
    for i in range(length + 1):
        if word[i] & 0xC0 == 0x80:
            continue
        gram = _FNV_OFFSET
        j = i
        for n in range(1, maxn + 1):
            if j > length:
                break
            gram = ((gram ^ _SIGNED[word[j]]) * _FNV_PRIME) & _LOW
            j += 1
            while j <= length and word[j] & 0xC0 == 0x80:
                gram = ((gram ^ _SIGNED[word[j]]) * _FNV_PRIME) & _LOW
                j += 1
            if n < minn or (n == 1 and (i == 0 or j == length + 1)):
                continue
            key = np.int64(gram - ((gram * reciprocal) >> turn) * modulus)
            key -= bucket if key >= bucket else 0
            batch[filled] = key
            # Without a branch, which would be hard to predict.
            kept: Any = np.int64((seen[key >> 6] >> np.uint64(key & 63)) & _ONE) if pruned else 1
            filled += kept
        if filled >= BATCH + SPARE:
            for k in range(first, filled):
                batch[k] = _row(model, batch[k])
            _add_rows(model.dense, model.codes, model.norms, model.centroids, batch, filled, hidden)
            added += filled
            first = filled = 0
    for k in range(first, filled):
        batch[k] = _row(model, batch[k])
    return filled, added


@kernel(leaf=True)
def _is_end(text: U8, start: Int, end: Int) -> bool:
    same = end - start == 4
    for k in range(4):
        same = same and text[start + k] == _END[k]
    return same


@kernel(leaf=True)
def _length(word: np.uint64) -> Int:
    """The number of bytes before the first one below 0x21; 8 if there is none."""
    below = ~(((word & _LOWER) + _TO_UPPER) | word) & _UPPER
    count: Int = popcount((below - _ONE) & ~below)
    return count >> 3


@kernel(leaf=True)
def _name(low: np.uint64, high: np.uint64) -> np.uint64:
    """A hash of up to 16 bytes; one to one for up to 8."""
    high *= _MIX_MORE
    return (low ^ high ^ (high >> _HALF)) * _MIX


@kernel(leaf=True)
def _long_word(text: U8, begin: Int, end: Int) -> tuple[Int, np.uint64]:
    """The end of a word of any bytes, and a hash of it."""
    position = begin
    name = _ALL
    while True:
        word = load64(text, position)
        size = min(_length(word), end - position)
        if size == 0:
            if position >= end or _SPACE[text[position]]:
                return position, name
            size = 1  # a control character is part of the word
        word &= _ALL >> np.uint64(64 - 8 * size)
        name = _name(word, name + np.uint64(size))
        position += size


@kernel(forceinline=True, leaf=True)
def average(
    model: Arrays,
    text: U8,
    start: Int,
    end: Int,
    word: U8,
    hashes: I32,
    batch: I32,
    hidden: F32,
    memo: U64,
    memo_rows: I32,
) -> int:
    """Sets `hidden` to the mean of the rows of the features of the line `text[start:end]`, and returns their number.
    `text` has at least 16 more bytes after the line.

    `memo` caches words and their rows across lines. Each slot has one word: a 64-bit hash of the word (two words
    collide once in 2**64), fastText's own hash, the number of rows, and then the rows, two per 64-bit number.
    """
    dense, codes, norms, centroids = model.dense, model.codes, model.norms, model.centroids
    room = memo_rows.shape[1] - 4
    for k in range(hidden.size):
        hidden[k] = 0
    features, filled, tokens = 0, 0, 0
    position = start
    last = False
    while not last:
        while position < end and _SPACE[text[position]]:
            position += 1
        begin = position
        if position >= end:  # the line's end is the token </s>; the same word in the text also ends the line
            last, name = True, _END_NAME
        else:
            low, high = load64(text, position), load64(text, position + 8)
            size = _length(low)
            size += _length(high) if size == 8 else 0
            size = min(size, end - position)
            front = min(size, 8)
            low &= _ALL >> np.uint64(64 - 8 * front & 63)  # of no byte, all: a long word
            high &= (_ONE << np.uint64(8 * (size - front) & 63)) - _ONE
            name = _name(low, high)
            position += size
            if size == 16 or (position < end and not _SPACE[text[position]]):
                position, name = _long_word(text, begin, end)
            if name == _END_NAME:
                last = _is_end(text, begin, position)
        slot = np.int64(name >> np.uint64(64 - MEMO_BITS))
        if memo[slot, 0] == name:
            count = memo_rows[slot, 3]
            if room == 12:  # copied whole, without a branch
                for k in range(12):
                    batch[filled + k] = memo_rows[slot, 4 + k]
            else:
                for k in range(count):
                    batch[filled + k] = memo_rows[slot, 4 + k]
            filled += count
            hashes[tokens] = memo_rows[slot, 2]
            tokens += 1
        else:
            length = 1
            value = _FNV_OFFSET
            for k in range(begin, position):
                word[length] = text[k]
                value = ((value ^ _SIGNED[text[k]]) * _FNV_PRIME) & _LOW
                length += 1
            if length == 1:
                for k in range(4):
                    word[1 + k] = _END[k]
                value, length = _END_HASH, 5
            word[0] = 60
            before = filled
            filled, added = _word_rows(model, word, length, value, batch, filled, hidden)
            if filled < 0:
                filled = before
                continue
            features += added
            hashes[tokens] = np.int32(np.uint32(value))
            if not added and filled - before <= room:
                memo[slot, 0] = name
                memo_rows[slot, 2] = hashes[tokens]
                memo_rows[slot, 3] = filled - before
                for k in range(filled - before):
                    memo_rows[slot, 4 + k] = batch[before + k]
            tokens += 1
        if filled >= BATCH:
            _add_rows(dense, codes, norms, centroids, batch, filled, hidden)
            features += filled
            filled = 0
    if model.word_ngrams > 1:
        for i in range(tokens):
            chain = np.uint64(np.int64(hashes[i]))
            for j in range(i + 1, min(tokens, i + model.word_ngrams)):
                chain = chain * np.uint64(116049371) + np.uint64(np.int64(hashes[j]))
                key = np.int64(chain % np.uint64(model.bucket))
                if not model.pruned or _kept(model, key):
                    batch[filled] = _row(model, key)
                    filled += 1
                if filled >= BATCH:
                    _add_rows(dense, codes, norms, centroids, batch, filled, hidden)
                    features += filled
                    filled = 0
    _add_rows(dense, codes, norms, centroids, batch, filled, hidden)
    features += filled
    if features:
        scale = np.float32(1.0 / features)
        for k in range(hidden.size):
            hidden[k] *= scale
    return features
