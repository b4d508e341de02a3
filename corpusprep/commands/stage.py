"""One stage on one file: what the commands `corpusprep clean`, `langid`, … do."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from corpusprep.arrow import count_values
from corpusprep.commands.reader import TableReader
from corpusprep.commands.writer import STANDARD_OUTPUT, TableWriter
from corpusprep.errors import SettingsError
from corpusprep.recipe import apply_overrides, validate
from corpusprep.report.tables import columns as in_columns
from corpusprep.stage import Outcome, StageSettings
from corpusprep.stages import balance, clean, dedup, instruct, langid, quality

STAGES: dict[str, tuple[type[StageSettings], Callable[..., Outcome]]] = {
    "clean": (clean.CleanSettings, lambda table, settings, seed: clean.clean(table, settings)),
    "langid": (langid.LangidSettings, lambda table, settings, seed: langid.langid(table, settings)),
    "dedup": (dedup.DedupSettings, dedup.dedup),
    "quality": (quality.QualitySettings, lambda table, settings, seed: quality.quality(table, settings, seed=seed)),
    "balance": (balance.BalanceSettings, balance.balance),
    "instruct": (instruct.InstructSettings, instruct.instruct),
}
_ROW_WISE = ("clean", "langid")  # stages that judge each row by itself: they process the file in batches


def run_stage(
    name: str,
    source: Path | str,
    target: Path | str,
    *,
    overrides: Sequence[str] = (),
    rejects: Path | str | None = None,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    seed: int = 1,
    read_as: str | None = None,
    write_as: str | None = None,
    columns: Mapping[str, str | int] | None = None,
    on_error: str = "stop",
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Runs one stage on a file and writes the rows that it keeps.

    Rows that cannot be read become rejects with the reasons `read.…`, as in a run. `clean` and `langid` process the file in
    batches; the other stages hold all rows in memory.

    Args:
        name: the stage.
        source: a file, a folder, a glob or a URL, packed or not; `-` is standard input.
        target: a .parquet, .jsonl or .tsv file, the last two also with .gz, .bz2 or .xz; `-` is standard output. The file
            appears when it is complete. It may be the source.
        overrides: `key=value` each.
        rejects: a file for the dropped rows, with the same suffixes as the target.
        src_lang, tgt_lang: the languages, if the file has no columns `src_lang` and `tgt_lang`.
        seed: seeds the random choices.
        read_as: format of the source, if its suffix does not name it.
        write_as: format of the target, if its suffix does not name it.
        columns: field -> the column's name in the source, or in tsv its number from 0.
        on_error: "stop" at a damaged file, or "keep" what can be read.
        say: called with each warning and with what was lost.

    Returns:
        The number of rows that were kept and dropped, by reason, as a table.

    Raises:
        InputError: the source cannot be read, or lacks columns.
        SettingsError: a setting is not known, or the format of a file.
    """
    model, function = STAGES[name]
    data: dict[str, Any] = {}
    apply_overrides(data, overrides)
    settings = validate(model, data, where=name)
    reader = TableReader(
        source, named=read_as, columns=columns, src_lang=src_lang, tgt_lang=tgt_lang, on_error=on_error, say=say
    )
    writer = TableWriter(target, write_as)
    refuse = _rejects_writer(rejects, source, target)
    kept_rows, reasons = 0, Counter[str]()
    try:
        _check_outputs(reader, target, rejects)
        schema = None
        if name not in _ROW_WISE:
            batches: Iterable[tuple[pa.Table, pa.Table]] = [reader.whole()]
        else:
            schema = reader.schema() if writer.fixed or (refuse is not None and refuse.fixed) else None
            batches = reader.tables()
        with writer, refuse or contextlib.nullcontext():
            for table, malformed in batches:
                kept, dropped = function(table if schema is None else reader.fit(table, schema), settings, seed=seed)
                kept_rows += kept.num_rows
                writer.write(kept)
                lost = _together(dropped, malformed)
                reasons.update(count_values(lost["reason"]))
                if refuse is not None:
                    refuse.write(lost)
    finally:
        reader.close()
    unit = "examples" if name == "instruct" else "rows"
    lines = [(f"kept ({unit})", kept_rows), *sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
    return in_columns(lines, (name, "rows"))


def _check_outputs(reader: TableReader, *outputs: Path | str | None) -> None:
    """Refuses an output that is one of several files that are read: it would be read as input the next time."""
    files = {os.path.realpath(file) for file in reader.files()}
    for output in outputs:
        if output is None or str(output) == STANDARD_OUTPUT:
            continue
        place = os.path.realpath(output)
        if os.path.isdir(reader.name) and place.startswith(os.path.realpath(reader.name) + os.sep):
            raise SettingsError(f"{output}: is in the folder that is read. Name a file outside of it.")
        if len(files) > 1 and place in files:
            raise SettingsError(f"{output}: is one of the files that are read. Name another one.")


def _rejects_writer(rejects: Path | str | None, source: Path | str, target: Path | str) -> TableWriter | None:
    """The writer of the rejects; they must not overwrite the input or the output."""
    if rejects is None:
        return None
    if str(rejects) == STANDARD_OUTPUT:
        raise SettingsError("--rejects -: rejects cannot go to standard output. Name a file.")
    place = os.path.realpath(rejects)
    if str(target) != STANDARD_OUTPUT and place == os.path.realpath(target):
        raise SettingsError(f"{target}: the output and the rejects are the same file. Name two files.")
    if place == os.path.realpath(source):
        raise SettingsError(f"{rejects}: the input and the rejects are the same file. Name another file.")
    return TableWriter(rejects, option=None)


def _together(dropped: pa.Table, malformed: pa.Table) -> pa.Table:
    """The rows that a stage drops, and those that could not be read."""
    for name in malformed.column_names:
        kind = dropped.schema.field(name).type if name in dropped.column_names else None
        if kind is not None and kind != malformed[name].type:
            try:
                column: Any = malformed[name].cast(kind)
            except pa.ArrowException:  # the file has a column `row` that holds something else than numbers
                column = pa.nulls(malformed.num_rows, kind)
            malformed = malformed.set_column(malformed.column_names.index(name), name, column)
    return pa.concat_tables([dropped, malformed], promote_options="permissive")
