"""Greedy decisions over 64-bit fingerprints: a row is dropped only if it is near to an earlier row that is kept.

`search.py` finds the pairs of near rows, and the members of buckets that are too large or too dense for pairwise comparison.
This module visits the rows in order, and compares members with the kept members of their buckets.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import U64
from corpusprep.kernels import kernel
from corpusprep.stages.bits import popcount
from corpusprep.stages.dedup import search
from corpusprep.stages.dedup.search import I32, I64

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

_LEAST_SCRATCH = 1 << 16
_SCRATCH = 1 << 26  # rows dealt into parts at a time; 12 bytes each
_BLOCKS = 1024  # initial number of blocks of a pool


class Pool(NamedTuple):
    """The kept members of the marked buckets: each bucket has a chain of blocks of eight rows.

    Attributes:
        head, tail, fill: for each bucket, the first and last block (-1 if there is none), and rows in the last block.
        values, rows: fingerprint and row at each place.
        next: the next block after each block, or -1.
        used: number of blocks in use.
    """

    head: I64
    tail: I64
    fill: I64
    values: U64
    rows: U32
    next: I64
    used: int


def new_pool(buckets: int) -> Pool:
    """A pool without rows for so many marked buckets."""
    none = np.full(buckets, -1, np.int64)
    return Pool(
        none, none.copy(), np.zeros(buckets, np.int64), np.empty(8 * _BLOCKS, np.uint64), np.empty(8 * _BLOCKS, np.uint32),
        np.full(_BLOCKS, -1, np.int64), 0,
    )  # fmt: skip


@kernel(inline="always")
def is_lost(lost: U8, row: np.uint64) -> bool:
    return bool(lost[row >> np.uint64(3)] >> (row & np.uint64(7)) & 1)


@kernel
def doubled(old: Any) -> Any:
    """The array with room for twice as many items."""
    new = np.empty(2 * old.size, old.dtype)
    new[: old.size] = old
    return new


@kernel
def visit(edges: U64, members: U64, values: U64, distance: int, lost: U8, pool: Pool) -> tuple[U64, Pool]:
    """Visits rows in order: a row goes if it is near to an earlier row that stays. Rows without edge and bucket stay.

    Args:
        edges: `later << 32 | earlier`, ascending.
        members: `row << 32 | bucket`, ascending.
        values: fingerprints of the members, (members,).
        distance: maximum number of bits in which near rows differ.
        lost: a bit for each row, set for those that go; written.
        pool: the kept members of earlier calls, which had earlier rows.

    Returns:
        The rows that go, as `row << 32 | keeper`, ascending; a row's keeper is the earliest kept row within the distance.
        And the pool.
    """
    head, tail, fill, pool_values, pool_rows, pool_next, used = pool
    near, low = np.uint64(distance), np.uint64(0xFFFFFFFF)
    none = np.uint64(1) << np.uint64(32)
    dropped, count = np.empty(1024, np.uint64), 0
    edge, member = 0, 0
    while edge < edges.size or member < members.size:
        row = none
        if edge < edges.size:
            row = edges[edge] >> np.uint64(32)
        if member < members.size:
            row = min(row, members[member] >> np.uint64(32))
        best = none
        while edge < edges.size and edges[edge] >> np.uint64(32) == row:
            if best == none and not is_lost(lost, edges[edge] & low):
                best = edges[edge] & low
            edge += 1
        begin = member
        while member < members.size and members[member] >> np.uint64(32) == row:
            bucket = np.int64(members[member] & low)
            block = head[bucket]
            while block >= 0:
                stop = 8 * block + (8 if pool_next[block] >= 0 else fill[bucket])
                hit = none
                for i in range(8 * block, stop):
                    if popcount(pool_values[i] ^ values[member]) <= near:
                        hit = np.uint64(pool_rows[i])
                        break
                if hit != none:
                    best = min(best, hit)
                    break
                block = pool_next[block]
            member += 1
        if best != none:
            lost[row >> np.uint64(3)] |= np.uint8(1) << np.uint8(row & np.uint64(7))
            if count == dropped.size:
                dropped = doubled(dropped)
            dropped[count] = row << np.uint64(32) | best
            count += 1
            continue
        for at in range(begin, member):
            bucket = np.int64(members[at] & low)
            if tail[bucket] < 0 or fill[bucket] == 8:
                if used == pool_next.size:
                    pool_values, pool_rows, pool_next = doubled(pool_values), doubled(pool_rows), doubled(pool_next)
                if tail[bucket] < 0:
                    head[bucket] = used
                else:
                    pool_next[tail[bucket]] = used
                tail[bucket], fill[bucket], pool_next[used] = used, 0, -1
                used += 1
            i = 8 * tail[bucket] + fill[bucket]
            pool_values[i], pool_rows[i] = values[at], row
            fill[bucket] += 1
    return dropped[:count].copy(), Pool(head, tail, fill, pool_values, pool_rows, pool_next, used)


@kernel
def _keep(first: I32, dropped: U64) -> None:
    """Turns the first rows with equal fingerprints into keepers, in place."""
    for pair in dropped:
        first[np.int64(pair >> np.uint64(32))] = np.int64(pair & np.uint64(0xFFFFFFFF))
    for row in range(first.size):
        first[row] = first[first[row]]


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
    if k is None and distance:
        blocks = search.choose_blocks(values[:: max(1, n // 30_000)], n, distance)
    else:
        blocks = search.blocks(k or 1)
    tables = search.make_tables(n, blocks, distance)
    ends = [*(np.flatnonzero(np.diff(tables.firsts)) + 1).tolist(), tables.firsts.size]
    first = np.empty(n, np.int32)
    scratch = max(_LEAST_SCRATCH, _SCRATCH // max(1, threads))
    nothing = np.empty(0, np.uint64)

    def layout(group: int) -> list[_Job]:
        table, coarse = (ends[group - 1] if group else 0), int(tables.coarse[ends[group] - 1])
        counts = np.zeros(1 << coarse, np.int64)
        search.histogram(values, tables.firsts[table], tables.first_lows[table], *_leading(coarse), counts)
        jobs, part, total = [], 0, np.cumsum(counts)
        share = min(scratch, -(-n // threads)) if group == 0 else scratch  # the first group runs alone
        while part < counts.size:
            before = int(total[part - 1]) if part else 0
            last = max(part + 1, int(np.searchsorted(total, before + share, side="right")))
            jobs.append(_Job(table, ends[group], part, counts[part:last]))
            part = last
        return jobs

    def look(job: _Job) -> tuple[U64, U64, int]:
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
                return nothing, nothing, 0
        return search.find_pairs(
            tables, table, job.last_table, job.counts, starts, sizes, part_values, part_rows, distance
        )

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(look, layout(0)))  # finds the first rows; the others are not searched again
        jobs = [job for jobs in pool.map(layout, range(1, len(ends))) for job in jobs]
        found += pool.map(look, jobs)
    if distance == 0:
        return first
    marks = np.cumsum([0, *(part[2] for part in found)])
    edges = np.concatenate([part[0] for part in found])
    members = np.concatenate([part[1] + np.uint64(before) for part, before in zip(found, marks, strict=False)])
    del found
    edges.sort()
    members.sort()
    lost = np.zeros(n // 8 + 1, np.uint8)
    near = values[(members >> np.uint64(32)).astype(np.int64)]
    dropped, _ = visit(edges, members, near, distance, lost, new_pool(int(marks[-1])))
    _keep(first, dropped)
    return first


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
