"""What the kinds of targets share: files, the interface, and how errors of libraries are told apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Advance = Callable[[int], None]

BLOCK = 4 << 20  # bytes that are read at a time
EXTRA = "Install it: pip install 'corpusprep[publish]'"
BUGS = (TypeError, AttributeError, NameError, AssertionError)
"""Errors that no user can solve, which are not turned into messages."""


@dataclass(frozen=True)
class File:
    """A file to publish.

    Attributes:
        name: its path at the target, "/" between folders.
        path: where it is here.
        size: bytes.
        sha256: of its content, in hex.
    """

    name: str
    path: Path
    size: int
    sha256: str


class Target(Protocol):
    """A place for files. All methods raise InputError for whatever the place refuses."""

    url: str
    """The target as it was named."""
    created: bool
    """Whether it is not there yet, and is created by the first change."""

    def present(self, names: Sequence[str]) -> set[str]:
        """Those of some files that are there."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it is not there."""

    def compare(self, files: Sequence[File], advance: Advance) -> dict[str, bool]:
        """Name -> whether the file there has the same content; names of files that are not there are left out.

        Args:
            advance: is called with the size of each file that was compared.
        """

    def change(self, send: Sequence[File], remove: Sequence[str], advance: Advance) -> None:
        """Sends files, then removes others, which must be there.

        Args:
            advance: is called with the bytes that were sent.
        """

    def at_once(self, changes: int) -> bool:
        """Whether a reader sees so many changes all at once or not at all."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def unreachable(chain: Iterable[BaseException]) -> bool:
    return any(
        isinstance(each, ConnectionError | TimeoutError) or re.search("Connect|Timeout|gaierror", type(each).__name__)
        for each in chain
    )


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
