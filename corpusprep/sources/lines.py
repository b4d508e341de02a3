"""Lines of text as spans of one byte buffer: cutting, checking and gathering them without Python objects a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.errors import InputError
from corpusprep.sources.base import ENCODING, LINE_LENGTH, NUL, TRUNCATED

Bytes = npt.NDArray[np.uint8]
Spans = npt.NDArray[np.int64]

MAX_LINE = 64 << 20
"""Bytes of the longest line that is read as text. A longer one is skipped as a stream and rejected, so that a small
packed file that unfolds to gigabytes without a line feed costs no memory."""
_KEPT_OF_LONG_LINE = 4096


class Lines(NamedTuple):
    """n lines, without their line feeds.

    Attributes:
        data: bytes; line i is `data[starts[i]:ends[i]]`.
        starts, ends: int64 of shape (n,).
        first: the number of the first line in its file.
        spoilt: verdicts of lines that are not what the file holds, by line number from `first`.
    """

    data: Bytes
    starts: Spans
    ends: Spans
    first: int
    spoilt: dict[int, int]


@numba.njit(cache=True, nogil=True)
def _positions(data: Bytes, byte: int, out: Spans) -> int:
    """Writes where a byte stands in the data, and how often it does."""
    n = 0
    for i in range(data.size):
        if data[i] == byte:
            out[n] = i
            n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _gather(data: Bytes, starts: Spans, ends: Spans, offsets: npt.NDArray[np.int32], out: Bytes) -> None:
    for i in range(starts.size):
        out[offsets[i] : offsets[i + 1]] = data[starts[i] : ends[i]]


@numba.njit(cache=True, nogil=True)
def valid_utf8(data: Bytes, start: int, end: int) -> bool:
    """Whether `data[start:end]` is UTF-8: no overlong form, no surrogate, nothing beyond U+10FFFF."""
    i = start
    while i < end:
        byte = data[i]
        if byte < 0x80:
            i += 1
            continue
        low, high = np.uint8(0x80), np.uint8(0xBF)
        if 0xC2 <= byte <= 0xDF:
            more = 1
        elif 0xE0 <= byte <= 0xEF:
            more = 2
            if byte == 0xE0:
                low = np.uint8(0xA0)
            elif byte == 0xED:
                high = np.uint8(0x9F)
        elif 0xF0 <= byte <= 0xF4:
            more = 3
            if byte == 0xF0:
                low = np.uint8(0x90)
            elif byte == 0xF4:
                high = np.uint8(0x8F)
        else:
            return False
        if i + more >= end:
            return False
        if data[i + 1] < low or data[i + 1] > high:
            return False
        for k in range(2, more + 1):
            if data[i + k] < 0x80 or data[i + k] > 0xBF:
                return False
        i += more + 1
    return True


@numba.njit(cache=True, nogil=True)
def _check(data: Bytes, starts: Spans, ends: Spans, encoding: int, nul: int, out: npt.NDArray[np.int8]) -> None:
    for i in range(starts.size):
        if out[i] != 0:
            continue
        if not valid_utf8(data, starts[i], ends[i]):
            out[i] = encoding
            continue
        for k in range(starts[i], ends[i]):
            if data[k] == 0:
                out[i] = nul
                break


def all_valid(data: Bytes) -> bool:
    """Whether the bytes are UTF-8 without NUL."""
    if data.size == 0:
        return True
    if data.min() == 0:
        return False
    offsets = np.array([0, data.size], np.int32 if data.size < 1 << 31 else np.int64)
    kind = pa.string() if offsets.dtype == np.int32 else pa.large_string()
    whole = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    try:
        whole.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def check_text(data: Bytes, starts: Spans, ends: Spans, verdict: npt.NDArray[np.int8]) -> None:
    """Marks spans that are not UTF-8, or hold NUL, in the verdicts that are still 0.

    All at once where the whole is sound: cutting at ASCII bytes cannot spoil UTF-8.
    """
    if starts.size and not all_valid(data[starts[0] : ends[-1]]):
        _check(data, starts, ends, ENCODING, NUL, verdict)


def gather(data: Bytes, starts: Spans, ends: Spans) -> pa.Array[Any]:
    """Spans of UTF-8 as an Arrow string array (large_string where they exceed 2 GiB)."""
    n = starts.size
    total = int((ends - starts).sum())
    large = total >= 1 << 31
    offsets = np.zeros(n + 1, np.int64 if large else np.int32)
    np.cumsum(ends - starts, out=offsets[1:])
    out = np.empty(total, np.uint8)
    _gather(data, starts, ends, offsets, out)
    kind = pa.large_string() if large else pa.string()
    return pa.Array.from_buffers(kind, n, [None, pa.py_buffer(offsets), pa.py_buffer(out)])


def decode(data: Bytes, start: int, end: int) -> str:
    """One span as text, with U+FFFD for what is not UTF-8."""
    return data[start:end].tobytes().decode("utf-8", "replace")


class LineCutter:
    """Cuts a stream of blocks into lines, at line feeds only.

    `fill` reads on until enough whole lines are at hand, `take` hands out the first of them. A last line without a
    line feed counts; a line feed at the end makes no further line.

    Args:
        stream: blocks of bytes; it may raise InputError.
        keep: where the stream raises, note the problem and end there, instead of raising.
        problems: the list that takes the problems.
    """

    def __init__(self, stream: Iterator[bytes], *, keep: bool, problems: list[str]) -> None:
        self._stream = stream
        self._keep = keep
        self._problems = problems
        self._blocks: list[bytes | memoryview] = []
        self._size = 0  # bytes in the blocks
        self._feeds: list[Spans] = []  # where their line feeds stand, counted from the first block's first byte
        self._count = 0  # how many those are
        self._last = -1  # where the last of them stands
        self._skipping = False
        self._ended = False
        self.row = 0
        """The number of the next line to be taken."""
        self._spoilt: dict[int, int] = {}

    def fill(self, max_rows: int, max_bytes: int) -> int:
        """Reads on until `max_rows` lines, or lines of more than `max_bytes` in sum, are at hand, or the stream ends.

        Returns:
            the number of lines at hand.
        """
        while not self._ended and self._count < max_rows and self._last < max_bytes:
            try:
                block = next(self._stream, None)
            except InputError as error:
                row = self.row + self._count
                if not self._keep:
                    raise InputError(error.file, error.problem, error.remedy, row) from None
                self._problems.append(f"{error.file}, row {row}: {error.problem}; what follows is lost.")
                if self._last + 1 < self._size:
                    self._spoilt.setdefault(row, TRUNCATED)
                block = None
            if block is None:
                self._end()
            else:
                self._add(block)
        return self._count

    def _add(self, block: bytes) -> None:
        if self._skipping:
            feed = block.find(b"\n")
            if feed < 0:
                return
            block, self._skipping = block[feed:], False
        data = np.frombuffer(block, np.uint8)
        count = block.count(b"\n")
        if count:
            feeds = np.empty(count, np.int64)
            _positions(data, 10, feeds)
            feeds += self._size
            self._feeds.append(feeds)
            self._count += count
            self._last = int(feeds[-1])
        self._blocks.append(block)
        self._size += len(block)
        if self._size - self._last > MAX_LINE:
            self._skip()

    def _skip(self) -> None:
        """Gives up the unfinished line but for its beginning."""
        self._spoilt[self.row + self._count] = LINE_LENGTH
        self._skipping = True
        self._size = self._last + 1 + _KEPT_OF_LONG_LINE
        self._blocks = [b"".join(self._blocks)[: self._size]]

    def _end(self) -> None:
        self._ended = True
        if self._last + 1 < self._size:  # the last line has no line feed of its own
            self._add(b"\n")

    def lines(self, count: int) -> Lines:
        """The first `count` lines at hand, which stay at hand."""
        if len(self._blocks) != 1:
            self._blocks = [b"".join(self._blocks)]
        if len(self._feeds) != 1:
            self._feeds = [np.concatenate(self._feeds) if self._feeds else np.empty(0, np.int64)]
        data = np.frombuffer(self._blocks[0], np.uint8)
        ends = self._feeds[0][:count]
        starts = np.empty_like(ends)
        if count:
            starts[0] = 0
            starts[1:] = ends[:-1] + 1
        spoilt = {row - self.row: verdict for row, verdict in self._spoilt.items() if row - self.row < count}
        return Lines(data, starts, ends, self.row, spoilt)

    def drop(self, count: int) -> None:
        """Lets the first `count` lines go."""
        if not count:
            return
        feeds = self._feeds[0]
        begin = int(feeds[count - 1]) + 1
        self._blocks = [memoryview(self._blocks[0])[begin:]]
        self._size -= begin
        self._feeds = [feeds[count:] - begin]
        self._count -= count
        self._last -= begin
        if not self._count:
            self._last = -1
        self.row += count
        self._spoilt = {row: verdict for row, verdict in self._spoilt.items() if row >= self.row}

    def count_rest(self) -> int:
        """How many lines are left, read to the end of the stream and let go."""
        rest = 0
        while count := self.fill(1 << 20, 8 << 20):
            self.lines(count)
            self.drop(count)
            rest += count
        return rest


def head(cutter: LineCutter, max_rows: int = 1000, max_bytes: int = 8 << 20) -> Lines:
    """The first lines of a file, from which its layout is told; they stay at hand."""
    lines = cutter.lines(min(cutter.fill(max_rows, max_bytes), max_rows))
    return cutter.lines(fit([lines], max_bytes)) if lines.starts.size else lines


def fit(sides: Sequence[Lines], max_bytes: int) -> int:
    """How many rows, one line of each side, go into `max_bytes`; at least one."""
    total = sum((side.ends - side.starts + 1).cumsum() for side in sides)
    return max(1, int(np.searchsorted(np.asarray(total), max_bytes, "right")))
