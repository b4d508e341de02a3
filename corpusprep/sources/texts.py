"""Evaluation text: the files whose sentences must not be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from corpusprep.errors import InputError
from corpusprep.sources import jsonl
from corpusprep.sources.base import SourceSettings, is_language, split_in_path
from corpusprep.sources.columnar import PARQUET_ERRORS, is_text, open_parquet
from corpusprep.sources.delimited import cut
from corpusprep.sources.files import blocks, find, missing, open_binary, printable, unpacked_name
from corpusprep.sources.lines import LineCutter, Lines, gather, head, valid_utf8, all_valid

Text: TypeAlias = "pa.Array[Any] | tuple[pa.Array[Any], pa.Array[Any]]"

_JSON = (".jsonl", ".ndjson", ".json")
_TEXT = (".tsv", ".txt")
_REMEDY = "Mend the file: what is not read is not protected"


def text_files(paths: Sequence[str]) -> list[str]:
    """The evaluation files that paths stand for, sorted, each once.

    A file that is named is taken; of a folder or glob those that end with .tsv, .txt, .jsonl or .parquet (.gz
    allowed), or with a language or split, as in `test.sw` or `eng_Latn.devtest`.

    Raises:
        InputError: a path stands for no file.
    """
    files: set[str] = set()
    for path in paths:
        tree = find(path)
        chosen = [name for name in tree.names if tree.single or _is_evaluation(name)]
        if not chosen:
            raise InputError(
                printable(path), "it holds no evaluation files", "Name .tsv, .txt, .jsonl or .parquet files"
            )
        files.update(tree.path(name) for name in chosen)
    return sorted(files)


def _is_evaluation(name: str) -> bool:
    name = unpacked_name(name.rpartition("/")[2])
    if name.endswith((*_TEXT, ".jsonl", ".ndjson", ".parquet")):
        return not name.upper().startswith(("README", "LICENSE", "LICENCE", "NOTICE"))
    stem, dot, suffix = name.rpartition(".")
    if not dot or suffix.lower() in ("json", "md", "zip", "py", "csv", "xml", "pdf", "log", "sh", "yml", "cfg"):
        return False
    return is_language(suffix) or split_in_path(suffix) != "train"


def read_texts(paths: Sequence[str]) -> list[Text]:
    """The text of evaluation files, one entry a file: a column, or two of a pair.

    A .tsv or .txt file has one column or two, separated by tabs; JSON lines and Parquet have `src` and `tgt`, a
    `translation` of languages, or one or two columns of text.

    Raises:
        InputError: a file is missing or damaged, or a line of it has other columns than the rest. Nothing is passed
            over, since what is not read is not protected.
    """
    found: list[Text] = []
    for path in text_files(paths):
        name = unpacked_name(path)
        if name.endswith(_JSON):
            found.extend(_json(path))
        elif name.endswith((".parquet", ".pq")):
            found.extend(_parquet(path))
        else:
            found.append(_lines(path))
    return found


def texts_identity(paths: Sequence[str]) -> str:
    """SHA-256 of the content of all files that paths stand for; it does not depend on their names.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    digests = []
    for path in text_files(paths):
        digest = hashlib.sha256()
        with open_binary(path) as stream:
            try:
                while block := stream.read(1 << 20):
                    digest.update(block)
            except OSError:
                raise missing(path) from None
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _batches(path: str) -> Iterator[Lines]:
    cutter = LineCutter(blocks(path), keep=False, problems=[])
    while count := cutter.fill(1 << 18, 32 << 20):
        lines = cutter.lines(count)
        file = printable(path)
        if lines.spoilt:
            raise InputError(file, "a line is too long", _REMEDY, lines.first + min(lines.spoilt))
        if not all_valid(lines.data[: lines.ends[-1]]):
            for i in range(count):
                if not valid_utf8(lines.data, lines.starts[i], lines.ends[i]):
                    raise InputError(file, "a line is not UTF-8", _REMEDY, lines.first + i)
        yield lines
        cutter.drop(count)


def _lines(path: str) -> Text:
    cutter = LineCutter(blocks(path), keep=False, problems=[])
    counts = cut(head(cutter), 1).counts
    values, often = np.unique(counts, return_counts=True)
    width = int(values[np.argmax(often)]) if values.size else 1
    file = printable(path)
    if width > 2:
        raise InputError(
            file, f"it has {width} columns, where evaluation text has one or two", "Cut out the text columns"
        )
    columns: list[list[pa.Array[Any]]] = [[] for _ in range(width)]
    for lines in _batches(path):
        table = cut(lines, width)
        blank = lines.starts == lines.ends
        odd = np.flatnonzero((table.counts != width) & ~blank)
        if odd.size:
            problem = f"a line has {table.counts[odd[0]]} columns and the others {width}"
            raise InputError(file, problem, _REMEDY, lines.first + int(odd[0]))
        for k in range(width):
            starts, ends = table.spans(k)
            columns[k].append(gather(lines.data, np.minimum(starts, ends), ends))
    joined = [_join(parts) for parts in columns]
    return joined[0] if width == 1 else (joined[0], joined[1])


def _join(parts: list[pa.Array[Any]]) -> pa.Array[Any]:
    if sum(part.nbytes for part in parts) >= 1 << 31:
        parts = [part.cast(pa.large_string()) for part in parts]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.string())


def _json(path: str) -> list[Text]:
    """The texts of a file of records, each read by Python: evaluation files are small."""
    file = printable(path)
    records: list[dict[str, Any]] = []
    for lines in _batches(path):
        for i in range(lines.starts.size):
            line = lines.data[lines.starts[i] : lines.ends[i]].tobytes()
            if not line.strip():
                continue
            record = jsonl._parse(line)
            if not isinstance(record, dict):
                raise InputError(file, "a line is not a JSON object", _REMEDY, lines.first + i)
            records.append(record)
    if not records:
        return [pa.array([], pa.string())]
    try:
        inner = [each["translation"] if "src" not in each and "translation" in each else each for each in records]
        table = pa.Table.from_pylist(inner)
    except (pa.ArrowException, UnicodeError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(file, f"its records do not make a table ({error})", _REMEDY) from None
    return _columns(table, file)


def _parquet(path: str) -> list[Text]:
    file = printable(path)
    with open_binary(path) as stream:
        try:
            table = open_parquet(stream, file).read()
        except PARQUET_ERRORS as error:
            raise InputError(file, f"it is damaged ({error})", "Fetch it again") from None
    if "src" not in table.schema.names and "translation" in table.schema.names:
        inner = table["translation"].combine_chunks()
        if pa.types.is_struct(inner.type):
            table = pa.Table.from_arrays(
                inner.flatten(), [inner.type.field(i).name for i in range(inner.type.num_fields)]
            )
    return _columns(table, file)


def _columns(table: pa.Table, file: str) -> list[Text]:
    """The text columns of a table: src and tgt, else those named by a language, else the one or two that there are."""
    names = [field.name for field in table.schema if is_text(field.type)]
    if {"src", "tgt"} <= set(names):
        names = ["src", "tgt"]
    elif not 1 <= len(names) <= 2:
        languages = [name for name in names if is_language(name.removeprefix("sentence_"))]
        if not languages:
            problem = f"it has the text columns {', '.join(names)}" if names else "it has no column of text"
            raise InputError(file, problem, "Name them src and tgt, or keep one or two")
        names = languages
    arrays = []
    for name in names:
        column = (
            table[name].cast(pa.large_string())
            if not pa.types.is_dictionary(table[name].type)
            else table[name].cast(table[name].type.value_type)
        )
        arrays.append(_join([chunk.cast(pa.string()).fill_null("") for chunk in column.chunks]))
    if len(arrays) == 2:
        return [(arrays[0], arrays[1])]
    return list(arrays)
