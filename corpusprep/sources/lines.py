"""Lines of text as spans of one byte buffer: cutting, checking and gathering them without Python objects a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.errors import InputError
from corpusprep.kernels import kernel
from corpusprep.sources.base import ENCODING, LINE_LENGTH, NUL, TRUNCATED, Extent

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


@kernel
def _feeds(data: Bytes, begin: int, end: int, out: Spans, n: int) -> int:
    """Writes where line feeds stand in `data[begin:end]` behind the first n places; returns how many there are then.

    64 bytes at once are looked over by vector instructions (a slice, since indexes that cannot be negative let the
    compiler do so): three times as fast as byte by byte.
    """
    i = begin
    while i + 64 <= end:
        chunk = data[i : i + 64]
        hit = np.uint8(0)
        for j in range(64):
            hit |= np.uint8(1) if chunk[j] == 10 else np.uint8(0)
        if hit != 0:
            for j in range(64):
                if chunk[j] == 10:
                    out[n] = i + j
                    n += 1
        i += 64
    while i < end:
        if data[i] == 10:
            out[n] = i
            n += 1
        i += 1
    return n


@kernel
def _gather(data: Bytes, starts: Spans, ends: Spans, offsets: npt.NDArray[np.int32], out: Bytes) -> None:
    for i in range(starts.size):
        source, sink = data[starts[i] : ends[i]], out[offsets[i] : offsets[i + 1]]
        n, k = source.size, 0
        while k + 32 <= n:  # copies of a fixed size need no call
            part, place = source[k : k + 32], sink[k : k + 32]
            for j in range(32):
                place[j] = part[j]
            k += 32
        part, place = source[k:], sink[k:]
        for j in range(part.size):
            place[j] = part[j]


@kernel
def valid_utf8(data: Bytes, start: int, end: int) -> bool:
    """Whether `data[start:end]` is UTF-8: no overlong form, no surrogate, nothing beyond U+10FFFF."""
    i = start
    while i < end:
        byte = data[i]
        if byte < 0x80:
            i += 1
            continue
        more = 1 if 0xC2 <= byte <= 0xDF else 2 if 0xE0 <= byte <= 0xEF else 3 if 0xF0 <= byte <= 0xF4 else 0
        if more == 0:
            return False
        low = np.uint8(0xA0) if byte == 0xE0 else np.uint8(0x90) if byte == 0xF0 else np.uint8(0x80)
        high = np.uint8(0x9F) if byte == 0xED else np.uint8(0x8F) if byte == 0xF4 else np.uint8(0xBF)
        if i + more >= end:
            return False
        if data[i + 1] < low or data[i + 1] > high:
            return False
        for k in range(2, more + 1):
            if data[i + k] < 0x80 or data[i + k] > 0xBF:
                return False
        i += more + 1
    return True


@kernel
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


def as_buffer(array: Any) -> pa.Buffer:
    """A contiguous NumPy array as an Arrow buffer, without a copy."""
    return pa.py_buffer(array)


def all_valid(data: Bytes) -> bool:
    """Whether the bytes are UTF-8 without NUL."""
    if data.size == 0:
        return True
    if data.min() == 0:
        return False
    offsets = np.array([0, data.size], np.int64)
    whole = pa.Array.from_buffers(pa.large_string(), 1, [None, as_buffer(offsets), as_buffer(data)])
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
    offsets: npt.NDArray[Any] = np.zeros(n + 1, np.int64 if large else np.int32)
    np.cumsum(ends - starts, out=offsets[1:])
    buffer = pa.allocate_buffer(total)  # Arrow's pool, which takes freed memory again
    if total:
        _gather(data, starts, ends, offsets, np.frombuffer(memoryview(buffer), np.uint8))
    kind = pa.large_string() if large else pa.string()
    return pa.Array.from_buffers(kind, n, [None, as_buffer(offsets), buffer])


def decode(data: Bytes, start: int, end: int) -> str:
    """One span as text, with U+FFFD for what is not UTF-8."""
    return data[start:end].tobytes().decode("utf-8", "replace")


class LineCutter:
    """Cuts a stream of blocks into lines, at line feeds only.

    `fill` reads on until enough whole lines are at hand, `lines` shows the first of them, `drop` lets them go. A last
    line without a line feed counts; a line feed at the end makes no further line.

    Args:
        stream: blocks of bytes; it may raise InputError.
        keep: where the stream raises, note the problem and end there, instead of raising.
        problems: the list that takes the problems.
    """

    def __init__(self, stream: Iterator[bytes], *, keep: bool, problems: list[str]) -> None:
        self._stream = stream
        self._keep = keep
        self._problems = problems
        self._data = np.empty(1 << 20, np.uint8)
        self._begin = self._end = 0  # the bytes at hand
        self._feeds = np.empty(1 << 16, np.int64)  # where line feeds stand
        self._first = self._last = 0  # those of the lines at hand
        self._skipping = False
        self._ended = False
        self._spoilt: dict[int, int] = {}
        self.row = 0
        """The number of the next line to be dropped."""

    def fill(self, max_rows: int, max_bytes: int) -> int:
        """Reads on until `max_rows` lines, or lines of more than `max_bytes` in sum, are at hand, or the stream ends.
        What `lines` has given is void then.

        Returns:
            the number of lines at hand.
        """
        while not self._ended and self._last - self._first < max_rows and self._whole() <= max_bytes:
            try:
                block = next(self._stream, None)
            except InputError as error:
                row = self.row + self._last - self._first
                where = error
                if error.row is not None or self._end > 0:  # else no row is to blame: the file did not open
                    where = InputError(error.file, error.problem, error.pieces, row)
                if not self._keep:
                    raise where from None
                place = error.file if where.row is None else f"{error.file}, row {row}"
                self._problems.append(f"{place}: {error.problem}; what follows is lost.")
                if self._begin + self._whole() < self._end:
                    self._spoilt.setdefault(row, TRUNCATED)
                block = None
            if block is not None:
                self._add(block)
                continue
            self._ended = True
            if self._begin + self._whole() < self._end:  # the last line has no line feed of its own
                self._add(b"\n")
        return self._last - self._first

    def _whole(self) -> int:
        """Bytes of the whole lines at hand."""
        return int(self._feeds[self._last - 1]) + 1 - self._begin if self._last > self._first else 0

    def _add(self, block: bytes) -> None:
        if self._skipping:
            feed = block.find(b"\n")
            if feed < 0:
                return
            block, self._skipping = block[feed:], False
        size = len(block)
        self._make_room(size)
        self._data[self._end : self._end + size] = np.frombuffer(block, np.uint8)
        self._last = _feeds(self._data, self._end, self._end + size, self._feeds, self._last)
        self._end += size
        unfinished = self._begin + self._whole()
        if self._end - unfinished > MAX_LINE:  # give the line up but for its beginning
            self._spoilt[self.row + self._last - self._first] = LINE_LENGTH
            self._skipping = True
            self._end = unfinished + _KEPT_OF_LONG_LINE

    def _make_room(self, size: int) -> None:
        """Room for a block and its line feeds: what is at hand moves to the front, of a larger buffer if need be.

        The buffer is used again and again: fresh memory costs more than the copy.
        """
        held, count = self._end - self._begin, self._last - self._first
        if self._end + size > self._data.size:
            old = self._data
            if held + size > old.size // 2:
                self._data = np.empty(2 * (held + size), np.uint8)
            self._data[:held] = old[self._begin : self._end]
            self._feeds[self._first : self._last] -= self._begin
            self._begin, self._end = 0, held
        if self._last + size > self._feeds.size:
            feeds = self._feeds
            if count + size > feeds.size // 2:
                self._feeds = np.empty(2 * (count + size), np.int64)
            self._feeds[:count] = feeds[self._first : self._last]
            self._first, self._last = 0, count

    def lines(self, count: int) -> Lines:
        """The first `count` lines at hand, which stay at hand."""
        ends = self._feeds[self._first : self._first + count]
        starts = np.empty(count, np.int64)
        if count:
            starts[0] = self._begin
            starts[1:] = ends[:-1] + 1
        spoilt = {row - self.row: verdict for row, verdict in self._spoilt.items() if row - self.row < count}
        return Lines(self._data, starts, ends, self.row, spoilt)

    def drop(self, count: int) -> None:
        """Lets the first `count` lines go."""
        if not count:
            return
        self._first += count
        self._begin = int(self._feeds[self._first - 1]) + 1
        self.row += count
        self._spoilt = {row: verdict for row, verdict in self._spoilt.items() if row >= self.row}

    def count_rest(self) -> int:
        """How many lines are left, read to the end of the stream and let go."""
        rest = 0
        while count := self.fill(1 << 20, 8 << 20):
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


def batches_of(cutter: LineCutter, extent: Extent) -> Iterator[Lines]:
    """The lines that are left, in batches; each is dropped when the next one is asked for.

    Args:
        extent: its limit counts all lines of the file, those that were dropped before included.
    """
    limit, max_rows, max_bytes = extent
    while limit is None or cutter.row < limit:
        wanted = max_rows if limit is None else min(max_rows, limit - cutter.row)
        count = min(wanted, cutter.fill(wanted, max_bytes))
        if count == 0:
            return
        count = fit([cutter.lines(count)], max_bytes)
        yield cutter.lines(count)
        cutter.drop(count)
