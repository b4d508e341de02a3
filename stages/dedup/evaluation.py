"""Finds rows that copy evaluation text: an index of character n-grams, and the share of a sentence that a row repeats.

A side of a row is a near copy of an evaluation sentence if it repeats at least a given share of the sentence's
character 8-grams, taken from the normalised texts (see `text.py`). So case, punctuation and spacing of a copy do not
matter. A copy is also found if parts were cut or edited, or if it is embedded in other text. Candidate sentences are
found by minimizers, the n-grams with the lowest hash in each window: two texts that share 15 consecutive characters
share a minimizer (Roberts et al., "Reducing storage requirements for biological sequence comparison", 2004; and
winnowing: Schleimer et al., "Winnowing: local algorithms for document fingerprinting", SIGMOD 2003).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import U64, mix64
from corpusprep.kernels import kernel
from corpusprep.stages.dedup.text import I32, I64, SOURCE, U8, U32, Int, Tables, fold_text, hash_codes

U16 = npt.NDArray[np.uint16]
Bool = npt.NDArray[np.bool_]

GRAM = 8  # characters of an n-gram
_WINDOW = 8  # n-grams of a window
_POSTINGS = 64  # maximum number of sentences stored for one n-gram
_BASE = 0x9E3779B97F4A7C15
_COMMON = 8  # an n-gram in more sentences is common: a sentence is indexed by it only if it has few rarer n-grams
_FEW = 4
_SEPARATOR = 1  # between the sides of a pair; normalised text has it only if it is all control characters


class Index(NamedTuple):
    """The arrays of an evaluation index. Texts are sorted by hash, so that the index depends only on the content.

    Attributes:
        codes: uint16; the normalised texts, concatenated, with code points folded to 16 bits.
        starts: int64 (texts + 1,); the start of each text in `codes`.
        minimizers: int32 (texts,); number of indexed n-grams of each text.
        grams: uint32 (entries,), sorted; hashes of the indexed n-grams.
        texts: int32 (entries,); the text of each n-gram.
        prefixes: int64 (2**b + 1,); the first entry for each value of the leading b bits.
        short: uint64, sorted; hashes of the pairs that are too short for n-gram entries.
    """

    codes: U16
    starts: I64
    minimizers: I32
    grams: U32
    texts: I32
    prefixes: I64
    short: U64

    def digest(self) -> str:
        """SHA-256 of the content."""
        state = hashlib.sha256()
        for array in (self.codes, self.starts, self.short):
            state.update(array.size.to_bytes(8, "little"))
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()


@kernel
def _shorten(codes: U32, size: Int, out: U16) -> None:
    for i in range(size):
        out[i] = np.uint16((codes[i] ^ (codes[i] >> 16)) & 0xFFFF)


@kernel
def _hash_grams(codes: U16, size: Int, grams: U64) -> Int:
    """Writes the hashes (odd numbers) of all n-grams of `codes[:size]` to `grams`, and returns their number."""
    count = size - GRAM + 1
    if count < 1:
        return 0
    base, leaving = np.uint64(_BASE), np.uint64(1)
    value = np.uint64(0)
    for k in range(GRAM):
        value = value * base + np.uint64(codes[k])
        leaving *= base
    for i in range(count):
        grams[i] = (value ^ (value >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
        if i + 1 < count:
            value = value * base + np.uint64(codes[i + GRAM]) - np.uint64(codes[i]) * leaving
    return count


@kernel
def _minimizers(grams: U64, count: Int, out: U32) -> int:
    """Writes 32 bits of each minimizer of `grams[:count]` to `out`, and returns their number."""
    found = 0
    last = -1
    for end in range(min(_WINDOW, count), count + 1):
        begin = max(0, end - _WINDOW)
        if last < begin:  # the lowest of the window, the rightmost if several are equal
            last = begin
            for i in range(begin + 1, end):
                if grams[i] <= grams[last]:
                    last = i
        elif grams[end - 1] <= grams[last]:
            last = end - 1
        else:
            continue
        # Mixed again: minimizers are all low and would crowd the first entries of the index.
        out[found] = np.uint32(mix64(grams[last]) >> np.uint64(32))
        found += 1
    return found


@kernel
def _pair_hash(a: np.uint64, b: np.uint64) -> np.uint64:
    """The hash of two sides, independent of their order."""
    return mix64(mix64(min(a, b)) ^ max(a, b))


@kernel
def _measure(offsets: I64, data: U8, t: Tables, sizes: I64, hashes: U64) -> None:
    longest = 0
    for i in range(sizes.size):
        longest = max(longest, offsets[i + 1] - offsets[i])
    codes = np.empty(6 * longest + 8, np.uint32)
    for i in range(sizes.size):
        sizes[i] = fold_text(data, offsets[i], offsets[i + 1], t, codes)
        hashes[i] = hash_codes(codes, sizes[i], SOURCE)


@kernel
def _pair_hashes(hashes: U64, first: I64, second: I64, out: U64) -> None:
    for i in range(out.size):
        out[i] = _pair_hash(hashes[first[i]], hashes[second[i]])


@kernel
def _fill(offsets: I64, data: U8, t: Tables, first: I64, second: I64, longest: int, codes: U16, starts: I64) -> None:
    """Writes the texts: side `first[i]`, then a separator and side `second[i]` if that is not -1."""
    wide = np.empty(6 * longest + 8, np.uint32)
    for i in range(first.size):
        place = starts[i]
        size = fold_text(data, offsets[first[i]], offsets[first[i] + 1], t, wide)
        _shorten(wide, size, codes[place:])
        if second[i] >= 0:
            place += size
            codes[place] = _SEPARATOR
            size = fold_text(data, offsets[second[i]], offsets[second[i] + 1], t, wide)
            _shorten(wide, size, codes[place + 1 :])


@kernel
def _entries(codes: U16, starts: I64, out: U64) -> int:
    """Writes hash << 32 | text for each minimizer of each text, and returns their number."""
    longest = 0
    for i in range(starts.size - 1):
        longest = max(longest, starts[i + 1] - starts[i])
    grams, chosen = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint32)
    n = 0
    for i in range(starts.size - 1):
        count = _hash_grams(codes[starts[i] : starts[i + 1]], starts[i + 1] - starts[i], grams)
        count = _minimizers(grams, count, chosen)
        for k in range(count):
            out[n] = np.uint64(chosen[k]) << np.uint64(32) | np.uint64(i)
            n += 1
    return n


@kernel
def _thin(entries: U64, minimizers: I32) -> Bool:
    """Which of the sorted, distinct entries are kept; writes the number of kept entries per text to `minimizers`."""
    sizes = np.empty(entries.size, np.int32)
    start = 0
    while start < entries.size:
        end = start
        while end < entries.size and entries[end] >> np.uint64(32) == entries[start] >> np.uint64(32):
            end += 1
        sizes[start:end] = end - start
        start = end
    rare = np.zeros(minimizers.size, np.int32)
    for i in range(entries.size):
        if sizes[i] <= _COMMON:
            rare[np.int64(entries[i] & np.uint64(0xFFFFFFFF))] += 1
    keep = np.zeros(entries.size, np.bool_)
    place = 0
    for i in range(entries.size):
        place = place + 1 if i > 0 and entries[i] >> np.uint64(32) == entries[i - 1] >> np.uint64(32) else 0
        text = np.int64(entries[i] & np.uint64(0xFFFFFFFF))
        keep[i] = sizes[i] <= _COMMON or (rare[text] < _FEW and place < _POSTINGS)
        minimizers[text] += keep[i]
    return keep


def build(offsets: I64, data: U8, first: I64, second: I64, t: Tables, min_chars: int) -> Index:
    """Builds the index.

    Args:
        offsets, data: all sides of all evaluation text, as `string_buffers` returns them.
        first, second: int64 (pairs,); the two sides of each pair.
        t: the folding tables.
        min_chars: minimum normalised characters of a side that is indexed on its own.
    """
    n = offsets.size - 1
    sizes, hashes = np.zeros(n, np.int64), np.zeros(n, np.uint64)
    _measure(offsets, data, t, sizes, hashes)
    filled = (sizes[first] > 0) & (sizes[second] > 0) & ((sizes[first] < min_chars) | (sizes[second] < min_chars))
    first, second = first[filled], second[filled]
    joined = np.zeros(first.size, np.uint64)
    _pair_hashes(hashes, first, second, joined)
    whole = sizes[first] + sizes[second] + 1
    tiny = whole < min_chars
    short = np.unique(joined[tiny])
    long = np.flatnonzero(sizes >= min_chars)
    # Pairs are indexed in both orders, because files have both; the hash of the second order differs by one bit.
    a = np.concatenate([long, first[~tiny], second[~tiny]])
    b = np.concatenate([np.full(long.size, -1), second[~tiny], first[~tiny]])
    key = np.concatenate([hashes[long], joined[~tiny] & ~np.uint64(1), joined[~tiny] | np.uint64(1)])
    length = np.concatenate([sizes[long], whole[~tiny], whole[~tiny]])
    _, chosen = np.unique(key, return_index=True)
    a, b, length = a[chosen], b[chosen], length[chosen]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(length, dtype=np.int64)])
    codes = np.empty(int(starts[-1]), np.uint16)
    longest = int((offsets[1:] - offsets[:-1]).max()) if n else 0
    _fill(offsets, data, t, a.astype(np.int64), b.astype(np.int64), longest, codes, starts)
    minimizers = np.zeros(a.size, np.int32)
    entries = np.empty(codes.size + 1, np.uint64)
    entries = np.sort(entries[: _entries(codes, starts, entries)])  # faster than np.unique
    entries = entries[np.append(True, entries[1:] != entries[:-1])[: entries.size]]
    entries = entries[_thin(entries, minimizers)]
    grams, texts = (entries >> np.uint64(32)).astype(np.uint32), (entries & np.uint64(0xFFFFFFFF)).astype(np.int32)
    bits = min(26, max(1, int(entries.size).bit_length()))
    prefixes = np.searchsorted(grams, np.arange(1 << bits, dtype=np.uint64) << np.uint64(32 - bits)).astype(np.int64)
    return Index(codes, starts, minimizers, grams, texts, np.append(prefixes, grams.size), short)


@kernel
def _share(
    codes: U16, size: Int, index: Index, down: np.uint64, least: float, grams: U64, chosen: U32, counts: I32, met: I32
) -> float:
    """The largest share of an indexed text's n-grams that `codes[:size]` repeats; 0 if it is certainly below `least`.

    Args:
        down: the right shift from a 32-bit hash to its entry in `index.prefixes`.
        grams, chosen, counts, met: scratch; `counts` (one per text) is all zero before and after.
    """
    total = _hash_grams(codes, size, grams)
    found = 0
    for k in range(_minimizers(grams, total, chosen)):
        p = np.int64(np.uint64(chosen[k]) >> down)
        for e in range(index.prefixes[p], index.prefixes[p + 1]):
            if index.grams[e] == chosen[k]:
                text = index.texts[e]
                if counts[text] == 0:
                    met[found] = text
                    found += 1
                counts[text] += 1
    best = 0.0
    own, theirs = grams[:0], grams[:0]
    slots = np.uint64(0)
    for m in range(found):
        text = met[m]
        hits = counts[text]
        counts[text] = 0
        # The share of minimizers estimates the share of n-grams. It is rough, so half of `least` is required.
        if 2 * hits < least * index.minimizers[text]:
            continue
        if own.size == 0:  # a hash set of the n-grams; 0 marks a free slot
            size_of_set = 64
            while size_of_set < 2 * total:
                size_of_set *= 2
            own = np.zeros(size_of_set, np.uint64)
            slots = np.uint64(size_of_set - 1)
            for k in range(total):
                at = (grams[k] >> np.uint64(20)) & slots
                while own[at] != 0 and own[at] != grams[k]:
                    at = (at + np.uint64(1)) & slots
                own[at] = grams[k]
        low, high = index.starts[text], index.starts[text + 1]
        if theirs.size < high - low:
            theirs = np.empty(2 * (high - low), np.uint64)
        length = _hash_grams(index.codes[low:high], high - low, theirs)
        same = 0
        for k in range(length):
            at = (theirs[k] >> np.uint64(20)) & slots
            while own[at] != 0 and own[at] != theirs[k]:
                at = (at + np.uint64(1)) & slots
            same += own[at] != 0
        best = max(best, same / length)
    return best


@kernel
def shares(
    src_offsets: I64, src: U8, tgt_offsets: I64, tgt: U8, t: Tables, index: Index,
    min_chars: int, least: float, out: npt.NDArray[np.float32],
) -> None:  # fmt: skip
    """Writes, for each row, the largest share of an evaluation text that one of its sides (or the pair) repeats."""
    longest = 0
    for row in range(out.size):
        longest = max(longest, src_offsets[row + 1] - src_offsets[row], tgt_offsets[row + 1] - tgt_offsets[row])
    wide = np.empty(6 * longest + 8, np.uint32)
    codes = np.empty(12 * longest + 17, np.uint16)
    grams, chosen = np.empty(12 * longest + 17, np.uint64), np.empty(12 * longest + 17, np.uint32)
    counts, met = np.zeros(index.minimizers.size, np.int32), np.empty(index.minimizers.size, np.int32)
    down = np.uint64(32)
    while (index.prefixes.size - 1) >> np.int64(np.uint64(32) - down) > 1:
        down -= np.uint64(1)
    for row in range(out.size):
        size = fold_text(src, src_offsets[row], src_offsets[row + 1], t, wide)
        a = hash_codes(wide, size, SOURCE)
        _shorten(wide, size, codes)
        best = 0.0
        if size >= min_chars:
            best = _share(codes, size, index, down, least, grams, chosen, counts, met)
        left = size
        size = fold_text(tgt, tgt_offsets[row], tgt_offsets[row + 1], t, wide)
        b = hash_codes(wide, size, SOURCE)
        codes[left] = _SEPARATOR
        _shorten(wide, size, codes[left + 1 :])
        if size >= min_chars and best < 1.0:
            best = max(best, _share(codes[left + 1 :], size, index, down, least, grams, chosen, counts, met))
        if (left < min_chars or size < min_chars) and left > 0 and size > 0 and best < 1.0:
            if left + size + 1 >= min_chars:
                best = max(best, _share(codes, left + size + 1, index, down, least, grams, chosen, counts, met))
            elif index.short.size:
                value = _pair_hash(a, b)
                at = np.searchsorted(index.short, value)
                if at < index.short.size and index.short[at] == value:
                    best = 1.0
        out[row] = best
