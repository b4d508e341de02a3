"""Standard input as a file of a source: its head can be looked at before it is read, as that of a file can."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from typing import Any, BinaryIO

from corpusprep.errors import InputError

STANDARD_INPUT = "-"
"""The path that stands for standard input."""
NAME = "standard input"
"""How messages call it."""

_BUFFER = 256 << 10
_state: StandardInput | None = None


class StandardInput:
    """A stream that can be read once, and whose head can be looked at before.

    What a look reads is kept in memory and read again. `spool` copies the stream to a temporary file, which has no name and
    so disappears with the process; from then on it is read like any file.

    Args:
        stream: where the bytes come from.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self._head = bytearray()
        self._file: BinaryIO | None = None
        self._taken = False

    def open(self, *, look: bool = False) -> BinaryIO:
        """The content from its beginning.

        Args:
            look: keep what is read, so that the content can be opened again.

        Raises:
            InputError: the content was read before.
        """
        if self._file is not None:
            return io.BufferedReader(_Spooled(self._file.fileno()), _BUFFER)
        if self._taken:
            raise InputError(NAME, "it can be read only once", "Write it to a file and name that")
        self._taken = not look
        return io.BufferedReader(_Replayed(self.stream, self._head, look), _BUFFER)

    def spool(self) -> None:
        """Copies the stream to a temporary file, so that it can be read several times and is seekable.

        Raises:
            InputError: the temporary file cannot be written.
        """
        if self._file is not None:
            return
        try:
            self._file = _copied(self.open())
        except OSError as error:
            folder = tempfile.gettempdir()
            problem = f"it cannot be kept in a temporary file in {folder} ({error.strerror or error})"
            raise InputError(NAME, problem, "Make room there, or set TMPDIR to another folder") from None

    def close(self) -> None:
        """Removes the temporary file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file, self._taken = None, True


def standard_input() -> StandardInput:
    """The standard input of this process.

    Raises:
        InputError: it is closed.
    """
    global _state
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise InputError(NAME, "it is closed", "Pipe a file into the command, or name a file")
    if _state is None or _state.stream is not stream:
        _state = StandardInput(stream)
    return _state


def _copied(stream: BinaryIO) -> BinaryIO:
    file: Any = tempfile.TemporaryFile(prefix="corpusprep-")  # noqa: SIM115
    try:
        with stream:
            shutil.copyfileobj(stream, file, 1 << 20)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file  # type: ignore[no-any-return]


class _Replayed(io.RawIOBase):
    """What was looked at before, and then the stream. A look keeps what it reads."""

    def __init__(self, stream: BinaryIO, head: bytearray, look: bool) -> None:
        self._stream, self._head, self._look = stream, head, look
        self._place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer)
        data = bytes(self._head[self._place : self._place + size])
        if data:
            self._place += len(data)
        else:
            data = self._stream.read(size) or b""
            if self._look:
                self._head += data
                self._place += len(data)
        buffer[: len(data)] = data
        return len(data)


class _Spooled(io.RawIOBase):
    """An open file with a position of its own, which other readers of the file do not move."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._place = descriptor, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence)
        self._place = offset + (os.fstat(self._descriptor).st_size if base is None else base)
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._descriptor, len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
