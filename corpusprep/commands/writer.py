"""Writes tables to a Parquet, JSONL or TSV file, or to standard output."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.arrow import join, shaped
from corpusprep.errors import InputError, SettingsError
from corpusprep.sources.files import unpacked_name
from corpusprep.sources.standard_input import NAME

STANDARD_OUTPUT = "-"
FORMATS = ("parquet", "jsonl", "tsv")
_ROWS = 65_536  # rows turned into text at a time
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary)


def format_of(path: Path | str, named: str | None, option: str | None, suffixes: dict[str, str]) -> str:
    """The format of a file: the one given, else the one that its suffix names. A suffix of compression may follow.

    Args:
        path: the file; `-` is standard input or output.
        named: the format that the user gave, or None.
        option: the option that gives it, for messages; None if there is none.
        suffixes: suffix -> format.

    Raises:
        SettingsError: the format is not known.
    """
    if named is not None:
        return named
    if str(path) == "-":
        name = "standard output" if option == "--to" else NAME
        raise SettingsError(f"{name}: its format is not known. Give {option}, for example {option} tsv.")
    lower = str(path).lower()
    plain = unpacked_name(lower)
    kind = next((kind for suffix, kind in suffixes.items() if plain.endswith(suffix)), None)
    if kind is None or (kind == "parquet" and plain != lower):
        remedy = "Use .parquet, .jsonl or .tsv (the last two also with .gz, .bz2 or .xz)"
        raise SettingsError(
            f"{path}: the suffix does not name a format. {remedy}{f', or give {option}' if option else ''}."
        )
    return kind


class TableWriter:
    """Writes tables one after the other. A context manager: the file appears when the context ends without an error.

    In TSV and Parquet the first table sets the columns and types; later tables may lack columns, but not add any.

    Args:
        target: the file, or `-` for standard output. JSONL and TSV are compressed if the name ends with .gz, .bz2 or .xz.
        named: the format, if the suffix does not name it.
        option: the option that gives the format, for messages; None if there is none.

    Raises:
        SettingsError: the format is not known, or the target is a folder.
    """

    def __init__(self, target: Path | str, named: str | None = None, *, option: str | None = "--to") -> None:
        self._path = Path(target)
        self._pipe = str(target) == STANDARD_OUTPUT
        self.kind = format_of(target, named, option, {f".{kind}": kind for kind in FORMATS})
        if self._path.is_dir() and not self._pipe:
            raise SettingsError(f"{target}: is a folder. Name a file.")
        self._name = "standard output" if self._pipe else str(target)
        if self._pipe and sys.stdout is None:
            raise SettingsError("standard output: it is closed. Name a file.")
        # Devices and named pipes are written to directly.
        aside = not self._pipe and (self._path.is_file() or not self._path.exists())
        self._scratch = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}") if aside else None
        self._open_files = contextlib.ExitStack()
        self._sink: Any = None
        self._schema: pa.Schema | None = None
        self._rows = 0

    @property
    def fixed(self) -> bool:
        """Whether the first table sets the columns of the file."""
        return self.kind != "jsonl"

    def __enter__(self) -> TableWriter:
        return self

    def write(self, table: pa.Table) -> None:
        """Appends a table.

        Raises:
            InputError: it has a column that the first table lacks, or a column of another type.
            SettingsError: the format cannot hold a column.
        """
        if self._schema is None:
            self._open(table.schema)
        if self.fixed:
            table = self._fitted(table)
        if self.kind == "parquet":
            self._sink.write_table(table)
        else:
            for begin in range(0, table.num_rows, _ROWS):
                part = table.slice(begin, _ROWS)
                self._sink.write(_json_lines(part, self._name) if self.kind == "jsonl" else _tab_separated(part))
        self._rows += table.num_rows

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._open_files.close()
            if kind is None and self._scratch is not None and self._schema is not None:
                self._scratch.replace(self._path)
        except Exception:
            if kind is None:  # otherwise the first error is the one to report
                raise
        finally:
            if self._scratch is not None:
                self._scratch.unlink(missing_ok=True)

    def _open(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._check(schema)
        place: Any = self._scratch or self._path
        if not self._pipe:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if self.kind == "parquet":
            import pyarrow.parquet as pq

            place = self._enter(_Output(sys.stdout.buffer)) if self._pipe else str(place)
            self._sink = self._enter(pq.ParquetWriter(place, schema, compression="zstd"))
            return
        self._sink = self._enter(_Output(sys.stdout.buffer) if self._pipe else open(place, "wb"))  # noqa: SIM115
        suffix = "" if self._pipe else self._path.suffix.lower()
        if suffix == ".gz":
            self._sink = self._enter(gzip.GzipFile("", "wb", 6, self._sink, mtime=0))
        elif suffix in (".bz2", ".xz"):
            self._sink = self._enter((bz2 if suffix == ".bz2" else lzma).open(self._sink, "wb"))
        if self.kind == "tsv":
            header = [re.sub("[\t\n\0]", " ", name) for name in schema.names]
            self._sink.write(("\t".join(header) + "\n").encode())

    def _enter(self, file: Any) -> Any:
        return self._open_files.enter_context(contextlib.closing(file))

    def _check(self, schema: pa.Schema) -> None:
        for field in schema:
            if self.kind == "tsv" and not _is_one_field(field.type):
                problem, remedy = "which TSV cannot", "Write .jsonl or .parquet"
            elif self.kind == "parquet" and _holds_nothing(field.type):
                problem, remedy = "which Parquet cannot", "Write .jsonl"
            elif self.kind == "jsonl" and _holds_bytes(field.type):
                problem, remedy = "which JSONL cannot", "Write .parquet"
            else:
                continue
            kind = "lists" if pa.types.is_list(field.type) else str(field.type)
            raise SettingsError(f"{self._name}: column {field.name} holds {kind}, {problem}. {remedy}.")

    def _fitted(self, table: pa.Table) -> pa.Table:
        assert self._schema is not None
        if table.schema.equals(self._schema):
            return table
        late = [name for name in table.column_names if name not in self._schema.names]
        if late:
            problem = f"column {late[0]!r} is missing in the first {self._rows:,} rows, which set the columns"
            raise InputError(self._name, problem, "Write .jsonl, or give all input files the same columns")
        try:
            return shaped(table, self._schema)
        except pa.ArrowException as error:
            problem = f"a column changes its type after the first {self._rows:,} rows ({error})"
            raise InputError(self._name, problem, "Write .jsonl, or give each column one type") from None


class _Output(io.RawIOBase):
    """Standard output, which is flushed at the end and not closed.

    With PYTHONUNBUFFERED it is a raw file, and a write to a pipe may take only a part of the bytes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._place = stream, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            left = left[self._stream.write(left) or 0 :]
        self._place += size
        return size

    def close(self) -> None:
        try:
            if not self.closed:
                self._stream.flush()
        finally:
            super().close()


def _is_one_field(kind: Any) -> bool:
    """Whether values can be written as text without tabs."""
    if pa.types.is_nested(kind) or _holds_bytes(kind):
        return False
    try:
        pa.nulls(0, kind).cast(pa.large_string())
    except pa.ArrowException:
        return False
    return True


def _holds_nothing(kind: Any) -> bool:
    """Whether a type is or has an object without fields."""
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return pa.types.is_nested(kind) and any(_holds_nothing(kind.field(i).type) for i in range(kind.num_fields))


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)


def _json_lines(table: pa.Table, name: str) -> bytes:
    import polars as pl

    buffer = io.BytesIO()
    try:
        pl.DataFrame(pl.from_arrow(table)).write_ndjson(buffer)
    except pl.exceptions.PolarsError as error:
        raise SettingsError(f"{name}: a column cannot be written as JSON ({error}). Write .parquet.") from None
    return buffer.getvalue()


def _tab_separated(table: pa.Table) -> Any:
    """Tab-separated lines, as bytes. Nothing is quoted: tabs, line feeds and NUL in a field become spaces."""
    *fields, last = [_field(table[name], name == table.column_names[-1]) for name in table.column_names]
    separators: Any = (pa.scalar(text, pa.large_string()) for text in ("", "\t", "\n"))
    nothing, tab, end = separators
    lines = join(*fields, join(last, end, separator=nothing), separator=tab)
    return b"".join(_bytes_of(chunk) for chunk in lines.chunks)


def _field(column: Any, last: bool) -> Any:
    is_text = any(check(column.type) for check in _TEXT)
    text: Any = pc.fill_null(column.cast(pa.large_string()), "")
    if is_text and any(_breaks(chunk) for chunk in text.chunks):
        # At the end of a line, a carriage return would be read as part of the line end.
        pattern = r"[\t\n\x00]|\r$" if last else r"[\t\n\x00]"
        text = pc.replace_substring_regex(text, pattern=pattern, replacement=" ")
    return text


def _breaks(chunk: Any) -> bool:
    """Whether any of the strings may hold a byte that a field cannot."""
    data = np.frombuffer(_bytes_of(chunk), np.uint8)
    return bool(data.size) and bool(((data <= 10) | (data == 13)).any())


def _bytes_of(chunk: Any) -> memoryview:
    """The concatenated bytes of an array of large strings, without a copy."""
    offsets = np.frombuffer(chunk.buffers()[1], np.int64, len(chunk) + 1, 8 * chunk.offset)
    data = chunk.buffers()[2]
    return memoryview(b"" if data is None else data)[int(offsets[0]) : int(offsets[-1])]
