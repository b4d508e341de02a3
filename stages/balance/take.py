"""Selects rows that fill a token target: of an array, or of rows that come in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import combine, order_of
from corpusprep.kernels import kernel

# Maximum number of consecutive rows that are skipped in search of one that fits.
_PATIENCE = 1000


@kernel
def take(
    tokens: npt.NDArray[np.int32], order: npt.NDArray[np.int64], target: int, copies: npt.NDArray[np.int32],
    total: int = 0, passed: int = 0,
) -> tuple[int, int, bool]:  # fmt: skip
    """Adds one copy of rows, in order, until their tokens are as close to the target as possible.

    A row is taken if it brings the sum closer to the target. A row that is too large is skipped, so that it does not
    end the selection early.

    Args:
        tokens: tokens of each row, int32 of shape (n,).
        order: indices of the candidate rows, best first.
        target: number of tokens to reach.
        copies: copies of each row, int32 of shape (n,); increased by 1 for each row that is taken.
        total, passed: what a call for earlier rows returned.

    Returns:
        The sum of tokens taken, the number of rows that were skipped since the last one that was taken, and whether later
        rows cannot be taken.
    """
    for row in order:
        left = target - total
        if left <= 0 or passed >= _PATIENCE:
            break
        if tokens[row] < 2 * left:
            copies[row] += 1
            total += tokens[row]
            passed = 0
        else:
            passed += 1
    return total, passed, total >= target or passed >= _PATIENCE


# -------------------------------------------------------------------------------------------------------------- pieces

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_MANY = 1 << 20  # rows that are put in order at a time
_SOME = 1 << 16  # rows that are looked at beyond those among which the target lies
_DIGITS = 6  # an order of 96 bits has six digits of 16: two of the quality, four of the hash


class Piece(NamedTuple):
    """Some of the rows among which is selected.

    Attributes:
        tokens: int32 (rows,), above 0.
        key: uint64 (rows,), a hash of the row's provenance.
        quality: float32 (rows,); None to select by the hash alone.
    """

    tokens: I32
    key: U64
    quality: npt.NDArray[np.float32] | None


class Selection(NamedTuple):
    """Which rows of all pieces are used: each `epochs` times, and once more those before `limit` in order, and `more`.

    Attributes:
        epochs: copies of every row.
        salt: of the hash by which rows are ordered.
        limit: of an order, as a number of 96 bits.
        more: number of a piece -> places of rows in it.
    """

    epochs: int
    salt: int
    limit: int
    more: dict[int, list[int]]

    def copies(self, number: int, piece: Piece) -> I32:
        """Copies of each row of a piece, int32 (rows,)."""
        found = np.full(piece.tokens.size, self.epochs, np.int32)
        if self.limit:
            found[_before(*_order(piece, self.salt), self.limit)] += 1
        if number in self.more:
            found[self.more[number]] += 1
        return found


def select_pieces(
    pieces: Callable[[], Iterable[Piece]], target: int, epochs: float, salt: int, scored: bool, many: int = _MANY
) -> Selection:
    """Selects rows of one pair as `select` does, holding no more than about a million rows at a time.

    Rows are counted by the leading digits of their order, until it is known of most that they are used. Only those around
    the place where the target is reached are put in order.

    Args:
        pieces: returns all rows, in pieces, as often as it is called.
        target: tokens to reach.
        epochs: maximum number of times that a row is used.
        salt: makes the order by hash independent of other uses of the keys.
        scored: whether rows are ordered by quality.
        many: rows that are put in order at a time.
    """
    level = 0 if scored else 2  # without a quality, its digits are the same in all rows
    first = _count(pieces, salt, None, level)
    total = int(first.tokens.sum())
    whole, rest = divmod(min(target, int(total * epochs)), total) if total else (0, 0)
    if rest == 0:
        return Selection(whole, salt, 0, {})
    prefix, taken = 0, 0
    later: list[_Bin] = []  # that follow, the next one first
    counts = first
    while True:
        sums = taken + np.cumsum(counts.tokens)
        # A row is used if what is left is more than half of its tokens. That holds for all rows of a bin at whose end the
        # longest row would still fit.
        critical = int(np.searchsorted(sums + first.longest, rest, side="right"))
        taken = int(sums[critical - 1]) if critical else taken
        bins = _bins(counts, prefix, level, critical)
        prefix += critical << _shift(level)
        if counts.rows[critical] <= many or level == _DIGITS - 1:
            later = bins + later
            break
        level, later = level + 1, bins[1:] + later
        counts = _count(pieces, salt, prefix, level)
    more: dict[int, list[int]] = {}
    passed, done = 0, False
    while later and not done:
        begin, level, rows = later.pop(0)
        if rows > many and level < _DIGITS - 1:
            later = _bins(_count(pieces, salt, begin, level + 1), begin, level + 1) + later
            continue
        end = begin + (1 << _shift(level))
        while later and rows < _SOME and rows + later[0].rows <= many:
            end, rows = later[0].begin + (1 << _shift(later[0].level)), rows + later[0].rows
            later.pop(0)
        taken, passed, done = _take_between(pieces, salt, begin, end, rest, taken, passed, more)
    return Selection(whole, salt, prefix, more)


class _Bin(NamedTuple):
    """Rows whose orders have the same digits up to a level: the first of these orders, the level, and the number of rows."""

    begin: int
    level: int
    rows: int


def _shift(level: int) -> int:
    return 16 * (_DIGITS - 1 - level)


def _bins(counts: _Counts, prefix: int, level: int, first: int = 0) -> list[_Bin]:
    """The bins of a digit that have rows, from one on."""
    digits = (first + np.flatnonzero(counts.rows[first:])).tolist()
    return [_Bin(prefix + (digit << _shift(level)), level, int(counts.rows[digit])) for digit in digits]


class _Counts(NamedTuple):
    """Rows and tokens by one digit of their order, int64 (65536,) each, and the tokens of the longest row."""

    rows: I64
    tokens: I64
    longest: int


def _order(piece: Piece, salt: int) -> tuple[U32, U64]:
    """What rows are ordered by: quality, the best first, then the hash."""
    hashes = combine(piece.key, salt)
    quality = np.zeros(hashes.size, np.uint32) if piece.quality is None else order_of(-piece.quality)
    return quality, hashes


def _before(quality: U32, hashes: U64, limit: int) -> npt.NDArray[np.bool_]:
    """Which rows are before a limit in order."""
    if limit >= 1 << 96:
        return np.ones(hashes.size, np.bool_)
    high, low = np.uint32(limit >> 64), np.uint64(limit & (1 << 64) - 1)
    return np.asarray((quality < high) | ((quality == high) & (hashes < low)))


def _count(pieces: Callable[[], Iterable[Piece]], salt: int, prefix: int | None, level: int) -> _Counts:
    """Counts the rows that have the leading digits of a prefix, or all rows, by their next digit."""
    rows, tokens, longest = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64), 0
    for piece in pieces():
        quality, hashes = _order(piece, salt)
        counts = piece.tokens
        longest = max(longest, int(counts.max(initial=0)))
        if prefix is not None:
            end = prefix + (1 << 16 * (_DIGITS - level))
            inside = _before(quality, hashes, end) & ~_before(quality, hashes, prefix)
            quality, hashes, counts = quality[inside], hashes[inside], counts[inside]
        digit = quality >> np.uint32(16 * (1 - level)) if level < 2 else hashes >> np.uint64(16 * (_DIGITS - 1 - level))
        _add(digit.astype(np.uint64), counts, rows, tokens)
    return _Counts(rows, tokens, longest)


@kernel
def _add(digit: U64, counts: I32, rows: I64, tokens: I64) -> None:
    for i in range(digit.size):
        at = np.int64(digit[i] & np.uint64(0xFFFF))
        rows[at] += 1
        tokens[at] += counts[i]


def _take_between(
    pieces: Callable[[], Iterable[Piece]], salt: int, begin: int, end: int, target: int, total: int, passed: int,
    more: dict[int, list[int]],
) -> tuple[int, int, bool]:  # fmt: skip
    """Puts the rows between two limits in order and uses them until the target is reached; see `take`."""
    found: list[tuple[U32, U64, I32, I64, I64]] = []
    for number, piece in enumerate(pieces()):
        quality, hashes = _order(piece, salt)
        places = np.flatnonzero(_before(quality, hashes, end) & ~_before(quality, hashes, begin))
        of = np.full(places.size, number, np.int64)
        found.append((quality[places], hashes[places], piece.tokens[places], places, of))
    quality, hashes, tokens, places, of = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    copies = np.zeros(tokens.size, np.int32)
    result = take(tokens, np.lexsort((hashes, quality)), target, copies, total, passed)
    for row in np.flatnonzero(copies).tolist():
        more.setdefault(int(of[row]), []).append(int(places[row]))
    return int(result[0]), int(result[1]), bool(result[2])
