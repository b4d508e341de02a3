"""Zips, read member by member without unpacking them to disk."""

from __future__ import annotations

import contextlib
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from corpusprep.errors import InputError
from corpusprep.sources.files import open_binary, printable, reader
from corpusprep.sources.remedies import or_keep
from corpusprep.sources.unpack import BLOCK, EDGE, INPUT, Fetch, inflate, salvage_deflate

# zipfile raises RuntimeError for encryption, NotImplementedError (a RuntimeError) for rare methods, and struct.error,
# ValueError, IndexError and others for nonsense in its tables.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    IndexError,
    OverflowError,
)


@contextlib.contextmanager
def open_zip(path: str) -> Iterator[zipfile.ZipFile]:
    """A zip's table of members.

    Raises:
        InputError: it cannot be opened or is not a zip.
    """
    with open_binary(path) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except _ZIP_ERRORS as error:
            problem = f"it is not a zip file that can be read ({error})"
            raise InputError(printable(path), problem, "Fetch it again") from None
        yield archive


def zip_members(path: str) -> dict[str, zipfile.ZipInfo]:
    """What the table of a zip says of its members, by name.

    Raises:
        InputError: as `open_zip`.
    """
    with open_zip(path) as archive:
        return {info.filename: info for info in archive.infolist()}


def zip_blocks(path: str, info: zipfile.ZipInfo, *, salvage: bool = False) -> Iterator[bytes]:
    """The content of one member of a zip, in blocks; nothing is written to disk. The table of the zip is not read again.

    Raises:
        InputError: as `blocks`.
    """
    name = f"{printable(path)}, member {printable(info.filename)}"
    again = ("Fetch the zip again", or_keep("to read what comes before"))
    if info.flag_bits & 1:
        raise InputError(name, "it is encrypted", "Unpack the zip and name the files")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        try:
            with open_zip(path) as archive, archive.open(info) as content:
                while block := content.read(EDGE):
                    yield block
        except _ZIP_ERRORS as error:
            raise InputError(name, f"its data is damaged ({error})", again, 0) from None
        return
    with open_binary(path) as stream:
        # Read here and not by zipfile, for isal's speed and to have what stands before a damaged place.
        begin = _member_begin(stream, info, name)
        fetch = reader(stream, path, info.compress_size)
        given = check = 0
        try:
            for block in _member(fetch, info, name):
                given += len(block)
                check = zlib.crc32(block, check)
                yield block
        except InputError:
            if salvage and info.compress_type == zipfile.ZIP_DEFLATED:
                stream.seek(begin)
                yield from salvage_deflate(reader(stream, path, info.compress_size), given, -15)
            raise
        if given != info.file_size or check != info.CRC:
            raise InputError(name, "its data is damaged (size or checksum differ from the zip's table)", again, 0)


def _member_begin(stream: BinaryIO, info: zipfile.ZipInfo, name: str) -> int:
    """Seeks a member's data; returns where it begins."""
    nowhere = InputError(name, "its data is not where the zip's table says", "Fetch the zip again")
    try:
        stream.seek(info.header_offset)
    except (OSError, ValueError):  # an offset that is nonsense
        raise nowhere from None
    header = reader(stream, name)(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise nowhere
    begin = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    stream.seek(begin)
    return begin


def _member(fetch: Fetch, info: zipfile.ZipInfo, name: str) -> Iterator[bytes]:
    if info.compress_type == zipfile.ZIP_STORED:
        while block := fetch(BLOCK):
            yield block
        return
    from isal import igzip_lib

    unpacker = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
    yield from inflate(unpacker, fetch(INPUT), fetch, name, "deflate")


def unsafe_member(info: zipfile.ZipInfo) -> str | None:
    """Why a member of a zip is not to be trusted, in words that follow its name, or None."""
    name = info.orig_filename.replace("\\", "/")
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "has an absolute path"
    if ".." in name.split("/"):
        return "has a path that climbs out of it"
    if (info.external_attr >> 16) & 0o170000 == 0o120000:
        return "is a link"
    return None
