"""Bitext as numbers: the kernel that cuts a line into token hashes and surface marks, and its character tables."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from corpusprep.arrow import mix64
from corpusprep.codes import language_of, script_of

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Classes of characters.
BREAK, LETTER, HANGUL, IDEOGRAPH, CLUSTER, DIGIT, SKIP = range(7)
_POINTS = 0x20000  # code points with an entry in the tables; those beyond are ideographs

# Blocks of scripts that are written without spaces between words: (first, last, class).
_UNSPACED = (
    (0x0E00, 0x0EFF, CLUSTER),  # Thai, Lao
    (0x0F00, 0x0FFF, CLUSTER),  # Tibetan
    (0x1000, 0x109F, CLUSTER),  # Myanmar
    (0x1780, 0x17FF, CLUSTER),  # Khmer
    (0x3040, 0x30FF, IDEOGRAPH),  # kana
    (0x31F0, 0x31FF, IDEOGRAPH),
    (0x3400, 0x4DBF, IDEOGRAPH),
    (0x4E00, 0x9FFF, IDEOGRAPH),
    (0xF900, 0xFAFF, IDEOGRAPH),
    (0x1100, 0x11FF, HANGUL),
    (0xAC00, 0xD7AF, HANGUL),
)


class Tables(NamedTuple):
    """Per code point: its class, its folded form (lower case, compatibility form, ASCII digit), and its consonants."""

    classes: U8
    folded: U32
    sounds: U8  # (points, 3): up to three consonant classes, 0 where there are fewer


# Consonants that scripts and languages tell apart in different ways share a class; h, w and y come and go, as vowels do.
_CONSONANTS = {c: k for k, group in enumerate(("bfpv", "dt", "cgkqx", "jsz", "m", "n", "lr"), 1) for c in group}


def _sounds(character: str) -> list[int]:
    """Consonant classes of a letter of any script that Unicode names by sound."""
    name = unicodedata.name(character, "")
    head, _, rest = name.partition(" ")
    if head == "LATIN":
        letters = rest.rpartition("LETTER ")[2].partition(" ")[0].lower()
    elif head in ("HANGUL", "KATAKANA", "HIRAGANA", "ETHIOPIC"):
        letters = name.rpartition(" ")[2].lower()
        if "SMALL TU" in name:
            letters = ""
    elif "VOWEL" in name or "TONE" in name or head in ("CJK", "TANGUT", "YI", "BOPOMOFO"):
        letters = ""
    elif head in ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"):
        letters = "" if "SARA" in name or "MAI " in name or "SIGN" in name else rest.partition(" ")[2].partition(" ")[0].lower()
    else:
        letters = "n" if "ANUSVARA" in name else rest.rpartition("LETTER ")[2].lower()
        if "SIGN" in letters or " I" in letters.upper()[-2:]:
            letters = "n" if "anusvara" in letters else ""
        letters = letters.rpartition(" ")[2] if head == "CYRILLIC" else letters.partition(" ")[0]
        # A letter is named by its sound with a vowel after it, or before it: te, el. What follows is the name's own.
        found = [c for c in letters[:2] if c in _CONSONANTS] or ([] if letters[:1] in "aeiou" else [c for c in letters[:3] if c in _CONSONANTS])
        letters = found[0] if found and not letters.startswith(("ain", "ayin", "alef", "aleph", "alpha", "eta", "epsilon", "iota", "omega", "omicron", "upsilon")) else ""
    letters = letters.replace("ng", "n").replace("sh", "s").replace("ch", "j").replace("ph", "p").replace("ts", "s")
    return [_CONSONANTS[c] for c in letters if c in _CONSONANTS][:3]


@functools.cache
def tables() -> Tables:
    """The character tables, made once a process."""
    classes = np.zeros(_POINTS, np.uint8)
    folded = np.arange(_POINTS, dtype=np.uint32)
    for point in range(_POINTS):
        character = chr(point)
        category = unicodedata.category(character)
        kind = category[0]
        if kind in "LM":
            classes[point] = LETTER
        elif category == "Nd":
            classes[point] = DIGIT
            folded[point] = ord("0") + unicodedata.digit(character)
        elif category == "Cf":
            classes[point] = SKIP
        if kind == "L" or category == "Nd":
            plain = unicodedata.normalize("NFKC", character).lower()
            if len(plain) == 1 and kind == "L":
                folded[point] = ord(plain)
    for first, last, class_ in _UNSPACED:
        block = classes[first : last + 1]
        block[block == LETTER] = class_
    # Vowel marks that Arabic and Hebrew writers put or leave out at will, and the Arabic stretch.
    for first, last in ((0x0591, 0x05C7), (0x0610, 0x061A), (0x0640, 0x0640), (0x064B, 0x065F), (0x0670, 0x0670)):
        block = classes[first : last + 1]
        block[:] = SKIP
    sounds = np.zeros((_POINTS, 3), np.uint8)
    for point in np.flatnonzero((classes >= LETTER) & (classes <= CLUSTER)):
        if not 0x3400 <= point <= 0x9FFF and point < 0xF900:
            for k, sound in enumerate(_sounds(chr(int(point)))):
                sounds[point, k] = sound
    return Tables(classes, folded, sounds)


@numba.njit(cache=True, nogil=True)
def decode(data: U8, start: int, end: int, out: U32) -> int:
    """UTF-8 bytes `data[start:end]` as code points into `out`; returns how many."""
    n = 0
    i = start
    while i < end:
        b = np.uint32(data[i])
        if b < 0x80:
            out[n] = b
            i += 1
        elif b < 0xE0 and i + 1 < end:
            out[n] = ((b & np.uint32(0x1F)) << np.uint32(6)) | (np.uint32(data[i + 1]) & np.uint32(0x3F))
            i += 2
        elif b < 0xF0 and i + 2 < end:
            out[n] = (
                ((b & np.uint32(0x0F)) << np.uint32(12))
                | ((np.uint32(data[i + 1]) & np.uint32(0x3F)) << np.uint32(6))
                | (np.uint32(data[i + 2]) & np.uint32(0x3F))
            )
            i += 3
        elif i + 3 < end:
            out[n] = (
                ((b & np.uint32(0x07)) << np.uint32(18))
                | ((np.uint32(data[i + 1]) & np.uint32(0x3F)) << np.uint32(12))
                | ((np.uint32(data[i + 2]) & np.uint32(0x3F)) << np.uint32(6))
                | (np.uint32(data[i + 3]) & np.uint32(0x3F))
            )
            i += 4
        else:
            break
        n += 1
    return n


@numba.njit(cache=True, nogil=True)
def gram(points: U32, start: int, end: int, salt: np.uint64) -> np.uint64:
    """Hash of the code points `points[start:end]`."""
    state = salt
    for i in range(start, end):
        state = mix64(state ^ np.uint64(points[i])) + np.uint64(0x9E3779B97F4A7C15)
    return mix64(state)


# How the words of a class of characters become tokens: whole words, prefixes of these lengths, n-grams of these lengths
# (bit k stands for length k).
class Units(NamedTuple):
    """Token plan of one language: int32 of shape (classes, 3): whole word, prefix lengths, n-gram lengths."""

    plan: I32


def units(language: str) -> Units:
    """The token plan of a language."""
    plan = np.zeros((7, 3), np.int32)
    plan[LETTER] = (1, 1 << 4 | 1 << 6, 0)
    plan[HANGUL] = (1, 1 << 1 | 1 << 2, 1 << 2)
    plan[IDEOGRAPH] = (0, 0, 1 << 1 | 1 << 2)
    plan[CLUSTER] = (0, 0, 1 << 2 | 1 << 4)
    return Units(plan)


MAX_TOKENS = 512
WORD, PIECE, NUMBER = range(3)
_SALT_WORD = np.uint64(0x1001)
_SALT_PREFIX = np.uint64(0x2002)
_SALT_GRAM = np.uint64(0x3003)
_SALT_NUMBER = np.uint64(0x4004)
# Places in the counts of a side.
N_TOKENS, N_WORDS, N_NUMBERS, N_LETTERS, N_MARKS, QUESTION, EXCLAIM, FINAL, QUOTES, PARENS, COMMAS, COLON, DOTS = range(13)


@numba.njit(cache=True, nogil=True)
def scan(
    points: U32,
    n: int,
    classes: U8,
    folded: U32,
    plan: I32,
    tokens: U64,
    kinds: U8,
    words: U64,
    stems: U64,
    shapes: U8,
    numbers: U64,
    counts: I64,
) -> None:
    """Cuts one side of a row, given as code points, into tokens and surface marks.

    `points` is folded in place. `tokens` and `kinds` take the tokens with repeats, `words`, `stems` (first four characters)
    and `shapes` (length, plus 128 where it begins with a capital) the words, `numbers` the numbers, `counts` how many of each.
    """
    counts[:] = 0
    room = tokens.size
    i = 0
    while i < n:
        p = points[i]
        c = classes[p] if p < _POINTS else np.uint8(IDEOGRAPH)
        if c == SKIP:
            i += 1
            continue
        if c == BREAK:
            if p == 0x3F or p == 0xFF1F or p == 0x61F or p == 0x2E2E or p == 0x37E:
                counts[QUESTION] += 1
                counts[FINAL] = 2
            elif p == 0x21 or p == 0xFF01:
                counts[EXCLAIM] += 1
                counts[FINAL] = 3
            elif p == 0x2E or p == 0x3002 or p == 0x964 or p == 0xFF0E or p == 0x6D4:
                counts[FINAL] = 1
                counts[DOTS] += 1
            elif p == 0x2026:
                counts[FINAL] = 1
                counts[DOTS] += 3
            elif p == 0x2C or p == 0x3001 or p == 0xFF0C or p == 0x60C:
                counts[COMMAS] += 1
                counts[FINAL] = 4
            elif p == 0x3A or p == 0xFF1A or p == 0x3B or p == 0xFF1B:
                counts[COLON] += 1
                counts[FINAL] = 4
            elif p == 0x28 or p == 0xFF08:
                counts[PARENS] += 1
            elif p == 0x22 or p == 0xAB or p == 0x201C or p == 0x201E or p == 0x300C or p == 0x300E:
                counts[QUOTES] += 1
            i += 1
            continue
        counts[FINAL] = 0
        if c == DIGIT:
            h = _SALT_NUMBER
            while i < n:
                p = points[i]
                if p < _POINTS and classes[p] == DIGIT:
                    h = mix64(h ^ np.uint64(folded[p])) + np.uint64(1)
                    i += 1
                elif (
                    (p == 0x2E or p == 0x2C or p == 0xA0 or p == 0x202F or p == 0x27)
                    and i + 3 < n
                    and _digit(points[i + 1], classes)
                    and _digit(points[i + 2], classes)
                    and _digit(points[i + 3], classes)
                    and not (i + 4 < n and _digit(points[i + 4], classes))
                ):
                    i += 1  # a thousands separator
                else:
                    break
            h = mix64(h)
            if counts[N_NUMBERS] < numbers.size:
                numbers[counts[N_NUMBERS]] = h
                counts[N_NUMBERS] += 1
            if counts[N_TOKENS] < room:
                tokens[counts[N_TOKENS]] = h
                kinds[counts[N_TOKENS]] = NUMBER
                counts[N_TOKENS] += 1
            continue
        # A run of one class, folded in place with the skipped characters left out.
        start = i
        capital = folded[p] != p if p < _POINTS else False
        w = i
        while i < n:
            p = points[i]
            d = classes[p] if p < _POINTS else np.uint8(IDEOGRAPH)
            if d == SKIP:
                i += 1
                continue
            if d != c:
                break
            points[w] = folded[p] if p < _POINTS else p
            w += 1
            i += 1
        length = w - start
        counts[N_LETTERS] += length
        whole, prefixes, grams = plan[c, 0], plan[c, 1], plan[c, 2]
        if c == LETTER and counts[N_WORDS] < words.size:
            k = counts[N_WORDS]
            words[k] = gram(points, start, w, _SALT_WORD)
            stems[k] = gram(points, start, min(start + 4, w), _SALT_PREFIX)
            shapes[k] = np.uint8(min(length, 127)) | np.uint8(128 if capital else 0)
            counts[N_WORDS] += 1
        if whole == 1 and counts[N_TOKENS] < room:
            tokens[counts[N_TOKENS]] = gram(points, start, w, _SALT_WORD)
            kinds[counts[N_TOKENS]] = WORD
            counts[N_TOKENS] += 1
        for size in range(1, 16):
            if (prefixes >> size) & 1 and length > size and counts[N_TOKENS] < room:
                tokens[counts[N_TOKENS]] = gram(points, start, start + size, _SALT_PREFIX)
                kinds[counts[N_TOKENS]] = PIECE
                counts[N_TOKENS] += 1
            if (grams >> size) & 1:
                for at in range(start, w - size + 1):
                    if counts[N_TOKENS] < room:
                        tokens[counts[N_TOKENS]] = gram(points, at, at + size, _SALT_GRAM + np.uint64(size))
                        kinds[counts[N_TOKENS]] = WORD if size > 1 and whole == 0 else PIECE
                        counts[N_TOKENS] += 1


@numba.njit(cache=True, nogil=True)
def _digit(point: np.uint32, classes: U8) -> bool:
    return bool(point < _POINTS and classes[point] == DIGIT)
