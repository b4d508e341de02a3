"""Tokenises a line of text: the kernel that extracts token hashes, names and marks, and its character tables."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import mix64
from corpusprep.codes import language_of
from corpusprep.kernels import kept, kernel

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Classes of characters. Words are runs of one class; ideographs (and kana) and clusters (Thai, Khmer, …) are written
# without spaces, so that a run of them is not a word.
BREAK, LETTER, HANGUL, IDEOGRAPH, CLUSTER, DIGIT, SKIP = range(7)
_POINTS = 0x20000  # code points with an entry in the tables; those beyond are ideographs

_BLOCKS = (
    (0x0E00, 0x0EFF, CLUSTER),  # Thai, Lao
    (0x0F00, 0x0FFF, CLUSTER),  # Tibetan
    (0x1000, 0x109F, CLUSTER),  # Myanmar
    (0x1100, 0x11FF, HANGUL),
    (0x1780, 0x17FF, CLUSTER),  # Khmer
    (0x3040, 0x30FF, IDEOGRAPH),  # kana
    (0x31F0, 0x31FF, IDEOGRAPH),
    (0x3400, 0x4DBF, IDEOGRAPH),
    (0x4E00, 0x9FFF, IDEOGRAPH),
    (0xAC00, 0xD7AF, HANGUL),
    (0xF900, 0xFAFF, IDEOGRAPH),
)
# Optional marks in Arabic and Hebrew, and the Arabic elongation (tatweel).
_OPTIONAL = ((0x0591, 0x05C7), (0x0610, 0x061A), (0x0640, 0x0640), (0x064B, 0x065F), (0x0670, 0x0670))

# Consonants that are not distinguished in all scripts and languages share a class; h, w and y are ignored like vowels.
_CONSONANTS = {c: k for k, group in enumerate(("bfpv", "dt", "cgkqx", "jsz", "m", "n", "lr"), 1) for c in group}
# Letters that are vowels or silent, although their names may begin with a consonant.
_SILENT = ("alef", "aleph", "alpha", "eta", "epsilon", "omega", "omicron", "upsilon", "vav", "vocalic")


class Tables(NamedTuple):
    """Per code point: its class, its folded form (lower case, compatibility form, ASCII digit), and its consonants."""

    classes: U8
    folded: U32
    sounds: U8  # (points, 3): consonant classes, 0 if there are fewer


@kept(Tables)
def tables() -> Tables:
    """The character tables."""
    classes = np.zeros(_POINTS, np.uint8)
    folded = np.arange(_POINTS, dtype=np.uint32)
    for point in range(_POINTS):
        category = unicodedata.category(chr(point))
        if category[0] in "LM":
            classes[point] = LETTER
        elif category == "Nd":
            classes[point] = DIGIT
            folded[point] = ord("0") + unicodedata.digit(chr(point))
        elif category == "Cf":
            classes[point] = SKIP
        if category[0] == "L":
            plain = unicodedata.normalize("NFKC", chr(point)).lower()
            if len(plain) == 1:
                folded[point] = ord(plain)
    for first, last, class_ in _BLOCKS:
        block = classes[first : last + 1]
        block[block == LETTER] = class_
    for first, last in _OPTIONAL:
        classes[first : last + 1] = SKIP
    sounds = np.zeros((_POINTS, 3), np.uint8)
    for point in np.flatnonzero((classes >= LETTER) & (classes <= CLUSTER)).tolist():
        if not 0x3400 <= point <= 0x9FFF:
            for k, sound in enumerate(_sounds(chr(point))):
                sounds[point, k] = sound
    return Tables(classes, folded, sounds)


def _sounds(character: str) -> list[int]:
    """Consonant classes of a letter, from its Unicode name, which spells its sound in Latin letters."""
    name = unicodedata.name(character, "").lower()
    script, _, rest = name.partition(" ")
    if script == "latin":
        spelt = rest.rpartition("letter ")[2].partition(" ")[0]
    elif script in ("hangul", "katakana", "hiragana", "ethiopic"):
        spelt = "" if rest.endswith("small tu") else rest.rpartition(" ")[2]
    elif script in ("thai", "lao"):
        first = rest.partition(" ")[2].partition(" ")[0]
        spelt = "" if first in ("sara", "mai", "vowel", "sign") else first
    elif "letter " in rest:
        # The name is the sound with a vowel after or before it (te, el, kaf); later letters belong only to the name.
        spelt = rest.rpartition("letter ")[2].removeprefix("final ")
        spelt = spelt.rpartition(" ")[2] if script == "cyrillic" else spelt.partition(" ")[0]
        spelt = spelt[:1] if script == "georgian" else spelt  # an, en, in are its vowels
        spelt = "" if spelt.startswith(_SILENT) else "".join(c for c in spelt[:2] if c in _CONSONANTS)[:1]
    else:
        spelt = "n" if rest.endswith("sign anusvara") else ""
    for digraph, one in (("ng", "n"), ("sh", "s"), ("ch", "j"), ("ph", "p"), ("ts", "s")):
        spelt = spelt.replace(digraph, one)
    return [_CONSONANTS[c] for c in spelt if c in _CONSONANTS][:3]


def plan(language: str, level: int) -> I32:
    """How words of each class of characters become tokens.

    Args:
        language: a canonical code.
        level: 0 has the fewest pieces; 1 and 2 add smaller ones, for corpora too small to contain most words twice.

    Returns:
        int32 of shape (7, 3): by class, whether the whole word is a token; lengths of prefixes; lengths of n-grams (a
        set bit k stands for length k).
    """
    out = np.zeros((7, 3), np.int32)
    # English has little inflection: its trigrams carry less information than those of other languages.
    trigrams = level == 2 or (level == 1 and language_of(language) != "en")
    out[LETTER] = (1, 1 << 4 | (1 << 6 if level else 0), 1 << 3 if trigrams else 0)
    out[HANGUL] = (1, 1 << 1 | 1 << 2, 1 << 2)
    out[IDEOGRAPH] = (0, 0, 1 << 1 | 1 << 2)
    out[CLUSTER] = (0, 0, 1 << 3)
    return out


MAX_TOKENS = 512
_LONGEST = 7  # characters of a prefix
WORD, PIECE, NUMBER = range(3)  # kinds of tokens
CAPITAL, INITIAL, RUN = 1, 2, 4  # of a name: begins with a capital, is first in its row, may contain several words
_SALT_WORD = np.uint64(0x1001)
_SALT_PREFIX = np.uint64(0x2002)
_SALT_GRAM = np.uint64(0x3003)
_SALT_NUMBER = np.uint64(0x4004)
# Indices into `Cut.counts`.
(N_TOKENS, N_WORDS, N_NUMBERS, N_NAMES, N_LETTERS, N_CAPITALS,
 QUESTIONS, EXCLAMATIONS, FINAL, QUOTES, BRACKETS, COMMAS, COLONS) = range(13)  # fmt: skip
# The final mark of a row, in `counts[FINAL]`.
NOTHING, STOP, QUESTION, EXCLAMATION, PAUSE = range(5)


class Cut(NamedTuple):
    """Buffers for one side of a row, reused for each row."""

    points: U32  # the code points
    tokens: U64  # hashes, with repeats
    kinds: U8
    words: U64  # hashes of words of LETTER
    stems: U64  # hashes of their first four characters
    prefixes: U64  # states of the hash after each of a word's first characters
    sizes: U8  # number of characters of each word
    numbers: U64  # hashes of runs of digits
    sounds: U8  # consonants of all names
    ends: I32  # name k is sounds[ends[k]:ends[k + 1]]
    marks: U8  # CAPITAL, INITIAL, RUN
    counts: I64
    capital: U8  # (1,), whether the word that was scanned last begins with a capital
    memo: U64  # see `words.py`
    memo_bytes: U8  # the same


MAX_SOUNDS = 8 * MAX_TOKENS
_SLOTS = 1 << 13  # of a memo


@kernel
def make_cut(longest: int, plan: I32) -> Cut:
    """Buffers for rows of up to `longest` bytes, whose words become tokens by a plan."""
    tokens = 2 if plan[LETTER, 2] == 0 and plan[LETTER, 1] == 1 << 4 else 10
    memo = np.zeros((_SLOTS, 6 + tokens), np.uint64)
    return Cut(
        np.empty(longest + 1, np.uint32), np.empty(MAX_TOKENS, np.uint64), np.empty(MAX_TOKENS, np.uint8),
        np.empty(MAX_TOKENS, np.uint64), np.empty(MAX_TOKENS, np.uint64), np.empty(_LONGEST, np.uint64),
        np.empty(MAX_TOKENS, np.uint8), np.empty(MAX_TOKENS, np.uint64), np.empty(MAX_SOUNDS + 16, np.uint8),
        np.zeros(MAX_TOKENS + 1, np.int32), np.empty(MAX_TOKENS, np.uint8), np.zeros(13, np.int64), np.zeros(1, np.uint8),
        memo, memo.reshape(memo.size).view(np.uint8),
    )  # fmt: skip


@kernel(leaf=True)
def decode(data: U8, start: int, end: int, out: U32) -> int:
    """Decodes the UTF-8 bytes `data[start:end]` to code points in `out`, and returns their number."""
    n = 0
    i = start
    low = np.uint32(0x3F)
    while i < end:
        b = np.uint32(data[i])
        if b < 0x80:
            out[n] = b
            i += 1
        elif b < 0xE0:
            if i + 1 >= end:
                break
            out[n] = ((b & np.uint32(0x1F)) << np.uint32(6)) | (np.uint32(data[i + 1]) & low)
            i += 2
        elif b < 0xF0:
            if i + 2 >= end:
                break
            middle = (np.uint32(data[i + 1]) & low) << np.uint32(6)
            out[n] = ((b & np.uint32(0x0F)) << np.uint32(12)) | middle | (np.uint32(data[i + 2]) & low)
            i += 3
        else:
            if i + 3 >= end:
                break
            middle = ((np.uint32(data[i + 1]) & low) << np.uint32(12)) | (
                (np.uint32(data[i + 2]) & low) << np.uint32(6)
            )
            out[n] = ((b & np.uint32(0x07)) << np.uint32(18)) | middle | (np.uint32(data[i + 3]) & low)
            i += 4
        n += 1
    return n


@kernel(forceinline=True, leaf=True)
def _step(state: np.uint64, point: np.uint32) -> np.uint64:
    state = (state ^ np.uint64(point)) * np.uint64(0x9E3779B97F4A7C15)
    return state ^ (state >> np.uint64(32))


@kernel(forceinline=True, leaf=True)
def _hash(points: U32, start: int, end: int, salt: np.uint64) -> np.uint64:
    state = salt
    for i in range(start, end):
        state = _step(state, points[i])
    return mix64(state)


@kernel(forceinline=True, leaf=True)
def _class(point: np.uint32, classes: U8) -> np.int64:
    return np.int64(classes[point]) if point < _POINTS else np.int64(IDEOGRAPH)


@kernel(forceinline=True, leaf=True)
def count_mark(point: np.uint32, counts: I64) -> None:
    """Counts a punctuation mark of any script."""
    p = point
    if p == 0x3F or p == 0xFF1F or p == 0x61F or p == 0x2E2E or p == 0x37E:
        counts[QUESTIONS] += 1
        counts[FINAL] = QUESTION
    elif p == 0x21 or p == 0xFF01:
        counts[EXCLAMATIONS] += 1
        counts[FINAL] = EXCLAMATION
    elif (
        p == 0x2E or p == 0x3002 or p == 0x964 or p == 0xFF0E or p == 0x6D4 or p == 0x2026 or p == 0x104B or p == 0x17D4
    ):
        counts[FINAL] = STOP
    elif p == 0x2C or p == 0x3001 or p == 0xFF0C or p == 0x60C:
        counts[COMMAS] += 1
        counts[FINAL] = PAUSE
    elif p == 0x3A or p == 0xFF1A or p == 0x3B or p == 0xFF1B or p == 0x61B:
        counts[COLONS] += 1
        counts[FINAL] = PAUSE
    elif p == 0x28 or p == 0xFF08 or p == 0x5B:
        counts[BRACKETS] += 1
    elif p == 0x22 or p == 0xAB or p == 0x201C or p == 0x201E or p == 0x300C or p == 0x300E:
        counts[QUOTES] += 1


@kernel(forceinline=True, leaf=True)
def _add(token: np.uint64, kind: int, cut: Cut) -> None:
    k = cut.counts[N_TOKENS]
    if k < MAX_TOKENS:
        cut.tokens[k] = token
        cut.kinds[k] = kind
        cut.counts[N_TOKENS] = k + 1


@kernel(forceinline=True, leaf=True)
def _number(cut: Cut, n: int, i: int, classes: U8, folded: U32) -> int:
    """Reads the number at index i, without thousands separators, and returns the index after it."""
    points = cut.points
    h = _SALT_NUMBER
    while i < n:
        p = points[i]
        if _class(p, classes) == DIGIT:
            h = mix64(h ^ np.uint64(folded[p])) + np.uint64(1)
            i += 1
            continue
        if not (p == 0x2E or p == 0x2C or p == 0xA0 or p == 0x202F or p == 0x27):
            break
        group = 0
        while i + 1 + group < n and group < 4 and _class(points[i + 1 + group], classes) == DIGIT:
            group += 1
        if group != 3:
            break
        i += 1
    h = mix64(h)
    if cut.counts[N_NUMBERS] < MAX_TOKENS:
        cut.numbers[cut.counts[N_NUMBERS]] = h
        cut.counts[N_NUMBERS] += 1
    _add(h, NUMBER, cut)
    return i


@kernel(forceinline=True, leaf=True)
def _name(cut: Cut, start: int, end: int, mark: int, sounds: U8) -> None:
    """Stores the consonants of `points[start:end]` if there are at least two; adjacent repeats are merged."""
    k = cut.counts[N_NAMES]
    at = np.int64(cut.ends[k])
    if k >= MAX_TOKENS or at + 3 * (end - start) > MAX_SOUNDS:
        return
    first, last = at, np.uint8(0)
    for i in range(start, end):
        p = cut.points[i]
        if p < _POINTS:
            c = sounds[p, 0]
            cut.sounds[at] = c
            new = np.int64((c != 0) & (c != last))
            at += new
            last += (c - last) * np.uint8(new)
            if sounds[p, 1] != 0:
                for s in range(1, 3):
                    c = sounds[p, s]
                    if c != 0 and c != last:
                        cut.sounds[at] = last = c
                        at += 1
    if at - first >= 2:
        cut.ends[k + 1] = at
        cut.marks[k] = mark
        cut.counts[N_NAMES] = k + 1


@kernel(leaf=True)
def scan(cut: Cut, n: int, tables: Tables, plan: I32) -> None:
    """Fills the buffers of a side from its n code points in `cut.points`, which are folded in place."""
    cut.counts[:] = 0
    cut.ends[0] = 0
    scan_on(cut, n, tables, plan, True)


@kernel(leaf=True)
def scan_on(cut: Cut, n: int, tables: Tables, plan: I32, initial: bool) -> bool:
    """Adds n code points to what the buffers of a side have. `initial` says whether a word is the first of its row; so does the
    result, for a word that follows."""
    points, counts = cut.points, cut.counts
    classes, folded, sounds = tables.classes, tables.folded, tables.sounds
    i = 0
    while i < n:
        c = _class(points[i], classes)
        if c == SKIP:
            i += 1
            continue
        if c == BREAK:
            count_mark(points[i], counts)
            i += 1
            continue
        counts[FINAL] = NOTHING
        if c == DIGIT:
            i = _number(cut, n, i, classes, folded)
            initial = False
            continue
        start = w = i
        capital = points[i] < _POINTS and folded[points[i]] != points[i] and c == LETTER
        cut.capital[0] = capital
        whole, prefixes, grams = plan[c, 0] == 1, plan[c, 1], plan[c, 2]
        spelt = whole or prefixes != 0 or c == LETTER
        word, prefix = _SALT_WORD, _SALT_PREFIX
        while i < n:
            p = points[i]
            d = _class(p, classes)
            if d != c and d != SKIP:
                break
            if d == c:
                p = folded[p] if p < _POINTS else p
                points[w] = p
                if spelt:
                    word = _step(word, p)
                    if w - start < _LONGEST:
                        prefix = _step(prefix, p)
                        cut.prefixes[w - start] = prefix
                w += 1
            i += 1
        length = w - start
        counts[N_LETTERS] += length
        if c in (LETTER, HANGUL):
            mark = (CAPITAL if capital else 0) | (INITIAL if initial else 0)
            _name(cut, start, w, mark, sounds)
            if capital and not initial:
                counts[N_CAPITALS] += 1
        elif c == CLUSTER:
            _name(cut, start, w, RUN, sounds)
        else:  # the runs of katakana, which spell foreign names
            a = start
            while a < w:
                b = a
                while b < w and points[b] >= 0x30A0 and points[b] <= 0x30FF:
                    b += 1
                if b > a:
                    _name(cut, a, b, 0, sounds)
                a = max(b, a + 1)
        initial = False
        if c == LETTER and counts[N_WORDS] < MAX_TOKENS:
            k = counts[N_WORDS]
            cut.words[k] = mix64(word)
            cut.stems[k] = mix64(cut.prefixes[min(length, 4) - 1])
            cut.sizes[k] = min(length, 255)
            counts[N_WORDS] = k + 1
        if whole:
            _add(mix64(word), WORD, cut)
        size = 1
        while (prefixes | grams) >> size:
            if (prefixes >> size) & 1 and length > size:
                _add(mix64(cut.prefixes[size - 1]), PIECE, cut)
            if (grams >> size) & 1:
                kind = PIECE if whole or size == 1 else WORD
                for at in range(start, w - size + 1):
                    _add(_hash(points, at, at + size, _SALT_GRAM + np.uint64(size)), kind, cut)
            size += 1
    return initial
