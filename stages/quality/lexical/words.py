"""Reads a line of UTF-8 as `text.decode` and `text.scan` do, but takes words that it has met from a memo.

Nine words in ten have occurred a short time before. A line is cut at ASCII characters that are no letters, eight bytes at a time. What
lies between is looked up by a hash, and only where it is not known decoded and taken apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import mix64
from corpusprep.kernels import kernel
from corpusprep.stages.bits import ONES, TOPS, copy_bytes, load64, trailing_zeros
from corpusprep.stages.quality.lexical import text
from corpusprep.stages.quality.lexical.text import Cut, Tables

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]

# A memo's slot: a hash of the bytes, the hashes of the word and of its stem, its facts, two numbers with the sounds, and the tokens.
_WORD, _STEM, _FACTS, _SOUNDS, _TOKENS = 1, 2, 3, 4, 6
_MOST_SOUNDS = 16
_ZERO, _NINE = 0x30, 0x39
_ROOM = text.MAX_TOKENS - 16  # a word is taken from the memo while there is surely room for all of it


@kernel(forceinline=True, leaf=True)
def _eight(data: U8, i: int) -> np.uint64:
    """`data[i:i + 8]` as one word; zeros for bytes that are not there."""
    if i + 8 <= data.size:
        return load64(data, i)
    word = np.uint64(0)
    for k in range(data.size - i):
        word |= np.uint64(data[i + k]) << np.uint64(8 * k)
    return word


@kernel(forceinline=True, leaf=True)
def _ends(word: np.uint64) -> np.uint64:
    """The highest bit of each byte that is ASCII and no letter."""
    low = (word | np.uint64(0x20 * ONES)) & np.uint64(0x7F * ONES)
    letters = (low + np.uint64((0x80 - 0x61) * ONES)) & ~(low + np.uint64((0x80 - 0x7B) * ONES))
    return ~(letters | word) & np.uint64(TOPS)


@kernel(leaf=True)
def read(cut: Cut, data: U8, start: int, end: int, tables: Tables, plan: I32) -> None:
    """Fills the buffers of a side, other than its code points, from `data[start:end]`."""
    counts = cut.counts
    counts[:] = 0
    cut.ends[0] = 0
    initial = True
    i = start
    while i < end:
        byte = data[i]
        if byte == 0x20:
            i += 1
            continue
        key, stop, ended = np.uint64(0), i, np.uint64(0)
        while ended == 0:
            word = _eight(data, stop)
            ended = _ends(word)
            if end - stop < 8:
                ended |= np.uint64(0x80) << np.uint64(8 * (end - stop))
            length = 8
            if ended:
                length = int(trailing_zeros(ended) >> 3)
                word &= (np.uint64(1) << np.uint64(8 * length)) - np.uint64(1)
            key = mix64(key ^ word)
            stop += length
        numeric = stop == i and _ZERO <= byte <= _NINE
        if numeric:
            while stop < end and (_ZERO <= data[stop] <= _NINE or _separates(data[stop])):
                stop += 1
        if stop == i:
            text.count_mark(np.uint32(byte), counts)
            i += 1
            continue
        if _goes_on(data, start, i, stop, end):
            text.scan(cut, text.decode(data, start, end, cut.points), tables, plan)
            return
        if numeric:
            initial = text.scan_on(cut, text.decode(data, i, stop, cut.points), tables, plan, initial)
        else:
            initial = _word(cut, data, i, stop, key | np.uint64(1), tables, plan, initial)
        i = stop


@kernel(forceinline=True, leaf=True)
def _separates(byte: np.uint8) -> bool:
    """Whether a byte can stand between the thousands of a number."""
    return byte == 0x2E or byte == 0x2C or byte == 0x27


@kernel(forceinline=True, leaf=True)
def _goes_on(data: U8, start: int, i: int, stop: int, end: int) -> bool:
    """Whether a number in `data[i:stop]`, a word or digits with separators, may go on outside of it: in digits of another script, or
    behind such."""
    if stop < end and data[stop - 1] >= 0x80 and _separates(data[stop]):
        return stop + 1 < end and (data[stop + 1] >= 0x80 or _ZERO <= data[stop + 1] <= _NINE)
    return _ZERO <= data[i] <= _NINE and ((i > start and data[i - 1] >= 0x80) or (stop < end and data[stop] >= 0x80))


@kernel(forceinline=True, leaf=True)
def _word(
    cut: Cut, data: U8, start: int, stop: int, key: np.uint64, tables: Tables, plan: I32, initial: bool
) -> bool:  # fmt: skip
    """Adds what lies between two ASCII characters that are no letters. Returns whether a word that follows is the first."""
    counts, number = cut.counts, np.int64(key & np.uint64(cut.memo.shape[0] - 1))
    slot = cut.memo[number]
    words, n, names = counts[text.N_WORDS], counts[text.N_TOKENS], counts[text.N_NAMES]
    at = np.int64(cut.ends[names])
    room = words < _ROOM and n < _ROOM and names < _ROOM and at + 3 * (stop - start) <= text.MAX_SOUNDS
    if slot[0] != key or not room:
        points = text.decode(data, start, stop, cut.points)
        still = text.scan_on(cut, points, tables, plan, initial)
        if room:
            _keep(cut, slot, key, points, words, n, names)
        return still
    facts, first = np.int64(slot[_FACTS]), np.int64(initial)
    size, tokens, sounds, capital = facts & 0xFF, (facts >> 8) & 0xFF, (facts >> 16) & 0xFF, facts >> 24
    counts[text.FINAL] = text.NOTHING
    counts[text.N_LETTERS] += size
    copy_bytes(cut.sounds, at, cut.memo_bytes, 8 * (number * cut.memo.shape[1] + _SOUNDS), _MOST_SOUNDS)
    cut.ends[names + 1] = at + sounds
    cut.marks[names] = capital * text.CAPITAL + first * text.INITIAL
    counts[text.N_NAMES] = names + (sounds > 0)
    counts[text.N_CAPITALS] += capital & (1 - first)
    cut.words[words], cut.stems[words], cut.sizes[words] = slot[_WORD], slot[_STEM], size
    counts[text.N_WORDS] = words + 1
    cut.tokens[n], cut.tokens[n + 1] = slot[_TOKENS], slot[_TOKENS + 1]
    cut.kinds[n], cut.kinds[n + 1] = text.WORD, text.PIECE
    for k in range(2, tokens):
        cut.tokens[n + k], cut.kinds[n + k] = slot[_TOKENS + k], text.PIECE
    counts[text.N_TOKENS] = n + tokens
    return False


@kernel(leaf=True)
def _keep(cut: Cut, slot: U64, key: np.uint64, points: int, words: int, n: int, names: int) -> None:
    """Stores in a slot what `scan_on` has added, if that is one word of all the code points, and it has room."""
    counts = cut.counts
    tokens, sounds = counts[text.N_TOKENS] - n, np.int64(0)
    if counts[text.N_WORDS] != words + 1 or cut.sizes[words] != points or not 1 <= tokens <= slot.size - _TOKENS:
        return
    capital = np.int64(cut.capital[0])
    at = np.int64(cut.ends[names])
    if counts[text.N_NAMES] > names:
        sounds = np.int64(cut.ends[names + 1]) - at
    if sounds > _MOST_SOUNDS or cut.kinds[n] != text.WORD:
        return
    slot[0], slot[_WORD], slot[_STEM] = key, cut.words[words], cut.stems[words]
    slot[_FACTS] = points | tokens << 8 | sounds << 16 | capital << 24
    for part in range(2):
        packed = np.uint64(0)
        for k in range(8):
            if 8 * part + k < sounds:
                packed |= np.uint64(cut.sounds[at + 8 * part + k]) << np.uint64(8 * k)
        slot[_SOUNDS + part] = packed
    for k in range(tokens):
        slot[_TOKENS + k] = cut.tokens[n + k]
