"""Measures what the rules of the `clean` stage use of pairs: properties of both texts (`measure.py`), and of one beside the other."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import mix64, string_buffers
from corpusprep.kernels import kernel
from corpusprep.stages import languages
from corpusprep.stages.bits import popcount
from corpusprep.stages.clean.measure import (
    BLOCK,
    CHARS,
    COLUMNS,
    FOREIGN,
    LETTERS,
    LONGEST_WORD,
    MAX_DIGITS,
    MAX_GROUPS,
    PART,
    PLAIN_WORDS,
    QUESTION_MARKS,
    SOLID,
    TABLE_BITS,
    URL_CHARS,
    URLS,
    WORDS,
    facts_table,
    find_rare,
    fold,
    measure,
    numbers,
)  # fmt: skip

__all__ = [
    "CHARS", "FOREIGN", "LETTERS", "LONGEST_WORD", "PLAIN_WORDS", "QUESTION_MARKS", "SOLID", "URLS", "URL_CHARS", "WORDS",
]  # fmt: skip

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

MAX_FOLDED = 4096  # letters that are compared to find near copies


class Side(NamedTuple):
    """Measurements of n texts.

    Attributes:
        counts: int32 of shape (n, columns), see `COLUMNS`.
        script: float32 of shape (n,), share of letters in an expected script; NaN if no script is expected or no letter
            has a known script. Letters are weighted by how much text a letter of their script stands for.
        repeated: float32 of shape (n,), share of the 8-character phrases that occur earlier in the same text; 0 may stand for shares
            that no rule asks for, see `examine`.
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


@kernel(leaf=True)
def _examine(  # type: ignore[no-untyped-def]
    src_offsets, src_data, tgt_offsets, tgt_data, src_expected, tgt_expected, table, digit, weights, least_same,
    most_repeated, src_counts, tgt_counts, src_script, tgt_script, src_repeated, tgt_repeated, same, missing, url_mismatch,
    src_parts, tgt_parts, facts, low, seen, folded, digits, groups, histogram, edits,
):  # fmt: skip
    find_rare(src_data, src_offsets[0], src_offsets[same.size], src_parts)
    find_rare(tgt_data, tgt_offsets[0], tgt_offsets[same.size], tgt_parts)
    for i in range(same.size):
        src_script[i], src_repeated[i], n, n_digits, sites = measure(
            src_data, src_offsets[i], src_offsets[i + 1], src_parts, table, weights, src_expected[i], most_repeated,
            mix64(np.uint64(2 * i)), src_counts, i, facts[0], low, seen,
        )  # fmt: skip
        tgt_script[i], tgt_repeated[i], m, m_digits, other_sites = measure(
            tgt_data, tgt_offsets[i], tgt_offsets[i + 1], tgt_parts, table, weights, tgt_expected[i], most_repeated,
            mix64(np.uint64(2 * i + 1)), tgt_counts, i, facts[1], low, seen,
        )  # fmt: skip
        url_mismatch[i] = src_counts[URLS, i] != tgt_counts[URLS, i] or sites != other_sites
        n, m = min(n, MAX_FOLDED), min(m, MAX_FOLDED)
        longest = max(n, m)
        # As many edits as the lengths differ by are needed at least.
        if longest > 0 and abs(n - m) <= int((1 - least_same) * longest + 1e-6):
            letters = fold(facts[0], src_counts[CHARS, i], digit, folded[0])
            others = fold(facts[1], tgt_counts[CHARS, i], digit, folded[1])
            # An edit removes at most one letter from the set of letters and adds at most one.
            if popcount(letters ^ others) <= 2 * (1 - least_same) * longest + 1e-6:
                same[i] = _sameness(folded[0], n, folded[1], m, least_same, histogram, edits)
        if n_digits > 1 and m_digits > 1:
            n_digits, n_groups = numbers(facts[0], src_counts[CHARS, i], digit, digits[0], groups[0])
            m_digits, m_groups = numbers(facts[1], tgt_counts[CHARS, i], digit, digits[1], groups[1])
        if n_digits > 1 and m_digits > 1:
            total, lacking = _lacking(digits[0], groups[0], n_groups, digits[1], groups[1], m_groups, m_digits)
            other_total, other_lacking = _lacking(
                digits[1], groups[1], m_groups, digits[0], groups[0], n_groups, n_digits
            )
            if lacking > 0 and other_lacking > 0:
                missing[i] = np.float32(lacking + other_lacking) / np.float32(total + other_total)


def script_mask(scripts: tuple[str, ...]) -> int:
    """A set of scripts as a bit mask."""
    return sum(1 << languages.script_number(script) for script in scripts)


@functools.cache
def _weights() -> npt.NDArray[np.int64]:
    """Weights of letters by the number of their script: a Han character stands for as much text as three Latin letters."""
    weights = np.ones(64, np.int64)
    for script in languages.SCRIPTS:
        weights[languages.script_number(script)] = round(100 / languages.script_length(script))
    return weights


def examine(
    src: pa.Array[Any],
    tgt: pa.Array[Any],
    src_expected: npt.NDArray[np.uint64],
    tgt_expected: npt.NDArray[np.uint64],
    least_same: float = 0.75,
    most_repeated: float = 0.0,
) -> Features:
    """Measures n pairs of normalised texts.

    Args:
        src, tgt: n strings each.
        src_expected, tgt_expected: uint64 of shape (n,), the expected `script_mask` of each text; 0 expects none.
        least_same: lower similarities of the two sides are returned as 0.
        most_repeated: shares of repeated phrases that are not higher may be returned as 0.
    """
    n = len(src)
    (src_offsets, src_data), (tgt_offsets, tgt_data) = string_buffers(src), string_buffers(tgt)
    counts = np.zeros((2, len(COLUMNS), n), np.int32)
    script, repeated = np.zeros((2, n), np.float32), np.zeros((2, n), np.float32)
    same, missing, url_mismatch = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, bool)
    room = 2 * BLOCK + max(int(np.diff(offsets).max(initial=0)) for offsets in (src_offsets, tgt_offsets))
    _examine(
        src_offsets, src_data, tgt_offsets, tgt_data, src_expected, tgt_expected, facts_table(),
        languages.character_table().digit, _weights(), least_same, most_repeated,
        counts[0], counts[1], script[0], script[1], repeated[0], repeated[1], same, missing, url_mismatch,
        np.zeros(src_data.size // PART + 1, np.uint8), np.zeros(tgt_data.size // PART + 1, np.uint8),
        np.zeros((2, room), np.uint32), np.zeros(room, np.uint8), np.zeros(1 << TABLE_BITS, np.uint64),
        np.zeros((2, MAX_FOLDED), np.uint32), np.zeros((2, MAX_DIGITS), np.uint8),
        np.zeros((2, MAX_GROUPS + 1), np.int64), np.zeros(32, np.int32), np.zeros(MAX_FOLDED + 2, np.int64),
    )  # fmt: skip
    return Features(
        Side(counts[0].T, script[0], repeated[0]),
        Side(counts[1].T, script[1], repeated[1]),
        same,
        missing,
        url_mismatch,
    )
