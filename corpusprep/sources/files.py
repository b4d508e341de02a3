"""Files here and elsewhere: finding, opening, identifying and unpacking them as a stream."""

from __future__ import annotations

import difflib
import errno
import glob
import hashlib
import io
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from corpusprep.errors import InputError
from corpusprep.sources.standard_input import NAME, STANDARD_INPUT, standard_input
from corpusprep.sources.unpack import BLOCK, EDGE, Fetch, packing, salvage_deflate, unpack

_ZSTD = b"\x28\xb5\x2f\xfd"
_PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
_NOT_UNPACKED = (".zst", ".lz4", ".lzma", ".br", ".7z", ".rar", ".Z", ".tgz", ".tar")
_NO_FILE = "Check the path, which is taken from the folder that the command runs in unless it begins with /"


def printable(text: str) -> str:
    """A path as messages name it, in text that can be written as UTF-8: bytes of a name that are none become U+FFFD."""
    return NAME if text == STANDARD_INPUT else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_remote(path: str) -> bool:
    """Whether a path is a URL of another file system than this machine's."""
    return "://" in path and not path.startswith("file://")


def local(path: str) -> str:
    """A path of this machine without `file://` and `~`."""
    return os.path.expanduser(path.removeprefix("file://"))


def unpacked_name(path: str) -> str:
    """A path without its suffix of compression."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in _PACKED else path


class Tree(NamedTuple):
    """What a path stands for.

    Attributes:
        base: the folder that the names are relative to.
        names: the files, relative to it, "/" between folders, sorted.
        single: whether the path names what it stands for, and is not a folder or glob.
    """

    base: str
    names: list[str]
    single: bool

    def path(self, name: str) -> str:
        """A file's full path or URL."""
        return posixpath.join(self.base, name) if self.base else name


def find(path: str) -> Tree:
    """The file, the files below the folder, or those that match the glob.

    Hidden files and those that macOS adds to archives are passed over.

    Raises:
        InputError: nothing is there, or it may not be read.
    """
    return _find_remote(path) if is_remote(path) else _find_local(local(path))


def find_prefix(prefix: str) -> Tree | None:
    """The files whose paths are the prefix (which may be a glob), a dot and something more; None where there are none
    or the prefix is a file or folder itself."""
    if is_remote(prefix):
        with _remote_errors(prefix):
            fs, inner = _remote(prefix)
            if inner.endswith("/") or fs.exists(inner) or not fs.glob(inner + ".*"):
                return None
        return _find_remote(prefix + ".*")._replace(single=not glob.has_magic(inner))
    path = local(prefix)
    if path.endswith("/") or os.path.exists(path):
        return None
    pattern = path if glob.has_magic(path) else glob.escape(path)
    names = [name for name in glob.iglob(pattern + ".*", recursive=True) if os.path.isfile(name)]
    if not names:
        return None
    base = os.path.dirname(path)
    while glob.has_magic(base):
        base = os.path.dirname(base)
    relative = (os.path.relpath(name, base or ".").replace(os.sep, "/") for name in names)
    return Tree(base, sorted(name for name in relative if not _hidden(name)), not glob.has_magic(path))


def missing(path: str) -> InputError:
    """The error of a path that is not there, with names near it."""
    near: list[str] = []
    if not is_remote(path):
        folder, name = os.path.split(local(path))
        try:
            near = difflib.get_close_matches(name, os.listdir(folder or "."), 3, 0.6)
        except OSError:
            near = []
    remedy = f"Did you mean {' or '.join(map(printable, near))}?" if near else _NO_FILE
    return InputError(printable(path), "there is no such file or folder", remedy.removesuffix("."))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _find_local(path: str) -> Tree:
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if os.path.isfile(path):
        return Tree(os.path.dirname(path), [os.path.basename(path)], True)
    if os.path.isdir(path):
        return Tree(path.rstrip("/") or "/", sorted(_walk(path)), False)
    if os.path.exists(path):
        raise InputError(printable(path), "it is neither a file nor a folder", "Name a file, a folder or a glob")
    if not glob.has_magic(path):
        raise missing(path)
    base = path
    while glob.has_magic(base):
        base = os.path.dirname(base)
    names: set[str] = set()
    for match in glob.iglob(path, recursive=True):
        name = os.path.relpath(match, base or ".").replace(os.sep, "/")
        if os.path.isdir(match):
            names.update(posixpath.join(name, below) for below in _walk(match))
        elif os.path.isfile(match):
            names.add(name)
    if not names:
        raise InputError(printable(path), "no file matches", _NO_FILE)
    return Tree(base, sorted(posixpath.normpath(name) for name in names if not _hidden(name)), False)


def _walk(folder: str) -> Iterator[str]:
    """The regular files below a folder, through links, each folder once."""

    def refuse(error: OSError) -> None:
        raise _unreadable(str(error.filename), error) from None

    seen: set[tuple[int, int]] = set()
    for here, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not _hidden(name))
        relative = os.path.relpath(here, folder).replace(os.sep, "/")
        for name in names:
            if not _hidden(name) and os.path.isfile(os.path.join(here, name)):
                yield name if relative == "." else f"{relative}/{name}"


def _find_remote(path: str) -> Tree:
    with _remote_errors(path):
        fs, inner = _remote(path)
        if not glob.has_magic(inner):
            if fs.isfile(inner):
                return Tree(path.rpartition("/")[0], [path.rpartition("/")[2]], True)
            matches, base = (fs.find(inner) if fs.isdir(inner) else []), inner
        else:
            base = inner
            while glob.has_magic(base):
                base = posixpath.dirname(base)
            matches = []
            for match in fs.glob(inner):
                matches.extend(fs.find(match) if fs.isdir(match) else [match])
        if not matches:
            raise InputError(path, "no file is there", "Check the URL and its credentials")
        root = fs._strip_protocol(base).rstrip("/")
        names = sorted({str(match)[len(root) :].lstrip("/") for match in matches})
        return Tree(str(fs.unstrip_protocol(root)), [name for name in names if not _hidden(name)], False)
    raise AssertionError  # _remote_errors lets nothing through


class _remote_errors:
    """Turns whatever a remote file system raises into an InputError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            raise _unreadable(self.path, error) from None


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    fs, inner = fsspec.core.url_to_fs(path)
    return fs, str(inner)


def _unreadable(path: str, error: BaseException) -> InputError:
    """The error of a file that cannot be opened or read, in the user's words."""
    name = printable(path)
    if isinstance(error, FileNotFoundError):
        return missing(path)
    if isinstance(error, PermissionError):
        return InputError(name, "it may not be read", "Give yourself the right to read it")
    if isinstance(error, IsADirectoryError):
        return InputError(name, "it is a folder, where a file is wanted", "Name the file")
    if isinstance(error, ImportError):
        return InputError(name, f"its file system needs a package that is missing ({error})", "Install it with pip")
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return InputError(name, "it is a link that leads to itself", "Mend or remove the link")
    detail = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return InputError(
        name, f"it cannot be read: {printable(str(detail)).rstrip('.')}", "Check the file and its disk or URL"
    )


def open_binary(path: str) -> BinaryIO:
    """A file, seekable, for reading. Standard input is copied to a temporary file for that.

    Raises:
        InputError: it is not there or may not be read.
    """
    if path == STANDARD_INPUT:
        standard_input().spool()
        return standard_input().open()
    if is_remote(path):
        with _remote_errors(path):
            fs, inner = _remote(path)
            stream: BinaryIO = fs.open(inner, "rb")
            return stream
    try:
        return open(local(path), "rb")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def size_of(path: str) -> int | None:
    """Bytes of a file; None where it does not say."""
    try:
        if is_remote(path):
            with _remote_errors(path):
                fs, inner = _remote(path)
                return int(fs.info(inner)["size"])
        return os.path.getsize(local(path))
    except (InputError, KeyError, OSError, TypeError, ValueError):
        return None


def identity(files: Iterable[str]) -> str:
    """A digest of size, time and the first and last 64 KiB of files, in their order; not of their names.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        if is_remote(path):
            with _remote_errors(path):
                fs, inner = _remote(path)
                info = fs.info(inner)
                keys = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag")
                time = [str(info[key]) for key in keys if key in info]
                size = int(info["size"])
        else:
            try:
                status = os.stat(local(path))
            except (OSError, ValueError) as error:
                raise _unreadable(path, error) from None
            time, size = [str(status.st_mtime_ns)], status.st_size
        digest.update(f"{size} {time}\n".encode())
        with open_binary(path) as stream:
            try:
                digest.update(stream.read(EDGE))
                if size > EDGE:
                    stream.seek(max(EDGE, size - EDGE))
                    digest.update(stream.read(EDGE))
            except Exception as error:
                raise _unreadable(path, error) from None
    return digest.hexdigest()


def blocks(path: str, *, salvage: bool = False, look: bool = False) -> Iterator[bytes]:
    """The content of a file in blocks of at most `BLOCK` bytes, unpacked if its name ends with .gz, .bz2 or .xz or its first
    bytes say that it is packed so.

    Args:
        path: path or URL; `-` is standard input.
        salvage: give what stands before a damaged place to the last byte. The file is read again for that, which is not
            possible with a pipe.
        look: keep what is read of standard input, so that it can be read again.

    Raises:
        InputError: it cannot be opened, or it is damaged; what could be read has been given by then. Its row is 0
            where a line is to blame, which one the caller knows.
    """
    name = printable(path)
    if path.endswith(_NOT_UNPACKED):
        raise InputError(name, "it is packed in a way that is not read here", "Unpack it, or use gzip")
    with standard_input().open(look=look) if path == STANDARD_INPUT else open_binary(path) as stream:
        fetch = reader(stream, path)
        block = fetch(BLOCK)
        if path == STANDARD_INPUT and block.startswith(_ZSTD):
            raise InputError(name, "it is packed with zstd, which is not read here", "Unpack it, or use gzip")
        kind = _PACKED.get(os.path.splitext(path)[1]) or packing(block)
        if kind is None:
            while block:
                yield block
                block = fetch(BLOCK)
            return
        given = 0
        try:
            for unpacked in unpack(block, fetch, name, kind):
                given += len(unpacked)
                yield unpacked
        except InputError:
            if salvage and kind == "gzip" and stream.seekable():
                stream.seek(0)
                yield from salvage_deflate(fetch, given, 31)
            raise


def reader(stream: BinaryIO, path: str, size: int | None = None) -> Fetch:
    """A function that reads at most so many bytes of a stream; of its next `size` bytes only, where given."""
    left = size

    def fetch(most: int) -> bytes:
        nonlocal left
        try:
            data = stream.read(most if left is None else min(most, left))
        except Exception as error:  # remote file systems raise errors of their own
            raise _unreadable(path, error) from None
        if left is not None:
            left -= len(data)
        return data

    return fetch


def read_head(path: str, size: int) -> bytes:
    """The first `size` bytes of a file's content, unpacked; fewer where it is shorter or damaged.

    Raises:
        InputError: it cannot be opened.
    """
    head = io.BytesIO()
    stream = blocks(path, look=True)
    try:
        for block in stream:
            head.write(block)
            if head.tell() >= size:
                break
    except InputError:
        if not head.tell():
            raise
    finally:
        stream.close()  # type: ignore[attr-defined]
    return head.getvalue()[:size]
