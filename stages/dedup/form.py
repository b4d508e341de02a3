"""Counts formal flaws of rows, to choose which duplicate is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import string_buffers
from corpusprep.kernels import kept, kernel
from corpusprep.stages.bits import TOPS, bytes_equal, load64, trailing_zeros

Bytes = npt.NDArray[np.uint8]

_UPPER, _LOWER, _OTHER_LETTER, _DASH, _CLOSING, _SPACE, _POINT = 1, 2, 3, 4, 5, 6, 7
_FULL_STOP, _QUESTION, _EXCLAMATION, _ELLIPSIS = 8, 9, 10, 11
_FULL_STOPS = ".。｡।॥۔።։᠃᱾။"
_MARKS = {
    **dict.fromkeys("?？؟⸮፧", _QUESTION),
    **dict.fromkeys("!！¡", _EXCLAMATION),
    "…": _ELLIPSIS,
    **dict.fromkeys(_FULL_STOPS, _FULL_STOP),
    **dict.fromkeys(",،，、;；:：", _POINT),
    **dict.fromkeys("-–—−•*·", _DASH),
    **dict.fromkeys("\"'”’“‘»›«‹)]}」』）】》〉", _CLOSING),
    **dict.fromkeys(" \u00a0\u202f\u3000", _SPACE),
}


class _Classes(NamedTuple):
    of: Bytes


@kept(_Classes)
def _classes() -> _Classes:
    """Class of every code point of the Basic Multilingual Plane."""
    table = np.zeros(1 << 16, np.uint8)
    for code in range(1 << 16):
        if 0xD800 <= code < 0xE000:
            continue
        char = chr(code)
        if char.isupper():
            table[code] = _UPPER
        elif char.islower():
            table[code] = _LOWER
        elif char.isalpha():
            table[code] = _OTHER_LETTER
    for char, mark in _MARKS.items():
        table[ord(char)] = mark
    return _Classes(table)


def flaws(src: pa.ChunkedArray[Any], tgt: pa.ChunkedArray[Any]) -> npt.NDArray[np.uint8]:
    """See `dedup.flaws`."""
    src_offsets, src_data = string_buffers(src)
    tgt_offsets, tgt_data = string_buffers(tgt)
    out = np.empty(src_offsets.size - 1, np.uint8)
    _flaws(src_offsets, src_data, tgt_offsets, tgt_data, _classes().of, out)
    return out


@kernel(inline="always", leaf=True)
def _class(data: Bytes, start: int, end: int, classes: Bytes) -> tuple[Any, int]:
    """The class of the character at `start`, and the end of the character."""
    byte = np.int64(data[start])
    if byte < 0x80:
        return np.int64(classes[byte]), start + 1
    if byte < 0xE0 and start + 1 < end:
        return np.int64(classes[(byte & 0x1F) << 6 | np.int64(data[start + 1]) & 0x3F]), start + 2
    if byte < 0xF0 and start + 2 < end:
        code = (byte & 0x0F) << 12 | (np.int64(data[start + 1]) & 0x3F) << 6 | np.int64(data[start + 2]) & 0x3F
        return np.int64(classes[code]), start + 3
    return np.int64(_OTHER_LETTER), start + 4


@kernel(leaf=True)
def _spaced(data: Bytes, start: int, end: int, classes: Bytes) -> bool:
    """Whether there is a space before a full stop or comma."""
    i = start + 1
    last_word = data.size - 8
    while i < end:
        if i <= last_word:
            # Eight bytes at a time: a full stop or comma after a space or a character that is not ASCII.
            before = load64(data, i - 1)
            word = load64(data, i)
            found = (
                (bytes_equal(word, 44) | bytes_equal(word, 46)) & (bytes_equal(before, 32) | before) & np.uint64(TOPS)
            )
            if found == 0:
                i += 8
                continue
            i += trailing_zeros(found) >> 3
            if i >= end:
                return False
        if data[i] == 44 or data[i] == 46:
            k: Any = i - 1
            while k > start and data[k] & 0xC0 == 0x80:
                k -= 1
            if _class(data, k, end, classes)[0] == _SPACE:
                return True
        i += 1
    return False


@kernel(leaf=True)
def _side(data: Bytes, start: int, end: int, classes: Bytes) -> tuple[Any, Any]:
    """Number of flaws of one text, and the class of the mark at its end (0: none)."""
    flawed: Any = 0
    i = start
    kind = np.int64(_SPACE)
    while i < end and kind == _SPACE:
        kind, i = _class(data, i, end, classes)
    flawed += kind == _DASH
    upper = lower = 0
    i = start
    while i < end and lower == 0:
        kind, i = _class(data, i, end, classes)
        upper += kind == _UPPER
        lower += kind == _LOWER
    flawed += upper >= 4 and lower == 0
    last = np.int64(0)
    dots = 0
    i = end
    while i > start:
        i -= 1
        while i > start and data[i] & 0xC0 == 0x80:
            i -= 1
        kind, _ = _class(data, i, end, classes)
        if kind in (_CLOSING, _SPACE):
            continue
        if last == 0:
            last = kind
        if data[i] != 46:
            break
        dots += 1
    if dots >= 2:
        last = np.int64(_ELLIPSIS)
    if last < _FULL_STOP:
        last = np.int64(0)
        flawed += 1
    flawed += _spaced(data, start, end, classes)
    return flawed, last


@kernel(leaf=True)
def _flaws(
    src_offsets: npt.NDArray[np.int64],
    src_data: Bytes,
    tgt_offsets: npt.NDArray[np.int64],
    tgt_data: Bytes,
    classes: Bytes,
    out: npt.NDArray[np.uint8],
) -> None:
    for i in range(out.size):
        left, ends = _side(src_data, src_offsets[i], src_offsets[i + 1], classes)
        right, end = _side(tgt_data, tgt_offsets[i], tgt_offsets[i + 1], classes)
        differ = 1 if ends != end and ends != 0 and end != 0 else 0
        out[i] = left + right + differ
