"""Scores that are kept: found again, merged, shared, and whole after an interruption."""

from __future__ import annotations

import fcntl
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from corpusprep.errors import RunError
from corpusprep.steps import kept_scores as module
from corpusprep.steps.kept_scores import ScoreStore


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    keys = draw.integers(0, 1 << 64, (count, 2), np.uint64)
    keys[:2] = [[0, 0], [(1 << 64) - 1, (1 << 64) - 1]][: min(count, 2)]
    return keys, draw.random(count, np.float32)


def test_what_was_added_is_found(tmp_path: Path) -> None:
    keys, scores = drawn(5000, 1)
    store = ScoreStore(tmp_path / "kept")
    assert not store.lookup(keys)[1].any()
    for k in range(5):
        store.add(keys[k * 1000 : (k + 1) * 1000], scores[k * 1000 : (k + 1) * 1000], f"window-{k}")
    store.settle()
    others = np.random.default_rng(9).integers(0, 1 << 64, (300, 2), np.uint64)
    mixed = np.concatenate([keys[::-1], others, keys[:1] ^ np.uint64([[0, 1]])])
    for one in (store, ScoreStore(tmp_path / "kept")):
        found, there = one.lookup(mixed)
        assert there.tolist() == [True] * 5000 + [False] * 301
        np.testing.assert_array_equal(found[:5000], scores[::-1])
        assert np.isnan(found[5000:]).all()
    assert list((tmp_path / "kept" / "incoming").iterdir()) == []


def test_what_is_added_twice_is_kept_once(tmp_path: Path) -> None:
    keys, scores = drawn(100, 2)
    store = ScoreStore(tmp_path)
    store.add(keys, scores, "a")
    store.settle()
    store.add(keys[50:], scores[50:] + 1, "b")
    store.add(keys[:50], scores[:50], "a")
    store.settle()
    found, there = store.lookup(keys)
    assert there.all()
    np.testing.assert_array_equal(found, scores)
    assert sum(module._read(path).high.size for path in tmp_path.glob("*.arrow")) == 100


def test_keys_that_agree_in_their_first_half_are_told_apart(tmp_path: Path) -> None:
    keys = np.array([[7, 1], [7, 3]], np.uint64)
    store = ScoreStore(tmp_path)
    store.add(keys, np.array([0.1, 0.3], np.float32), "a")
    store.settle()
    found, there = store.lookup(np.array([[7, 1], [7, 2], [7, 3]], np.uint64))
    assert there.tolist() == [True, False, True]
    np.testing.assert_allclose(found[[0, 2]], [0.1, 0.3])


def test_a_merge_that_was_cut_off_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, scores = drawn(2000, 3)
    store = ScoreStore(tmp_path)
    store.add(keys, scores, "a")
    whole, written = module._write, 0

    def cut_off(path: Path, kept: module._Kept) -> None:
        nonlocal written
        written += 1
        if written > 20:
            raise KeyboardInterrupt
        whole(path, kept)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            store.settle()
    later = ScoreStore(tmp_path)
    later.settle()
    found, there = later.lookup(keys)
    assert there.all()
    np.testing.assert_array_equal(found, scores)


def test_windows_of_a_run_that_goes_on_stay_aside(tmp_path: Path) -> None:
    keys, scores = drawn(100, 6)
    store = ScoreStore(tmp_path)
    store.add(keys[:50], scores[:50], "mine.1")
    store.add(keys[50:], scores[50:], "other.1")
    store.settle(but={"mine.1"})
    assert store.lookup(keys)[1].tolist() == [False] * 50 + [True] * 50
    store.settle()
    assert store.lookup(keys)[1].all()


def test_what_is_not_a_number_is_not_kept(tmp_path: Path) -> None:
    keys, scores = drawn(10, 7)
    scores[[2, 5]] = np.nan, np.inf
    store = ScoreStore(tmp_path)
    store.add(keys, scores, "a")
    store.settle()
    assert np.flatnonzero(~store.lookup(keys)[1]).tolist() == [2, 5]


def test_partitions_are_mapped_not_read(tmp_path: Path) -> None:
    keys, scores = drawn(400_000, 8)
    ScoreStore(tmp_path).add(keys, scores, "a")
    ScoreStore(tmp_path).settle()
    store = ScoreStore(tmp_path)
    before = pa.total_allocated_bytes()
    assert store.lookup(keys[::100])[1].all()
    assert pa.total_allocated_bytes() - before < 1 << 20  # 8 MB are kept


def test_a_merge_is_left_to_who_is_at_it(tmp_path: Path) -> None:
    keys, scores = drawn(10, 4)
    store = ScoreStore(tmp_path)
    store.add(keys, scores, "a")
    with open(tmp_path / ".lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        store.settle()
        assert not store.lookup(keys)[1].any()
    store.settle()
    assert ScoreStore(tmp_path).lookup(keys)[1].all()


def test_nothing_is_added_and_nothing_is_found(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "none")
    nothing = np.empty((0, 2), np.uint64)
    assert store.lookup(nothing)[0].shape == (0,)
    store.settle()
    assert not (tmp_path / "none").exists()
    store.add(nothing, np.empty(0, np.float32), "a")
    store.settle()
    assert store.lookup(nothing)[1].shape == (0,)


@pytest.mark.parametrize("content", [b"no arrow file", b"ARROW1\0\0"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    keys, scores = drawn(100, 5)
    store = ScoreStore(tmp_path)
    store.add(keys, scores, "a")
    store.settle()
    (tmp_path / "00.arrow").write_bytes(content)
    with pytest.raises(RunError, match=r"00\.arrow: cannot be read as kept scores .* Remove the file"):
        ScoreStore(tmp_path).lookup(keys)
