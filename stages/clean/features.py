"""Measures the text properties that the rules of the `clean` stage use, in one pass over the UTF-8 bytes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import mix64, string_buffers
from corpusprep.kernels import kernel
from corpusprep.stages import languages
from corpusprep.stages.clean.text import decode
from corpusprep.stages.languages import DIGIT, LETTER, MARK, PUNCTUATION

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

MAX_GROUPS = 64  # groups of digits that are compared per side
MAX_DIGITS = 512
GRAM = 8  # characters of a phrase in the repetition rule
TABLE_BITS = 13
FOLD_BITS, FOLD_MASK = 21, (1 << 21) - 1
MAX_FOLDED = 4096  # letters that are compared to find near copies

_COLUMNS = (
    "chars",  # code points
    "solid",  # code points that are not spaces
    "letters",  # letters and their combining marks
    "outside",  # letters outside URLs
    "url_chars",
    "urls",
    "longest_word",
    "question_marks",  # question marks between two letters, the second in lower case
    "words",  # runs of letters between spaces
    "plain_words",  # words that do not begin with a capital
    "foreign",  # digits, letters of unexpected scripts, and URLs: they have the same length in any language
)
_BEYOND = LETTER | languages.script_number("Hani") << 3 | 1 << 9  # characters beyond the end of the table are Han
CHARS, SOLID, LETTERS, OUTSIDE, URL_CHARS, URLS, LONGEST_WORD, QUESTION_MARKS, WORDS, PLAIN_WORDS, FOREIGN = range(
    len(_COLUMNS)
)


class Side(NamedTuple):
    """Measurements of n texts.

    Attributes:
        counts: int32 of shape (n, columns), see `_COLUMNS`.
        script: float32 of shape (n,), share of letters in an expected script; NaN if no script is expected or no letter
            has a known script. Letters are weighted by how much text a letter of their script stands for.
        repeated: float32 of shape (n,), share of the 8-character phrases that occur earlier in the same text.
    """

    counts: I32
    script: F32
    repeated: F32


class Features(NamedTuple):
    """Measurements of n pairs.

    Attributes:
        src, tgt: the sides.
        same: float32 of shape (n,), similarity of the letters and digits of both sides, from 0 to 1, without case and
            punctuation; 0 if it is below the requested minimum.
        numbers: float32 of shape (n,), share of the numbers of both sides that are missing on the other side; 0 unless
            both sides have such a number.
        url_mismatch: bool of shape (n,), true if one side has URLs that the other side does not have.
    """

    src: Side
    tgt: Side
    same: F32
    numbers: F32
    url_mismatch: npt.NDArray[np.bool_]


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
def _measure(  # type: ignore[no-untyped-def]
    data, start, end, packed, digit, weights, expected, salt, counts, folded, digits, groups, seen
):  # fmt: skip
    """Measures one text.

    Fills counts, folded (letters and digits), digits (values, in order), groups (the start of each group of digits).
    Returns (share of expected script, share of repeated phrases, folded length, number of digits, number of groups,
    hash of sites, set of letters).
    """
    wanted = known = 0
    chars = solid = letters = outside = url_chars = urls = longest_word = question_marks = words = plain_words = (
        foreign
    ) = 0
    n_folded = n_digits = n_groups = word = again = 0
    sites = np.uint64(0)
    letter_set = np.uint64(0)
    url_end = start
    url_ahead = _may_hold_url(data, start, end)
    previous_letter = asked = in_digits = in_word = False
    word_start = True
    # Phrases: the key is the low bytes of the last 8 characters. The table has one slot per key, and a new entry
    # overwrites the old one. So the table is never cleared; the salt separates the texts.
    key = np.uint64(0)
    point: Any  # int64
    facts: Any
    weight: Any
    match: Any

    i = start
    while i < end:
        byte = np.int64(data[i])
        if url_ahead and word_start and byte < 0x80 and i >= url_end and (byte | 32) >= 97:
            url_end = _url_end(data, i, end)
            if url_end > i:
                urls += 1
                sites += _site(data, i, url_end)
        url = i < url_end
        if byte < 0x80:
            point = byte
            i += 1
        else:
            point, i = decode(data, i, end)
        if point < packed.size:
            facts = np.int64(packed[point])
        elif point < 0x323B0:
            facts = (np.int64(_BEYOND) << FOLD_BITS) | point
        else:
            facts = point
        low = facts & FOLD_MASK
        what = (facts >> FOLD_BITS) & 7
        which = (facts >> (FOLD_BITS + 3)) & 63
        chars += 1
        key = (key << np.uint64(8)) | np.uint64(low & 255)
        if chars >= GRAM:
            # The slot depends only on the key: the result must not depend on the row's number.
            mark = key ^ salt
            place = np.int64((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - TABLE_BITS))
            again += seen[place] == mark
            seen[place] = mark
        if point == 0x20:
            word = 0
            word_start = True
            previous_letter = asked = in_digits = in_word = False
            continue
        solid += 1
        letter = what in (LETTER, MARK)
        number = what == DIGIT
        if url:
            url_chars += 1
            foreign += 1
            letters += letter
            word = 0
        else:
            if letter:
                letters += 1
                outside += 1
                if not in_word:
                    in_word = True
                    words += 1
                    plain_words += low == point
                if which > 0:
                    weight = weights[which]
                    match = np.int64((expected >> np.uint64(which)) & np.uint64(1))
                    known += weight
                    wanted += weight * match
                    foreign += 1 - match
                    if asked and low == point and 97 <= point < 0x250:
                        question_marks += 1
            # Words end at white space, punctuation other than apostrophes, and letters of scripts without spaces.
            if facts >> (FOLD_BITS + 9) or (what == PUNCTUATION and point != 39 and point != 0x2019):
                word = 0
            else:
                word += 1
                longest_word = max(longest_word, word)
        asked = point == 63 and previous_letter and not url
        if number and not url:
            if not in_digits and n_groups < MAX_GROUPS:
                groups[n_groups] = n_digits
                n_groups += 1
            in_digits = True
            foreign += 1
            if n_digits < MAX_DIGITS:
                digits[n_digits] = digit[point]
                n_digits += 1
        else:
            if (
                in_digits
                and solid <= n_digits + 2
                and n_groups == 1
                and (
                    point == 41 or ((point == 45 or point == 46 or point == 58) and i < end and not 48 <= data[i] <= 57)
                )
            ):
                n_digits = n_groups = 0  # "12) ", "3. ": a list number, not part of the text
            in_digits = False
        if (letter or number) and n_folded < MAX_FOLDED:
            folded[n_folded] = digit[point] if number else low
            n_folded += 1
            letter_set |= np.uint64(1) << np.uint64(low & 63)
        word_start = not (letter or number)
        previous_letter = letter
    groups[n_groups] = n_digits
    counts[CHARS], counts[SOLID], counts[LETTERS], counts[OUTSIDE] = chars, solid, letters, outside
    counts[URL_CHARS], counts[URLS] = url_chars, urls
    counts[LONGEST_WORD], counts[QUESTION_MARKS] = longest_word, question_marks
    counts[WORDS], counts[PLAIN_WORDS] = words, plain_words
    counts[FOREIGN] = foreign if expected != 0 else 0
    share = np.float32(wanted / known) if known > 0 and expected != 0 else np.float32(np.nan)
    repeated = np.float32(again / (chars - GRAM + 1)) if chars >= GRAM else np.float32(0)
    return share, repeated, n_folded, n_digits, n_groups, sites, letter_set


@kernel(leaf=True)
def _occurs(digits, first, last, others, n_others):  # type: ignore[no-untyped-def]
    length = last - first
    for at in range(n_others - length + 1):
        k = 0
        while k < length and digits[first + k] == others[at + k]:
            k += 1
        if k == length:
            return True
    return False


@kernel(leaf=True)
def _number(digits, first, last):  # type: ignore[no-untyped-def]
    value = 0
    for k in range(first, min(last, first + 9)):
        value = 10 * value + digits[k]
    return value


@kernel(leaf=True)
def _lacking(digits, groups, n_groups, others, other_groups, n_other_groups, n_others):  # type: ignore[no-untyped-def]
    """Counts the numbers with two or more digits, and how many of them are missing on the other side.

    A number is present on the other side in three cases. Its digits, without zeros at both ends, occur anywhere in the
    other side's digits (so separators and words like "million" do not matter). It ends in one of the other side's
    numbers (1974 and 74). Or one of them is the same time or year in another system: 12 hours or 543 years (Buddhist
    era) apart.
    """
    total = 0
    lacking = 0
    for g in range(n_groups):
        first, last = groups[g], groups[g + 1]
        if last - first < 2:
            continue
        total += 1
        while first < last and digits[first] == 0:
            first += 1
        while last > first and digits[last - 1] == 0:
            last -= 1
        if _occurs(digits, first, last, others, n_others):
            continue
        found = False
        number = _number(digits, groups[g], groups[g + 1])
        for h in range(n_other_groups):
            a, b = other_groups[h], other_groups[h + 1]
            apart = abs(number - _number(others, a, b))
            if (apart == 12 and number < 25) or (apart == 543 and number > 1000):
                found = True
                break
            if b - a >= 2 and b - a <= groups[g + 1] - groups[g]:
                k = 1
                while k <= b - a and others[b - k] == digits[groups[g + 1] - k]:
                    k += 1
                if k > b - a:
                    found = True
                    break
        if not found:
            lacking += 1
    return total, lacking


@kernel(leaf=True)
def _sameness(a, n, b, m, least, histogram, row):  # type: ignore[no-untyped-def]
    """1 - edit distance / length of the longer, if that is `least` or more, else 0."""
    longest = max(n, m)
    if longest == 0:
        return np.float32(0)
    allowed = int((1 - least) * longest + 1e-6)
    if abs(n - m) > allowed:
        return np.float32(0)
    histogram[:] = 0
    for k in range(n):
        histogram[a[k] & 31] += 1
    for k in range(m):
        histogram[b[k] & 31] -= 1
    apart = 0
    for k in range(32):
        apart += abs(histogram[k])
    if apart > 2 * allowed:
        return np.float32(0)
    first = 0
    while first < n and first < m and a[first] == b[first]:
        first += 1
    while n > first and m > first and a[n - 1] == b[m - 1]:
        n -= 1
        m -= 1
    # Edit distance of the rest, in a band around the diagonal.
    n -= first
    m -= first
    if n == 0 or m == 0:
        return np.float32(1) - np.float32(max(n, m)) / np.float32(longest)
    band = min(allowed, 64)
    far = longest + 1
    for j in range(m + 1):
        row[j] = j if j <= band else far
    for i in range(1, n + 1):
        low = max(1, i - band)
        high = min(m, i + band)
        diagonal = row[low - 1]
        row[low - 1] = i if low == 1 and i <= band else far
        for j in range(low, high + 1):
            up = row[j] if j < i + band else far
            cost = diagonal + (a[first + i - 1] != b[first + j - 1])
            diagonal = row[j]
            row[j] = min(cost, up + 1, row[j - 1] + 1)
    distance = row[m]
    if distance > allowed:
        return np.float32(0)
    return np.float32(1) - np.float32(distance) / np.float32(longest)


@kernel(inline="always")
def _bits(word):  # type: ignore[no-untyped-def]
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def _examine(  # type: ignore[no-untyped-def]
    src_offsets, src_data, tgt_offsets, tgt_data, src_expected, tgt_expected, packed, digit, weights, least_same,
    src_counts, tgt_counts, src_script, tgt_script, src_repeated, tgt_repeated, same, numbers, url_mismatch,
):  # fmt: skip
    folded = np.zeros((2, MAX_FOLDED), np.uint32)
    digits = np.zeros((2, MAX_DIGITS), np.uint8)
    groups = np.zeros((2, MAX_GROUPS + 1), np.int64)
    seen = np.zeros(1 << TABLE_BITS, np.uint64)
    histogram = np.zeros(32, np.int32)
    row = np.zeros(MAX_FOLDED + 2, np.int64)
    for i in range(same.size):
        src_script[i], src_repeated[i], n, n_digits, n_groups, sites, letters = _measure(
            src_data, src_offsets[i], src_offsets[i + 1], packed, digit, weights, src_expected[i], mix64(np.uint64(2 * i)),
            src_counts[i], folded[0], digits[0], groups[0], seen,
        )  # fmt: skip
        tgt_script[i], tgt_repeated[i], m, m_digits, m_groups, other_sites, others = _measure(
            tgt_data, tgt_offsets[i], tgt_offsets[i + 1], packed, digit, weights, tgt_expected[i], mix64(np.uint64(2 * i + 1)),
            tgt_counts[i], folded[1], digits[1], groups[1], seen,
        )  # fmt: skip
        url_mismatch[i] = src_counts[i, URLS] != tgt_counts[i, URLS] or sites != other_sites
        same[i] = 0
        # An edit removes at most one letter from the set of letters and adds at most one.
        if _bits(letters ^ others) <= 2 * (1 - least_same) * max(n, m) + 1e-6:
            same[i] = _sameness(folded[0], n, folded[1], m, least_same, histogram, row)
        numbers[i] = 0
        if n_digits > 1 and m_digits > 1:
            total, lacking = _lacking(digits[0], groups[0], n_groups, digits[1], groups[1], m_groups, m_digits)
            other_total, other_lacking = _lacking(
                digits[1], groups[1], m_groups, digits[0], groups[0], n_groups, n_digits
            )
            if lacking > 0 and other_lacking > 0:
                numbers[i] = np.float32(lacking + other_lacking) / np.float32(total + other_total)


def script_mask(scripts: tuple[str, ...]) -> int:
    """A set of scripts as a bit mask."""
    return sum(1 << languages.script_number(script) for script in scripts)


@functools.cache
def _packed_table() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Character properties packed into one number (lower case, kind, script, whether the script has no spaces), values
    of digits, and weights of letters by script."""
    table = languages.character_table()
    spaceless = np.zeros(64, np.uint32)
    weights = np.ones(64, np.int64)
    for script in languages.SCRIPTS:
        number = languages.script_number(script)
        spaceless[number] = script in languages.SPACELESS_SCRIPTS
        # A Han character stands for as much text as three Latin letters.
        weights[number] = round(100 / languages.script_length(script))
    facts = table.kind.astype(np.uint32) | table.script.astype(np.uint32) << np.uint32(3)
    facts |= spaceless[table.script] << np.uint32(9)
    return table.fold | facts << np.uint32(FOLD_BITS), table.digit, weights


def examine(
    src: pa.Array[Any],
    tgt: pa.Array[Any],
    src_expected: npt.NDArray[np.uint64],
    tgt_expected: npt.NDArray[np.uint64],
    least_same: float = 0.75,
) -> Features:
    """Measures n pairs of normalised texts.

    Args:
        src, tgt: n strings each.
        src_expected, tgt_expected: uint64 of shape (n,), the expected `script_mask` of each text; 0 expects none.
        least_same: lower similarities of the two sides are returned as 0.
    """
    n = len(src)
    counts = np.zeros((2, n, len(_COLUMNS)), np.int32)
    script, repeated = np.zeros((2, n), np.float32), np.zeros((2, n), np.float32)
    same, numbers, url_mismatch = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, bool)
    _examine(
        *string_buffers(src), *string_buffers(tgt), src_expected, tgt_expected, *_packed_table(), least_same,
        counts[0], counts[1], script[0], script[1], repeated[0], repeated[1], same, numbers, url_mismatch,
    )  # fmt: skip
    return Features(
        Side(counts[0], script[0], repeated[0]), Side(counts[1], script[1], repeated[1]), same, numbers, url_mismatch
    )
