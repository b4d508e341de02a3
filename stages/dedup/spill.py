"""Records that are dealt into partitions on disk."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
Values = npt.NDArray[Any]

PIECE = 1 << 22
"""Records that are read at a time."""


class Spill:
    """Records that are dealt into partitions: a file for each partition and field.

    Records are held until there are many of them: with thousands of partitions, writing each piece at once would open files
    more often than all else takes.

    Args:
        folder: is made.
        partitions: number of partitions.
        fields: name -> type.
        room: bytes of records that are held.

    Attributes:
        rows: records of each partition.
    """

    def __init__(self, folder: Path, partitions: int, fields: dict[str, Any], room: int = 16 << 20) -> None:
        self.folder, self.fields, self.room = folder, fields, room
        self.rows = np.zeros(partitions, np.int64)
        self._held: list[tuple[U32, dict[str, Values]]] = []
        self._bytes = 0
        self._lock = threading.Lock()
        folder.mkdir()

    def append(self, which: U32, records: dict[str, Values]) -> None:
        """Adds records to the partitions that `which` names, in their order; safe to call from several threads."""
        counts = np.bincount(which, minlength=self.rows.size)
        mine = {name: records[name] for name in self.fields}
        with self._lock:
            self.rows += counts
            self._held.append((which, mine))
            self._bytes += which.nbytes + sum(column.nbytes for column in mine.values())
            if self._bytes >= self.room:
                self._flush()

    def _flush(self) -> None:
        """Writes what is held, sorted by partition; the lock is held."""
        which = np.concatenate([each for each, _ in self._held])
        counts = np.bincount(which, minlength=self.rows.size)
        ends = np.cumsum(counts)
        places = np.empty(which.size, np.int64)
        _place(which, ends - counts, places)
        for name, kind in self.fields.items():
            column = np.empty(which.size, kind)
            column[places] = np.concatenate([records[name] for _, records in self._held])
            for p in np.flatnonzero(counts).tolist():
                self._write(p, name, column[ends[p] - counts[p] : ends[p]])
        self._held, self._bytes = [], 0

    def _settle(self) -> None:
        with self._lock:
            if self._held:
                self._flush()

    def _write(self, p: int, name: str, column: Values) -> None:
        with open(self._path(p, name), "ab") as file:
            file.write(np.ascontiguousarray(column).data)

    def read(self, p: int) -> Iterator[dict[str, Values]]:
        """The records of a partition, in pieces."""
        for begin in range(0, int(self.rows[p]), PIECE):
            yield self.read_some(p, PIECE, begin)

    def read_some(self, p: int, count: int, begin: int = 0) -> dict[str, Values]:
        self._settle()
        found: dict[str, Values] = {}
        for name, kind in self.fields.items():
            found[name] = np.fromfile(self._path(p, name), kind, count, offset=begin * np.dtype(kind).itemsize)
        return found

    def every(self, p: int, name: str, step: int) -> Values:
        """One field of every so many records of a partition."""
        if not self.rows[p]:
            return np.empty(0, self.fields[name])
        self._settle()
        return np.array(np.memmap(self._path(p, name), self.fields[name], "r")[::step])

    def whole(self, p: int) -> dict[str, Values]:
        if not self.rows[p]:
            return {name: np.empty(0, kind) for name, kind in self.fields.items()}
        return self.read_some(p, int(self.rows[p]))

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, p: int, name: str) -> Path:
        return self.folder / f"{p}.{name}"


@kernel
def _place(which: U32, next_place: I64, places: I64) -> None:
    for i in range(which.size):
        places[i] = next_place[which[i]]
        next_place[which[i]] += 1
