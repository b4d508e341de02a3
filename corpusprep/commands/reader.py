"""The input of a command: files or standard input, as tables in batches, read by the same sources as in a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from corpusprep.arrow import shaped
from corpusprep.codes import explicit
from corpusprep.commands.writer import format_of
from corpusprep.errors import InputError, SettingsError
from corpusprep.recipe import validate
from corpusprep.sources import Shard, SourceSettings, open_source
from corpusprep.sources.files import printable
from corpusprep.sources.standard_input import STANDARD_INPUT, standard_input
from corpusprep.stage import PAIR_COLUMNS

_SUFFIXES = {
    ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "tsv",
    ".txt": "tsv",
}  # fmt: skip
_TABLES = ("tsv", "jsonl", "parquet")
_REJECTED = ("row", *PAIR_COLUMNS, "reason")
_ONE_TYPE = "Give each field one type, or leave it out"


@contextlib.contextmanager
def remedies_as_options(on_error: bool = True) -> Iterator[None]:
    """Has InputErrors name options of a command, instead of settings of a recipe.

    Args:
        on_error: whether the command has an option `--on-error`.
    """
    try:
        yield
    except InputError as error:
        raise error.for_command(on_error) from None


class TableReader:
    """The tables of a command's input.

    Args:
        source: a file, a folder, a glob or a URL; `-` is standard input.
        named: the format, if the suffix does not name it: any format of a source except hub.
        columns: field -> the column's name, or in tsv its number from 0, as `columns` of a source.
        src_lang, tgt_lang: the languages, if the file has no columns for them.
        on_error: "stop" or "keep", as of a source. None is "stop" for a command without the option.
        say: called with each warning and with what was lost.

    Raises:
        SettingsError: the format is not known, or an option is wrong.
    """

    def __init__(
        self,
        source: Path | str,
        *,
        named: str | None = None,
        columns: Mapping[str, str | int] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        on_error: str | None = "stop",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._path = str(source)
        self.name = printable(self._path)
        self.format = format_of(source, named, "--from", _SUFFIXES)
        if self._path == STANDARD_INPUT and self.format not in _TABLES:
            raise SettingsError(f"{self.name}: {self.format} is read from files, not from a pipe. Name the files.")
        places = {field: at if self.format == "tsv" else str(at) for field, at in (columns or {}).items()}
        data = {"format": self.format, "path": self._path, "on_error": on_error or "stop", "columns": places}
        settings = validate(SourceSettings, data, where="--column" if places else "options")
        codes = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        # The sources of a run want both languages or neither; a table may have a column for one of them.
        settings = settings.model_copy(update={side: code and explicit(code) for side, code in codes.items()})
        self._source = open_source(settings, whole=True)
        self._say = say
        self._may_keep = on_error is not None
        self._own_reason = False

    def schema(self) -> pa.Schema | None:
        """The columns and types of all rows, or None if the first batch has them all.

        JSONL is read once for that, since a field may first appear in the last line; standard input is copied to a temporary
        file.

        Raises:
            InputError: the files cannot be read, or no type fits all values of a column.
        """
        with remedies_as_options(self._may_keep):
            shards = self._shards()
            if self.format != "jsonl" and len(shards) == 1:
                return None
            if self._path == STANDARD_INPUT:
                standard_input().spool()
            schema = pa.schema([])
            for shard in shards:
                row = 0
                for batch in self._source.read(shard):
                    found = self._own(batch.table).schema
                    try:
                        schema = _unified(schema, found)
                    except pa.ArrowException as error:
                        problem = f"the type of a field changes from here on ({error})"
                        raise InputError(printable(shard.files[0]), problem, _ONE_TYPE, row) from None
                    row += batch.table.num_rows + batch.rejected.num_rows
                    if self.format != "jsonl":
                        break
            return schema

    def tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Batches: the good rows, with all columns of the file, and the rejects, with `row`, `src`, `tgt`, `src_lang`,
        `tgt_lang` and `reason`. There is at least one batch, which may be empty.

        Raises:
            InputError: the input cannot be read.
        """
        with remedies_as_options(self._may_keep):
            shards = self._shards()
            if left_out := self._source.left_out():
                names = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
                self._say(
                    f"{self.name}: {names} are of other splits than train, and are not read. Name a file to read it."
                )
            columns = [*(["shard"] if len(shards) > 1 else []), *_REJECTED]
            for shard in shards:
                for batch in self._source.read(shard):
                    for problem in batch.problems:
                        self._say(problem)
                    yield self._own(batch.table), batch.rejected.select(columns)

    def fit(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        """A batch with the columns and types of `schema()`.

        Raises:
            InputError: the values cannot be cast to these types.
        """
        try:
            return shaped(table, schema)
        except pa.ArrowException as error:
            raise InputError(
                self.name, f"a field does not have the same type in all rows ({error})", _ONE_TYPE
            ) from None

    def whole(self) -> tuple[pa.Table, pa.Table]:
        """All batches of `tables()` as one.

        Raises:
            InputError: the input cannot be read, or no type fits all values of a column.
        """
        tables, rejected = zip(*self.tables(), strict=True)
        schema = pa.schema([])
        for table in tables:
            try:
                schema = _unified(schema, table.schema)
            except pa.ArrowException as error:
                raise InputError(
                    self.name, f"a field does not have the same type in all rows ({error})", _ONE_TYPE
                ) from None
        return pa.concat_tables([self.fit(table, schema) for table in tables]), pa.concat_tables(rejected)

    def files(self) -> list[str]:
        """The files that are read.

        Raises:
            InputError: nothing is there.
        """
        with remedies_as_options(self._may_keep):
            return [file for shard in self._shards() for file in shard.files]

    def close(self) -> None:
        """Removes the temporary copy of standard input, if there is one."""
        if self._path == STANDARD_INPUT:
            standard_input().close()

    def _shards(self) -> list[Shard]:
        shards = self._source.shards()
        if self._path == STANDARD_INPUT and len(shards) > 1:  # each shard reads the whole input
            standard_input().spool()
        return shards

    def _own(self, table: pa.Table) -> pa.Table:
        """The columns that the file itself has."""
        if self.format not in _TABLES:
            return table.select([*PAIR_COLUMNS, *(["score"] if self.format == "nllb" else [])])
        if "reason" in table.column_names:
            if not self._own_reason:
                self._say(f"{self.name}: its column 'reason' is left out: rejects get a column of that name.")
            self._own_reason = True
            return table.drop_columns(["reason"])
        return table


def _unified(schema: pa.Schema, other: pa.Schema) -> pa.Schema:
    """The columns of both schemas, with types that hold the values of both."""
    unsigned = [f.name for each in (schema, other) for f in each if f.type == pa.uint64()]
    schema, other = (  # Arrow would make them int64, which does not hold a fingerprint
        pa.schema([f.with_type(pa.uint64()) if f.name in unsigned and pa.types.is_integer(f.type) else f for f in each])
        for each in (schema, other)
    )
    return pa.unify_schemas([schema, other], promote_options="permissive")
