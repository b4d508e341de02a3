"""Look-up of the entries of a lexical model: which translations of a row's source tokens are among its target tokens.

A row has some hundred pairs of a source and a target token, of which a tenth are entries. So each source token has a bitmap, small
enough to stay in cache, that answers most pairs with no without a branch. A set bit's rank is the number of the record.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import mix64
from corpusprep.kernels import kernel
from corpusprep.stages.bits import popcount

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Integer = int | np.integer[Any]

_SPARSE = 32  # bits for each entry, at least: with fewer, more pairs that are no entries need a look at a record
_CROWDED = 15  # bit of a tag: more entries fall on this bit of the bitmap
_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)


class Table(NamedTuple):
    """Entries (e, f): source token e, target token f.

    A target token's number is mixed by a bijection of `width` bits. The low bits choose a bit of the source token's bitmap, the
    others are its tag. Entries that fall on a bit that is taken are found in a hash table.

    Attributes:
        words: (tokens + 1,), the bitmap of source token e is `bits[words[e]:words[e + 1]]`, a power of two of words, or none.
        bits: the bitmaps.
        ranks: number of set bits in all words before.
        records: (entries, 1 + folds), in the order of the set bits: the tag, and for each fold t(target | source) and
            t(source | target) as in `Model.values`, eight bits each. Entries on taken bits follow.
        keys: hash table of those, `e << 32 | mixed`.
        places: their records.
        width: (1,), bits of a mixed number.
    """

    words: I64
    bits: U64
    ranks: I32
    records: U16
    keys: U64
    places: I32
    width: I64


class Room(NamedTuple):
    """Buffers for the pairs of one row."""

    mixed: U32
    pairs: U32
    records: U32


@kernel
def make_room(tokens: int) -> Room:
    """Buffers for rows of up to so many tokens, which must be below 2^15."""
    return Room(
        np.empty(tokens, np.uint32), np.empty(tokens * tokens + 1, np.uint32), np.empty(tokens * tokens + 1, np.uint32)
    )


@kernel(forceinline=True, leaf=True)
def _mix(target: Integer, width: np.uint32) -> np.uint32:
    mixed = (np.uint32(target) * np.uint32(0x9E3779B1)) & np.uint32((1 << width) - 1)
    return np.uint32(mixed ^ (mixed >> ((width + np.uint32(1)) >> np.uint32(1))))


@kernel(forceinline=True, leaf=True)
def _rank(bits: U64, ranks: I32, word: Integer, bit: np.uint32) -> np.int64:
    """The number of set bits before a bit of a word."""
    below = (np.uint64(1) << np.uint64(bit & np.uint32(63))) - np.uint64(1)
    return np.int64(ranks[word]) + popcount(bits[word] & below)


@kernel(forceinline=True, leaf=True)
def _slot(keys: U64, key: np.uint64) -> np.int64:
    """The slot of a key, or the free one for it."""
    last = np.uint64(keys.size - 1)
    slot = mix64(key) & last
    while keys[slot] != _FREE and keys[slot] != key:
        slot = (slot + np.uint64(1)) & last
    return np.int64(slot)


@kernel
def make_table(starts: I64, targets: I32, values: U8, tokens: int) -> Table:
    """The table of a model.

    Args:
        starts, targets, values: see `Model`; a source token has fewer than 2^26 entries.
        tokens: number of target tokens.
    """
    width = 7
    while 1 << width < tokens:
        width += 1
    least = 1 << max(width - 6 - _CROWDED, 0)  # words, so that a tag has fewer bits than `_CROWDED`
    words = np.zeros(starts.size, np.int64)
    for e in range(starts.size - 1):
        size = least if starts[e + 1] > starts[e] else 0
        while 64 * size < _SPARSE * (starts[e + 1] - starts[e]):
            size *= 2
        words[e + 1] = words[e] + size
    bits = np.zeros(words[-1], np.uint64)
    for e in range(starts.size - 1):
        last = np.uint32(64 * (words[e + 1] - words[e]) - 1)
        for k in range(starts[e], starts[e + 1]):
            bit = _mix(targets[k], np.uint32(width)) & last
            bits[words[e] + (bit >> np.uint32(6))] |= np.uint64(1) << np.uint64(bit & np.uint32(63))
    ranks = np.empty(bits.size, np.int32)
    end = np.int64(0)
    for word in range(bits.size):
        ranks[word] = end
        end += popcount(bits[word])
    size = 2
    while size < 2 * (targets.size - end):
        size *= 2
    keys, places = np.full(size, _FREE, np.uint64), np.zeros(size, np.int32)
    records, taken = np.zeros((targets.size, 1 + values.shape[1]), np.uint16), np.zeros(end, np.bool_)
    for e in range(starts.size - 1):
        last = np.uint32(64 * (words[e + 1] - words[e]) - 1)
        tag = np.uint32(popcount(np.uint64(last)))
        for k in range(starts[e], starts[e + 1]):
            mixed = _mix(targets[k], np.uint32(width))
            bit = mixed & last
            record = _rank(bits, ranks, words[e] + (bit >> np.uint32(6)), bit)
            if taken[record]:
                records[record, 0] |= 1 << _CROWDED
                key = np.uint64(e) << np.uint64(32) | np.uint64(mixed)
                slot = _slot(keys, key)
                keys[slot], places[slot] = key, end
                record = end
                end += 1
            else:
                taken[record] = True
            records[record, 0] |= mixed >> tag
            for f in range(values.shape[1]):
                records[record, 1 + f] = np.uint16(values[k, f, 0]) | np.uint16(values[k, f, 1]) << np.uint16(8)
    return Table(words, bits, ranks, records, keys, places, np.array([width]))


@kernel(leaf=True)
def translate(
    table: Table, fold: Integer, probabilities: F32, si: I32, ks: int, ti: I32, kt: int, sum_s: F32, sum_t: F32, room: Room
) -> None:  # fmt: skip
    """Sums of t(source | target) for each of ks source tokens `si`, and of t(target | source) for each of kt target tokens `ti`, over
    the other side's. Each step goes over all pairs that the step before has left."""
    words, bits, ranks, records = table.words, table.bits, table.ranks, table.records
    mixed, pairs, found = room
    width = np.uint32(table.width[0])
    sum_s[:ks] = 0
    sum_t[:kt] = 0
    for j in range(kt):
        mixed[j] = _mix(ti[j], width)
    one = np.uint64(1)
    n = np.uint64(0)  # unsigned indices need no test for negative ones
    for i in range(ks):
        word = np.uint64(words[si[i]])
        last = np.uint32(64 * (words[si[i] + 1] - words[si[i]]) - 1)
        if words[si[i] + 1] == words[si[i]]:
            continue
        first = np.uint32(i << 16)
        for j in range(kt):
            bit = mixed[j] & last
            pairs[n] = first | np.uint32(j)
            n += (bits[word + np.uint64(bit >> np.uint32(6))] >> np.uint64(bit & np.uint32(63))) & one
    hits = np.uint64(0)
    for m in range(n):
        pair = pairs[np.uint64(m)]
        e, x = np.uint64(si[np.uint64(pair >> np.uint32(16))]), mixed[np.uint64(pair & np.uint32(0xFFFF))]
        word = np.uint64(words[e])
        last = np.uint32(64 * (np.uint64(words[e + one]) - word) - one)
        bit = x & last
        record = np.uint64(_rank(bits, ranks, word + np.uint64(bit >> np.uint32(6)), bit))
        tag = np.int64(records[record, 0])
        same = np.int64((tag & ((1 << _CROWDED) - 1)) == np.int64(x >> np.uint32(popcount(np.uint64(last)))))
        if (1 - same) & (tag >> _CROWDED):  # one branch, which is seldom taken
            slot = _slot(table.keys, e << np.uint64(32) | np.uint64(x))
            if table.keys[slot] != _FREE:
                record, same = np.uint64(table.places[slot]), np.int64(1)
        found[hits], pairs[hits] = record, pair
        hits += np.uint64(same)
    for m in range(hits):
        pair = pairs[np.uint64(m)]
        both = records[np.uint64(found[np.uint64(m)]), 1 + fold]
        sum_t[np.uint64(pair & np.uint32(0xFFFF))] += probabilities[both & 0xFF]
        sum_s[np.uint64(pair >> np.uint32(16))] += probabilities[both >> 8]
