"""Finds all pairs of near 64-bit fingerprints, at a small multiple of the cost of a sort.

The decisions are greedy: a row is dropped only if it is within the distance of an earlier row that is kept. They take
three steps. This module has steps 1 and 2; step 3 is in `greedy.py`.

1. Rows with equal fingerprints count as one, so that boilerplate costs one look-up per row.
2. Two fingerprints within distance d agree on at least k - d of k blocks of bits (Manku et al., "Detecting
   near-duplicates for web crawling", WWW 2007). Each choice of k - d blocks is a table. Rows that agree on these blocks
   are in the same bucket and are compared; this gives the edges of the graph of near rows. Tables with the same first
   block share work: the rows are dealt once into parts by that block, and the buckets of a part fit the cache. k is
   chosen on a sample, so that buckets are small and tables few.
3. Rows are visited in order; a row that has an edge to a kept row is dropped.

A bucket that is large or dense with edges is not compared pairwise. It is marked, its rows are its members, and step 3
compares them only with the kept members. Kept rows are further than d from each other, so dense buckets have few of them,
and time and memory stay bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import U64
from corpusprep.kernels import kernel
from corpusprep.stages.bits import popcount

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

FINEST = 24  # log2 of the maximum number of buckets of a part
_PART = 13  # log2 of the rows of a part: a part fits the cache, with its buckets
_LARGE = 1024  # rows of a bucket that is never compared pairwise
_DENSE, _EDGES = 64, 4  # a bucket is dense if it has more than _DENSE edges plus _EDGES edges per row
# Measured times in nanoseconds: to deal a row into its part, to look it up in a table, to compare it with another row.
_DEAL, _LOOK, _COMPARE = 10.0, 8.0, 30.0


def blocks(k: int) -> list[int]:
    """k blocks that divide 64 bits, as masks, the lowest bits first."""
    edges = [64 * i // k for i in range(k + 1)]
    return [(1 << end) - (1 << begin) for begin, end in itertools.pairwise(edges)]


def _collisions(sample: U64, mask: int) -> float:
    """The chance that two rows of a sample have the same bits of a mask."""
    values = np.sort(sample & np.uint64(mask))
    counts = np.diff(np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1], [True])))).astype(float)
    return float((counts * (counts - 1)).sum()) / max(1, sample.size) / max(1, sample.size)


def choose_blocks(sample: U64, n: int, distance: int) -> list[int]:
    """The blocks with the cheapest search of n rows, estimated from the buckets of a sample.

    Those that tell rows apart best come first: rows are dealt by the first block of each table, and a block that is nearly the
    same in all rows would put them into one part.
    """
    sample = np.unique(sample)
    best, best_cost = blocks(distance + 1), np.inf
    for k in range(distance + 1, distance + 5):
        chosen = sorted(blocks(k), key=lambda block: _collisions(sample, block))
        tables = list(itertools.combinations(chosen, k - distance))
        if len(tables) > 512:
            break
        # Compared pairs per row, for some of the tables, estimated from the sample's collisions.
        compared, looked = 0.0, tables[:: max(1, len(tables) // 4)]
        for table in looked:
            mask = sum(table)
            compared += min(max(_collisions(sample, mask), 0.5 ** mask.bit_count()) * n / 2, _LARGE)
        cost = _DEAL * (distance + 1) + len(tables) * (_LOOK + _COMPARE * compared / len(looked))
        if cost < best_cost:
            best, best_cost = chosen, cost
    return best


class Tables(NamedTuple):
    """Bits and hashes of each table, as arrays with one item per table. Tables with the same first block are adjacent.

    Attributes:
        masks: bits that the table compares; uint64.
        group: number of the first block; int64.
        firsts, first_lows: bits of the first block, and the lowest of them. Their hash determines the part of a row;
            uint64.
        coarse: number of leading bits of that hash that are used; int64.
        keys, key_lows: bits whose hash determines the bucket within a part, and the lowest of them. Bits that all rows
            of a part share are left out; uint64.
        used: number of leading bits of that hash that are already used for the part; int64.
        left: maximum number of bits of the key that distinguish the buckets of a part; int64.
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


def make_tables(n: int, chosen: Sequence[int], distance: int) -> Tables:
    """The tables for n rows and some blocks, as masks."""
    rows: list[tuple[int, ...]] = []
    for table in itertools.combinations(range(len(chosen)), len(chosen) - distance):
        mask, first = sum(chosen[block] for block in table), chosen[table[0]]
        coarse = min(first.bit_count(), max(0, n.bit_length() - _PART))
        key = mask ^ first if coarse == first.bit_count() and mask != first else mask
        used = coarse if key == first else 0
        left = min(key.bit_count() - used, FINEST)
        rows.append((mask, table[0], first, _low(first), coarse, key, _low(key), used, left))
    columns: list[Any] = [np.array(column, np.uint64) for column in zip(*rows, strict=True)]
    for number in (1, 4, 7, 8):
        columns[number] = columns[number].astype(np.int64)
    return Tables(*columns)


def _low(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


@kernel(inline="always")
def _hash(value: np.uint64, mask: np.uint64, low: np.uint64) -> np.uint64:
    """A 63-bit hash of the masked bits; its leading bits are the best. It spreads neighbours better than chance.

    Values with equal masked bits share a bucket; other values may share one by chance.
    """
    return (((value & mask) >> low) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(1)


@kernel(inline="always")
def fine_bits(left: int, rows: int) -> np.int64:
    """The number of bits that distinguish the buckets of a part: two to four buckets per row, if the key has the bits.

    It depends on the rows of the part, because a block of bits can be nearly the same in all texts.
    """
    bits = np.int64(1)
    while rows >> bits:
        bits += 1
    return min(np.int64(left), bits + 1)


@kernel
def collapse(part_values: U64, part_rows: I32, starts: I64, sizes: I64, first: I32) -> None:
    """For each row of some parts, writes the first row with the same fingerprint to `first`. Only these first rows stay
    in the parts; their number is written to `sizes`.

    Equal fingerprints are in one part, in row order. Each part has a hash table that fits the cache.
    """
    bits = 2
    while 1 << bits < 3 * sizes.max():
        bits += 1
    owner = np.empty(1 << bits, np.int32)  # the place of a row in its part, from 1
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
    """Bits of the hash as a number: the hash is shifted right by `down` and masked with `bits`."""
    return (_hash(value, mask, low) >> down) & bits


@kernel
def histogram(values: U64, mask: np.uint64, low: np.uint64, down: np.uint64, bits: np.uint64, counts: I64) -> None:
    """Counts the values with each number, and adds the counts to `counts`."""
    for i in range(values.size):
        counts[np.int64(number(values[i], mask, low, down, bits))] += 1


@kernel
def _meet(
    part: U64, key: np.uint64, low: np.uint64, down: np.uint64, fine: np.uint64, near: np.uint64,
    head: I32, chain: I32, meeting: I32,
) -> int:  # fmt: skip
    """Puts the rows of a part into the buckets of a table, and writes the rows that must be compared to `meeting`.

    Args:
        part: fingerprints, from place 1 on; place 0 may have any value.
        key, low, down, fine: arguments of `number`, which gives the bucket.
        near: the distance.
        head: all zero; the last row of each bucket, written.
        chain: for each row, the previous row in its bucket, written; 0 if there is none.

    Returns:
        The number of rows that are near one of the two previous rows in their bucket, or have more previous rows. Most
        buckets have few rows and no near ones, so the branch is rarely taken.
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
    """Appends values, in order, to the parts of their numbers; `ends` has the next free place of each part.

    Values of other parts are all written to the place in the last item of `ends`: a branch would often be mispredicted.

    Args:
        ids: the row to write to `rows` for each value; the index of the value if empty.
        mask, low, down, bits: arguments of `number`.
        part: the number of the first part.
        only: if not empty, value i is dealt only if `only[i] == i`.
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
    """Scratch arrays for the buckets of a part, see `_meet`; `found` is the number of near pairs, or -1 minus the number of a
    marked bucket."""

    head: I32
    found: I32
    chain: I32
    meeting: I32


@kernel(inline="always")
def _append(values: U64, count: int, value: np.uint64) -> U64:
    """Appends an item to the array; doubles the size of the array if it is full."""
    if count == values.size:
        more = np.empty(2 * count, np.uint64)
        more[:count] = values
        values = more
    values[count] = value
    return values


@kernel
def _compare(
    some: U64, rows: I32, masks: U64, table: int, key: np.uint64, low: np.uint64, down: np.uint64, fine: int,
    near: np.uint64, scratch: _Scratch, edges: U64, edge_count: int, members: U64, member_count: int, marks: int,
) -> tuple[U64, int, U64, int, int]:  # fmt: skip
    """Compares the rows of one part in one table.

    Args:
        some, rows: fingerprints and rows, from place 1 on.
        key, low, down, fine: arguments of `number`, which gives the bucket; `fine` as a number of bits.
        edges, members: arrays that are appended to and returned, with their counts.
        marks: number of marked buckets so far; returned.
    """
    head, found, chain, meeting = scratch
    mask, bits = masks[table], np.uint64((1 << fine) - 1)
    head[: 1 << fine] = 0
    meetings = _meet(some, key, low, down, bits, near, head, chain, meeting)
    if meetings:
        found[: 1 << fine] = 0
    marks_before = marks
    for at in range(meetings):
        i = meeting[at]
        value = some[i]
        q = np.int64(number(value, key, low, down, bits))
        if found[q] < 0:
            continue
        steps = 0
        j = chain[i]
        while j > 0:
            differ = value ^ some[j]
            if popcount(differ) <= near and differ & mask == 0:
                known = False  # an earlier table finds this pair too
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
            found[q] = -1 - marks
            marks += 1
    if marks > marks_before:
        for i in range(1, some.size):
            mark = -1 - found[np.int64(number(some[i], key, low, down, bits))]
            if mark >= 0:
                members = _append(members, member_count, np.uint64(rows[i]) << np.uint64(32) | np.uint64(mark))
                member_count += 1
    return edges, edge_count, members, member_count, marks


@kernel
def find_pairs(
    tables: Tables,
    first_table: int,
    last_table: int,
    counts: I64,
    starts: I64,
    sizes: I64,
    part_values: U64,
    part_rows: I32,
    distance: int,
) -> tuple[U64, U64, int]:
    """Compares the rows of some parts in the tables `first_table` to `last_table - 1`.

    Args:
        tables: all tables; those from `first_table` to `last_table - 1` have the same first block.
        counts: rows dealt to each part, including repeated fingerprints.
        starts, sizes: for each part, its start in `part_values` and `part_rows` (from 1), and its number of rows.
        distance: maximum number of bits in which near rows differ.

    Returns:
        Edges as `later << 32 | earlier`, unordered, where the later row is the one that lies further back in its part; a pair
        that several tables find is returned by the first. Members of marked buckets as `row << 32 | bucket`. And the number
        of these buckets, which are counted from 0.
    """
    # Unpacked once, because each access counts references.
    masks, _, _, _, _, keys, key_lows, useds, lefts = tables
    part_values[0] = 0
    edges, members = np.empty(1024, np.uint64), np.empty(64, np.uint64)
    edge_count, member_count, marks = 0, 0, 0
    near = np.uint64(distance)
    largest = sizes.max()
    buckets = 1 << (_PART + 4)
    scratch = _Scratch(
        np.empty(buckets, np.int32),
        np.empty(buckets, np.int32),
        np.zeros(largest + 1, np.int32),
        np.empty(largest, np.int32),
    )
    # A part can be much larger than others, because a block of bits can be the same in many texts. Such a part is dealt
    # again for each table, by leading bits of the bucket, so that the compared rows fit the cache.
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
            down = np.uint64(63 - useds[table] - whole)
            if whole <= _PART + 4:
                edges, edge_count, members, member_count, marks = _compare(
                    part_values[begin - 1 : end], part_rows[begin - 1 : end], masks, table, key, low, down, whole, near,
                    scratch, edges, edge_count, members, member_count, marks,
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
                    edges, edge_count, members, member_count, marks = _compare(
                        dealt_values[bounds[s] - 1 : bounds[s + 1]], dealt_rows[bounds[s] - 1 : bounds[s + 1]], masks, table,
                        key, low, down, fine, near, scratch, edges, edge_count, members, member_count, marks,
                    )  # fmt: skip
    return edges[:edge_count].copy(), members[:member_count].copy(), marks
