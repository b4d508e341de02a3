"""Greedy decisions over 64-bit fingerprints: a row is dropped only if it is near to an earlier row that is kept.

`search.py` finds the pairs of near rows, and marks buckets that are too large or too dense for pairwise comparison.
This module visits the rows in order, and compares them with the kept rows of marked buckets.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from corpusprep.arrow import U64
from corpusprep.kernels import kernel
from corpusprep.stages.dedup import search
from corpusprep.stages.dedup.search import FINEST, I32, I64, U8, Tables, fine_bits, number, popcount

_LEAST_SCRATCH = 1 << 16
_SCRATCH = 1 << 26  # rows dealt into parts at a time; 12 bytes each
_BLOCKS = 4096  # initial number of blocks, of eight kept rows each
_NONE = np.iinfo(np.int32).max


class _Pool(NamedTuple):
    """The kept rows of the marked buckets: each bucket has a chain of blocks of eight rows.

    Attributes:
        head, tail, fill: for each bucket, the first and last block (-1 if there is none), and rows in the last block.
        values, rows: fingerprint and row at each place.
        next: the next block after each block, or -1.
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
        tables, counts: the tables, and the number of rows per part of each group, shape (groups, parts).
        marked: the marked buckets, ascending; those of table t start at `marked_start[t]`.
        crowded: which rows are in a marked bucket.
        pool: the kept rows of the marked buckets.
        row, used: the first row to visit, and the blocks of the pool in use: 0 and 0, or the returned values.
        keeper: int32 (n,), written.

    Returns:
        The first row that was not visited because the pool is full (n at the end), and the blocks in use.
    """
    near = np.uint64(distance)
    # Unpacked once, because each access counts references.
    masks, groups, firsts, first_lows, coarses, keys, key_lows, useds, lefts = tables
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
                down, bits = np.uint64(63 - coarses[t]), np.uint64((1 << coarses[t]) - 1)
                part = np.int64(number(value, firsts[t], first_lows[t], down, bits))
                fine = fine_bits(lefts[t], counts[groups[t], part])
                down, bits = np.uint64(63 - useds[t] - fine), np.uint64((1 << fine) - 1)
                q = np.int64(number(value, keys[t], key_lows[t], down, bits))
                bucket = np.uint64((t << 48) | (part << FINEST) | q)
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
    """The keeper of each row; enlarges the pool if needed."""
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


def _leading(bits: int) -> tuple[np.uint64, np.uint64]:
    """The leading bits of a hash, as a shift and a mask."""
    return np.uint64(63 - bits), np.uint64((1 << bits) - 1)


class _Job(NamedTuple):
    """Tables with the same first block, and the parts of them that are searched at once."""

    first_table: int
    last_table: int
    part: int
    counts: I64


def keepers(values: U64, distance: int, threads: int = 1, k: int | None = None) -> I32:
    """The keeper of each row, int32 (n,): itself, or the earliest kept row within the distance.

    Args:
        values: n < 2**31 fingerprints in rank order, uint64, contiguous.
        distance: maximum number of bits in which near rows differ, 0 to 8.
        threads: number of threads; the result does not depend on it.
        k: the number of blocks; chosen automatically if None.
    """
    n = values.size
    tables = search.make_tables(n, k or (search.choose_blocks(values, distance) if distance else 1), distance)
    ends = [*(np.flatnonzero(np.diff(tables.firsts)) + 1).tolist(), tables.firsts.size]
    first, crowded = np.empty(n, np.int32), np.zeros(n, np.uint8)
    scratch = max(_LEAST_SCRATCH, _SCRATCH // max(1, threads))
    all_counts = np.zeros((len(ends), 1 << int(tables.coarse.max())), np.int64)

    def layout(group: int) -> list[_Job]:
        table, coarse = (ends[group - 1] if group else 0), int(tables.coarse[ends[group] - 1])
        counts = all_counts[group, : 1 << coarse]
        search.histogram(values, tables.firsts[table], tables.first_lows[table], *_leading(coarse), counts)
        jobs, part, total = [], 0, np.cumsum(counts)
        share = min(scratch, -(-n // threads)) if group == 0 else scratch  # the first group runs alone
        while part < counts.size:
            before = int(total[part - 1]) if part else 0
            last = max(part + 1, int(np.searchsorted(total, before + share, side="right")))
            jobs.append(_Job(table, ends[group], part, counts[part:last]))
            part = last
        return jobs

    def look(job: _Job) -> tuple[U64, U64]:
        table, sizes = job.first_table, job.counts
        room = int(sizes.sum()) + 1
        starts = np.concatenate(([1], np.cumsum(sizes) + 1))
        part_values, part_rows = np.empty(room, np.uint64), np.empty(room, np.int32)
        to = starts.copy()
        to[-1] = 0
        again = table > 0
        search.deal(
            values, first[:0], tables.firsts[table], tables.first_lows[table], *_leading(int(tables.coarse[table])),
            job.part, to, part_values, part_rows, first if again else first[:0],
        )  # fmt: skip
        sizes = to[:-1] - starts[:-1]
        if not again:
            search.collapse(part_values, part_rows, starts, sizes, first)
            if distance == 0:
                return np.empty(0, np.uint64), np.empty(0, np.uint64)
        return search.find_pairs(
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
        found = list(pool.map(look, layout(0)))  # finds the first rows; the others are not searched again
        jobs = [job for jobs in pool.map(layout, range(1, len(ends))) for job in jobs]
        found += pool.map(look, jobs)
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
