"""A JSON reader for lines of plain records, in Numba.

It reads a line only if it is sure to read it as Python's `json` does; every other line (a key written with escapes,
a field twice, a value of another type, broken syntax) it leaves to Python. So what a line means never depends on its
neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel
from corpusprep.sources.lines import Bytes, Spans

ABSENT, PLAIN, ESCAPED, NUMBER = 0, 1, 2, 3
_DEPTH = 32
Kinds = npt.NDArray[np.int8]


@kernel
def _space(data: Bytes, i: int, end: int) -> int:
    while i < end and (data[i] == 32 or data[i] == 9 or data[i] == 13):
        i += 1
    return i


@kernel
def _hex4(data: Bytes, i: int, end: int) -> int:
    """The value of four hexadecimal digits, or -1."""
    if i + 4 > end:
        return -1
    value = 0
    for k in range(4):
        byte = data[i + k]
        if 48 <= byte <= 57:
            digit = byte - 48
        elif 65 <= byte <= 70:
            digit = byte - 55
        elif 97 <= byte <= 102:
            digit = byte - 87
        else:
            return -1
        value = value * 16 + digit
    return value


@kernel
def _escape(data: Bytes, i: int, end: int) -> int:
    """The end of an escape that begins at i (of both halves where it is a surrogate pair), or -1."""
    if i + 1 >= end:
        return -1
    code = data[i + 1]
    if code in (34, 92, 47, 98, 102, 110, 114, 116):
        return i + 2
    if code != 117:
        return -1
    value = _hex4(data, i + 2, end)
    if value < 0 or 0xDC00 <= value <= 0xDFFF:
        return -1
    i += 6
    if 0xD800 <= value <= 0xDBFF:
        if i + 6 > end or data[i] != 92 or data[i + 1] != 117:
            return -1
        low = _hex4(data, i + 2, end)
        if low < 0xDC00 or low > 0xDFFF:
            return -1
        i += 6
    return i


@kernel
def _string(data: Bytes, i: int, end: int) -> tuple[int, bool]:
    """The end of a string that opens at i (the place of its closing quote), and whether it has escapes; -1: unsure."""
    escaped = False
    i += 1
    while i < end:
        stop = end
        if i + 16 <= end:  # 16 bytes at once where none of them needs a look
            stop = i + 16
            chunk = data[i : i + 16]
            hit = np.uint8(0)
            for j in range(16):
                odd = (chunk[j] == 34) | (chunk[j] == 92) | (chunk[j] < 32)
                hit |= np.uint8(1) if odd else np.uint8(0)
            if hit == 0:
                i = stop
                continue
        while i < stop:
            byte = data[i]
            if byte == 34:
                return i, escaped
            if byte < 32:
                return -1, escaped
            if byte != 92:
                i += 1
                continue
            escaped = True
            i = _escape(data, i, end)
            if i < 0:
                return -1, escaped
    return -1, escaped


@kernel
def _number(data: Bytes, i: int, end: int) -> int:
    """The end of a number that begins at i, or -1."""
    begin = i
    if i < end and data[i] == 45:
        i += 1
    if i >= end or not 48 <= data[i] <= 57:
        return -1
    if data[i] == 48:
        i += 1
    else:
        while i < end and 48 <= data[i] <= 57:
            i += 1
    if i < end and data[i] == 46:
        i += 1
        if i >= end or not 48 <= data[i] <= 57:
            return -1
        while i < end and 48 <= data[i] <= 57:
            i += 1
    if i < end and (data[i] == 69 or data[i] == 101):
        i += 1
        if i < end and (data[i] == 43 or data[i] == 45):
            i += 1
        if i >= end or not 48 <= data[i] <= 57:
            return -1
        while i < end and 48 <= data[i] <= 57:
            i += 1
    return i if i - begin < 200 else -1


@kernel
def _word(data: Bytes, i: int, end: int) -> int:
    """The end of true, false or null at i, or -1."""
    if i + 4 <= end:
        a, b, c, d = data[i], data[i + 1], data[i + 2], data[i + 3]
        if a == 116 and b == 114 and c == 117 and d == 101:
            return i + 4
        if a == 110 and b == 117 and c == 108 and d == 108:
            return i + 4
        if i + 5 <= end and a == 102 and b == 97 and c == 108 and d == 115 and data[i + 4] == 101:
            return i + 5
    return -1


@kernel
def _skip(data: Bytes, i: int, end: int) -> int:
    """The end of any value that begins at i, or -1 where it is unsound or very deep."""
    inside = np.empty(_DEPTH, np.uint8)  # 123 an object, 91 an array
    depth = 0
    while True:
        # A value begins at i.
        i = _space(data, i, end)
        if i >= end:
            return -1
        byte = data[i]
        opened = False
        if byte == 34:
            i, _ = _string(data, i, end)
            if i < 0:
                return -1
            i += 1
        elif byte == 123 or byte == 91:
            if depth == _DEPTH:
                return -1
            inside[depth] = byte
            depth += 1
            opened = True
            i += 1
        else:
            after = _word(data, i, end)
            if after < 0:
                after = _number(data, i, end)
            if after < 0:
                return -1
            i = after
        # A value has ended, or a bracket has opened.
        while True:
            if depth == 0:
                return i
            i = _space(data, i, end)
            if i >= end:
                return -1
            byte = data[i]
            closing = 125 if inside[depth - 1] == 123 else 93
            if byte == closing:
                depth -= 1
                opened = False
                i += 1
                continue
            if not opened:
                if byte != 44:
                    return -1
                i = _space(data, i + 1, end)
            if inside[depth - 1] == 123:
                if i >= end or data[i] != 34:
                    return -1
                i, _ = _string(data, i, end)
                if i < 0:
                    return -1
                i = _space(data, i + 1, end)
                if i >= end or data[i] != 58:
                    return -1
                i += 1
            break


@kernel
def _same(data: Bytes, start: int, end: int, names: Bytes, name_start: int, name_end: int) -> bool:
    if end - start != name_end - name_start:
        return False
    for k in range(end - start):  # noqa: SIM110  Numba has no all()
        if data[start + k] != names[name_start + k]:
            return False
    return True


@kernel
def _record(
    data: Bytes,
    i: int,
    end: int,
    names: Bytes,
    name_ends: Spans,
    levels: Kinds,
    numeric: int,
    begins: Spans,
    finishes: Spans,
    kinds: Kinds,
) -> bool:
    fields = kinds.size
    level, first, outer_seen = 0, True, False
    i = _space(data, i, end)
    if i >= end or data[i] != 123:
        return False
    i += 1
    while True:
        i = _space(data, i, end)
        if i >= end:
            return False
        if data[i] == 125:
            i += 1
            first = False
            if level == 1:
                level = 0
                continue
            return _space(data, i, end) == end
        if not first:
            if data[i] != 44:
                return False
            i = _space(data, i + 1, end)
            if i >= end:
                return False
        first = False
        if data[i] != 34:
            return False
        key = i + 1
        key_end, escaped = _string(data, i, end)
        if key_end < 0 or escaped:
            return False
        i = _space(data, key_end + 1, end)
        if i >= end or data[i] != 58:
            return False
        i = _space(data, i + 1, end)
        if i >= end:
            return False
        if level == 0 and _same(data, key, key_end, names, 0, name_ends[0]):
            if outer_seen or data[i] != 123:
                return False
            outer_seen, level, first = True, 1, True
            i += 1
            continue
        field = -1
        for f in range(fields):
            if levels[f] == level and _same(data, key, key_end, names, name_ends[f], name_ends[f + 1]):
                field = f
        if field < 0:
            i = _skip(data, i, end)
            if i < 0:
                return False
            continue
        if kinds[field] != ABSENT:
            return False
        if field == numeric:
            after = _number(data, i, end)
            if after < 0:
                return False
            begins[field], finishes[field], kinds[field] = i, after, NUMBER
            i = after
        else:
            if data[i] != 34:
                return False
            after, escaped = _string(data, i, end)
            if after < 0:
                return False
            begins[field], finishes[field] = i + 1, after
            kinds[field] = ESCAPED if escaped else PLAIN
            i = after + 1


@kernel
def scan(
    data: Bytes,
    starts: Spans,
    ends: Spans,
    names: Bytes,
    name_ends: Spans,
    levels: Kinds,
    numeric: int,
    begins: npt.NDArray[np.int64],
    finishes: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.int8],
    sure: npt.NDArray[np.bool_],
) -> None:
    """Finds the fields of n records.

    Args:
        data, starts, ends: the lines.
        names, name_ends: the key of the object that holds fields of level 1 (a byte that no key has where there is
            none), then the key of each of the m fields: name k is `names[name_ends[k - 1]:name_ends[k]]`.
        levels: m, 0 for fields of the record, 1 for those of that object.
        numeric: the field that is a number, or -1; the others are strings.
        begins, finishes, kinds: output of shape (n, m): where each value stands (a string without its quotes), and
            what it is.
        sure: output of shape (n,): the line is a record that was read for certain.
    """
    kinds[:] = ABSENT
    begins[:] = 0
    finishes[:] = 0
    for i in range(starts.size):
        sure[i] = _record(data, starts[i], ends[i], names, name_ends, levels, numeric, begins[i], finishes[i], kinds[i])


@kernel
def _put(code: int, out: Bytes, n: int) -> int:
    """Writes a code point as UTF-8; returns the place behind it."""
    if code < 0x80:
        out[n] = code
        return n + 1
    if code < 0x800:
        out[n] = 0xC0 | (code >> 6)
        out[n + 1] = 0x80 | (code & 0x3F)
        return n + 2
    if code < 0x10000:
        out[n] = 0xE0 | (code >> 12)
        out[n + 1] = 0x80 | ((code >> 6) & 0x3F)
        out[n + 2] = 0x80 | (code & 0x3F)
        return n + 3
    out[n] = 0xF0 | (code >> 18)
    out[n + 1] = 0x80 | ((code >> 12) & 0x3F)
    out[n + 2] = 0x80 | ((code >> 6) & 0x3F)
    out[n + 3] = 0x80 | (code & 0x3F)
    return n + 4


@kernel
def unescape(data: Bytes, starts: Spans, ends: Spans, kinds: Kinds, out: Bytes, places: Spans) -> None:
    """Writes n strings one after the other without their escapes; `places` (n + 1) are their bounds.

    `out` needs the bytes of the strings as they are: no escape is shorter than what it stands for.
    """
    n = 0
    places[0] = 0
    for i in range(starts.size):
        k, end = starts[i], ends[i]
        if kinds[i] != ESCAPED:
            out[n : n + end - k] = data[k:end]
            n += end - k
            places[i + 1] = n
            continue
        while k < end:
            byte = data[k]
            if byte != 92:
                out[n] = byte
                n += 1
                k += 1
                continue
            code = data[k + 1]
            k += 2
            if code == 117:
                value = _hex4(data, k, end)
                k += 4
                if 0xD800 <= value <= 0xDBFF:
                    value = 0x10000 + ((value - 0xD800) << 10) + (_hex4(data, k + 2, end) - 0xDC00)
                    k += 6
                n = _put(value, out, n)
                continue
            if code == 98:
                out[n] = 8
            elif code == 102:
                out[n] = 12
            elif code == 110:
                out[n] = 10
            elif code == 114:
                out[n] = 13
            elif code == 116:
                out[n] = 9
            else:
                out[n] = code
            n += 1
        places[i + 1] = n
