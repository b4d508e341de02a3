"""Pairs of near 64-bit fingerprints: all of them, and within a small multiple of the cost of a sort.

This is steps 1 and 2 of the way to greedy decisions, in which a row is dropped only if it lies within the distance of an
earlier row that is kept; step 3 is in `greedy.py`.

1. Rows with equal fingerprints count as one, so that boilerplate costs a look-up a row.
2. Two fingerprints within distance d agree on at least k - d of k blocks of bits (Manku et al., "Detecting
   near-duplicates for web crawling", WWW 2007). For each choice of k - d blocks, a table, rows that agree on these blocks
   are compared: this gives the edges of the graph of near rows. Tables that begin with the same block share the work:
   the rows are dealt once into parts by that block, and each table then has its buckets in a part, within the cache. k is
   chosen on a sample, so that buckets are small and tables few.
3. Rows are visited in order; a row that has an edge to a kept row is dropped.

A bucket that is large, or dense with edges, is not compared pairwise: it is marked, and consulted in step 3, where a
row is compared with those rows of it that were kept. Kept rows are further than d from each other, so they are few
where rows are dense, and neither time nor memory blows up.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from corpusprep.arrow import U64
from corpusprep.kernels import kernel

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

FINEST = 24  # log2 of the buckets of a part, at most
_PART = 13  # log2 of the rows of a part: with its buckets, it fits the cache
_LARGE = 1024  # rows of a bucket that is never compared pairwise
_DENSE, _EDGES = 64, 4  # so many edges, and so many more a row, and a bucket is dense
_MARKED = -1
# Nanoseconds, as measured: to deal a row into its part, to look it up in a table, to compare it with another.
_DEAL, _LOOK, _COMPARE = 10.0, 5.0, 10.0


def _popcount(typing: Any, value: Any) -> Any:
    """Number of set bits of a uint64: one instruction."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


popcount: Any = intrinsic(_popcount)


def blocks(k: int) -> list[tuple[int, int]]:
    """The (lowest bit, width) of k blocks that share out 64 bits."""
    edges = [64 * i // k for i in range(k + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def _mask(k: int, chosen: tuple[int, ...]) -> int:
    parts = blocks(k)
    return sum(((1 << parts[b][1]) - 1) << parts[b][0] for b in chosen)


def choose_blocks(fingerprints: U64, distance: int) -> int:
    """The number of blocks that makes the search cheapest, judged by the buckets of a sample."""
    n = fingerprints.size
    sample = np.unique(fingerprints[:: max(1, n // 30_000)])
    best, best_cost = distance + 1, np.inf
    for k in range(distance + 1, distance + 5):
        tables = list(itertools.combinations(range(k), k - distance))
        if len(tables) > 512:
            break
        # Compared pairs a row: of some tables, by the sample's collisions.
        compared, looked = 0.0, tables[:: max(1, len(tables) // 4)]
        for chosen in looked:
            mask = _mask(k, chosen)
            values = np.sort(sample & np.uint64(mask))
            counts = np.diff(np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1], [True])))).astype(float)
            seen = float((counts * (counts - 1)).sum()) / max(1, sample.size) / max(1, sample.size)
            floor = 0.5 ** mask.bit_count()
            compared += min(max(seen, floor) * n / 2, _LARGE)
        cost = _DEAL * (distance + 1) + len(tables) * (_LOOK + _COMPARE * compared / len(looked))
        if cost < best_cost:
            best, best_cost = k, cost
    return best


class Tables(NamedTuple):
    """How the tables see a fingerprint; arrays of one item a table. Those with the same first block are neighbours.

    Attributes:
        masks: the bits that the table looks at, uint64.
        group: the number of its first block among those of all tables; int64.
        firsts, first_lows: the bits of the first block, and the lowest of them. Their hash says which part a row is in;
            uint64.
        coarse: how many leading bits of that hash; int64.
        keys, key_lows: the bits, and the lowest of them, whose hash says which bucket of the part: those that the rows of
            a part do not share anyway; uint64.
        used: leading bits of that hash that the part has used up; int64.
        left: bits of the key that tell buckets of a part, at most; int64.
    """

    masks: U64
    group: I64
    firsts: U64
    first_lows: U64
    coarse: I64
    keys: U64
    key_lows: U64
    used: I64
    left: I64


def make_tables(n: int, k: int, distance: int) -> Tables:
    """The tables for n rows and k blocks."""
    rows: list[tuple[int, ...]] = []
    for chosen in itertools.combinations(range(k), k - distance):
        mask, first = _mask(k, chosen), _mask(k, chosen[:1])
        coarse = min(first.bit_count(), max(0, n.bit_length() - _PART))
        key = mask ^ first if coarse == first.bit_count() and mask != first else mask
        used = coarse if key == first else 0
        left = min(key.bit_count() - used, FINEST)
        rows.append((mask, chosen[0], first, _low(first), coarse, key, _low(key), used, left))
    columns: list[Any] = [np.array(column, np.uint64) for column in zip(*rows, strict=True)]
    for number in (1, 4, 7, 8):
        columns[number] = columns[number].astype(np.int64)
    return Tables(*columns)


def _low(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


@kernel(inline="always")
def _hash(value: np.uint64, mask: np.uint64, low: np.uint64) -> np.uint64:
    """A hash, of 63 bits, of the masked bits, the leading ones best. It spreads neighbours better than chance would.

    Strangers may meet in a bucket; friends do.
    """
    return (((value & mask) >> low) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(1)


@kernel(inline="always")
def fine_bits(left: int, rows: int) -> np.int64:
    """The bits that tell the buckets of a part with so many rows: two to four buckets a row, where the key has the bits.

    It goes by the part's own rows, as a block of bits can be much the same in all texts.
    """
    bits = np.int64(1)
    while rows >> bits:
        bits += 1
    return min(np.int64(left), bits + 1)


@kernel
def collapse(part_values: U64, part_rows: I32, starts: I64, sizes: I64, first: I32) -> None:
    """Writes to `first` which row of the same fingerprint comes first, for every row of some parts, and leaves only these
    rows in the parts: `sizes` says how many.

    Equal fingerprints are in one part, in their order; each part has a hash table that fits the cache.
    """
    bits = 2
    while 1 << bits < 3 * sizes.max():
        bits += 1
    owner = np.empty(1 << bits, np.int32)  # the place of a row in its part, counted from 1
    for p in range(sizes.size):
        bits = 2
        while 1 << bits < 3 * sizes[p]:
            bits += 1
        owner[: 1 << bits] = 0
        down, last = np.uint64(64 - bits), (1 << bits) - 1
        begin = starts[p] - 1
        kept = 0
        for i in range(1, sizes[p] + 1):
            value, row = part_values[begin + i], part_rows[begin + i]
            slot = np.int64((value * np.uint64(0x9E3779B97F4A7C15)) >> down)
            j = owner[slot]
            while j > 0 and part_values[begin + j] != value:
                slot = (slot + 1) & last
                j = owner[slot]
            if j == 0:
                kept += 1
                owner[slot] = j = kept
                part_values[begin + kept], part_rows[begin + kept] = value, row
            first[row] = part_rows[begin + j]
        sizes[p] = kept


@kernel(inline="always")
def number(value: np.uint64, mask: np.uint64, low: np.uint64, down: np.uint64, bits: np.uint64) -> np.uint64:
    """Some of the bits of the hash, as a number: those of `bits`, after it is shifted down."""
    return (_hash(value, mask, low) >> down) & bits


@kernel
def histogram(values: U64, mask: np.uint64, low: np.uint64, down: np.uint64, bits: np.uint64, counts: I64) -> None:
    """Adds to `counts` how many values have each number."""
    for i in range(values.size):
        counts[np.int64(number(values[i], mask, low, down, bits))] += 1


@kernel
def _meet(
    part: U64, key: np.uint64, low: np.uint64, down: np.uint64, fine: np.uint64, near: np.uint64,
    head: I32, chain: I32, meeting: I32,
) -> int:  # fmt: skip
    """Puts the rows of a part into the buckets of a table, and writes to `meeting` which rows are to be looked at again.

    Args:
        part: fingerprints, from place 1 on; place 0 is any value.
        key, low, down, fine: what makes the bucket.
        near: the distance.
        head: zeros; the last row of each bucket, written.
        chain: the row before it in its bucket, written; 0 where there is none.

    Returns:
        How many rows are near one of the two rows before them in their bucket, or have more before them. Most rows are
        alone or meet a stranger or two, so that this is a branch seldom taken.
    """
    meetings = 0
    for i in range(1, part.size):
        value = part[i]
        q = np.int64(number(value, key, low, down, fine))
        j = head[q]
        head[q], chain[i] = i, j
        before = chain[j]
        if (popcount(value ^ part[j]) <= near) | (popcount(value ^ part[before]) <= near) | (chain[before] > 0):
            meeting[meetings] = i
            meetings += 1
    return meetings


@kernel
def deal(
    values: U64, ids: I32, mask: np.uint64, low: np.uint64, down: np.uint64, bits: np.uint64, part: int, ends: I64,
    to: U64, rows: I32, only: I32,
) -> None:  # fmt: skip
    """Deals values, in order, to where `ends` says that the part of their number goes on.

    Those of other parts go where the last item of `ends` says, over and over: a branch would be guessed wrong too often.

    Args:
        ids: what to write to `rows` for each value; its place, where empty.
        mask, low, down, bits: what makes the number.
        part: the number of the first part.
        only: deals value i only if `only[i] == i`; all where empty.
    """
    last = np.uint64(ends.size - 1)
    for i in range(values.size):
        which = min(number(values[i], mask, low, down, bits) - np.uint64(part), last)
        if only.size and only[i] != i:
            which = last
        place = ends[which]
        to[place], rows[place] = values[i], ids[i] if ids.size else i
        ends[which] = place + np.int64(which != last)


class _Scratch(NamedTuple):
    """What the buckets of a part are kept in: see `_meet`; `found` counts near pairs, or says that a bucket is marked."""

    head: I32
    found: I32
    chain: I32
    meeting: I32


@kernel(inline="always")
def _append(values: U64, count: int, value: np.uint64) -> U64:
    """The array with one more item, in twice the room where there was none."""
    if count == values.size:
        more = np.empty(2 * count, np.uint64)
        more[:count] = values
        values = more
    values[count] = value
    return values


@kernel
def _compare(
    some: U64, rows: I32, masks: U64, table: int, key: np.uint64, low: np.uint64, down: np.uint64, fine: int, base: int,
    near: np.uint64, scratch: _Scratch, crowded: U8, edges: U64, edge_count: int, marked: U64, mark_count: int,
) -> tuple[U64, int, U64, int]:  # fmt: skip
    """Compares the rows of one part through one table.

    Args:
        some, rows: fingerprints and rows, from place 1 on.
        key, low, down, fine: what makes the bucket.
        base: what the number of a marked bucket is added to.
        edges, marked: with their counts, added to and returned.
    """
    head, found, chain, meeting = scratch
    mask, bits = masks[table], np.uint64((1 << fine) - 1)
    head[: 1 << fine] = 0
    meetings = _meet(some, key, low, down, bits, near, head, chain, meeting)
    if meetings:
        found[: 1 << fine] = 0
    marked_before = mark_count
    for at in range(meetings):
        i = meeting[at]
        value = some[i]
        q = np.int64(number(value, key, low, down, bits))
        if found[q] == _MARKED:
            continue
        steps = 0
        j = chain[i]
        while j > 0:
            differ = value ^ some[j]
            if popcount(differ) <= near and differ & mask == 0:
                known = False  # an earlier table sees this pair too
                for earlier in range(table):
                    if differ & masks[earlier] == 0:
                        known = True
                        break
                found[q] += 1
                if not known:
                    edges = _append(edges, edge_count, np.uint64(rows[i]) << np.uint64(32) | np.uint64(rows[j]))
                    edge_count += 1
            j = chain[j]
            steps += 1
        if steps >= _LARGE or found[q] > _EDGES * steps + _DENSE:
            found[q] = _MARKED
            marked = _append(marked, mark_count, np.uint64(base | q))
            mark_count += 1
    if mark_count > marked_before:
        for i in range(1, some.size):
            if found[np.int64(number(some[i], key, low, down, bits))] == _MARKED:
                crowded[rows[i]] = 1
    return edges, edge_count, marked, mark_count


@kernel
def find_pairs(
    tables: Tables,
    first_table: int,
    last_table: int,
    part: int,
    counts: I64,
    starts: I64,
    sizes: I64,
    part_values: U64,
    part_rows: I32,
    distance: int,
    crowded: U8,
) -> tuple[U64, U64]:
    """Compares the rows of some parts through the tables `first_table` to `last_table - 1`.

    Args:
        tables: all tables; those looked through have their first block in common.
        part: the number of the first part.
        counts: rows that are dealt to each part, be they first or not.
        starts, sizes: where in `part_values` and `part_rows` each part starts, from 1, and its rows.
        distance: bits in which near rows may differ.
        crowded: 1 is written for the rows of marked buckets, uint8 (n,).

    Returns:
        Edges as `later << 32 | earlier`, in no order; a pair that several tables see is given by the first. And the
        buckets that were marked, as `table << 48 | part << FINEST | bucket`.
    """
    masks, _, _, _, _, keys, key_lows, useds, lefts = tables  # once: each time counts references
    part_values[0] = 0
    edges, marked = np.empty(1024, np.uint64), np.empty(64, np.uint64)
    edge_count, mark_count = 0, 0
    near = np.uint64(distance)
    largest = sizes.max()
    buckets = 1 << (_PART + 4)
    scratch = _Scratch(
        np.empty(buckets, np.int32),
        np.empty(buckets, np.int32),
        np.zeros(largest + 1, np.int32),
        np.empty(largest, np.int32),
    )
    # A part that is much larger than others, as a block of bits can be the same in many texts, is dealt again for each
    # table, by leading bits of the bucket, so that what is compared stays within the cache.
    widest = np.int64(0)
    for table in range(first_table, last_table):
        widest = max(widest, fine_bits(lefts[table], counts.max()))
    room = largest + 1 if widest > _PART + 4 else 0
    dealt_values, dealt_rows = np.empty(room, np.uint64), np.empty(room, np.int32)
    for p in range(sizes.size):
        if sizes[p] < 2:
            continue
        begin, end = starts[p], starts[p] + sizes[p]
        for table in range(first_table, last_table):
            key, low, whole = keys[table], key_lows[table], fine_bits(lefts[table], counts[p])
            down, base = np.uint64(63 - useds[table] - whole), (table << 48) | ((part + p) << FINEST)
            if whole <= _PART + 4:
                edges, edge_count, marked, mark_count = _compare(
                    part_values[begin - 1 : end], part_rows[begin - 1 : end], masks, table, key, low, down, whole, base,
                    near, scratch, crowded, edges, edge_count, marked, mark_count,
                )  # fmt: skip
                continue
            fine = np.int64(_PART + 2)
            bounds = np.zeros((1 << (whole - fine)) + 1, np.int64)
            leading, bits = down + np.uint64(fine), np.uint64(bounds.size - 2)
            histogram(part_values[begin:end], key, low, leading, bits, bounds[1:])
            bounds[0] = 1
            for s in range(bounds.size - 1):
                bounds[s + 1] += bounds[s]
            ends = bounds.copy()
            ends[-1] = 0
            deal(
                part_values[begin:end], part_rows[begin:end], key, low, leading, bits, 0, ends, dealt_values, dealt_rows,
                part_rows[:0],
            )  # fmt: skip
            for s in range(bounds.size - 1):
                if bounds[s + 1] - bounds[s] > 1:
                    edges, edge_count, marked, mark_count = _compare(
                        dealt_values[bounds[s] - 1 : bounds[s + 1]], dealt_rows[bounds[s] - 1 : bounds[s + 1]], masks, table,
                        key, low, down, fine, base | (s << fine), near, scratch, crowded, edges, edge_count, marked,
                        mark_count,
                    )  # fmt: skip
    return edges[:edge_count].copy(), marked[:mark_count].copy()
