"""Greedy near-duplicate decisions over 64-bit fingerprints: exact, and within a small multiple of the cost of a sort.

A row is dropped only if it lies within the distance of an earlier row that is kept. The way there:

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
from concurrent.futures import ThreadPoolExecutor
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

_FINEST = 24  # log2 of the buckets of a part, at most
_LEAST_SCRATCH = 1 << 16
_SCRATCH = 1 << 26  # rows dealt into parts at a time; 12 bytes each
_PART = 13  # log2 of the rows of a part: with its buckets, it fits the cache
_LARGE = 1024  # rows of a bucket that is never compared pairwise
_DENSE, _EDGES = 64, 4  # so many edges, and so many more a row, and a bucket is dense
_MARKED = -1
_BLOCKS = 4096  # of eight kept rows, room for which is made at first
_NONE = np.iinfo(np.int32).max
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
        left = min(key.bit_count() - used, _FINEST)
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
def _fine(left: int, rows: int) -> np.int64:
    """The bits that tell the buckets of a part with so many rows: two to four buckets a row, where the key has the bits.

    It goes by the part's own rows, as a block of bits can be much the same in all texts.
    """
    bits = np.int64(1)
    while rows >> bits:
        bits += 1
    return min(np.int64(left), bits + 1)


@kernel
def _collapse(part_values: U64, part_rows: I32, starts: I64, sizes: I64, first: I32) -> None:
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


@kernel
def _histogram(values: U64, mask: np.uint64, low: np.uint64, coarse: int, counts: I64) -> None:
    down = np.uint64(63 - coarse)
    for i in range(values.size):
        counts[np.int64(_hash(values[i], mask, low) >> down)] += 1


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
        q = np.int64((_hash(value, key, low) >> down) & fine)
        j = head[q]
        head[q], chain[i] = i, j
        before = chain[j]
        if (popcount(value ^ part[j]) <= near) | (popcount(value ^ part[before]) <= near) | (chain[before] > 0):
            meeting[meetings] = i
            meetings += 1
    return meetings


@kernel
def _deal(
    values: U64, mask: np.uint64, low: np.uint64, coarse: int, part: int, ends: I64, to: U64, rows: I32, only: I32
) -> None:
    """Deals the rows of some parts, from `part` on, in order, to where `ends` says that each part goes on.

    Rows of other parts go where the last item of `ends` says, over and over: a branch would be guessed wrong too often.

    Args:
        only: deals row i only if `only[i] == i`; all rows where it is empty.
    """
    down = np.uint64(63 - coarse)
    last = np.uint64(ends.size - 1)
    for i in range(values.size):
        which = min((_hash(values[i], mask, low) >> down) - np.uint64(part), last)
        if only.size and only[i] != i:
            which = last
        place = ends[which]
        to[place], rows[place] = values[i], i
        ends[which] = place + np.int64(which != last)


@kernel
def _search(
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
        buckets that were marked, as `table << 48 | part << _FINEST | bucket`.
    """
    masks, _, _, _, _, keys, key_lows, useds, lefts = tables  # once: each time counts references
    part_values[0] = 0
    edges, marked = np.empty(1024, np.uint64), np.empty(64, np.uint64)
    edge_count, mark_count = 0, 0
    near = np.uint64(distance)
    head, found = np.empty(1 << (_PART + 4), np.int32), np.empty(1 << (_PART + 4), np.int32)
    chain, meeting = np.zeros(sizes.max() + 1, np.int32), np.empty(sizes.max(), np.int32)
    # A part that is much larger than others, as a block of bits can be the same in many texts, is dealt again for each
    # table, by leading bits of the bucket, so that what is compared stays within the cache.
    widest = np.int64(0)
    for table in range(first_table, last_table):
        widest = max(widest, _fine(lefts[table], counts.max()))
    room = sizes.max() + 1 if widest > _PART + 4 else 0
    dealt_values, dealt_rows = np.empty(room, np.uint64), np.empty(room, np.int32)
    for p in range(sizes.size):
        begin, end = starts[p], starts[p] + sizes[p]
        if sizes[p] < 2:
            continue
        for table in range(first_table, last_table):
            mask, key, low, whole = masks[table], keys[table], key_lows[table], _fine(lefts[table], counts[p])
            shift = 63 - useds[table] - whole
            split = whole - (_PART + 2) if whole > _PART + 4 else np.int64(0)
            fine = whole - split
            down, fine_mask = np.uint64(shift), np.uint64((1 << fine) - 1)
            bounds = np.zeros((1 << split) + 1, np.int64)
            bounds[0] = 1
            if split:
                split_down, split_mask = np.uint64(shift + fine), np.uint64((1 << split) - 1)
                for i in range(begin, end):
                    bounds[np.int64((_hash(part_values[i], key, low) >> split_down) & split_mask) + 1] += 1
                for s in range(1 << split):
                    bounds[s + 1] += bounds[s]
                ends = bounds[:-1].copy()
                for i in range(begin, end):
                    to = np.int64((_hash(part_values[i], key, low) >> split_down) & split_mask)
                    dealt_values[ends[to]], dealt_rows[ends[to]] = part_values[i], part_rows[i]
                    ends[to] += 1
            for s in range(1 << split):
                if split:
                    some, some_rows = (
                        dealt_values[bounds[s] - 1 : bounds[s + 1]],
                        dealt_rows[bounds[s] - 1 : bounds[s + 1]],
                    )
                else:
                    some, some_rows = part_values[begin - 1 : end], part_rows[begin - 1 : end]
                if some.size < 3:
                    continue
                head[: 1 << fine] = 0
                meetings = _meet(some, key, low, down, fine_mask, near, head, chain, meeting)
                if meetings:
                    found[: 1 << fine] = 0
                marked_before = mark_count
                for at in range(meetings):
                    i = meeting[at]
                    value = some[i]
                    q = np.int64((_hash(value, key, low) >> down) & fine_mask)
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
                                if edge_count == edges.size:
                                    more = np.empty(2 * edge_count, np.uint64)
                                    more[:edge_count] = edges
                                    edges = more
                                later, before = np.uint64(some_rows[i]), np.uint64(some_rows[j])
                                edges[edge_count] = later << np.uint64(32) | before
                                edge_count += 1
                        j = chain[j]
                        steps += 1
                    if steps >= _LARGE or found[q] > _EDGES * steps + _DENSE:
                        found[q] = _MARKED
                        if mark_count == marked.size:
                            more = np.empty(2 * mark_count, np.uint64)
                            more[:mark_count] = marked
                            marked = more
                        marked[mark_count] = np.uint64((table << 48) | ((part + p) << _FINEST) | (s << fine) | q)
                        mark_count += 1
                if mark_count > marked_before:
                    for i in range(1, some.size):
                        if found[np.int64((_hash(some[i], key, low) >> down) & fine_mask)] == _MARKED:
                            crowded[some_rows[i]] = 1
    return edges[:edge_count].copy(), marked[:mark_count].copy()


class _Pool(NamedTuple):
    """The kept rows of the marked buckets: a chain of blocks of eight rows a bucket.

    Attributes:
        head, tail, fill: the first and last block of every bucket, -1 where there is none, and rows in the last.
        values, rows: of every place.
        next: the block after each block, or -1.
    """

    head: I64
    tail: I64
    fill: I64
    values: U64
    rows: I32
    next: I64


@kernel
def _greedy(
    values: U64, first: I32, edges: U64, tables: Tables, counts: I64, marked: U64, marked_start: I64, crowded: U8,
    distance: int, pool: _Pool, row: int, used: int, keeper: I32,
) -> tuple[int, int]:  # fmt: skip
    """Visits rows in order and writes each one's keeper: itself, or the earliest kept row within the distance.

    Args:
        values: fingerprints in rank order.
        first: the first row with the same fingerprint.
        edges: `later << 32 | earlier`, ascending.
        tables, counts: what makes the buckets; rows of the parts of each group, shape (groups, parts).
        marked: the marked buckets, ascending; `marked_start` says where each table's start.
        crowded: which rows are in a marked bucket.
        pool: the kept rows of the marked buckets.
        row, used: the first row to visit, and blocks of the pool in use: 0 and 0, or what was returned.
        keeper: int32 (n,), written.

    Returns:
        The row that was not visited for want of room in the pool, n at the end; and blocks in use.
    """
    near = np.uint64(distance)
    masks, groups, firsts, first_lows, coarses, keys, key_lows, useds, lefts = tables  # once: it counts references
    head, tail, fill, pool_values, pool_rows, pool_next = pool
    place = np.full(masks.size, -1, np.int64)
    edge = np.searchsorted(edges, np.uint64(row) << np.uint64(32))
    while row < values.size:
        if first[row] != row:
            keeper[row] = keeper[first[row]]
            row += 1
            continue
        best = _NONE
        while edge < edges.size and np.int64(edges[edge] >> np.uint64(32)) == row:
            other: Any = np.int64(edges[edge] & np.uint64(0xFFFFFFFF))
            if best == _NONE and keeper[other] == other:
                best = other
            edge += 1
        if crowded[row]:
            if used + masks.size > pool_next.size:
                return row, used
            value = values[row]
            for t in range(masks.size):
                place[t] = -1
                low, high = marked_start[t], marked_start[t + 1]
                if low == high:
                    continue
                part = np.int64(_hash(value, firsts[t], first_lows[t]) >> np.uint64(63 - coarses[t]))
                fine = _fine(lefts[t], counts[groups[t], part])
                q = np.int64(_hash(value, keys[t], key_lows[t]) >> np.uint64(63 - useds[t] - fine)) & ((1 << fine) - 1)
                bucket = np.uint64((t << 48) | (part << _FINEST) | q)
                at = low + np.searchsorted(marked[low:high], bucket)
                if at == high or marked[at] != bucket:
                    continue
                place[t] = at
                block = head[at]
                while block >= 0:
                    stop = 8 * block + (8 if pool_next[block] >= 0 else fill[at])
                    hit = _NONE
                    for i in range(8 * block, stop):
                        if popcount(pool_values[i] ^ value) <= near:
                            hit = pool_rows[i]
                            break
                    if hit != _NONE:
                        best = min(best, hit)
                        break
                    block = pool_next[block]
            if best == _NONE:
                for t in range(masks.size):
                    at = place[t]
                    if at < 0:
                        continue
                    if tail[at] < 0 or fill[at] == 8:
                        if tail[at] < 0:
                            head[at] = used
                        else:
                            pool_next[tail[at]] = used
                        tail[at], fill[at] = used, 0
                        used += 1
                    i = 8 * tail[at] + fill[at]
                    pool_values[i], pool_rows[i] = value, row
                    fill[at] += 1
        keeper[row] = row if best == _NONE else best
        row += 1
    return row, used


def _visit(
    values: U64, first: I32, edges: U64, tables: Tables, counts: I64, marked: U64, crowded: U8, distance: int
) -> I32:
    """The keeper of every row; gives the pool the room that it needs."""
    starts = np.searchsorted(marked, np.arange(tables.masks.size + 1, dtype=np.uint64) << np.uint64(48))
    room = _BLOCKS + tables.masks.size
    none = np.full(marked.size, -1, np.int64)
    pool = _Pool(
        none, none.copy(), np.zeros(marked.size, np.int64), np.empty(8 * room, np.uint64),
        np.empty(8 * room, np.int32), np.full(room, -1, np.int64),
    )  # fmt: skip
    keeper = np.empty(values.size, np.int32)
    row, used = 0, 0
    while True:
        row, used = _greedy(
            values,
            first,
            edges,
            tables,
            counts,
            marked,
            starts.astype(np.int64),
            crowded,
            distance,
            pool,
            row,
            used,
            keeper,
        )
        if row == values.size:
            return keeper
        pool = pool._replace(
            values=np.concatenate((pool.values, np.empty_like(pool.values))),
            rows=np.concatenate((pool.rows, np.empty_like(pool.rows))),
            next=np.concatenate((pool.next, np.full_like(pool.next, -1))),
        )


class _Job(NamedTuple):
    """The tables with one first block, and the parts of them that are looked through at a time."""

    first_table: int
    last_table: int
    part: int
    counts: I64


def keepers(values: U64, distance: int, threads: int = 1, k: int | None = None) -> I32:
    """The keeper of every row, int32 (n,): itself, or the earliest kept row within the distance.

    Args:
        values: n < 2**31 fingerprints in rank order, uint64, contiguous.
        distance: bits in which near rows may differ, 0 to 8.
        threads: how many to use; the result does not depend on it.
        k: the number of blocks, if it is not to be chosen here.
    """
    n = values.size
    tables = make_tables(n, k or (choose_blocks(values, distance) if distance else 1), distance)
    ends = [*(np.flatnonzero(np.diff(tables.firsts)) + 1).tolist(), tables.firsts.size]
    first, crowded = np.empty(n, np.int32), np.zeros(n, np.uint8)
    scratch = max(_LEAST_SCRATCH, _SCRATCH // max(1, threads))
    all_counts = np.zeros((len(ends), 1 << int(tables.coarse.max())), np.int64)

    def layout(group: int) -> list[_Job]:
        table, coarse = (ends[group - 1] if group else 0), int(tables.coarse[ends[group] - 1])
        counts = all_counts[group, : 1 << coarse]
        _histogram(values, tables.firsts[table], tables.first_lows[table], coarse, counts)
        jobs, part, total = [], 0, np.cumsum(counts)
        share = min(scratch, -(-n // threads)) if group == 0 else scratch  # the first group has no other beside it
        while part < counts.size:
            before = int(total[part - 1]) if part else 0
            last = max(part + 1, int(np.searchsorted(total, before + share, side="right")))
            jobs.append(_Job(table, ends[group], part, counts[part:last]))
            part = last
        return jobs

    def search(job: _Job) -> tuple[U64, U64]:
        table, sizes = job.first_table, job.counts
        room = int(sizes.sum()) + 1
        starts = np.concatenate(([1], np.cumsum(sizes) + 1))
        part_values, part_rows = np.empty(room, np.uint64), np.empty(room, np.int32)
        to = starts.copy()
        to[-1] = 0
        again = table > 0
        _deal(
            values, tables.firsts[table], tables.first_lows[table], int(tables.coarse[table]), job.part, to, part_values,
            part_rows, first if again else first[:0],
        )  # fmt: skip
        sizes = to[:-1] - starts[:-1]
        if not again:
            _collapse(part_values, part_rows, starts, sizes, first)
            if distance == 0:
                return np.empty(0, np.uint64), np.empty(0, np.uint64)
        return _search(
            tables,
            table,
            job.last_table,
            job.part,
            job.counts,
            starts,
            sizes,
            part_values,
            part_rows,
            distance,
            crowded,
        )

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(search, layout(0)))  # says which rows are first: the others are not looked at again
        jobs = [job for jobs in pool.map(layout, range(1, len(ends))) for job in jobs]
        found += pool.map(search, jobs)
    if distance == 0:
        return first
    edges = np.concatenate([part[0] for part in found])
    marked = np.concatenate([part[1] for part in found])
    del found
    edges.sort()
    marked.sort()
    return _visit(values, first, edges, tables, all_counts, marked, crowded, distance)


@kernel
def _verdicts(text_hash: U64, keeper: I32, exact: bool, verdict: U8) -> None:
    for row in range(keeper.size):
        kept = keeper[row]
        if kept == row:
            verdict[row] = 0
        elif exact and text_hash[row] == text_hash[kept]:
            verdict[row] = 1
        else:
            verdict[row] = 2


def decide(
    fingerprint: U64, text_hash: U64, distance: int, exact: bool, near: bool, threads: int = 1
) -> tuple[U8, I64]:
    """Verdicts and keepers of rows in rank order; see `corpusprep.stages.dedup.decide`."""
    n = fingerprint.size
    if n < 2 or not (exact or near):
        return np.zeros(n, np.uint8), np.arange(n, dtype=np.int64)
    keeper = keepers(fingerprint, distance, threads) if near else keepers(text_hash, 0, threads)
    verdict = np.empty(n, np.uint8)
    _verdicts(text_hash, keeper, exact, verdict)
    return verdict, keeper.astype(np.int64)
