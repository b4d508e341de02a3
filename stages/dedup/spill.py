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
Column = npt.NDArray[Any]

PIECE = 1 << 22
"""Records that are read or dealt at a time."""


class Spill:
    """Records that are dealt into partitions: a file for each partition and field.

    Attributes:
        fields: name -> type.
        rows: records of each partition.
    """

    def __init__(self, folder: Path, partitions: int, fields: dict[str, Any]) -> None:
        self.folder, self.fields = folder, fields
        self.rows = np.zeros(partitions, np.int64)
        self._lock = threading.Lock()
        folder.mkdir()

    def append(self, which: U32, records: dict[str, Column]) -> None:
        """Adds records to the partitions that `which` names, in their order; safe to call from several threads."""
        for begin in range(0, which.size, PIECE):
            some = which[begin : begin + PIECE]
            counts = np.bincount(some, minlength=self.rows.size)
            ends = np.cumsum(counts)
            places = np.empty(some.size, np.int64)
            _place(some, ends - counts, places)
            sorted_records = {}
            for name, kind in self.fields.items():
                sorted_records[name] = np.empty(some.size, kind)
                sorted_records[name][places] = records[name][begin : begin + PIECE]
            with self._lock:
                for p in np.flatnonzero(counts).tolist():
                    mine = slice(ends[p] - counts[p], ends[p])
                    self.write(p, {name: column[mine] for name, column in sorted_records.items()})

    def write(self, p: int, records: dict[str, Column]) -> None:
        """Adds records to one partition."""
        for name, column in records.items():
            with open(self._path(p, name), "ab") as file:
                file.write(np.ascontiguousarray(column).data)
        self.rows[p] += next(iter(records.values())).size

    def read(self, p: int) -> Iterator[dict[str, Column]]:
        """The records of a partition, in pieces."""
        for begin in range(0, int(self.rows[p]), PIECE):
            yield self.read_some(p, PIECE, begin)

    def read_some(self, p: int, count: int, begin: int = 0) -> dict[str, Column]:
        found: dict[str, Column] = {}
        for name, kind in self.fields.items():
            found[name] = np.fromfile(self._path(p, name), kind, count, offset=begin * np.dtype(kind).itemsize)
        return found

    def every(self, p: int, name: str, step: int) -> Column:
        """One field of every so many records of a partition."""
        if not self.rows[p]:
            return np.empty(0, self.fields[name])
        return np.array(np.memmap(self._path(p, name), self.fields[name], "r")[::step])

    def whole(self, p: int) -> dict[str, Column]:
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
