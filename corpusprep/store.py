"""A run's folder of parts. A part is written elsewhere, then renamed into place; its name has a key of its inputs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.errors import InputError, RunError

_ROW_GROUP = 1 << 17  # rows


def write_table(table: pa.Table, path: str | Path) -> None:
    """Writes Parquet with zstd; the same rows give the same bytes.

    Level 1, and no dictionary for columns without repeated values, halve the time of the defaults and need no more
    space.
    """
    with _parquet_writer(path, table) as writer:
        writer.write_table(table, _ROW_GROUP)


def write_tables(tables: Iterable[pa.Table], path: str | Path) -> int:
    """Writes tables of one schema one after another, as `write_table` does, and renames the file into place when all are
    written. Returns the number of rows; there is no file where there are none."""
    rows = 0
    with contextlib.ExitStack() as stack:
        writer = None
        for table in tables:
            if not table.num_rows:
                continue
            if writer is None:
                writer = stack.enter_context(_parquet_writer(stack.enter_context(writing(path)), table))
            writer.write_table(table, _ROW_GROUP)
            rows += table.num_rows
    return rows


def _parquet_writer(path: str | Path, head: pa.Table) -> pq.ParquetWriter:
    """A writer of tables like `head`, with the settings of `write_table`."""
    repeating: Any = [name for name in head.column_names if _repeats(head[name].slice(0, 1024))]
    return pq.ParquetWriter(path, head.schema, compression="zstd", compression_level=1, use_dictionary=repeating)


def _repeats(head: pa.ChunkedArray[Any]) -> bool:
    if pa.types.is_nested(head.type):
        return False
    return 4 * pc.count_distinct(head).as_py() <= len(head)


class Store:
    """The folder `DIR/parts`: `parts/KIND/NAME.KEY`, a file or a folder.

    Only complete parts have such a name. Unfinished ones are in `parts/tmp` or end with `.tmp`; the next run that holds the
    folder's lock removes them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[Path] = set()

    def path(self, kind: str, name: str, key: str) -> Path:
        """The path of a part, whether it exists or not. The call marks the part as used by this run."""
        path = self.folder / kind / f"{name}.{key}"
        self.used.add(path)
        return path

    def scratch(self, suffix: str = "") -> Path:
        """A new path in `parts/tmp`."""
        folder = self.folder / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{os.getpid()}-{secrets.token_hex(6)}{suffix}"

    def begin(self) -> None:
        """Removes what an interrupted run left in `parts/tmp`."""
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*/*.tmp"):
            remove(path)

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
    """Gives each writer a temporary path beside `path`, and renames it to `path` when the file is written."""
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
    """Whether a part exists. An empty file, which a power failure can leave, does not count."""
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
    """Locks a run's folder for this process. The kernel releases the lock when the process ends, however it ends.

    Raises:
        RunError: another process holds it.
    """
    foreign = [
        name for name in ("mix", "rejects", "parts") if (folder / name).is_dir() and any((folder / name).iterdir())
    ]
    if foreign and not (folder / ".lock").exists():
        raise RunError(
            f"{folder}: has a folder {foreign[0]} that is not from a run. A run would replace it: choose another --out."
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
                f"{folder}: another corpusprep process is using this folder. Wait for it, or choose another --out."
            ) from None
        yield


@contextlib.contextmanager
def lock_for_reading(folder: Path) -> Iterator[None]:
    """Keeps runs out of a finished run's folder. Several processes may read it at the same time.

    A copy of such a folder may lack the file that is locked: nothing writes to it.

    Raises:
        InputError: a run is at work there.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(open(folder / ".lock", "rb"))
        except FileNotFoundError:
            handle = None
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(str(folder), "a run is writing to it", "Wait until the run has finished") from None
        yield
