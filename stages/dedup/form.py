"""Counts formal flaws of rows, to choose which duplicate is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import string_buffers
from corpusprep.kernels import kept, kernel

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


@kernel
def _side(data: Bytes, start: int, end: int, classes: Bytes) -> tuple[int, int]:
    """Number of flaws of one text, and the class of the mark at its end (0: none)."""
    upper, lower, flawed, spaced = 0, 0, 0, False
    first, before, last, dots = 0, 0, 0, 0
    i = start
    while i < end:
        byte = data[i]
        if byte < 0x80:
            code, size = int(byte), 1
        elif byte < 0xE0:
            code, size = (int(byte) & 0x1F) << 6, 2
        elif byte < 0xF0:
            code, size = (int(byte) & 0x0F) << 12, 3
        else:
            code, size = 0, 4
        if i + size > end:
            break
        if size == 2:
            code |= int(data[i + 1]) & 0x3F
        elif size == 3:
            code |= (int(data[i + 1]) & 0x3F) << 6 | (int(data[i + 2]) & 0x3F)
        kind = int(classes[code]) if size < 4 else _OTHER_LETTER
        if kind == _UPPER:
            upper += 1
        elif kind == _LOWER:
            lower += 1
        if first == 0 and kind != _SPACE:
            first = 1
            if kind == _DASH:
                flawed += 1
        if before == _SPACE and code in (44, 46):
            spaced = True
        before = kind
        dots = dots + 1 if code == 46 else (dots if kind in (_CLOSING, _SPACE) else 0)
        if kind not in (_CLOSING, _SPACE):
            last = kind
        i += size
    if dots >= 2:
        last = _ELLIPSIS
    if last < _FULL_STOP:
        last = 0
        flawed += 1
    if upper >= 4 and lower == 0:
        flawed += 1
    if spaced:
        flawed += 1
    return flawed, last


@kernel
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
