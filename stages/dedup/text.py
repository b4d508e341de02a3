"""Kernels on Arrow buffers for the normalised form of a text, its 64-bit SimHash and its exact hash.

The normalised form is NFKC, case folded, without punctuation, symbols, white space and format characters, composed
again (NFC). Texts that differ only in these have the same form. Digits, letters, marks and unassigned or private
characters are kept. If no character would be kept, the text is its own normalised form. Each character is folded
separately, and the results are composed by the rules of NFC, with marks in canonical order. This differs from Unicode's
NFKC_Casefold of a whole text only in the order of a combining iota, U+0345, among other marks. The tables come from
Python's `unicodedata`, whose version of Unicode is `UNICODE`.

SimHash: Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002; for near-duplicates in
Manku et al., "Detecting near-duplicates for web crawling", WWW 2007.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import U64, mix64
from corpusprep.kernels import kept, kernel

UNICODE = unicodedata.unidata_version

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Int = int | np.int64  # counters in kernels; int() would keep an unsigned type, and mixed types give floats
U32 = npt.NDArray[np.uint32]

_DROP = 0  # the character is dropped; 0 is free, because U+0000 is dropped too
_COMBINES = 1 << 30  # the character may reorder or compose with previous characters
_SEQUENCE = 1 << 29  # the low bits are an index into `sequences`
_LOW = (1 << 29) - 1
_LAST = 0xE1000  # later characters are private
_HANGUL = range(0xAC00, 0xD7A4)  # syllables, which are composed by arithmetic
_BLOCK = 64
_KEPT_AS_THEY_ARE = frozenset(["Cn", "Co", "Cs"])  # categories: unassigned, private, surrogate
# Fillers and variation selectors: their category is letter or mark, but they are invisible.
_UNSEEN = frozenset(
    [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10)]
) | frozenset(range(0xE0100, 0xE01F0))

SOURCE, TARGET = 1, 2  # start value of a feature's hash, which separates the two sides
_BASE = 0x9E3779B97F4A7C15
_FACTOR = 0xD6E8FEB86659FD93
_MASK = (1 << 64) - 1


class Tables(NamedTuple):
    """Tables for normalisation in kernels.

    Attributes:
        fold: int32[0x110000]; for each code point, 0 if it is dropped, else the folded code point or an index into
            `sequences`, with the flag `_COMBINES` if it may compose.
        sequences: int32; at each index, the length, then the folded code points.
        ccc: uint8[0x110000]; canonical combining classes.
        pairs: int64 (m,), sorted; first << 32 | second of each canonical composition.
        composed: int32 (m,); the composition of each pair.
        parts: int64 (m,); the pairs, sorted by their composition.
        whole: int32 (m,), sorted; the composition of each pair in `parts`.
    """

    fold: I32
    sequences: I32
    ccc: U8
    pairs: I64
    composed: I32
    parts: I64
    whole: I32


@functools.lru_cache(1 << 16)
def fold_character(character: str) -> str:
    """The folded form of one character, empty if it is dropped."""
    text = character
    while True:
        step = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        if step == text:
            break
        text = step
    return "".join(c for c in text if not _is_dropped(c))


def _is_dropped(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PSZ" or category in ("Cc", "Cf") or ord(character) in _UNSEEN


def normalise(text: str) -> str:
    """The normalised form of a text, as the kernels compute it, in plain Python; for checks and single texts."""
    return unicodedata.normalize("NFC", "".join(map(fold_character, text))) or text


@kept(Tables)
def tables() -> Tables:
    """The tables."""
    fold = np.arange(sys.maxunicode + 1, dtype=np.int32)
    ccc = np.zeros(fold.size, np.uint8)
    sequences: list[int] = [0]
    pairs: list[tuple[int, int]] = []
    seconds: set[int] = set()
    for start in range(0, _LAST, _BLOCK):
        block = "".join(map(chr, range(start, start + _BLOCK)))
        # Most blocks have no character that folds or combines; a test of each character would take a second.
        if _KEPT_AS_THEY_ARE.issuperset(map(unicodedata.category, block)) or start in _HANGUL[::_BLOCK]:
            continue
        plain = block.isalnum() and block == block.casefold() == unicodedata.normalize("NFKD", block)
        if plain and _UNSEEN.isdisjoint(range(start, start + _BLOCK)):
            continue
        for code in range(start, start + _BLOCK):
            character = chr(code)
            folded = fold_character(character)
            if folded != character:
                if len(folded) < 2:
                    fold[code] = ord(folded) if folded else _DROP
                else:
                    fold[code] = _SEQUENCE | len(sequences)
                    sequences += [len(folded), *map(ord, folded)]
            ccc[code] = unicodedata.combining(character)
            parts = unicodedata.decomposition(character)
            if parts and parts[0] != "<" and " " in parts and unicodedata.normalize("NFC", character) == character:
                first, second = (int(part, 16) for part in parts.split())
                pairs.append((first << 32 | second, code))
                seconds.add(second)
    # Excluded compositions (such as Bengali yya with its dot) fold to their parts, so they need no table.
    combines = ccc > 0
    combines[list(seconds)] = True
    combines[0x1161:0x1176] = combines[0x11A8:0x11C3] = True  # the vowels and finals of Hangul
    for code in np.flatnonzero(fold != np.arange(fold.size)).tolist():
        value = int(fold[code])
        if value & _SEQUENCE:
            place = value & _LOW
            if any(combines[c] for c in sequences[place + 1 : place + 1 + sequences[place]]):
                fold[code] |= _COMBINES
        elif value and combines[value]:
            fold[code] |= _COMBINES
    same = np.flatnonzero(combines & (fold == np.arange(fold.size)))
    fold[same] |= _COMBINES
    pairs.sort()
    keys = np.array([key for key, _ in pairs], np.int64)
    composed = np.array([code for _, code in pairs], np.int32)
    order = np.argsort(composed)
    return Tables(fold, np.array(sequences, np.int32), ccc, keys, composed, keys[order], composed[order])


@kernel(leaf=True)
def _compose(first: Int, second: Int, t: Tables) -> Int:
    """The composition of two characters, or 0."""
    if 0x1100 <= first < 0x1113 and 0x1161 <= second < 0x1176:
        return 0xAC00 + ((first - 0x1100) * 21 + (second - 0x1161)) * 28
    if 0xAC00 <= first < 0xD7A4 and (first - 0xAC00) % 28 == 0 and 0x11A8 <= second < 0x11C3:
        return first + second - 0x11A7
    key = np.int64(first) << 32 | np.int64(second)
    at = np.searchsorted(t.pairs, key)
    if at < t.pairs.size and t.pairs[at] == key:
        return np.int64(t.composed[at])
    return 0


@kernel
def _push(out: U32, size: Int, code: Int, t: Tables) -> Int:
    """Appends a character that may combine to the NFC text `out[:size]`, keeps it in NFC, and returns the new size."""
    start = size - 1
    while start > 0 and t.ccc[out[start]] != 0:
        start -= 1
    if start < 0:
        out[0] = code
        return 1
    rank = np.int64(t.ccc[code])
    if rank == 0:  # composes only with the character directly before it
        made = _compose(np.int64(out[size - 1]), code, t) if start == size - 1 else 0
        if made:
            out[size - 1] = made
            return size
        out[size] = code
        return size + 1
    # Decompose the cluster, put the mark in its place, and compose again.
    tail = np.empty(4 * (size - start) + 4, np.int64)
    n = 0
    for i in range(start, size):
        whole = np.int64(out[i])
        stack = np.empty(8, np.int64)
        depth = 0
        while True:
            at = np.searchsorted(t.whole, whole)
            if at < t.whole.size and t.whole[at] == whole:
                stack[depth] = t.parts[at] & 0xFFFFFFFF
                depth += 1
                whole = t.parts[at] >> 32
            else:
                break
        tail[n] = whole
        n += 1
        while depth > 0:
            depth -= 1
            tail[n] = stack[depth]
            n += 1
    tail[n] = code
    n += 1
    for i in range(1, n):  # stable insertion sort by class; marks do not move past starters
        j = i
        moving = tail[i]
        rank = np.int64(t.ccc[moving])
        while rank != 0 and j > 0 and t.ccc[tail[j - 1]] > rank:
            tail[j] = tail[j - 1]
            j -= 1
        tail[j] = moving
    base = start
    out[start] = tail[0]
    size = start + 1
    last: Int = -1 if t.ccc[tail[0]] == 0 else 256
    for i in range(1, n):
        rank = np.int64(t.ccc[tail[i]])
        made = 0
        if last < rank:
            made = _compose(np.int64(out[base]), tail[i], t)
        if made:
            out[base] = made
        else:
            out[size] = tail[i]
            size += 1
            last = rank
    return size


@kernel(inline="always")
def _decode(data: U8, i: Int, end: Int) -> tuple[Int, Int]:
    """The non-ASCII code point at `data[i]`, and the index of the next one; U+FFFD if the text is truncated."""
    byte = np.int64(data[i])
    length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2
    if i + length > end:
        return 0xFFFD, end
    code = byte & (0x7F >> length)
    for k in range(1, length):
        code = code << 6 | np.int64(data[i + k] & 63)
    return (code if code < 0x110000 else 0xFFFD), i + length


@kernel
def fold_text(data: U8, start: Int, end: Int, t: Tables, out: U32) -> Int:
    """Writes the normalised form of the UTF-8 text `data[start:end]` to `out` and returns its length.

    `out` must have room for 6 code points per byte, which the longest ligature needs.
    """
    size: Int = 0
    i = start
    fold = t.fold
    while i < end:
        byte = data[i]
        if byte < 0x80:
            i += 1
            folded = fold[byte]
            out[np.uint64(size)] = folded  # without a branch, because ends of words are hard to predict
            size += folded != _DROP
            continue
        code, i = _decode(data, i, end)
        folded = fold[code]
        if folded < _SEQUENCE:
            out[size] = folded
            size += folded != _DROP
            continue
        first: Int = 0
        count: Int = 1
        if folded & _SEQUENCE:
            first = (folded & _LOW) + 1
            count = np.int64(t.sequences[first - 1])
        for k in range(count):
            piece = np.int64(t.sequences[first + k]) if folded & _SEQUENCE else np.int64(folded & _LOW)
            if folded & _COMBINES and t.fold[piece] & _COMBINES:
                size = _push(out, size, piece, t)
            else:
                out[size] = piece
                size += 1
    if size == 0:  # only symbols: the text itself
        i = start
        while i < end:
            code = np.int64(data[i])
            if code < 0x80:
                i += 1
            else:
                code, i = _decode(data, i, end)
            out[size] = code
            size += 1
    return size


@kernel(leaf=True)
def hash_codes(codes: U32, size: Int, seed: int) -> np.uint64:
    """Exact 64-bit hash of `codes[:size]`: two chains, each with one multiplication per two characters, are mixed."""
    state = mix64(np.uint64(seed) ^ (np.uint64(size) * np.uint64(_BASE)))
    other = state ^ np.uint64(_MASK)
    i = 0
    while i + 4 <= size:
        state = (state ^ (np.uint64(codes[i]) | np.uint64(codes[i + 1]) << np.uint64(32))) * np.uint64(_BASE)
        other = (other ^ (np.uint64(codes[i + 2]) | np.uint64(codes[i + 3]) << np.uint64(32))) * np.uint64(_FACTOR)
        state ^= state >> np.uint64(32)
        other ^= other >> np.uint64(29)
        i += 4
    while i < size:
        state = mix64(state ^ np.uint64(codes[i])) + np.uint64(_BASE)
        i += 1
    return mix64(state ^ mix64(other))


def feature_hash(marker: int, feature: str) -> int:
    """The hash of one feature (a character n-gram of the side that `marker` names), in plain Python."""
    value = marker
    for character in feature:
        value = (value * _BASE + ord(character)) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@kernel(inline="always", leaf=True)
def _gram(codes: U32, i: Int, n: Int, marker: int) -> np.uint64:
    """The feature at i before mixing: the marker and n characters as the digits of a number in base `_BASE`."""
    value = np.uint64(marker)
    for k in range(n):
        value = value * np.uint64(_BASE) + np.uint64(codes[np.uint64(i) + np.uint64(k)])
    return value


@kernel(inline="always", leaf=True)
def _next_gram(value: np.uint64, codes: U32, i: Int, n: Int, weight: np.uint64, lead: np.uint64) -> np.uint64:
    """The feature at i + 1, from the feature at i: removes the first character and appends the next one.

    Args:
        weight: `_BASE ** n`, the weight of the first character after the multiplication.
        lead: correction that keeps the weight of the marker.
    """
    value = value * np.uint64(_BASE) + lead
    return value - np.uint64(codes[np.uint64(i)]) * weight + np.uint64(codes[np.uint64(i + n)])


@kernel(inline="always", leaf=True)
def _add(planes: U64, level: int, top: int, bits: np.uint64) -> None:
    """Adds 2**level to the counters of the set bits. No counter needs a plane beyond `top`. Counter b is bit b of all
    planes. The carry always runs to the last plane, because its end is hard to predict."""
    for k in range(level, top):
        carry = planes[k] & bits
        planes[k] ^= bits
        bits = carry


@kernel(leaf=True)
def add_features(codes: U32, size: Int, n: Int, marker: int, planes: U64, before: Int) -> Int:
    """Counts the features of one text: its character n-grams, or the whole text if it is shorter than n.

    The 64 counters are stored as bit planes, so that one feature costs a few operations on whole words. Carry-save
    adders add eight features at a time to the first three planes; carries go to the other planes.

    Args:
        codes: the normalised text in `codes[:size]`.
        n: characters of a feature.
        marker: the side of the text, `SOURCE` or `TARGET`.
        planes: uint64[40], the counters, added to.
        before: number of features already counted in the planes.

    Returns:
        The number of features.
    """
    if size == 0:
        return 0
    if size < n:
        n = size
    count = size - n + 1
    top = 0
    while (before + count) >> top:
        top += 1
    weight = np.uint64(1)
    for _ in range(n):
        weight *= np.uint64(_BASE)
    # value * _BASE + lead keeps the weight of the marker.
    lead = np.uint64(marker) * weight - np.uint64(marker) * weight * np.uint64(_BASE)
    value = _gram(codes, 0, n, marker)
    ones, twos, fours = planes[0], planes[1], planes[2]
    i = 0
    while i + 8 < count:
        a = mix64(value)
        value = _next_gram(value, codes, i, n, weight, lead)
        b = mix64(value)
        value = _next_gram(value, codes, i + 1, n, weight, lead)
        u = ones ^ a
        twos_a = (ones & a) | (u & b)
        ones = u ^ b
        a = mix64(value)
        value = _next_gram(value, codes, i + 2, n, weight, lead)
        b = mix64(value)
        value = _next_gram(value, codes, i + 3, n, weight, lead)
        u = ones ^ a
        twos_b = (ones & a) | (u & b)
        ones = u ^ b
        u = twos ^ twos_a
        fours_a = (twos & twos_a) | (u & twos_b)
        twos = u ^ twos_b
        a = mix64(value)
        value = _next_gram(value, codes, i + 4, n, weight, lead)
        b = mix64(value)
        value = _next_gram(value, codes, i + 5, n, weight, lead)
        u = ones ^ a
        twos_a = (ones & a) | (u & b)
        ones = u ^ b
        a = mix64(value)
        value = _next_gram(value, codes, i + 6, n, weight, lead)
        b = mix64(value)
        value = _next_gram(value, codes, i + 7, n, weight, lead)
        u = ones ^ a
        twos_b = (ones & a) | (u & b)
        ones = u ^ b
        u = twos ^ twos_a
        fours_b = (twos & twos_a) | (u & twos_b)
        twos = u ^ twos_b
        u = fours ^ fours_a
        eights = (fours & fours_a) | (u & fours_b)
        fours = u ^ fours_b
        _add(planes, 3, top, eights)
        i += 8
    planes[0], planes[1], planes[2] = ones, twos, fours
    while i < count:
        _add(planes, 0, top, mix64(value))
        if i + 1 < count:
            value = _next_gram(value, codes, i, n, weight, lead)
        i += 1
    return count


@kernel(leaf=True)
def majority(planes: U64, count: Int) -> np.uint64:
    """The fingerprint: the bits that are set in more than half of `count` features (a tie is 0, as in `simhash`)."""
    least = np.uint64(count // 2 + 1)
    above, equal = np.uint64(0), ~np.uint64(0)
    for level in range(planes.size - 1, -1, -1):
        if (least >> np.uint64(level)) & np.uint64(1):
            equal &= planes[level]
        else:
            above |= equal & planes[level]
            equal &= ~planes[level]
    return above | equal


@kernel
def fingerprints(
    src_offsets: I64,
    src: U8,
    tgt_offsets: I64,
    tgt: U8,
    sides: int,
    n: int,
    t: Tables,
    fingerprint: U64,
    text_hash: U64,
) -> None:
    """Fingerprint and exact hash of each row.

    Args:
        src_offsets, src, tgt_offsets, tgt: the two sides, as `string_buffers` returns them.
        sides: 1 source, 2 target, 3 both.
        n: characters of a feature.
        t: the folding tables.
        fingerprint, text_hash: uint64 (rows,), written.
    """
    longest = 0
    for row in range(fingerprint.size):
        longest = max(longest, src_offsets[row + 1] - src_offsets[row], tgt_offsets[row + 1] - tgt_offsets[row])
    codes = np.empty(6 * longest + 8, np.uint32)
    planes = np.zeros(40, np.uint64)
    for row in range(fingerprint.size):
        planes[:] = np.uint64(0)
        count: Int = 0
        exact = np.uint64(0)
        if sides & SOURCE:
            size = fold_text(src, src_offsets[row], src_offsets[row + 1], t, codes)
            count += add_features(codes, size, n, SOURCE, planes, count)
            exact = hash_codes(codes, size, SOURCE)
        if sides & TARGET:
            size = fold_text(tgt, tgt_offsets[row], tgt_offsets[row + 1], t, codes)
            count += add_features(codes, size, n, TARGET, planes, count)
            exact = mix64(exact) ^ hash_codes(codes, size, TARGET)
        fingerprint[row] = majority(planes, count)
        text_hash[row] = exact
