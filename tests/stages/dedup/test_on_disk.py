"""Deduplication on disk, against the decisions in memory: whatever the sizes of partitions, pieces and ranges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dedup_search import clustered

from corpusprep.errors import RunError
from corpusprep.stages.dedup import DedupSettings, greedy, on_disk, spill


def in_memory(
    values: np.ndarray, hashes: np.ndarray, order: np.ndarray | None, chosen: DedupSettings
) -> tuple[np.ndarray, np.ndarray]:
    n = values.size
    by_rank = np.argsort(order, kind="stable") if order is not None else np.arange(n)
    found, kept = greedy.decide(values[by_rank], hashes[by_rank], chosen.max_distance, chosen.exact, chosen.near)
    verdict, keeper = np.empty(n, np.uint8), np.empty(n, np.int64)
    verdict[by_rank], keeper[by_rank] = found, by_rank[kept]
    return verdict, keeper


def from_disk(
    folder: Path, values: np.ndarray, hashes: np.ndarray, order: np.ndarray | None, chosen: DedupSettings, most: int
) -> on_disk.Decision:
    def rows() -> Iterator[on_disk.Rows]:
        for begin in range(0, values.size, 777):
            some = slice(begin, begin + 777)
            yield on_disk.Rows(values[some], hashes[some])

    orders = (lambda: np.array_split(order, 5)) if order is not None else None
    decision = on_disk._Decision(rows, orders, values.size, chosen, folder, 1 << 30, 2)
    decision.most = most
    return decision.run()


def compare(
    folder: Path, values: np.ndarray, hashes: np.ndarray, order: np.ndarray | None, chosen: DedupSettings, most: int
) -> None:
    verdict, keeper = in_memory(values, hashes, order, chosen)
    found = from_disk(folder, values, hashes, order, chosen, most)
    assert np.array_equal(found.verdict, verdict)
    if chosen.clusters:
        assert found.keeper is not None
        assert np.array_equal(found.keeper, keeper)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set()  # partitions are removed


ORDERS = [None, 1, 5, 1 << 32]  # numbers that rows are ordered by


@given(
    seed=st.integers(0, 1 << 32), n=st.integers(0, 3000), centres=st.integers(1, 600), flips=st.integers(0, 8),
    distance=st.integers(0, 6), near=st.booleans(), exact=st.booleans(), clusters=st.booleans(),
    orders=st.sampled_from(ORDERS), most=st.sampled_from([3, 50, 100_000]), piece=st.sampled_from([64, 1000, 1 << 22]),
    span=st.sampled_from([5, 9, 23]), split=st.sampled_from([1, 2, 8]),
    same=st.sampled_from([0, 0xFFFF, 0xFFFF << 24, 0xFFFFFFFFFFFF, (1 << 64) - 1]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_verdicts_are_those_of_memory(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, centres: int, flips: int, distance: int, near: bool,
    exact: bool, clusters: bool, orders: int | None, most: int, piece: int, span: int, split: int, same: int,
) -> None:  # fmt: skip
    """Bits that are the same in all rows (`same`) put them into few partitions, which are dealt again and again."""
    rng = np.random.default_rng(seed)
    values = (clustered(rng, n, centres, flips) if n else np.zeros(0, np.uint64)) & ~np.uint64(same)
    hashes = values * np.uint64(3) + rng.integers(0, 2, n).astype(np.uint64)
    order = rng.integers(0, orders, n).astype(np.uint32) if orders is not None else None
    chosen = DedupSettings(max_distance=distance, near=near, exact=exact, clusters=clusters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "PIECE", piece)
        patch.setattr(on_disk, "PIECE", piece)
        patch.setattr(on_disk, "_RANGE", span)
        patch.setattr(on_disk, "_SPLIT", split)
        compare(tmp_path_factory.mktemp("rows"), values, hashes, order, chosen, most)


@pytest.mark.parametrize("kind", ["random", "clustered", "half share a block", "half are in one bucket", "one line"])
def test_many_rows(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(5)
    n = 200_000
    values = rng.integers(0, 1 << 64, n, np.uint64)
    if kind == "clustered":
        values = clustered(rng, n, n // 10, 3)
    elif kind == "half share a block":
        values[::2] &= ~np.uint64(0xFFFF)
    elif kind == "half are in one bucket":
        values[::2] = clustered(rng, n // 2, 40, 30)
    elif kind == "one line":
        values[rng.random(n) < 0.7] = values[0]
    order = rng.integers(0, 4, n).astype(np.uint32)
    compare(tmp_path, values, values, order, DedupSettings(clusters=True), 30_000)


def test_memory_and_threads_do_not_change_the_result(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = clustered(rng, 300_000, 60_000, 4)
    found = []
    for number, (memory, threads) in enumerate([(1 << 20, 1), (1 << 30, 3)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        decision = on_disk.decide(
            lambda: [on_disk.Rows(values, values)],
            None,
            values.size,
            DedupSettings(clusters=True),
            folder,
            memory,
            threads,
        )
        found.append((np.array(decision.verdict), np.array(decision.keeper)))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_crowded_buckets_that_are_read_in_pieces_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bucket has one number, whatever other threads number meanwhile."""
    for module in (spill, on_disk):
        monkeypatch.setattr(module, "PIECE", 500)
    rng = np.random.default_rng(4)
    centres = rng.integers(0, 1 << 64, 40, np.uint64) & ~np.uint64(0xFFFFF)
    values = centres[rng.integers(0, 40, 60_000)] | rng.integers(0, 1 << 20, 60_000).astype(np.uint64)
    wanted, _ = in_memory(values, values, None, DedupSettings())
    decision = on_disk._Decision(
        lambda: [on_disk.Rows(values, values)], None, values.size, DedupSettings(), tmp_path, 1 << 30, 4
    )
    decision.most = 500
    assert np.array_equal(decision.run().verdict, wanted)
    assert decision.buckets > 100


def test_ranks_of_many_different_orders_are_found_in_several_looks(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    order = rng.integers(0, 1 << 32, 5000).astype(np.uint32)
    values = rng.integers(0, 40, 5000).astype(np.uint64)
    rows = [on_disk.Rows(values, values)]
    decision = on_disk._Decision(
        lambda: rows, lambda: [order], 5000, DedupSettings(near=False, clusters=True), tmp_path, 1 << 30, 1
    )
    decision.memory = 100 * (4 << 16) * 4  # counters for 100 of the 65,536 leading halves at a time
    assert np.array_equal(decision.run().verdict, in_memory(values, values, order, DedupSettings(near=False))[0])


def test_more_rows_than_ranks_can_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Split the pair"):
        on_disk.decide(list, None, 1 << 32, DedupSettings(), tmp_path, 1 << 30)
