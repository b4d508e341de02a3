"""Kernels that measure one text for the rules of the `clean` stage.

A text is first written as one number per character, its facts. Everything that is counted for each character follows from
bit sets of 64 characters, so that words and punctuation, whose places are hard to predict, cost no branches. Only rare parts
are looked at one by one: URLs, digits, question marks and letters of several scripts.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import mix64
from corpusprep.kernels import kernel
from corpusprep.stages import languages
from corpusprep.stages.bits import TOPS, leading_zeros, load64, popcount, trailing_zeros
from corpusprep.stages.clean.text import decode
from corpusprep.stages.languages import DIGIT, LETTER, MARK, PUNCTUATION

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

MAX_GROUPS = 64  # groups of digits that are compared per side
MAX_DIGITS = 512
GRAM = 8  # characters of a phrase in the repetition rule
TABLE_BITS = 13
BLOCK = 64  # characters of a bit set
PART = 512  # bytes of text that are searched together for what is rare
RARE_URL, RARE_QUESTION = 1, 2

# The facts of a character: its lower case (18 bits), the number of its script (6 bits), and these flags.
FOLD_MASK = (1 << 18) - 1
SCRIPT, SCRIPT_MASK, FLAGS = 18, 63, 24
_LETTER, _DIGIT, _SPACE, _BREAK, _SMALL, _URL, _URL_LETTER, _URL_DIGIT = range(8)
"""Flags: a letter or mark; a digit; a space; no part of a word; not a capital; in a URL, where the next two replace the first
two."""
_BEYOND_FOLD = 0x33F00  # with the lowest byte of a code point for which the lower case has no room


@functools.cache
def facts_table() -> U32:
    """The facts of each code point up to the end of the letters, which is the end of the table."""
    table = languages.character_table()
    spaceless = np.zeros(64, bool)
    spaceless[[languages.script_number(script) for script in languages.SPACELESS_SCRIPTS]] = True
    points = np.arange(_LETTERS_END, dtype=np.uint32)
    inside = points[: languages.SIZE]
    kind = np.full(points.size, LETTER, np.uint8)  # characters beyond the other table are Han
    script = np.full(points.size, languages.script_number("Hani"), np.uint8)
    fold = points.copy()
    kind[inside], script[inside], fold[inside] = table.kind, table.script, table.fold
    facts = fold | script.astype(np.uint32) << np.uint32(SCRIPT)
    apostrophe = (points == 0x27) | (points == 0x2019)
    flags = {
        _LETTER: (kind == LETTER) | (kind == MARK),
        _DIGIT: kind == DIGIT,
        _SPACE: points == 0x20,
        # Words end at white space, punctuation other than apostrophes, and letters of scripts without spaces.
        _BREAK: (points == 0x20) | spaceless[script] | ((kind == PUNCTUATION) & ~apostrophe),
        _SMALL: fold == points,
    }
    for flag, members in flags.items():
        facts[members] |= np.uint32(1 << (FLAGS + flag))
    return facts


_LETTERS_END = 0x323B0


@kernel(inline="always", leaf=True)
def has(fact: int, flag: int) -> bool:
    """Whether a character has a flag."""
    return (np.int64(fact) >> (FLAGS + flag)) & 1 != 0


@kernel(leaf=True)
def characters(data: U8, start: int, end: int, table: U32, facts: U32) -> int:
    """Writes the facts of each character of `data[start:end]` and returns their number, n. `facts` needs room for 8 more."""
    i = start
    n = 0
    last_word = data.size - 8
    last_whole = min(last_word, end - 8)
    while i < end:
        if data[i] >= 0x80:
            point, i = decode(data, i, end)
            facts[n] = table[point] if point < table.size else np.uint32(_BEYOND_FOLD | (point & 0xFF))
            n += 1
        elif i > last_word:
            facts[n] = table[data[i]]
            n += 1
            i += 1
        else:
            # Eight at a time: those from the first character that is not ASCII on are written again.
            word = load64(data, i)
            place = np.uint64(n)
            for k in range(8):
                facts[place + np.uint64(k)] = table[(word >> np.uint64(8 * k)) & np.uint64(0x7F)]
            others = word & np.uint64(TOPS)
            if i <= last_whole and others == 0:
                n += 8
                i += 8
                continue
            size = min(trailing_zeros(others) >> 3, end - i)
            n += size
            i += size
    return n


@kernel(leaf=True)
def find_rare(data: U8, first: int, last: int, parts: U8) -> None:
    """Notes in which parts of the texts in `data[first:last]`, `PART` bytes each, begins something that is rare, as bits:
    what may be a URL, or a question mark within a word."""
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    for part in range(first // PART, (last + PART - 1) // PART):
        begin = np.uint64(part * PART)
        if begin + np.uint64(PART + 3) > np.uint64(data.size):
            parts[part] = RARE_URL | RARE_QUESTION
            continue
        url = asked = np.uint8(255)  # 0 where all bits agree
        for k in range(PART):
            at = begin + np.uint64(k)
            a, b, c, d = data[at], data[at + one], data[at + two], data[at + three]
            # Back to bytes, of which a register holds many: Numba computes with 64 bits.
            scheme = np.uint8((a ^ np.uint8(58)) | (b ^ np.uint8(47)) | (c ^ np.uint8(47)))  # ://
            host = np.uint8(((a & b & c | np.uint8(32)) ^ np.uint8(119)) | (d ^ np.uint8(46)))  # www.
            mark = np.uint8((a ^ np.uint8(63)) | (~b & np.uint8(64) & ~(b >> np.uint8(1))))  # ? and a letter
            url = scheme if scheme < url else url
            url = host if host < url else url
            asked = mark if mark < asked else asked
        parts[part] = np.int64(url == 0) * RARE_URL | np.int64(asked == 0) * RARE_QUESTION


@kernel(inline="always", leaf=True)
def _bit_sets(facts: U32, first: int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64, np.uint64]:
    """Which of the 64 characters from `first` on are letters, digits, spaces, no part of a word, not capitals.

    Unsigned indices need no test for negative ones, which would keep the loop from being vectorised.
    """
    letter = digit = space = stop = small = np.uint64(0)
    one = np.uint64(1)
    for k in range(BLOCK):
        fact = np.uint64(facts[np.uint64(first) + np.uint64(k)])
        place = np.uint64(k)
        letter |= ((fact >> np.uint64(FLAGS + _LETTER)) & one) << place
        digit |= ((fact >> np.uint64(FLAGS + _DIGIT)) & one) << place
        space |= ((fact >> np.uint64(FLAGS + _SPACE)) & one) << place
        stop |= ((fact >> np.uint64(FLAGS + _BREAK)) & one) << place
        small |= ((fact >> np.uint64(FLAGS + _SMALL)) & one) << place
    return letter, digit, space, stop, small


@kernel(leaf=True)
def _repeated(low: U8, n: int, salt: np.uint64, most: float, seen: npt.NDArray[np.uint64]) -> np.float32:
    """Share of the phrases that occur earlier in the text; 0 as soon as it is certain that it is not above `most`.

    The key of a phrase is the low bytes of its characters. The table has one slot per key, and a new entry overwrites the
    old one. So the table is never cleared; the salt separates the texts. The slot depends only on the key: the result must
    not depend on the row's number.
    """
    if n < GRAM:
        return np.float32(0)
    total = n - GRAM + 1
    enough = total * (1 - most + 1e-6)  # new phrases
    new = done = 0
    while done < total:
        # So many more new phrases are needed at the least.
        stop = min(total, done + int(enough - new) + 1)
        for first in range(np.uint64(done), np.uint64(stop)):
            key = np.uint64(0)
            for k in range(GRAM):
                key = (key << np.uint64(8)) | np.uint64(low[first + np.uint64(k)])
            mark = key ^ salt
            place = (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - TABLE_BITS)
            new += int(seen[place] != mark)
            seen[place] = mark
        done = stop
        if new >= enough:
            return np.float32(0)
    return np.float32((total - new) / total)


@kernel(leaf=True)
def _scripts(facts: U32, n: int, weights: npt.NDArray[np.int64], expected: np.uint64) -> tuple[int, int, int]:
    """Weight of the letters of expected scripts, of all known scripts, and number of the letters of other scripts."""
    wanted = known = 0
    foreign: Any = 0
    for k in range(n):
        which = (np.int64(facts[k]) >> SCRIPT) & SCRIPT_MASK
        if which > 0:
            match = np.int64((expected >> np.uint64(which)) & np.uint64(1))
            known += weights[which]
            wanted += weights[which] * match
            foreign += 1 - match
    return wanted, known, foreign


@kernel(leaf=True)
def _question_marks(facts: U32, n: int) -> int:
    """Question marks between two letters, the second in lower case: traces of characters that were lost."""
    found = 0
    for k in range(2, n):
        if facts[k - 1] & np.uint32(FOLD_MASK) == 63 and not has(facts[k - 1], _URL):
            before, fact = facts[k - 2], facts[k]
            point = fact & np.uint32(FOLD_MASK)
            small = has(fact, _LETTER) and has(fact, _SMALL) and 97 <= point < 0x250
            scripted = (fact >> np.uint32(SCRIPT)) & np.uint32(SCRIPT_MASK) != 0
            found += small and scripted and (has(before, _LETTER) or has(before, _URL_LETTER))
    return found


@kernel(leaf=True)
def numbers(facts: U32, n: int, digit: U8, digits: U8, groups: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Fills the values of the digits and the start of each group of digits; returns the numbers of both."""
    n_digits = n_groups = solid = 0
    in_digits = False
    for k in range(n):
        fact = facts[k]
        if has(fact, _SPACE):
            in_digits = False
            continue
        solid += 1
        point = np.int64(fact) & FOLD_MASK
        if has(fact, _DIGIT):
            if not in_digits and n_groups < MAX_GROUPS:
                groups[n_groups] = n_digits
                n_groups += 1
            in_digits = True
            if n_digits < MAX_DIGITS:
                digits[n_digits] = digit[point]
                n_digits += 1
            continue
        if in_digits and solid <= n_digits + 2 and n_groups == 1:
            following = np.int64(facts[k + 1]) & FOLD_MASK if k + 1 < n else 48
            if point == 41 or ((point == 45 or point == 46 or point == 58) and not 48 <= following <= 57):
                n_digits = n_groups = 0  # "12) ", "3. ": a list number, not part of the text
        in_digits = False
    groups[n_groups] = n_digits
    return n_digits, n_groups


# ---------------------------------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------------------------------


@kernel(inline="always")
def _lower(byte: int) -> int:
    return byte + 32 if 65 <= byte <= 90 else byte


@kernel(leaf=True)
def _may_hold_url(data, start, end):  # type: ignore[no-untyped-def]
    """Whether the text contains `://` or `www.`: a cheap test that saves most texts the search at each word."""
    for k in range(start, end - 3):
        if data[k + 1] == 47 and data[k] == 58 and data[k + 2] == 47:
            return True
        if data[k + 3] == 46 and _lower(data[k]) == 119 and _lower(data[k + 1]) == 119 and _lower(data[k + 2]) == 119:
            return True
    return False


@kernel(leaf=True)
def _url_end(data, start, end):  # type: ignore[no-untyped-def]
    """The end of the URL at `start`, or `start` if there is no URL. `start` must be the beginning of a word."""
    i = start
    while i < end and i - start < 12 and 97 <= _lower(data[i]) <= 122:
        i += 1
    scheme = i - start
    if scheme >= 3 and i + 3 < end and data[i] == 58 and data[i + 1] == 47 and data[i + 2] == 47:
        i += 3
    elif (
        scheme == 3 and i < end and data[i] == 46 and _lower(data[start]) == 119 and _lower(data[start + 1]) == 119
        and _lower(data[start + 2]) == 119 and i + 1 < end and data[i + 1] < 0x80 and data[i + 1] > 0x2F
    ):  # fmt: skip
        i += 1
    else:
        return start
    while i < end and 0x20 < data[i] < 0x7F and data[i] != 60 and data[i] != 62 and data[i] != 34:
        i += 1
    while i > start and (
        data[i - 1] == 46
        or data[i - 1] == 44
        or data[i - 1] == 59
        or data[i - 1] == 58
        or data[i - 1] == 33
        or data[i - 1] == 63
        or data[i - 1] == 39
        or data[i - 1] == 41
        or data[i - 1] == 93
        or data[i - 1] == 47
    ):
        i -= 1
    return i


@kernel(leaf=True)
def _site(data, start, end):  # type: ignore[no-untyped-def]
    """Hash of the longest label of a URL's host: the same for en.wikipedia.org and de.wikipedia.org."""
    i = start
    while i < end and data[i] != 58 and data[i] != 46:
        i += 1
    if i < end and data[i] == 58:
        i += 3
    else:
        i = start
    best_hash = np.uint64(0)
    best = -1
    length = 0
    state = np.uint64(0)
    while i <= end:
        byte = _lower(data[i]) if i < end else 47
        stop = byte == 47 or byte == 58 or byte == 63 or byte == 35
        if stop or byte == 46:
            if length > best:
                best = length
                best_hash = state
            length = 0
            state = np.uint64(0)
            if stop:
                break
        else:
            state = mix64(state ^ np.uint64(byte))
            length += 1
        i += 1
    return best_hash


@kernel(leaf=True)
def _mark_urls(data: U8, start: int, end: int, facts: U32) -> tuple[int, int, int, int, np.uint64]:
    """Finds URLs and changes the flags of their characters.

    Returns (number of URLs, characters of URLs, letters among them, digits among them, hash of sites).
    """
    urls = url_chars = url_letters = url_digits = n = 0
    sites = np.uint64(0)
    i = url_end = start
    word_start = True
    while i < end:
        if word_start and i >= url_end and data[i] < 0x80 and (data[i] | 32) >= 97:
            url_end = _url_end(data, i, end)
            if url_end > i:
                urls += 1
                sites += _site(data, i, url_end)
        fact = facts[n]
        letter, number = has(fact, _LETTER), has(fact, _DIGIT)
        if i < url_end:
            url_chars += 1
            url_letters += letter
            url_digits += number
            mark = 1 << _URL | 1 << _BREAK | np.int64(letter) << _URL_LETTER | np.int64(number) << _URL_DIGIT
            facts[n] = (np.int64(fact) & FOLD_MASK) | mark << FLAGS
        word_start = not (letter or number)
        _, i = decode(data, i, end)
        n += 1
    return urls, url_chars, url_letters, url_digits, sites


# ---------------------------------------------------------------------------------------------------------------------
# All together
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "chars",  # code points
    "solid",  # code points that are not spaces
    "letters",  # letters and their combining marks
    "url_chars",
    "urls",
    "longest_word",
    "question_marks",  # question marks between two letters, the second in lower case
    "words",  # runs of letters between spaces
    "plain_words",  # words that do not begin with a capital
    "foreign",  # digits, letters of unexpected scripts, and URLs: they have the same length in any language
)
CHARS, SOLID, LETTERS, URL_CHARS, URLS, LONGEST_WORD, QUESTION_MARKS, WORDS, PLAIN_WORDS, FOREIGN = range(len(COLUMNS))


@kernel(leaf=True)
def measure(  # type: ignore[no-untyped-def]
    data, start, end, parts, table, weights, expected, most_repeated, salt, counts, row, facts, low, seen
):  # fmt: skip
    """Measures one text.

    Fills one column of counts, and facts. Returns (share of expected script, share of repeated phrases, letters and digits,
    digits outside URLs, hash of sites).
    """
    n = characters(data, start, end, table, facts)
    for k in range(BLOCK):
        facts[np.uint64(n) + np.uint64(k)] = np.uint32(0)
    rare = 0
    for part in range(start // PART, (end + PART - 1) // PART):
        rare |= parts[part]
    url = (rare & RARE_URL) != 0 and _may_hold_url(data, start, end)
    urls = url_chars = url_letters = url_digits = 0
    sites = np.uint64(0)
    if url:
        urls, url_chars, url_letters, url_digits, sites = _mark_urls(data, start, end, facts)
    spaces = letters = digits = words = plain_words = longest_word = 0
    run = 0  # length of the word at the end of the block before
    seek = np.uint64(1)  # whether that word has had no letter yet
    scripts = np.uint32(0)
    unexpected = np.uint64(0)
    others = ~(expected | np.uint64(1))
    for first in range(0, n, BLOCK):
        at = np.uint64(first)
        for k in range(BLOCK):
            low[at + np.uint64(k)] = np.uint8(facts[at + np.uint64(k)] & np.uint32(0xFF))
        for k in range(BLOCK):
            script = (facts[at + np.uint64(k)] >> np.uint32(SCRIPT)) & np.uint32(SCRIPT_MASK)
            scripts |= script
            unexpected |= others >> np.uint64(script)
        letter, digit, space, breaks, small = _bit_sets(facts, first)
        spaces += popcount(space)
        letters += popcount(letter)
        digits += popcount(digit)
        # The first letter of each word: a sum carries the bit of the word's first character past those before the letter.
        begin = (space << np.uint64(1) | seek) & ~space
        other = ~(letter | space)
        carried = other + (begin & other)
        initial = (begin | carried) & letter
        seek = space >> np.uint64(63) | np.uint64(carried < other)
        words += popcount(initial)
        plain_words += popcount(initial & small)
        if n - first < BLOCK:
            breaks |= ~np.uint64(0) << np.uint64(n - first)
        longest_word = max(longest_word, run + trailing_zeros(breaks))
        run = leading_zeros(breaks) + (run if breaks == 0 else 0)
        # Each step takes one character off each word.
        rest = ~breaks
        length = 0
        while rest != 0:
            rest &= rest >> np.uint64(1)
            length += 1
        longest_word = max(longest_word, length)
    counts[CHARS, row], counts[SOLID, row], counts[LETTERS, row] = n, n - spaces, letters + url_letters
    counts[URL_CHARS, row], counts[URLS, row] = url_chars, urls
    counts[LONGEST_WORD, row], counts[WORDS, row], counts[PLAIN_WORDS, row] = longest_word, words, plain_words
    counts[QUESTION_MARKS, row] = _question_marks(facts, n) if (rare & RARE_QUESTION) != 0 else 0
    wanted = known = 1 if scripts != 0 else 0
    foreign = 0
    if unexpected & np.uint64(1) != 0:
        wanted, known, foreign = _scripts(facts, n, weights, expected)
    counts[FOREIGN, row] = digits + url_chars + foreign if expected != 0 else 0
    share = np.float32(wanted / known) if known > 0 and expected != 0 else np.float32(np.nan)
    repeated = _repeated(low, n, salt, most_repeated, seen)
    return share, repeated, letters + url_letters + digits + url_digits, digits, sites


@kernel(leaf=True)
def fold(facts: U32, n: int, digit: U8, folded: U32) -> np.uint64:
    """Writes the first letters, in lower case, and values of digits; stops at the end of `folded`. Returns their set: bit k
    is set if a character's number ends in k."""
    size = 0
    members = np.uint64(0)
    for k in range(n):
        fact = np.int64(facts[k])
        flags = fact >> FLAGS
        number = flags & (1 << _DIGIT | 1 << _URL_DIGIT) != 0
        kept = number or flags & (1 << _LETTER | 1 << _URL_LETTER) != 0
        if size == folded.size:
            break
        point = fact & FOLD_MASK
        # Without a branch, because ends of words are hard to predict: the next character takes the place of one that is not kept.
        folded[np.uint64(size)] = digit[point] if number else point
        members |= np.uint64(kept) << np.uint64(point & 63)
        size += kept
    return members
