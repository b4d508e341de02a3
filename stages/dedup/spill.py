"""Records that are dealt into partitions on disk."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
Values = npt.NDArray[Any]

_STRIDE = 0x9E3779B1
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
        self._counts = np.zeros(partitions, np.int64)  # of the records that are held
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
            self._counts += counts
            self._held.append((which, mine))
            self._bytes += which.nbytes + sum(column.nbytes for column in mine.values())
            if self._bytes >= self.room:
                self._flush()

    def _flush(self) -> None:
        """Writes what is held, sorted by partition; the lock is held."""
        ends = np.cumsum(self._counts)
        starts = ends - self._counts
        for name, kind in self.fields.items():
            column, places = np.empty(int(ends[-1]), kind), starts.copy()
            for which, records in self._held:
                _deal(which, records[name], places, column)
            for p in np.flatnonzero(self._counts).tolist():
                self._write(p, name, column[starts[p] : ends[p]])
        self._held, self._bytes = [], 0
        self._counts[:] = 0

    def _settle(self) -> None:
        with self._lock:
            if self._held:
                self._flush()

    def _write(self, p: int, name: str, column: Values) -> None:
        with open(self._path(p, name), "ab") as file:
            file.write(np.ascontiguousarray(column).data)

    def read(self, p: int, *names: str) -> Iterator[dict[str, Values]]:
        """Some fields of the records of a partition, or all, in pieces."""
        for begin in range(0, int(self.rows[p]), PIECE):
            yield self._read_some(p, names or tuple(self.fields), PIECE, begin)

    def _read_some(self, p: int, names: Sequence[str], count: int, begin: int = 0) -> dict[str, Values]:
        self._settle()
        kinds = {name: np.dtype(self.fields[name]) for name in names}
        return {
            name: np.fromfile(self._path(p, name), kind, count, offset=begin * kind.itemsize)
            for name, kind in kinds.items()
        }

    def every(self, p: int, name: str, step: int) -> Values:
        """One field of every so many records of a partition. The first of them is another in each partition: the first records
        of all partitions are likely to be neighbours where they come from."""
        if not self.rows[p]:
            return np.empty(0, self.fields[name])
        self._settle()
        first = p * _STRIDE % min(step, int(self.rows[p]))
        return np.array(np.memmap(self._path(p, name), self.fields[name], "r")[first::step])

    def whole(self, p: int) -> dict[str, Values]:
        if not self.rows[p]:
            return {name: np.empty(0, kind) for name, kind in self.fields.items()}
        return self._read_some(p, tuple(self.fields), int(self.rows[p]))

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, p: int, name: str) -> Path:
        return self.folder / f"{p}.{name}"


@kernel
def _deal(which: U32, values: Values, places: I64, to: Values) -> None:
    """Writes each value to the next place of its partition."""
    for i in range(which.size):
        p = which[i]
        to[places[p]] = values[i]
        places[p] += 1
