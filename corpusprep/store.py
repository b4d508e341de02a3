"""A run's folder of parts: each is written aside, then renamed into place under a key made of all it depends on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.errors import RunError


def write_table(table: pa.Table, path: str | Path) -> None:
    """Parquet with zstd; the same rows give the same bytes.

    Level 1 and no dictionary for what does not repeat take half the time of the defaults, and no more room.
    """
    repeating: Any = [name for name in table.column_names if _repeats(table[name].slice(0, 1024))]
    pq.write_table(
        table, path, compression="zstd", compression_level=1, use_dictionary=repeating, row_group_size=1 << 17
    )


def _repeats(head: pa.ChunkedArray[Any]) -> bool:
    if pa.types.is_nested(head.type):
        return False
    return 4 * pc.count_distinct(head).as_py() <= len(head)


class Store:
    """The folder `DIR/parts`: `parts/KIND/NAME.KEY`, a file or a folder.

    Only whole parts bear a key's name; what is being written lies in `parts/tmp`, which a new holder of the
    folder's lock empties.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[Path] = set()

    def path(self, kind: str, name: str, key: str) -> Path:
        """Where a part lies or will lie; asking for it marks it as used by this run."""
        path = self.folder / kind / f"{name}.{key}"
        self.used.add(path)
        return path

    def scratch(self, suffix: str = "") -> Path:
        """A new path in `parts/tmp`."""
        folder = self.folder / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{os.getpid()}-{secrets.token_hex(6)}{suffix}"

    def put(self, scratch: Path, path: Path) -> None:
        """Renames a finished file or folder into place; one that is there already stays, being the same."""
        commit(scratch, path)

    def begin(self) -> None:
        """Empties `parts/tmp` of what an interrupted run left."""
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def forget(self, kinds: tuple[str, ...]) -> None:
        """Removes all parts of some kinds, so that they are made again."""
        for kind in kinds:
            shutil.rmtree(self.folder / kind, ignore_errors=True)

    def prune(self) -> None:
        """Removes every part that this run did not use."""
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        for kind in self.folder.iterdir():
            if not kind.is_dir():
                continue
            for path in kind.iterdir():
                if path not in self.used:
                    remove(path)
            with contextlib.suppress(OSError):
                kind.rmdir()


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which becomes `path` when all is written; no two writers share one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield scratch
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    commit(scratch, path)


def ready(path: str | Path) -> bool:
    """Whether a part is there; a file of no bytes, as a loss of power can leave, is not."""
    path = Path(path)
    try:
        return path.stat().st_size > 0 or path.is_dir()
    except OSError:
        return False


def commit(scratch: Path, path: Path) -> None:
    """Renames a finished file or folder into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(scratch, path)
    except OSError:
        if not path.exists():
            raise
        remove(scratch)


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process; the kernel lets go when the process ends, however it does.

    Raises:
        RunError: another process holds it.
    """
    foreign = [
        name for name in ("mix", "rejects", "parts") if (folder / name).is_dir() and any((folder / name).iterdir())
    ]
    if foreign and not (folder / ".lock").exists():
        raise RunError(
            f"{folder}: holds a folder {foreign[0]} that is no run's. A run would replace it: choose another --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}). Choose another folder with --out.") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{folder}: another corpusprep process is at work in this folder. Wait for it, or choose another --out."
            ) from None
        yield
