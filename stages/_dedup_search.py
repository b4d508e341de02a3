"""Greedy near-duplicate decisions over 64-bit fingerprints: exact, and close to the cost of sorting them.

A row is dropped only if it lies within the distance of an earlier row that is kept. The way there:

1. Equal fingerprints are collapsed, so that boilerplate costs a look-up a row.
2. Two fingerprints within distance d agree on at least k - d of k blocks of bits (Manku et al., "Detecting
   near-duplicates for web crawling", WWW 2007). For each choice of k - d blocks, a table, the rows are dealt into
   buckets by the bits of these blocks, and the pairs in a bucket are compared: this gives the edges of the graph of
   near rows. k is chosen on a sample, so that buckets are small and tables few.
3. Rows are visited in order; a row that has an edge to a kept row is dropped.

A bucket that is large, or dense with edges, is not compared pairwise: it is marked, and consulted in step 3, where a
row is compared with those rows of it that were kept. Kept rows are further than d from each other, so they are few
where rows are dense, and neither time nor memory blows up.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from corpusprep.arrow import U64, mix64

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_SCRATCH = 1 << 24  # rows dealt into buckets at a time; 12 bytes each
_PART = 14  # log2 of rows that are looked at together, in the cache
_LARGE = 1024  # rows of a bucket that is never compared pairwise
_DENSE, _EDGES = 64, 4  # so many edges, and so many more a row, and a bucket is dense
_NONE = np.iinfo(np.int32).max


def _popcount(typing: Any, value: Any) -> Any:
    """Number of set bits of a uint64: one instruction."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


popcount: Any = intrinsic(_popcount)


def blocks(k: int) -> list[tuple[int, int]]:
    """The (lowest bit, width) of k blocks that share out 64 bits."""
    edges = [64 * i // k for i in range(k + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def choose_blocks(fingerprints: U64, distance: int) -> int:
    """The number of blocks that makes the search cheapest, judged by the buckets of a sample."""
    n = fingerprints.size
    sample = fingerprints[:: max(1, n // 50_000)]
    best, best_cost = distance + 1, np.inf
    for k in range(distance + 1, distance + 5):
        tables = list(itertools.combinations(range(k), k - distance))
        if len(tables) > 512:
            break
        # Compared pairs a row: of some tables, by the sample's collisions.
        compared, looked = 0.0, tables[:: max(1, len(tables) // 8)]
        for chosen in looked:
            mask = _mask(k, chosen)
            counts = np.unique(sample & mask, return_counts=True)[1].astype(np.float64)
            seen = float((counts * (counts - 1)).sum()) / max(1, sample.size) / max(1, sample.size)
            floor = 0.5 ** int(mask).bit_count()
            compared += min(max(seen, floor) * n / 2, _LARGE)
        cost = len(tables) * (27 + 20 * compared / len(looked))  # nanoseconds, as measured
        if cost < best_cost:
            best, best_cost = k, cost
    return best


def _mask(k: int, chosen: tuple[int, ...]) -> np.uint64:
    parts = blocks(k)
    return np.uint64(sum(((1 << parts[b][1]) - 1) << parts[b][0] for b in chosen))


@numba.njit(cache=True, nogil=True, inline="always")
def _bucket(value: np.uint64, mask: np.uint64, down: np.uint64) -> np.int64:
    """The bucket of a fingerprint: leading bits of a hash of the masked bits. Strangers may meet in one; friends do."""
    chosen = value & mask
    return np.int64(((chosen ^ (chosen >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)) >> down)


@numba.njit(cache=True, nogil=True)
def collapse(fingerprints: U64, first: I32) -> int:
    """Writes to `first` (int32, (n,)) the index of the first row with the same fingerprint; returns how many are first.

    Rows are dealt, in order, into parts by a hash of the fingerprint; each part has a hash table that fits the cache.
    """
    n = fingerprints.size
    bits = 0
    while n >> bits > 16384 and bits < 14:
        bits += 1
    down = np.uint64(64 - bits)
    starts = np.zeros((1 << bits) + 1, np.int64)
    if bits:
        for i in range(n):
            starts[np.int64(mix64(fingerprints[i]) >> down) + 1] += 1
    else:
        starts[1] = n
    largest = starts.max()
    for p in range(1 << bits):
        starts[p + 1] += starts[p]
    rows = np.empty(n, np.int32)
    if bits:
        ends = starts[:-1].copy()
        for i in range(n):
            part = np.int64(mix64(fingerprints[i]) >> down)
            rows[ends[part]] = i
            ends[part] += 1
    else:
        for i in range(n):
            rows[i] = i
    size = 2
    while size < 2 * largest:
        size *= 2
    keys, owner = np.empty(size, np.uint64), np.empty(size, np.int32)
    distinct = 0
    for p in range(1 << bits):
        low, high = starts[p], starts[p + 1]
        size = 2
        while size < 2 * (high - low):
            size *= 2
        owner[:size] = -1
        for place in range(low, high):
            row = rows[place]
            value = fingerprints[row]
            slot = np.int64(mix64(value) & np.uint64(size - 1))
            while owner[slot] >= 0 and keys[slot] != value:
                slot = (slot + 1) & (size - 1)
            if owner[slot] < 0:
                owner[slot], keys[slot] = row, value
                distinct += 1
            first[row] = owner[slot]
    return distinct


@numba.njit(cache=True, nogil=True)
def _histogram(values: U64, mask: np.uint64, down: np.uint64, counts: I64) -> None:
    for i in range(values.size):
        counts[_bucket(values[i], mask, down)] += 1


@numba.njit(cache=True, nogil=True)
def _search(
    values: U64, masks: U64, table: int, coarse: int, fine: int, counts: I64, first: int, last: int, distance: int
) -> tuple[I32, I32, U64]:
    """Compares the rows of one table whose bucket starts with `first` to `last - 1`.

    Args:
        values: fingerprints in rank order.
        masks: the bits that each table looks at, the tables being in order.
        coarse, fine: leading bits of the bucket that part the rows, and bits that tell buckets in a part.
        counts: rows of every part.
        distance: bits in which near rows may differ.

    Returns:
        Edges (earlier, later) as two int32 arrays, and the buckets that were marked, ascending. A pair that several
        tables see is given by the first.
    """
    mask, down = masks[table], np.uint64(64 - coarse)
    starts = np.zeros(last - first + 1, np.int64)
    largest = 0
    for p in range(first, last):
        starts[p - first + 1] = starts[p - first] + counts[p]
        largest = max(largest, counts[p])
    part_values, part_rows = np.empty(starts[-1], np.uint64), np.empty(starts[-1], np.int32)
    ends = starts[:-1].copy()
    for i in range(values.size):
        part = _bucket(values[i], mask, down) - first if coarse else np.int64(0)
        if 0 <= part < last - first:
            place = ends[part]
            part_values[place], part_rows[place] = values[i], i
            ends[part] = place + 1

    left, right = np.empty(1024, np.int32), np.empty(1024, np.int32)
    edges = 0
    marked = np.empty(64, np.uint64)
    marks = 0
    near = np.uint64(distance)
    fine_down, fine_mask = np.uint64(64 - coarse - fine), (1 << fine) - 1
    # A part fits the cache. Its rows, in order, are compared with those before them in the same bucket, a chain.
    head, size, near_pairs = np.empty(1 << fine, np.int32), np.empty(1 << fine, np.int32), np.empty(1 << fine, np.int32)
    chain = np.empty(largest, np.int32)
    for p in range(last - first):
        begin, end = starts[p], starts[p + 1]
        if end - begin < 2:
            continue
        head[:] = -1
        size[:] = 0
        near_pairs[:] = 0
        for i in range(begin, end):
            value = part_values[i]
            q = _bucket(value, mask, fine_down) & fine_mask
            j = head[q]
            head[q] = i - begin
            chain[i - begin] = j
            if j < 0:
                continue
            if size[q] == _NONE:  # marked
                continue
            size[q] += 1  # the bucket's rows but the first
            if near_pairs[q] > _EDGES * size[q] + _DENSE or size[q] >= _LARGE:
                size[q] = _NONE
                if marks == marked.size:
                    more_marked = np.empty(2 * marks, np.uint64)
                    more_marked[:marks] = marked
                    marked = more_marked
                marked[marks] = np.uint64(first + p) << np.uint64(fine) | np.uint64(q)
                marks += 1
                continue
            while j >= 0:
                differ = value ^ part_values[begin + j]
                if popcount(differ) <= near and differ & mask == 0:
                    known = False  # an earlier table sees this pair too
                    for earlier in range(table):
                        if differ & masks[earlier] == 0:
                            known = True
                            break
                    near_pairs[q] += 1
                    if not known:
                        if edges == left.size:
                            more_left, more_right = np.empty(2 * edges, np.int32), np.empty(2 * edges, np.int32)
                            more_left[:edges], more_right[:edges] = left, right
                            left, right = more_left, more_right
                        left[edges], right[edges] = part_rows[begin + j], part_rows[i]
                        edges += 1
                j = chain[j]
    return left[:edges].copy(), right[:edges].copy(), np.sort(marked[:marks])


@numba.njit(cache=True, nogil=True)
def _by_later(n: int, left: I32, right: I32, starts: I64, earlier: I32) -> None:
    """The edges as lists: `earlier[starts[j]:starts[j + 1]]` are the earlier ends of the edges of row j."""
    for e in range(right.size):
        starts[right[e] + 2] += 1
    for j in range(2, n + 2):
        starts[j] += starts[j - 1]
    for e in range(right.size):
        j = right[e] + 1
        earlier[starts[j]] = left[e]
        starts[j] += 1


@numba.njit(cache=True, nogil=True)
def _greedy(
    values: U64,
    starts: I64,
    earlier: I32,
    masks: U64,
    downs: U64,
    marked: U64,
    marked_start: I64,
    distance: int,
    keeper: I32,
) -> None:
    """Visits rows in order and writes each one's keeper: itself, or the earliest kept row within the distance.

    Args:
        values: distinct fingerprints in rank order.
        starts, earlier: the edges, from `_by_later`.
        masks, downs: what makes the buckets of every table.
        marked: the marked buckets, by table, ascending; `marked_start` says where each table's start.
        keeper: int32 (n,), written.
    """
    tables = masks.size
    near = np.uint64(distance)
    # The kept rows of the marked buckets: a chain of blocks of eight a bucket, in one pool.
    head, tail, fill = (
        np.full(marked.size, -1, np.int64),
        np.full(marked.size, -1, np.int64),
        np.zeros(marked.size, np.int64),
    )
    pool_values, pool_rows, pool_next = (
        np.empty(8 * 256, np.uint64),
        np.empty(8 * 256, np.int32),
        np.full(256, -1, np.int64),
    )
    used = 0
    place = np.empty(tables, np.int64)
    for row in range(values.size):
        best = _NONE
        for e in range(starts[row], starts[row + 1]):
            other = earlier[e]
            if other < best and keeper[other] == other:
                best = other
        if marked.size:
            value = values[row]
            for t in range(tables):
                place[t] = -1
                low, high = marked_start[t], marked_start[t + 1]
                if low == high:
                    continue
                bucket = np.uint64(_bucket(value, masks[t], downs[t]))
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
                for t in range(tables):
                    at = place[t]
                    if at < 0:
                        continue
                    if tail[at] < 0 or fill[at] == 8:
                        if used == pool_next.size:
                            new_values, new_rows = np.empty(16 * used, np.uint64), np.empty(16 * used, np.int32)
                            new_next = np.full(2 * used, -1, np.int64)
                            new_values[: 8 * used], new_rows[: 8 * used], new_next[:used] = (
                                pool_values,
                                pool_rows,
                                pool_next,
                            )
                            pool_values, pool_rows, pool_next = new_values, new_rows, new_next
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


def greedy(values: U64, distance: int, threads: int = 1, k: int | None = None) -> I32:
    """The keeper of every row: itself, or the earliest kept row within the distance, shape (n,).

    Args:
        values: n < 2**31 distinct fingerprints in rank order.
        distance: bits in which near rows may differ, 0 to 8.
        threads: how many to use; the result does not depend on it.
        k: the number of blocks, if it is not to be chosen here.
    """
    n = values.size
    if distance == 0 or n < 2:
        return np.arange(n, dtype=np.int32)
    k = k or choose_blocks(values, distance)
    masks = np.array([_mask(k, table) for table in itertools.combinations(range(k), k - distance)], np.uint64)
    bits = np.minimum(
        np.unpackbits(masks.view(np.uint8)).reshape(len(masks), -1).sum(axis=1).astype(np.int64), n.bit_length()
    )
    downs = (64 - bits).astype(np.uint64)
    scratch = max(1 << 16, _SCRATCH // max(1, threads))

    def layout(t: int) -> list[tuple[int, int, int, I64, int, int]]:
        coarse = min(int(bits[t]), max(0, n.bit_length() - _PART))
        counts = np.zeros(1 << coarse, np.int64)
        if coarse:
            _histogram(values, masks[t], np.uint64(64 - coarse), counts)
        else:
            counts[0] = n
        jobs, first, total = [], 0, np.cumsum(counts)
        while first < counts.size:
            before = int(total[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(total, before + scratch, side="right")))
            jobs.append((t, coarse, int(bits[t]) - coarse, counts, first, last))
            first = last
        return jobs

    def search(job: tuple[int, int, int, I64, int, int]) -> tuple[I32, I32, U64]:
        t, coarse, fine, counts, first, last = job
        return _search(values, masks, t, coarse, fine, counts, first, last, distance)

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            jobs = [job for jobs in pool.map(layout, range(masks.size)) for job in jobs]
            found = list(pool.map(search, jobs))
    else:
        jobs = [job for t in range(masks.size) for job in layout(t)]
        found = [search(job) for job in jobs]
    left, right = np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])
    marked = np.concatenate([part[2] for part in found])
    marked_start = np.zeros(masks.size + 1, np.int64)
    for job, part in zip(jobs, found, strict=True):
        marked_start[job[0] + 1] += part[2].size
    del found
    starts, earlier = np.zeros(n + 2, np.int64), np.empty(left.size, np.int32)
    _by_later(n, left, right, starts, earlier)
    keeper = np.empty(n, np.int32)
    _greedy(values, starts, earlier, masks, downs, marked, np.cumsum(marked_start), distance, keeper)
    return keeper


@numba.njit(cache=True, nogil=True)
def _number(first: I32, rows: I32) -> None:
    """Makes `first`, the first row of the same fingerprint, that row's place among all such rows, listed in `rows`."""
    n = 0
    for row in range(first.size):
        if first[row] == row:
            rows[n] = row
            first[row] = n
            n += 1
        else:
            first[row] = first[first[row]]


@numba.njit(cache=True, nogil=True)
def _verdicts(text_hash: U64, place: I32, rows: I32, keepers: I32, exact: bool, verdict: U8, keeper: I64) -> None:
    """From the keepers of distinct fingerprints to a verdict a row."""
    for row in range(place.size):
        kept = np.int64(rows[keepers[place[row]]])
        keeper[row] = kept
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
    place = np.empty(n, np.int32)
    if not near:
        collapse(text_hash, place)
        return (place != np.arange(n, dtype=np.int32)).astype(np.uint8), place.astype(np.int64)
    rows = np.empty(collapse(fingerprint, place), np.int32)
    _number(place, rows)
    keepers = greedy(fingerprint[rows], distance, threads)
    verdict, keeper = np.empty(n, np.uint8), np.empty(n, np.int64)
    _verdicts(text_hash, place, rows, keepers, exact, verdict, keeper)
    return verdict, keeper
