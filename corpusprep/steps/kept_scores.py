"""Scores that cost much to compute, kept by what they are scores of.

A folder holds partitions by the first bits of a 128-bit key, each an Arrow file sorted by key, which is mapped rather than
read; and `incoming/`, what each window of rows added, until `settle` merges it. Everything is written aside and renamed, so
that runs may share a folder, and a run that is killed loses the window that it was at.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.errors import RunError
from corpusprep.store import ready, writing

U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]

_OF = "@"  # between a window's name and what tells apart those who scored it
_MERGED = 256  # windows at once, each an open file
_BITS = 6  # of a key that name its partition: a billion scores are 64 files of 300 MB
_FIELDS: list[tuple[str, pa.DataType]] = [("high", pa.uint64()), ("low", pa.uint64()), ("score", pa.float32())]
_SCHEMA = pa.schema(_FIELDS)


class _Kept(NamedTuple):
    high: U64
    low: U64
    score: F32

    def part(self, start: int, end: int) -> _Kept:
        return _Kept(self.high[start:end], self.low[start:end], self.score[start:end])


_NOTHING = _Kept(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.float32))


class ScoreStore:
    """Scores in a folder, by 128-bit key.

    Args:
        folder: of one model: scores of another are not to be mixed with its own.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[int, tuple[tuple[int, int], _Kept]] = {}

    def lookup(self, keys: U64) -> tuple[F32, npt.NDArray[np.bool_]]:
        """Scores that are kept.

        Args:
            keys: (n, 2), as `add` was given them.

        Returns:
            The scores, (n,), and which of them are there, (n,).
        """
        scores = np.full(len(keys), np.nan, np.float32)
        there = np.zeros(len(keys), np.bool_)
        if not self.folder.is_dir():
            return scores, there
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        edges = _edges(keys[order, 0])
        for partition in range(1 << _BITS):
            rows = order[edges[partition] : edges[partition + 1]]
            if not len(rows):
                continue
            kept = self._partition(partition)
            if not len(kept.high):
                continue
            at = _places(kept, keys[rows, 0], keys[rows, 1])
            scores[rows[at >= 0]] = kept.score[at[at >= 0]]
            there[rows] = at >= 0
        return scores, there

    def add(self, keys: U64, scores: F32, name: str) -> None:
        """Keeps scores.

        Args:
            keys: (n, 2); no two are equal.
            scores: (n,).
            name: of the window that they are of.
        """
        # What is not a number says nothing of the row the next time.
        finite = np.flatnonzero(np.isfinite(scores))
        order = finite[np.lexsort((keys[finite, 1], keys[finite, 0]))]
        path = self.folder / "incoming" / f"{name}{_OF}{secrets.token_hex(8)}.arrow"
        _write(path, _Kept(keys[order, 0], keys[order, 1], scores[order]))

    def settle(self, but: Collection[str] = ()) -> None:
        """Merges what was added into the partitions; left to another process where one is at it.

        Args:
            but: names of windows whose scores stay aside.
        """
        if not (self.folder / "incoming").is_dir():
            return
        with _locked(self.folder) as mine:
            found = sorted((self.folder / "incoming").glob("*.arrow")) if mine else []
            incoming = [path for path in found if path.name.partition(_OF)[0] not in but]
            for start in range(0, len(incoming), _MERGED):
                self._merge(incoming[start : start + _MERGED])

    def _merge(self, incoming: list[Path]) -> None:
        added = [_read(path) for path in incoming]
        edges = [_edges(kept.high) for kept in added]
        for partition in range(1 << _BITS):
            new = [kept.part(edge[partition], edge[partition + 1]) for kept, edge in zip(added, edges, strict=True)]
            if any(len(kept.high) for kept in new):
                _write(self._file(partition), _union([_read(self._file(partition)), *new]))
        for path in incoming:
            path.unlink()

    def _file(self, partition: int) -> Path:
        return self.folder / f"{partition:02x}.arrow"

    def _partition(self, partition: int) -> _Kept:
        path = self._file(partition)
        try:
            stamp = (
                path.stat().st_ino,
                path.stat().st_mtime_ns,
            )  # a merge, by whichever process, puts another file there
        except FileNotFoundError:
            return _NOTHING
        if self._open.get(partition, (None,))[0] != stamp:
            self._open[partition] = stamp, _read(path)
        return self._open[partition][1]


def _edges(high: U64) -> npt.NDArray[np.int64]:
    """Where each partition begins among sorted high halves of keys, and where the last one ends."""
    starts = np.arange(1 << _BITS, dtype=np.uint64) << np.uint64(64 - _BITS)
    return np.append(np.searchsorted(high, starts), len(high))


def _places(kept: _Kept, high: U64, low: U64) -> npt.NDArray[np.int64]:
    """Where keys are among those that are kept, -1 where they are not."""
    at = np.searchsorted(kept.high, high)
    while True:  # ends at once, but for keys that share their high half
        near = np.minimum(at, len(kept.high) - 1)
        further = (at < len(kept.high)) & (kept.high[near] == high) & (kept.low[near] < low)
        if not further.any():
            break
        at = at + further
    same = (at < len(kept.high)) & (kept.high[near] == high) & (kept.low[near] == low)
    return np.where(same, at, -1)


def _union(parts: list[_Kept]) -> _Kept:
    """All scores, sorted by key; of those of one key, the first."""
    high, low, score = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((low, high))  # stable
    high, low, score = high[order], low[order], score[order]
    new = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])) if len(high) else np.zeros(0, np.bool_)
    return _Kept(high[new], low[new], score[new])


def _write(path: Path, kept: _Kept) -> None:
    with writing(path) as scratch, pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(column) for column in kept], schema=_SCHEMA))


def _read(path: Path) -> _Kept:
    if not ready(path):
        return _NOTHING
    try:
        table: Any = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.schema != _SCHEMA:
            raise pa.ArrowInvalid("its columns are not those of kept scores")
        if table.num_rows == 0:
            return _NOTHING
        return _Kept(*(column.chunk(0).to_numpy() for column in table.columns))  # one batch: mapped, not copied
    except pa.ArrowException as error:
        raise RunError(
            f"{path}: cannot be read as kept scores ({error}). Remove the file: they are computed again."
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process may merge: the lock ends with the process."""
    with open(folder / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
