"""Evaluation text: the files whose sentences must not be trained on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.errors import InputError
from corpusprep.sources import jsonl
from corpusprep.sources.base import is_language
from corpusprep.sources.columnar import PARQUET_ERRORS, is_text, open_parquet
from corpusprep.sources.delimited import cut
from corpusprep.sources.files import blocks, find, missing, open_binary, printable, unpacked_name
from corpusprep.sources.lines import LineCutter, Lines, all_valid, gather, head, valid_utf8
from corpusprep.sources.settings import split_in_path

Text: TypeAlias = "pa.Array[Any] | tuple[pa.Array[Any], pa.Array[Any]]"

_JSON = (".jsonl", ".ndjson", ".json")
_TEXT = (".tsv", ".txt")
_FLORES = re.compile(r"^(sentence_)?[a-z]{3}_[A-Z][a-z]{3}$")
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
    _, dot, suffix = name.rpartition(".")
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
    first = head(cutter)
    counts = cut(first, 1).counts[first.starts < first.ends]
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
    rows: list[int] = []
    records: list[dict[str, Any]] = []
    nested = False
    for lines in _batches(path):
        for i in range(lines.starts.size):
            line = lines.data[lines.starts[i] : lines.ends[i]].tobytes()
            if not line.strip():
                continue
            record = jsonl.parse(line)
            if isinstance(record, dict) and "src" not in record and "translation" in record:
                record, nested = record["translation"], True
            if not isinstance(record, dict):
                raise InputError(file, "a line is not a JSON object", _REMEDY, lines.first + i)
            records.append(record)
            rows.append(lines.first + i)
    if not records:
        return [pa.array([], pa.string())]
    keys = dict.fromkeys(key for record in records for key, value in record.items() if isinstance(value, str))
    arrays = []
    for name in _choose(list(keys), file, nested):
        values = [record.get(name) for record in records]
        for row, value in zip(rows, values, strict=True):
            if not isinstance(value, str):
                raise InputError(file, f"a record has no text {name!r}", _REMEDY, row)
            if not value.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
                raise InputError(file, f"the text {name!r} of a record holds half a character", _REMEDY, row)
        arrays.append(pa.array(values, pa.string()))
    return _entries(arrays)


def _parquet(path: str) -> list[Text]:
    file = printable(path)
    with open_binary(path) as stream:
        try:
            table = open_parquet(stream, file).read()
        except PARQUET_ERRORS as error:
            raise InputError(file, f"it is damaged ({error})", "Fetch it again") from None
    nested = "src" not in table.schema.names and "translation" in table.schema.names
    if nested:
        kind = table.schema.field("translation").type
        if not pa.types.is_struct(kind):
            raise InputError(file, f"its column 'translation' is {kind}, not a struct of languages", _REMEDY)
        names = [kind.field(i).name for i in range(kind.num_fields)]
        table = pa.table({name: pc.struct_field(table["translation"], name) for name in names})
    names = [field.name for field in table.schema if is_text(field.type) and not pa.types.is_null(field.type)]
    arrays = []
    for name in _choose(names, file, nested):
        column: Any = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        try:
            parts = [chunk.cast(pa.string()).fill_null("") for chunk in column.chunks]
            for part in parts:
                part.validate(full=True)
        except pa.ArrowException as error:
            raise InputError(file, f"its column {name!r} is not sound text ({error})", _REMEDY) from None
        arrays.append(_join(parts))
    return _entries(arrays)


def _choose(names: list[str], file: str, nested: bool) -> list[str]:
    """Which columns of text are evaluation text: src and tgt, else all that languages name, else the one or two that
    there are.

    Args:
        nested: they are the languages of a `translation`.
    """
    if {"src", "tgt"} <= set(names):
        return ["src", "tgt"]
    chosen = names if nested else [name for name in names if _FLORES.match(name)]
    if chosen:
        return chosen
    if not 1 <= len(names) <= 2:
        problem = f"it has the text columns {', '.join(names)}" if names else "it has no column of text"
        raise InputError(file, problem, "Name them src and tgt, or keep one or two")
    return names


def _entries(arrays: Sequence[pa.Array[Any]]) -> list[Text]:
    """Two columns as one pair, others as they are."""
    return [(arrays[0], arrays[1])] if len(arrays) == 2 else list(arrays)
