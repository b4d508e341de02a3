"""Deduplication of more rows than memory holds: the verdicts and keepers of `greedy.decide`, from partitions on disk.

1. Rows are numbered by rank, the best first, and dealt into partitions by a hash of their fingerprint.
2. For each fingerprint the row of the lowest rank is its first row. The first rows are dealt again, once for each first block of
   bits (see `search.py`), and searched for near rows.
3. What was found is dealt by rank, and the rows are visited in order (`greedy.visit`).
4. The partitions of step 1 are read again, and each row gets its verdict.

A partition has a share of the memory. One that is too large is dealt again: by more bits of the block, then for each table
by the bits of its key. If all its rows have the same bits, it is one bucket, whose rows need not be compared pairwise.
What is held for all rows is one bit each, and 12 bytes for each table and kept row of a crowded bucket. Results are arrays, or
mapped files where they would take much of the memory.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corpusprep.arrow import U64
from corpusprep.errors import RunError
from corpusprep.kernels import kernel
from corpusprep.stages.dedup import greedy, search
from corpusprep.stages.dedup.greedy import U8, U32
from corpusprep.stages.dedup.search import FINEST, I32, I64, Tables
from corpusprep.stages.dedup.spill import PIECE, Spill, Values

if TYPE_CHECKING:
    from corpusprep.stages.dedup import DedupSettings

Orders = Callable[[], Iterable[U32]]

_ROW = 100  # bytes a row of a partition takes while it is worked on
_RANGE = 23  # log2 of the ranks whose edges are visited at a time
_SAMPLE = 30_000  # fingerprints from which the number of blocks is chosen
_COUNTED = 4  # partitions from which the number of first rows is estimated
_CACHED = 1 << 18  # rows of a partition whose table of keys does not miss the cache at each row
_MOST_BITS = 11  # log2 of the partitions by key, each of which has files
_SPLIT = 8  # log2 of the parts into which a partition that is too large is dealt
_SPREAD, _SLOT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


class Rows(NamedTuple):
    """Consecutive rows: uint64 (rows,) each."""

    fingerprint: U64
    text_hash: U64


class Decision(NamedTuple):
    """What becomes of n rows, as arrays or mapped files.

    Attributes:
        verdict: uint8 (n,); see `corpusprep.stages.dedup.decide`.
        keeper: uint32 (n,), the place of the row that is kept instead; the row itself if it is kept. None where nobody asks.
    """

    verdict: U8
    keeper: U32 | None


def decide(
    rows: Callable[[], Iterable[Rows]], orders: Orders | None, n: int, settings: DedupSettings, folder: Path, memory: int,
    threads: int = 1,
) -> Decision:  # fmt: skip
    """Finds the duplicates among rows that come in pieces.

    Args:
        rows: returns all rows, in pieces.
        orders: returns the numbers by which rows are ranked, the lowest first, uint32 (rows,) in pieces, as often as it is
            called. Rows of equal numbers, and all rows if it is None, have the rank of their place.
        n: number of rows, below 2**32.
        settings: `exact`, `near`, `max_distance` and `clusters` are used.
        folder: an empty folder for files: 20 bytes a row and 12 for each block (`max_distance` + 1), and what is found; the
            result may lie there, too.
        memory: bytes to use, at least some 100 MB.
        threads: number of threads; the result depends neither on it nor on the memory.

    Raises:
        RunError: there are too many rows.
    """
    if n >= 1 << 32:
        raise RunError(
            f"{n:,} rows are compared with each other, and at most {(1 << 32) - 1:,} can be. Split the pair into several runs."
        )
    return _Decision(rows, orders, n, settings, folder, memory, threads).run()


class _Decision:
    def __init__(
        self,
        rows: Callable[[], Iterable[Rows]],
        orders: Orders | None,
        n: int,
        settings: DedupSettings,
        folder: Path,
        memory: int,
        threads: int,
    ) -> None:
        self.rows, self.orders, self.n, self.settings, self.folder = rows, orders, n, settings, folder
        self.memory, self.threads = memory, threads
        self.most = max(1 << 16, memory // 2 // threads // _ROW)
        """Rows of a partition."""
        self.room = max(16 << 20, memory // 16)
        """Bytes of records that are held until they are written."""
        self.hashed = settings.near and settings.exact
        """Whether hashes of text are needed beside fingerprints."""
        self.buckets = 0
        self.lock = threading.Lock()

    def run(self) -> Decision:
        verdict = self._map("verdict", np.uint8)  # by rank, until the end
        keepers = self._map("keeper", np.uint32) if self.settings.clusters else None
        if keepers is not None:
            for begin in range(0, self.n, PIECE):
                keepers[begin : begin + PIECE] = np.arange(begin, min(self.n, begin + PIECE))
        if not (self.settings.near or self.settings.exact):
            return Decision(verdict, keepers)
        ranks = self._ranks()
        rows = self._deal(ranks)
        lost = np.zeros(self.n // 8 + 1, np.uint8)
        if self.settings.near and self.settings.max_distance:
            self._visit(*self._search(rows), lost, keepers)
        self._judge(rows, lost, verdict, keepers)
        rows.remove()
        return Decision(verdict, keepers) if ranks is None else self._by_place(ranks, verdict, keepers)

    def _map(self, name: str, kind: Any) -> Any:
        """n items, all zero: an array, or a mapped file if they would take much of the memory. Random writes to a mapped file
        are slow: the system writes each of its pages to disk again and again."""
        if self.n * np.dtype(kind).itemsize <= self.memory // 8:
            return np.zeros(self.n, kind)
        return np.memmap(self.folder / name, kind, "w+", shape=(self.n,))

    # ------------------------------------------------------------------------------------------------------- ranks

    def _ranks(self) -> U32 | None:
        """The rank of each row; None where it is the row's place."""
        if self.orders is None:
            return None
        high = np.zeros(1 << 16, np.int64)
        for order in self.orders():
            high += np.bincount(order >> np.uint32(16), minlength=1 << 16)
        ranks: U32 = self._map("rank", np.uint32)
        before = np.cumsum(high) - high
        bins = np.flatnonzero(high)
        share = max(1, self.memory // 4 // (4 << 16))  # bins of 65,536 counters each
        for some in (bins[begin : begin + share] for begin in range(0, bins.size, share)):
            slot = np.full(1 << 16, -1, np.int32)
            slot[some] = np.arange(some.size)
            counts = np.zeros((some.size, 1 << 16), np.uint32)
            for order in self.orders():
                _count(order, slot, counts)
            _start(counts, before[some])
            place = 0
            for order in self.orders():
                _number(order, slot, counts, ranks[place : place + order.size])
                place += order.size
        return ranks

    def _by_place(self, ranks: U32, verdict: U8, keepers: U32 | None) -> Decision:
        """Results by place instead of by rank."""
        pieces = [slice(begin, min(self.n, begin + PIECE)) for begin in range(0, self.n, PIECE)]
        found = self._map("verdict-by-place", np.uint8)
        for piece in pieces:
            found[piece] = verdict[ranks[piece]]
        if keepers is None:
            return Decision(found, None)
        places, by_place = self._map("place", np.uint32), self._map("keeper-by-place", np.uint32)
        for piece in pieces:
            places[ranks[piece]] = np.arange(piece.start, piece.stop, dtype=np.uint32)
        for piece in pieces:
            by_place[piece] = places[keepers[ranks[piece]]]
        return Decision(found, by_place)

    # -------------------------------------------------------------------------------------------------- partitions

    def _deal(self, ranks: U32 | None) -> Spill:
        """Deals all rows by a hash of what is compared: `key`, `rank` and, if it counts, `hash`."""
        bits = min(_MOST_BITS, (self.n // min(self.most, _CACHED)).bit_length())
        fields = {"key": np.uint64, "rank": np.uint32} | ({"hash": np.uint64} if self.hashed else {})
        spill = Spill(self.folder / "rows", 1 << bits, fields, self.room)
        place = 0
        for piece in self.rows():
            key = piece.fingerprint if self.settings.near else piece.text_hash
            end = place + key.size
            rank = np.arange(place, end, dtype=np.uint32) if ranks is None else ranks[place:end]
            records: dict[str, Values] = {"key": key, "rank": rank}
            if self.hashed:
                records["hash"] = piece.text_hash
            spill.append(_leading_bits(key, bits), records)
            place = end
        return spill

    def _table(self, rows: Spill, p: int, hashed: bool = False) -> _Table:
        """The distinct keys of a partition, with their first rows, and the hashes of these if they are asked for."""
        table = _new_table(hashed)
        for piece in rows.read(p, "key", "rank", *(["hash"] if hashed else [])):
            table = _insert(piece["key"], piece["rank"], piece.get("hash", _NO_HASHES), table)
        return table

    def _judge(self, rows: Spill, lost: U8, verdict: U8, keepers: U32 | None) -> None:
        exact = 2 if self.settings.near and not self.settings.exact else 1

        def look(p: int) -> None:
            table = self._table(rows, p, self.hashed)
            for piece in rows.read(p):
                found = np.empty(piece["key"].size, np.int32)
                _find(piece["key"], table, found)
                firsts = table.ranks[found]
                decided = np.empty(found.size, np.uint8)
                _decide(piece["rank"], firsts, lost, exact, decided)
                if self.hashed:  # a row with the first row's fingerprint and another text is no exact duplicate of it
                    decided[(decided == 1) & (piece["hash"] != table.hashes[found])] = 2
                verdict[piece["rank"]] = decided
                if keepers is not None:
                    others = firsts != piece["rank"]
                    keepers[piece["rank"][others]] = keepers[firsts[others]]

        self._each(look, rows.rows)

    def _each(self, look: Callable[[int], None], rows: I64) -> None:
        """Calls a function for each partition that has rows."""
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(look, np.flatnonzero(rows).tolist()))

    # ------------------------------------------------------------------------------------------------------- search

    def _search(self, rows: Spill) -> tuple[Spill, Spill]:
        """Edges and members of buckets, dealt by ranges of the later row's rank."""
        ranges = (self.n >> _RANGE) + 1
        edges = Spill(self.folder / "edges", ranges, {"edge": np.uint64})
        members = Spill(self.folder / "members", ranges, {"member": np.uint64, "value": np.uint64})
        total, distance = self._count_first(rows), self.settings.max_distance
        # From all over the rows: duplicates often are neighbours, and a sample of neighbours would have too many of them.
        step = max(1, self.n // _SAMPLE)
        sample = np.concatenate([np.zeros(0, np.uint64), *(rows.every(p, "key", step) for p in range(rows.rows.size))])
        tables = search.make_tables(total, search.choose_blocks(sample, total, distance), distance)
        groups = [*(np.flatnonzero(np.diff(tables.firsts)) + 1).tolist(), tables.firsts.size]
        wholes = []
        for begin, end in zip([0, *groups], groups, strict=False):
            coarse = int(tables.coarse[begin])
            bits = min(coarse, (total // self.most).bit_length())
            fields = {"key": np.uint64, "rank": np.uint32}
            dealt = Spill(self.folder / f"blocks-{begin}", 1 << bits, fields, self.room // len(groups))
            wholes.append(_Part(dealt, 0, begin, end, bits, coarse - bits, ""))
        self._each(functools.partial(self._deal_first, rows, tables, wholes), rows.rows)
        finder = _Finder(self, tables, edges, members)
        for whole in wholes:
            self._each(functools.partial(finder.look_at, whole), whole.spill.rows)
            whole.spill.remove()
        return edges, members

    def _count_first(self, rows: Spill) -> int:
        """About how many first rows there are, from some partitions."""
        some = np.flatnonzero(rows.rows)[:_COUNTED].tolist()
        firsts = sum(self._table(rows, p).used for p in some)
        return int(self.n * firsts / max(1, int(rows.rows[some].sum())))

    def _deal_first(self, rows: Spill, tables: Tables, wholes: list[_Part], p: int) -> None:
        """Deals the first rows of a partition by the leading bits of each first block."""
        table = self._table(rows, p)
        first: dict[str, Values] = {"key": table.keys[: table.used], "rank": table.ranks[: table.used]}
        for part in wholes:
            mask, low = tables.firsts[part.begin], tables.first_lows[part.begin]
            part.spill.append(_numbers(first["key"], mask, low, 0, part.part_bits), first)

    def _visit(self, edges: Spill, members: Spill, lost: U8, keepers: U32 | None) -> None:
        """Visits the rows in order: those that are near to a row that stays are marked in `lost`."""
        pool = greedy.new_pool(self.buckets)
        for r in range(edges.rows.size):
            for some_edges, some_members, values in self._in_order(edges, members, r, _RANGE):
                dropped, pool = greedy.visit(some_edges, some_members, values, self.settings.max_distance, lost, pool)
                if keepers is not None:
                    keepers[dropped >> np.uint64(32)] = (dropped & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        edges.remove()
        members.remove()

    def _in_order(self, edges: Spill, members: Spill, r: int, bits: int) -> Iterator[tuple[U64, U64, U64]]:
        """The edges and members of a range of ranks, sorted; in several pieces if they are many."""
        if 16 * edges.rows[r] + 40 * members.rows[r] <= max(1 << 20, self.memory // 2) or bits == 0:
            found = edges.whole(r)["edge"]
            found.sort()
            some = members.whole(r)
            order = np.argsort(some["member"])
            yield found, some["member"][order], some["value"][order]
            return
        step = min(bits, 4)
        mask = np.uint64((1 << step) - 1)
        folders = [self.folder / f"{name}-{r}-{bits}" for name in ("edges", "members")]
        apart = [
            Spill(folder, 1 << step, spill.fields) for folder, spill in zip(folders, (edges, members), strict=True)
        ]
        for field, spill, to in zip(("edge", "member"), (edges, members), apart, strict=True):
            for piece in spill.read(r):
                to.append((piece[field] >> np.uint64(32 + bits - step) & mask).astype(np.uint32), piece)
        for s in range(1 << step):
            yield from self._in_order(apart[0], apart[1], s, bits - step)
        for spill in apart:
            spill.remove()

    def number(self, buckets: int) -> int:
        """The number of the first of some new buckets."""
        with self.lock:
            self.buckets += buckets
            return self.buckets - buckets

    def emit(self, part_edges: U64, part_members: U64, values: U64, buckets: int, edges: Spill, members: Spill) -> None:
        """Adds what was found in a part, by rank; its buckets are counted from 0."""
        part_members = part_members + np.uint64(self.number(buckets))
        if part_edges.size:
            edges.append((part_edges >> np.uint64(32 + _RANGE)).astype(np.uint32), {"edge": part_edges})
        if part_members.size:
            which = (part_members >> np.uint64(32 + _RANGE)).astype(np.uint32)
            members.append(which, {"member": part_members, "value": values})


class _Part(NamedTuple):
    """A partition of first rows, to be searched in some tables with the same first block.

    Attributes:
        spill, p: where its rows are.
        begin, end: the tables.
        part_bits: leading bits of the hash of the first block that all its rows share.
        more: further bits of that hash by which rows are dealt into parts.
        name: for folders.
    """

    spill: Spill
    p: int
    begin: int
    end: int
    part_bits: int
    more: int
    name: str


class _Finder:
    """Searches partitions of first rows, and deals those that are too large again."""

    def __init__(self, decision: _Decision, tables: Tables, edges: Spill, members: Spill) -> None:
        self.decision, self.tables, self.edges, self.members = decision, tables, edges, members

    def look_at(self, dealt: _Part, p: int) -> None:
        """Searches one of the partitions that were dealt by the leading bits of a first block."""
        self.look(dealt._replace(p=p, name=f"{dealt.begin}-{p}"))

    def look(self, part: _Part) -> None:
        rows = int(part.spill.rows[part.p])
        if rows < 2:
            return
        if rows <= self.decision.most:
            self._compare(part)
            return
        if part.more == 0:
            for table in range(part.begin, part.end):
                used = int(self.tables.used[table])
                left = int(self.tables.keys[table]).bit_count() - used
                self._look_in_table(part.spill, part.p, table, used, left, f"{part.name}-{table}")
            return
        step = min(part.more, _SPLIT)
        first = self.tables.firsts[part.begin], self.tables.first_lows[part.begin]
        dealt = self._again(part.spill, part.p, part.name, *first, part.part_bits, step)
        for p in np.flatnonzero(dealt.rows).tolist():
            self.look(
                part._replace(
                    spill=dealt, p=p, part_bits=part.part_bits + step, more=part.more - step, name=f"{part.name}-{p}"
                )
            )
        dealt.remove()

    def _again(self, spill: Spill, p: int, name: str, mask: Any, low: Any, used: int, step: int) -> Spill:
        """Deals a partition by the bits of a hash that follow those which are used."""
        dealt = Spill(self.decision.folder / f"again-{name}", 1 << step, spill.fields)
        for piece in spill.read(p):
            dealt.append(_numbers(piece["key"], mask, low, used, step), piece)
        return dealt

    def _compare(self, part: _Part) -> None:
        records = part.spill.whole(part.p)
        values, ranks = records["key"], records["rank"]
        first, low, more = self.tables.firsts[part.begin], self.tables.first_lows[part.begin], part.more
        down, bits = np.uint64(63 - part.part_bits - more), np.uint64((1 << more) - 1)
        counts = np.zeros(1 << more, np.int64)
        search.histogram(values, first, low, down, bits, counts)
        starts = np.concatenate(([1], np.cumsum(counts) + 1))
        part_values, part_rows = np.empty(values.size + 1, np.uint64), np.empty(values.size + 1, np.int32)
        to = starts.copy()
        to[-1] = 0
        none = np.empty(0, np.int32)
        search.deal(values, none, first, low, down, bits, 0, to, part_values, part_rows, none)
        self._find(self.tables, part.begin, part.end, counts, starts, part_values, part_rows, values, ranks)

    def _look_in_table(self, spill: Spill, p: int, table: int, used: int, left: int, name: str) -> None:
        """Searches rows that share `used` leading bits of a table's hash, of which `left` bits tell them apart."""
        rows, tables = int(spill.rows[p]), self.tables
        if rows < 2:
            return
        if left == 0:  # one bucket
            bucket = np.uint64(self.decision.number(1))
            for piece in spill.read(p):
                member = piece["rank"].astype(np.uint64) << np.uint64(32) | bucket
                which = (member >> np.uint64(32 + _RANGE)).astype(np.uint32)
                self.members.append(which, {"member": member, "value": piece["key"]})
            return
        if rows > self.decision.most:
            step = min(left, _SPLIT)
            dealt = self._again(spill, p, name, tables.keys[table], tables.key_lows[table], used, step)
            for q in np.flatnonzero(dealt.rows).tolist():
                self._look_in_table(dealt, q, table, used + step, left - step, f"{name}-{q}")
            dealt.remove()
            return
        records = spill.whole(p)
        here = tables._replace(used=tables.used.copy(), left=tables.left.copy())
        here.used[table], here.left[table] = used, min(left, FINEST)
        values = np.concatenate((np.zeros(1, np.uint64), records["key"]))
        places = np.arange(-1, rows, dtype=np.int32)
        counts, starts = np.array([rows]), np.array([1, rows + 1])
        self._find(here, table, table + 1, counts, starts, values, places, records["key"], records["rank"])

    def _find(
        self, tables: Tables, begin: int, end: int, counts: I64, starts: I64, part_values: U64, part_rows: I32,
        values: U64, ranks: U32,
    ) -> None:  # fmt: skip
        edges, members, buckets = search.find_pairs(
            tables, begin, end, counts, starts, counts, part_values, part_rows, self.decision.settings.max_distance
        )
        _rank_edges(edges, ranks)
        places = (members >> np.uint64(32)).astype(np.int64)
        near = values[places]
        members = ranks[places].astype(np.uint64) << np.uint64(32) | members & np.uint64(0xFFFFFFFF)
        self.decision.emit(edges, members, near, buckets, self.edges, self.members)


# ------------------------------------------------------------------------------------------------------------- kernels

_NO_HASHES = np.empty(0, np.uint64)


@kernel
def _count(order: U32, slot: I32, counts: U32) -> None:
    for value in order:
        at = slot[value >> np.uint32(16)]
        if at >= 0:
            counts[at, value & np.uint32(0xFFFF)] += np.uint32(1)


@kernel
def _start(counts: U32, before: I64) -> None:
    """Turns counts into the first rank of each value, in place."""
    for at in range(before.size):
        total = before[at]
        for low in range(counts.shape[1]):
            count = counts[at, low]
            counts[at, low] = total
            total += count


@kernel
def _number(order: U32, slot: I32, next_rank: U32, ranks: U32) -> None:
    for i in range(order.size):
        at = slot[order[i] >> np.uint32(16)]
        if at >= 0:
            low = order[i] & np.uint32(0xFFFF)
            ranks[i] = next_rank[at, low]
            next_rank[at, low] += np.uint32(1)


def _leading_bits(keys: U64, bits: int) -> U32:
    if bits == 0:
        return np.zeros(keys.size, np.uint32)
    return (keys * _SPREAD >> np.uint64(64 - bits)).astype(np.uint32)


def _numbers(values: U64, mask: Any, low: Any, used: int, bits: int) -> U32:
    """Bits of the hash of a block of bits, after the leading ones that are used; see `search.number`."""
    found = np.empty(values.size, np.uint32)
    _write_numbers(values, mask, low, np.uint64(63 - used - bits), np.uint64((1 << bits) - 1), found)
    return found


@kernel
def _write_numbers(values: U64, mask: np.uint64, low: np.uint64, down: np.uint64, bits: np.uint64, found: U32) -> None:
    for i in range(values.size):
        found[i] = search.number(values[i], mask, low, down, bits)


@kernel
def _rank_edges(edges: U64, ranks: U32) -> None:
    """Turns places into ranks, in place: `later << 32 | earlier`."""
    for i in range(edges.size):
        a = np.uint64(ranks[edges[i] >> np.uint64(32)])
        b = np.uint64(ranks[edges[i] & np.uint64(0xFFFFFFFF)])
        edges[i] = max(a, b) << np.uint64(32) | min(a, b)


class _Table(NamedTuple):
    """Distinct keys, with the lowest rank of each and the hash of that row: a hash table with open addressing.

    Attributes:
        slots: index of a key, or -1; a power of two, more than twice as many as there are keys.
        keys, ranks, hashes: room for `used` keys or more.
        used: number of keys.
    """

    slots: I32
    keys: U64
    ranks: U32
    hashes: U64
    used: int


def _new_table(hashed: bool) -> _Table:
    room = 1 << 10
    hashes = np.empty(room if hashed else 0, np.uint64)
    return _Table(np.full(4 * room, -1, np.int32), np.empty(room, np.uint64), np.empty(room, np.uint32), hashes, 0)


@kernel(inline="always")
def _slot(key: np.uint64, slots: int) -> np.int64:
    mixed = (key ^ key >> np.uint64(32)) * _SLOT
    return np.int64((mixed ^ mixed >> np.uint64(29)) & np.uint64(slots - 1))


@kernel
def _insert(keys: U64, ranks: U32, row_hashes: U64, table: _Table) -> _Table:
    slots, table_keys, table_ranks, hashes, count = table
    hashed = hashes.size > 0
    for i in range(keys.size):
        at = _slot(keys[i], slots.size)
        while slots[at] >= 0 and table_keys[slots[at]] != keys[i]:
            at = at + 1 & slots.size - 1
        j = slots[at]
        if j >= 0:
            if ranks[i] < table_ranks[j]:
                table_ranks[j] = ranks[i]
                if hashed:
                    hashes[j] = row_hashes[i]
            continue
        if count == table_keys.size:
            table_keys, table_ranks = greedy.doubled(table_keys), greedy.doubled(table_ranks)
            if hashed:
                hashes = greedy.doubled(hashes)
            slots = np.full(2 * slots.size, -1, np.int32)
            for k in range(count):
                at = _slot(table_keys[k], slots.size)
                while slots[at] >= 0:
                    at = at + 1 & slots.size - 1
                slots[at] = k
            at = _slot(keys[i], slots.size)
            while slots[at] >= 0:
                at = at + 1 & slots.size - 1
        slots[at], table_keys[count], table_ranks[count] = count, keys[i], ranks[i]
        if hashed:
            hashes[count] = row_hashes[i]
        count += 1
    return _Table(slots, table_keys, table_ranks, hashes, count)


@kernel
def _find(keys: U64, table: _Table, found: I32) -> None:
    """Writes the index of each key, which must be there."""
    slots, table_keys, _, _, _ = table
    for i in range(keys.size):
        at = _slot(keys[i], slots.size)
        while table_keys[slots[at]] != keys[i]:
            at = at + 1 & slots.size - 1
        found[i] = slots[at]


@kernel
def _decide(ranks: U32, firsts: U32, lost: U8, exact: int, verdict: U8) -> None:
    """Verdicts of rows, by the first row with the same key: `exact` for its duplicates, 2 for those of a row that goes."""
    for i in range(ranks.size):
        first = firsts[i]
        if greedy.is_lost(lost, np.uint64(first)):
            verdict[i] = 2
        else:
            verdict[i] = 0 if first == ranks[i] else exact
