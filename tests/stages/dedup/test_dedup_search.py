"""Greedy decisions over fingerprints, against brute force, and what they cost where rows are dense or alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpusprep.stages.dedup import DedupSettings, decide
from corpusprep.stages.dedup import greedy as _greedy
from corpusprep.stages.dedup import search as _search


def popcount(values):
    return np.unpackbits(np.ascontiguousarray(values, np.uint64)[..., None].view(np.uint8), axis=-1).sum(axis=-1)


def brute_force(values: np.ndarray, distance: int) -> list[int]:
    """The keeper of every row, by comparing it with all kept ones."""
    kept: list[int] = []
    keepers = []
    for i, value in enumerate(values):
        near = np.flatnonzero(popcount(values[kept] ^ value) <= distance) if kept else []
        keepers.append(kept[near[0]] if len(near) else i)
        if not len(near):
            kept.append(i)
    return keepers


def clustered(rng: np.random.Generator, n: int, centres: int, flips: int) -> np.ndarray:
    """Fingerprints near a few random ones, each bit flipped at most `flips` times."""
    values = rng.integers(0, 2**64, centres, dtype=np.uint64)[rng.integers(0, centres, n)]
    for _ in range(flips):
        bits = np.uint64(1) << rng.integers(0, 64, n).astype(np.uint64)
        values = values ^ np.where(rng.random(n) < 0.6, bits, np.uint64(0))
    return values


@pytest.fixture
def edges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs of rows each search compared and found near."""
    counts: list[int] = []
    search = _search.find_pairs

    def counting(*arguments: Any) -> Any:
        found = search(*arguments)
        counts.append(found[0].size)
        return found

    monkeypatch.setattr(_search, "find_pairs", counting)
    return counts


class TestDecide:
    @given(st.integers(0, 2**32), st.integers(2, 600), st.integers(1, 40), st.integers(0, 8), st.integers(0, 4))
    @settings(max_examples=80, deadline=None)
    def test_it_is_the_greedy_choice(self, seed: int, n: int, centres: int, flips: int, distance: int) -> None:
        values = clustered(np.random.default_rng(seed), n, centres, flips)
        hashes = values.copy()
        verdict, keeper = decide(values, hashes, DedupSettings(max_distance=distance))
        assert keeper.tolist() == brute_force(values, distance)
        assert verdict.dtype == np.uint8
        assert keeper.dtype == np.int64
        equal = values == values[keeper]
        assert verdict.tolist() == np.where(keeper == np.arange(n), 0, np.where(equal, 1, 2)).tolist()

    @pytest.mark.parametrize("distance", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_dense_buckets_are_exact_too(self, distance: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Thousands of rows around one fingerprint, and rows that share most blocks without being near."""
        monkeypatch.setattr(_greedy, "_SCRATCH", 1 << 10)  # many jobs a group
        monkeypatch.setattr(_greedy, "_LEAST_SCRATCH", 1)
        monkeypatch.setattr(_greedy, "_BLOCKS", 1)
        monkeypatch.setattr(_search, "_PART", 8)
        rng = np.random.default_rng(distance)
        far = rng.integers(0, 2**64, 1500, dtype=np.uint64) & np.uint64(0xFFFFF)
        values = np.concatenate([clustered(rng, 3000, 1, 6), far, clustered(rng, 1500, 300, 3)])
        rng.shuffle(values)
        values = np.concatenate([values, rng.permutation(values)[:500]])
        wanted = brute_force(values, distance)
        for k in (None, distance + 1, distance + 2):
            assert _greedy.keepers(values, distance, threads, k).tolist() == wanted

    @pytest.mark.parametrize("bits", [0xFFFF, 0xFFFF << 24, 0xFFFFFFFFFFFF])
    def test_bits_that_are_the_same_in_all_rows(self, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """All rows are in one part, or in few buckets."""
        monkeypatch.setattr(_search, "_PART", 4)
        rng = np.random.default_rng(6)
        values = clustered(rng, 2000, 1200, 3) & ~np.uint64(bits)
        for distance in (0, 1, 3):
            wanted = brute_force(values, distance)
            for k in (None, distance + 1, distance + 3):
                assert _greedy.keepers(values, distance, 2, k).tolist() == wanted

    def test_a_part_that_is_too_large_is_dealt_again(self) -> None:
        """A block of bits is the same in all of 200,000 rows, so that one part holds them all."""
        rng = np.random.default_rng(8)
        values = rng.integers(0, 2**64, 200_000, dtype=np.uint64)
        values[100_000:150_000] = values[:50_000] ^ (np.uint64(0b101) << rng.integers(16, 60, 50_000).astype(np.uint64))
        values[150_000:190_000] = values[0]  # and a fifth of them are one row
        values &= ~np.uint64(0xFFFF)
        found = _greedy.keepers(values, 3, k=6)
        assert (found[100_000:150_000] == np.arange(50_000)).sum() > 49_990  # a few are near an earlier one by chance
        assert (found[150_000:190_000] == 0).all()
        assert (found == np.arange(200_000)).sum() > 109_900
        for k in (4, 5, 7):
            assert np.array_equal(_greedy.keepers(values, 3, threads=2, k=k), found)

    def test_buckets_go_by_the_rows_of_their_part(self) -> None:
        """So a part that holds all rows, for a block of bits that they share, has as many as many parts have."""
        fine = _search.fine_bits.py_func
        assert fine(40, 100_000) == 18
        assert fine(40, 10) == 5
        assert fine(3, 100_000) == 3

    def test_no_chains(self) -> None:
        values = np.array([0b0, 0b111, 0b111111], np.uint64)  # a-b and b-c are near, a-c are not
        verdict, keeper = decide(values, values, DedupSettings(max_distance=3))
        assert verdict.tolist() == [0, 2, 0]
        assert keeper.tolist() == [0, 0, 2]

    def test_a_row_is_compared_with_kept_rows_only_even_where_texts_are_equal(self) -> None:
        values = np.array([0b0, 0b111, 0b111, 0b111111], np.uint64)
        hashes = np.array([1, 2, 2, 3], np.uint64)
        verdict, keeper = decide(values, hashes, DedupSettings())
        assert verdict.tolist() == [
            0,
            2,
            2,
            0,
        ]  # the second of the equal texts is near to the kept row, not equal to it
        assert keeper.tolist() == [0, 0, 0, 3]

    def test_exact_and_near_can_be_switched_off(self) -> None:
        values = np.array([5, 5, 5, 4], np.uint64)
        hashes = np.array([1, 1, 2, 3], np.uint64)
        for exact, near, wanted in (
            (True, True, [0, 1, 2, 2]),
            (True, False, [0, 1, 0, 0]),
            (False, True, [0, 2, 2, 2]),
            (False, False, [0, 0, 0, 0]),
        ):
            assert decide(values, hashes, DedupSettings(exact=exact, near=near))[0].tolist() == wanted
        assert decide(values, hashes, DedupSettings(max_distance=0))[0].tolist() == [0, 1, 2, 0]

    @pytest.mark.parametrize("n", [0, 1])
    def test_no_rows_and_one(self, n: int) -> None:
        for chosen in (DedupSettings(), DedupSettings(near=False), DedupSettings(max_distance=0)):
            verdict, keeper = decide(np.full(n, 7, np.uint64), np.full(n, 9, np.uint64), chosen)
            assert verdict.tolist() == [0] * n
            assert keeper.tolist() == [0] * n

    def test_one_fingerprint_a_million_times(self, edges: list[int]) -> None:
        rng = np.random.default_rng(3)
        values = rng.integers(0, 2**64, 1_200_000, dtype=np.uint64)
        values[rng.permutation(1_200_000)[:1_000_000]] = np.uint64(99)
        verdict, keeper = decide(values, values, DedupSettings())
        assert sum(edges) == 0
        assert int((verdict == 0).sum()) == 200_001
        assert np.unique(keeper[values == 99]).tolist() == [int(np.flatnonzero(values == 99)[0])]

    def test_a_dense_neighbourhood_does_not_blow_up(self, edges: list[int]) -> None:
        """Of 200,000 rows within five bits of one there are a thousand million pairs within three."""
        rng = np.random.default_rng(4)
        values = np.full(200_000, 12345, np.uint64)
        for _ in range(5):
            values ^= np.uint64(1) << rng.integers(0, 64, values.size).astype(np.uint64)
        verdict, keeper = decide(values, values, DedupSettings())
        assert 0 < sum(edges) < 40 * values.size
        assert (popcount(values ^ values[keeper]) <= 3).all()
        kept = values[verdict == 0][:2_000]
        apart = popcount(kept[:, None] ^ kept[None, :])
        assert (apart[~np.eye(kept.size, dtype=bool)] > 3).all()

    def test_it_does_not_depend_on_the_number_of_threads(self) -> None:
        values = clustered(np.random.default_rng(5), 30_000, 9_000, 4)
        one, many = (decide(values, values, DedupSettings(), threads=threads) for threads in (1, 4))
        assert np.array_equal(one[0], many[0])
        assert np.array_equal(one[1], many[1])
