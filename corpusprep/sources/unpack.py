"""Unpacks gzip, bzip2 and xz as a stream, and salvages what a damaged file still holds."""

from __future__ import annotations

import bz2
import contextlib
import functools
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

from corpusprep.errors import InputError
from corpusprep.sources.remedies import or_keep

Fetch = Callable[[int], bytes]

BLOCK = 256 << 10  # what fits the cache beside its unpacked form: a MiB took 1.4 times as long
INPUT = 256 << 10
EDGE = 64 << 10
_MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ"}
_SHORTEST = 14  # bytes of an empty file that is packed with bzip2


def packing(head: bytes) -> str | None:
    """The compression of a file by its first bytes, or None.

    Text may begin with the two or three bytes that mark a format, so the head must be unpacked without an error, too.
    """
    kind = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)
    if kind is None or len(head) < _SHORTEST:
        return None
    unpacker: Any
    if kind == "gzip":
        unpacker = zlib.decompressobj(31)
    else:
        unpacker = bz2.BZ2Decompressor() if kind == "bzip2" else lzma.LZMADecompressor()
    try:
        unpacker.decompress(head[:EDGE], 1)
    except (OSError, ValueError, zlib.error, lzma.LZMAError):
        return None
    return kind


def unpack(data: bytes, fetch: Fetch, name: str, kind: str) -> Iterator[bytes]:
    """The members of a compressed stream one after the other, a bounded block at a time.

    Args:
        data: the first bytes, already read.
        fetch: reads on.
        name: how messages name the file.
        kind: gzip, bzip2 or xz.

    Raises:
        InputError: it is not packed like that, or it is damaged; what could be read has been given by then.
    """
    make: Callable[[], Any]
    if kind == "gzip":
        from isal import igzip_lib

        make = functools.partial(igzip_lib.IgzipDecompressor, flag=igzip_lib.DECOMP_GZIP)
    elif kind == "bzip2":
        make = bz2.BZ2Decompressor
    else:
        make = lzma.LZMADecompressor
    magic, members = _MAGIC[kind], 0
    while data:
        while len(data) < len(magic) and (more := fetch(INPUT)):
            data += more
        if not data.startswith(magic):
            if members:
                problem = f"bytes that are not {kind} follow its end"
                raise InputError(name, problem, ("Remove them", or_keep("to read what comes before")), 0)
            remedy = "Rename it without the suffix if it is plain text, or fetch it again"
            raise InputError(name, f"it is not {kind}, though its name says so", remedy)
        data = yield from inflate(make(), data, fetch, name, kind)
        members += 1
        while not data.strip(b"\0"):  # members may be padded with zeros
            data = fetch(INPUT)
            if not data:
                return
        data = data.lstrip(b"\0")


def inflate(unpacker: Any, data: bytes, fetch: Fetch, name: str, kind: str) -> Generator[bytes, None, bytes]:
    """The content of one compressed member; returns what was read beyond its end.

    Args:
        unpacker: one of the standard library's decompressors, or isal's, which have one interface.
        data: the member's first bytes, already read.
    """
    while not unpacker.eof:
        try:
            block = unpacker.decompress(data, BLOCK)
        except Exception as error:  # IsalError and zlib's are Exceptions, the others OSErrors or ValueErrors
            remedy = ("Fetch it again", or_keep("to read what comes before"))
            raise InputError(name, f"its {kind} data is damaged ({error})", remedy, 0) from None
        data = b""
        if block:
            yield block
        if unpacker.needs_input and not unpacker.eof:
            data = fetch(INPUT)
            if not data:
                remedy = ("Fetch it again", or_keep("to read what is there"))
                raise InputError(name, f"its {kind} data breaks off before its end", remedy, 0)
    unused: bytes = unpacker.unused_data
    return unused


def salvage_deflate(fetch: Fetch, given: int, wbits: int) -> Iterator[bytes]:
    """What a damaged deflate stream still holds beyond its first `given` bytes.

    isal gives nothing from a call that meets an error; zlib can be asked for one byte at a time, from a copy of the
    state before the call that failed.
    """
    unpacker = zlib.decompressobj(wbits)
    data = b""
    seen = 0
    while True:
        if not data:
            data = fetch(INPUT)
            if not data:
                return
        before, fed = unpacker.copy(), data
        try:
            block = unpacker.decompress(data, EDGE)
        except zlib.error:
            found = bytearray()
            with contextlib.suppress(zlib.error):
                while byte := before.decompress(fed, 1):
                    found += byte
                    fed = before.unconsumed_tail
            yield bytes(found[max(0, given - seen) :])
            return
        data = unpacker.unconsumed_tail
        if block and seen + len(block) > given:
            yield block[max(0, given - seen) :]
        seen += len(block)
        if unpacker.eof:
            data = unpacker.unused_data.lstrip(b"\0")
            unpacker = zlib.decompressobj(wbits)
