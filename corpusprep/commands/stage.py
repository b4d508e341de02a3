"""One stage on one file: what the commands `corpusprep clean`, `langid`, … do."""

from __future__ import annotations

import gzip
import io
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from corpusprep.arrow import count_values, join, shaped
from corpusprep.codes import explicit
from corpusprep.errors import InputError, SettingsError
from corpusprep.recipe import RejectsSettings, UserStage, apply_overrides, validate
from corpusprep.report.tables import columns
from corpusprep.sources import SourceSettings
from corpusprep.sources.delimited import cut
from corpusprep.sources.files import blocks
from corpusprep.sources.lines import LineCutter, check_text, decode, gather
from corpusprep.stage import PAIR_COLUMNS, Outcome, StageSettings
from corpusprep.stages import balance, clean, dedup, instruct, langid, quality
from corpusprep.training.settings import TrainSettings

_ROWS, _BYTES = 65_536, 32 << 20
_READ_REASONS = {1: "read.encoding", 2: "read.encoding", 3: "read.nul", 4: "read.columns"}
STAGES: dict[str, tuple[type[StageSettings], Callable[..., Outcome]]] = {
    "clean": (clean.CleanSettings, lambda table, settings, seed: clean.clean(table, settings)),
    "langid": (langid.LangidSettings, lambda table, settings, seed: langid.langid(table, settings)),
    "dedup": (dedup.DedupSettings, dedup.dedup),
    "quality": (quality.QualitySettings, lambda table, settings, seed: quality.quality(table, settings, seed=seed)),
    "balance": (balance.BalanceSettings, balance.balance),
    "instruct": (instruct.InstructSettings, instruct.instruct),
}
_ROW_WISE = ("clean", "langid")  # stages that judge each row by itself: the file goes through them in batches


def run_stage(
    name: str,
    source: Path,
    target: Path,
    *,
    overrides: Sequence[str] = (),
    rejects: Path | None = None,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    seed: int = 1,
) -> str:
    """Runs one stage on a file and writes the rows that it keeps.

    Args:
        name: of the stage.
        source, target, rejects: `.parquet`, `.jsonl` or `.tsv`; the last two also with `.gz`. `-` is not a file.
        overrides: `key=value` each.
        src_lang, tgt_lang: languages of files that do not name them.

    Returns:
        What was kept and dropped, by reason, as a table.

    Raises:
        InputError: the file cannot be read, or lacks columns.
        SettingsError: a setting or a suffix that is not known.
    """
    model, function = STAGES[name]
    data: dict[str, Any] = {}
    apply_overrides(data, overrides)
    settings = validate(model, data, where=name)
    languages = tuple(explicit(code) if code else None for code in (src_lang, tgt_lang))
    if rejects is not None and rejects.absolute() == target.absolute():
        raise SettingsError(
            f"{target}: is named for the rows that are kept and for those that are not. Name two files."
        )
    kept_rows, reasons = 0, Counter[str]()
    writer, refuse = _Writer(target), _Writer(rejects) if rejects else None
    batches = _read(source, languages)
    if name not in _ROW_WISE:
        batches = _whole(batches)
    with writer, refuse or _Nothing():
        for table, malformed in batches:
            kept, dropped = function(table, settings, seed=seed)
            kept_rows += kept.num_rows
            writer.write(kept)
            lost = pa.concat_tables([dropped, malformed], promote_options="default")
            reasons.update(count_values(lost["reason"]))
            if refuse is not None:
                refuse.write(lost)
    unit = "examples" if name == "instruct" else "rows"
    lines = [(f"kept ({unit})", kept_rows), *sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
    return columns(lines, (name, "rows"))


def _whole(batches: Iterator[tuple[pa.Table, pa.Table]]) -> Iterator[tuple[pa.Table, pa.Table]]:
    tables, malformed = zip(*batches, strict=True)
    yield pa.concat_tables(tables, promote_options="default"), pa.concat_tables(malformed, promote_options="default")


def _suffix(path: Path) -> str:
    suffix = (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()
    if suffix not in (".parquet", ".jsonl", ".tsv") or (suffix == ".parquet" and path.suffix == ".gz"):
        raise SettingsError(f"{path}: the suffix tells the format; use .parquet, .jsonl, .tsv, .jsonl.gz or .tsv.gz.")
    return suffix


# ------------------------------------------------------------------------------------------------------------- reading


def _read(path: Path, languages: tuple[str | None, ...]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Batches of well-formed rows, and of malformed ones with `reason`; at least one batch."""
    reader = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".tsv": _read_tsv}[_suffix(path)]
    count = 0
    for table, malformed in reader(path, languages[0] is not None):
        count += 1
        yield _complete(table, path, languages), malformed
    if not count:
        raise InputError(str(path), "is empty", "Name a file with rows, or with a header at least")


def _complete(table: pa.Table, path: Path, languages: tuple[str | None, ...]) -> pa.Table:
    for name, language in zip(("src_lang", "tgt_lang"), languages, strict=True):
        if language is not None and name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(language, pa.string()), table.num_rows))
    missing = [name for name in PAIR_COLUMNS if name not in table.column_names]
    if missing:
        remedy = "Name the columns src, tgt, src_lang, tgt_lang"
        if set(missing) <= {"src_lang", "tgt_lang"}:
            remedy = "Give --src-lang and --tgt-lang, or add those columns"
        raise InputError(str(path), f"has no column {', '.join(missing)}", remedy)
    for name in PAIR_COLUMNS:
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            if not (pa.types.is_null(kind) or pa.types.is_dictionary(kind)):
                raise InputError(str(path), f"column {name} holds {kind}, not text", "Make it text")
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    for name in ("src_lang", "tgt_lang"):
        table = table.set_column(table.column_names.index(name), name, _codes(table[name], path, name))
    return table


def _codes(column: pa.ChunkedArray[Any], path: Path, name: str) -> pa.ChunkedArray[Any]:
    """The column's languages in canonical form."""
    encoded: Any = pa.concat_arrays(column.cast(pa.string()).chunks or [pa.array([], pa.string())]).dictionary_encode()
    try:
        known = pa.array([explicit(code or "") for code in encoded.dictionary.to_pylist()], pa.string())
    except SettingsError as error:
        raise InputError(str(path), f"column {name}: {error}"[:-1], "Mend the column") from None
    taken = known.take(encoded.indices)
    if taken.null_count:
        row = int(np.flatnonzero(taken.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(str(path), f"column {name} is empty", "Name the language of every row", row)
    return pa.chunked_array([taken])


def _read_parquet(path: Path, _: bool) -> Iterator[tuple[pa.Table, pa.Table]]:
    try:
        with pq.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                yield file.schema_arrow.empty_table(), _none()
            for batch in file.iter_batches(batch_size=_ROWS):
                yield pa.Table.from_batches([batch]), _none()
    except FileNotFoundError:
        raise InputError(str(path), "does not exist", "Check the path") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            str(path), f"is not whole Parquet ({error})".replace("\n", " "), "Write the file again"
        ) from None


def _none() -> pa.Table:
    return pa.table({"reason": pa.array([], pa.string())})


def _lines(path: Path) -> Iterator[Any]:
    cutter = LineCutter(blocks(str(path)), keep=False, problems=[])
    while count := min(cutter.fill(_ROWS, _BYTES), _ROWS):
        yield cutter.lines(count)
        cutter.drop(count)


def _malformed(rows: Sequence[tuple[int, str, str]]) -> pa.Table:
    """Rows that are not rows: their line, their text, and why."""
    return pa.table(
        {
            "row": pa.array([row for row, _, _ in rows], pa.int64()),
            "src": pa.array([text for _, text, _ in rows], pa.string()),
            "reason": pa.array([reason for _, _, reason in rows], pa.string()),
        }
    )


def _read_tsv(path: Path, languages_given: bool) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Tab-separated without quoting; the first line is a header if it names `src` and `tgt`, else the columns are
    src, tgt and, where no languages are given, src_lang, tgt_lang."""
    names: list[str] | None = None
    for lines in _lines(path):
        data, starts, ends, first = lines.data, lines.starts, lines.ends, lines.first
        if names is None:
            head = decode(data, int(starts[0]), int(ends[0])).rstrip("\r").removeprefix("\ufeff").split("\t")
            if "src" in head and "tgt" in head:
                names = head
                lines = lines._replace(starts=starts[1:], ends=ends[1:], first=first + 1)
                data, starts, ends, first = lines.data, lines.starts, lines.ends, lines.first
            else:
                names = list(PAIR_COLUMNS[:2] if languages_given else PAIR_COLUMNS)
                if len(head) != len(names):
                    raise InputError(
                        str(path),
                        f"its first line has {len(head)} columns, not {len(names)} ({', '.join(names)})",
                        "Put a header line of column names on top, or give --src-lang and --tgt-lang for two columns",
                        0,
                    )
            if len(set(names)) < len(names):
                raise InputError(str(path), "its header names a column twice", "Mend the header", 0)
        table = cut(lines, len(names))
        verdict = np.where(table.counts == len(names), 0, 4).astype(np.int8)
        check_text(data, starts, ends, verdict)
        good = verdict == 0
        fields = {}
        for index, name in enumerate(names):
            begin, end = table.spans(index)
            column = gather(data, begin[good], end[good])
            if index == len(names) - 1:
                column = pc.utf8_rtrim(column, "\r")
            fields[name] = column
        bad = [
            (first + int(i), decode(data, int(starts[i]), int(ends[i])), _READ_REASONS[int(verdict[i])])
            for i in np.flatnonzero(~good)
        ]
        yield _typed(pa.table(fields)), _malformed(bad)


def _typed(table: pa.Table) -> pa.Table:
    """Columns that stages add, as they were before they became text."""
    known = {
        "row": pa.int64(), "score": pa.float32(), "quality": pa.float32(), "tokens": pa.int32(), "fingerprint": pa.uint64(),
        "src_lid_prob": pa.float32(), "tgt_lid_prob": pa.float32(),
    }  # fmt: skip
    for name, kind in known.items():
        if name in table.column_names:
            text = table[name]
            try:
                column = pc.if_else(pc.equal(text, pa.scalar("")), pa.scalar(None, pa.string()), text).cast(kind)
            except pa.ArrowInvalid:
                continue
            table = table.set_column(table.column_names.index(name), name, column)
    return table


def _read_jsonl(path: Path, _: bool) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Reads the file twice: once for the fields and their types, which may first show anywhere, and once for the rows."""
    schema = pa.schema([])
    for lines in _lines(path):
        try:
            found = _plain(_objects(lines, None)[0].schema)
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException as error:
            where = lines.first
            raise InputError(
                str(path), f"its fields change their type ({error})", "Give each field one type", where
            ) from None
    for lines in _lines(path):
        table, bad = _objects(lines, schema)
        yield shaped(table, schema), _malformed(bad)


def _plain(schema: pa.Schema) -> pa.Schema:
    """Text that looks like a time is text."""
    return pa.schema([f.with_type(pa.string()) if pa.types.is_timestamp(f.type) else f for f in schema])


def _objects(lines: Any, schema: pa.Schema | None) -> tuple[pa.Table, list[tuple[int, str, str]]]:
    """The lines that are JSON objects as a table, and the others."""
    import pyarrow.json as pj

    block = lines.data[int(lines.starts[0]) : int(lines.ends[-1])].tobytes()
    try:
        options = pj.ParseOptions(explicit_schema=schema) if schema is not None else None
        table = pj.read_json(io.BytesIO(block), parse_options=options)
        if table.num_rows == lines.starts.size:
            return table, []
    except pa.ArrowException:
        pass
    records, bad = [], []
    for i, (start, end) in enumerate(zip(lines.starts.tolist(), lines.ends.tolist(), strict=True)):
        raw = lines.data[start:end].tobytes()
        try:
            record = json.loads(raw)
            if not isinstance(record, dict):
                raise ValueError("no object")
            json.dumps(record, ensure_ascii=False).encode()
            records.append(record)
        except UnicodeError:
            bad.append((lines.first + i, decode(lines.data, start, end), "read.encoding"))
        except (ValueError, RecursionError):
            bad.append((lines.first + i, decode(lines.data, start, end), "read.json"))
    if not records:
        return (schema or pa.schema([])).empty_table(), bad
    try:
        return pa.Table.from_pylist(records, schema=schema), bad
    except OverflowError as error:
        raise pa.ArrowInvalid(str(error)) from None


# ------------------------------------------------------------------------------------------------------------- writing


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class _Writer:
    """Writes tables one after the other; the file appears when all is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._kind = path, _suffix(path)
        self._scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        self._sink: Any = None
        self._names: list[str] = []

    def __enter__(self) -> _Writer:
        return self

    def write(self, table: pa.Table) -> None:
        if self._sink is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._names = table.column_names
            if self._kind == ".parquet":
                self._sink = pq.ParquetWriter(self._scratch, table.schema, compression="zstd")
            else:
                raw = open(self._scratch, "wb")  # noqa: SIM115
                self._sink = gzip.GzipFile("", "wb", 6, raw, mtime=0) if self._path.suffix == ".gz" else raw
                if self._kind == ".tsv":
                    self._sink.write(("\t".join(self._names) + "\n").encode())
        if self._kind == ".parquet":
            self._sink.write_table(shaped(table, self._sink.schema))
        elif self._kind == ".jsonl":
            import polars as pl

            buffer = io.BytesIO()
            pl.DataFrame(pl.from_arrow(table)).write_ndjson(buffer)
            self._sink.write(buffer.getvalue())
        else:
            self._sink.write(_tsv(table, self._names, self._path))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._sink is not None:
            raw = getattr(self._sink, "fileobj", None)
            self._sink.close()
            if raw is not None:
                raw.close()
        if kind is None and self._sink is not None:
            self._scratch.replace(self._path)
        elif kind is not None:
            self._scratch.unlink(missing_ok=True)


def _tsv(table: pa.Table, names: Sequence[str], path: Path) -> bytes:
    """Lines of tab-separated text; tabs and line feeds inside a field become spaces, as nothing is quoted."""
    fields = []
    for name in names:
        column: Any = table[name] if name in table.column_names else pa.nulls(table.num_rows, pa.string())
        if pa.types.is_nested(column.type):
            raise SettingsError(f"{path}: column {name} holds lists, which TSV cannot. Write .jsonl or .parquet.")
        text: Any = pc.fill_null(column.cast(pa.string()), "")
        fields.append(pc.replace_substring_regex(text, pattern="[\t\n]", replacement=" "))
    if not table.num_rows:
        return b""
    lines: list[Any] = join(*fields, separator="\t").to_pylist()
    return ("\n".join(lines) + "\n").encode()


# ------------------------------------------------------------------------------------------------------------ settings


def describe_settings(stage: str | None) -> str:
    """The settings of a stage, of `source`, or of all: name, default, meaning."""
    models: dict[str, type[BaseModel]] = {
        "source": SourceSettings,
        **{name: model for name, (model, _) in STAGES.items()},
        "stage": UserStage,
        "rejects": RejectsSettings,
        "train": TrainSettings,
    }
    chosen = models if stage is None else {stage: models[stage]}
    return "\n\n".join(
        _describe(f"[[{name}]]" if name in ("source", "stage") else f"[{name}]", model)
        for name, model in chosen.items()
    )


def _describe(title: str, model: type[BaseModel], depth: int = 0) -> str:
    pad = "  " * depth
    lines = [f"{pad}{title}"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        lines.append(f"{pad}  {name} = {default}")
        lines.append(f"{pad}      {' '.join((field.description or '').split())}")
        nested = [m for m in _nested(field.annotation) if m is not model]
        lines += [_describe(f"{name}.…:", m, depth + 2) for m in nested]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        value = [item.model_dump(exclude_defaults=True) for item in value]
    return json.dumps(value, ensure_ascii=False, default=str) if value is not None else "none"


def _nested(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _nested(part)]
