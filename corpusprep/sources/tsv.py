"""Tab-separated text of any making."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from corpusprep.errors import InputError, Wording
from corpusprep.sources.base import MAX_BYTES, MAX_ROWS, Found, RawBatch, Shard, Source, is_language, pair_in_path
from corpusprep.sources.delimited import Columns, cut, read_delimited, typed
from corpusprep.sources.files import printable, read_head, unpacked_name
from corpusprep.sources.lines import Lines, check_text, decode
from corpusprep.sources.remedies import LANGUAGES, OR_NAME_LANGUAGES
from corpusprep.sources.settings import Field_, SourceSettings, split_in_path
from corpusprep.sources.whole import shadowed

_HEAD = 64 << 10
_FIELDS: tuple[Field_, ...] = ("src", "tgt", "src_lang", "tgt_lang", "score")
_CODES = {"src_lang", "tgt_lang"}
# Columns that stages add. They are read as numbers if the lines at the head of the file have numbers there.
_NUMBERS: dict[str, pa.DataType] = {
    "row": pa.int64(),
    "quality": pa.float32(),
    "tokens": pa.int32(),
    "fingerprint": pa.uint64(),
    "src_lid_prob": pa.float32(),
    "tgt_lid_prob": pa.float32(),
}


class TsvSource(Source):
    """`.tsv` and `.txt` files, packed or not, without quoting, whose first line may name the columns."""

    def _find(self) -> list[Found]:
        tree = self._tree()
        found: list[Found] = []
        for name in tree.names:
            if not tree.single and not unpacked_name(name).endswith((".tsv", ".txt")):
                continue
            path = tree.path(name)
            split = self.settings.splits[0] if tree.single else split_in_path(name)
            found.extend(
                Found(name, (path,), languages, split) for languages in self._languages(path, name, tree.single)
            )
        return found

    def _languages(self, path: str, name: str, single: bool) -> list[tuple[str, str] | None]:
        """The languages of a file, None where its lines name them; nothing where nobody does and the file is one of
        many (a README, say)."""
        settings = self.settings
        if not self.whole and settings.src_lang is not None and settings.tgt_lang is not None:
            return [(settings.src_lang, settings.tgt_lang)]
        first, where = _first(path), path if "/" not in name else name
        names = set(first) if _is_header(first, settings) else set()
        asked = settings.columns.keys()
        if self.whole:
            if not first and single:
                return [None]
            found = self._told(("src_lang" in names | asked, "tgt_lang" in names | asked), where)
        elif _CODES.issubset(asked) or _CODES.issubset(names):
            found = [None]
        else:
            pair = pair_in_path(where)
            found = [pair] if pair else []
        if not found and single and _names_languages(first):
            return [None]
        if not found and (single or (self.whole and names)):
            raise InputError(
                printable(path),
                "nothing tells its languages",
                ("Name it as in en-sw.tsv, give ", LANGUAGES, *OR_NAME_LANGUAGES),
            )
        return found

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        def layout(first: Lines) -> tuple[Columns, list[str]]:
            columns, places, warnings = _layout(first, self.settings, shard)
            if self.whole:
                asked = "score" in self.settings.columns
                columns, more = _whole(columns, places, first, printable(shard.files[0]), asked)
                warnings = warnings + more
            return columns, warnings

        return read_delimited(self.settings, shard, layout, self._extent(shard, max_rows, max_bytes), self.whole)


def first_line(path: str) -> list[str]:
    """The columns of a file's first line; none where it is empty.

    Raises:
        InputError: it cannot be read.
    """
    head = read_head(path, _HEAD)
    return _names(head.partition(b"\n")[0].decode("utf-8", "replace")) if head else []


def _first(path: str) -> list[str]:
    """`first_line`; nothing where it cannot be read, which reading will meet again and say."""
    try:
        return first_line(path)
    except InputError:
        return []


def _names_languages(first: list[str]) -> bool:
    """Whether a first line that is no header has four columns: two texts and their languages."""
    return len(first) == 4 and is_language(first[2]) and is_language(first[3])


def _names(line: str) -> list[str]:
    return line.removeprefix("\ufeff").removesuffix("\r").split("\t")


def _is_header(names: list[str], settings: SourceSettings) -> bool:
    """Whether a first line names columns: those that the settings name, or `src` and `tgt`."""
    asked = [column for column in settings.columns.values() if isinstance(column, str)]
    return bool(asked) or {"src", "tgt"} <= set(names)


def _layout(first: Lines, settings: SourceSettings, shard: Shard) -> tuple[Columns, dict[str, int], list[str]]:
    """The columns from the settings, the header, and what most lines at the head of the file have; where the fields are;
    and warnings.

    Raises:
        InputError: a column is not there.
    """
    file = printable(shard.files[0])
    names = _names(decode(first.data, first.starts[0], first.ends[0]))
    header = _is_header(names, settings)
    places: dict[str, int] = {}
    for field in _FIELDS:
        column = settings.columns.get(field)
        if isinstance(column, int):
            places[field] = column
        elif column is not None or (header and field in names):
            name = column or field
            if name not in names:
                raise InputError(
                    file,
                    f"its first line names no column {name!r}; it names {', '.join(map(repr, names[:20]))}",
                    (
                        Wording("Set columns to", "Give --column"),
                        " names that are in the first line, or to numbers from 0 if it is no header",
                    ),
                    0,
                )
            places[field] = names.index(name)
    if "src" not in places and "tgt" not in places and not header:
        places["src"], places["tgt"] = 0, 1
    for field in ("src", "tgt"):
        if field not in places:
            remedy = [Wording(f"Add {field} to columns", f"Give --column {field}=NAME")]
            raise InputError(file, f"which column is {field} is not said", remedy, 0)
    languages = None
    if shard.pair is None:
        if not header and not _CODES & places.keys() and _names_languages(names):
            places |= {"src_lang": 2, "tgt_lang": 3}
        languages = (places.get("src_lang"), places.get("tgt_lang"))
        given = (settings.src_lang, settings.tgt_lang)
        if any(place is None and code is None for place, code in zip(languages, given, strict=True)):
            raise InputError(file, "its languages are not named by its lines any more", "Start again", 0)
    fields = Columns(0, places["src"], places["tgt"], places.get("score"), languages, header)
    needed = max(places.values()) + 1
    if header:
        return fields._replace(width=len(names)), places, []
    counts = cut(first, 1).counts
    values, often = np.unique(counts[counts >= needed], return_counts=True)
    if not values.size:
        problem = f"{file}: no line at its head has the {needed} columns that are asked for."
        return fields._replace(width=needed), places, [problem]
    return fields._replace(width=int(values[np.argmax(often)])), places, []


def _named(header: list[str], fields: Iterable[str]) -> list[str]:
    """Names of all columns: `column_3` for one without a name in the header, with as many `_` as it takes to be the only one."""
    taken = {*header, *fields}
    names = []
    for place, name in enumerate(header):
        if not name:
            name = f"column_{place}"
            while name in taken:
                name += "_"
        names.append(name)
    return names


def _whole(columns: Columns, places: dict[str, int], first: Lines, file: str, score: bool) -> tuple[Columns, list[str]]:
    """The columns with the names of all of them, for a whole table, and warnings.

    Args:
        score: whether the settings name the column of the score; else one of this name may hold text.

    Raises:
        InputError: the file lacks a column that is asked for, or its header names one twice.
    """
    there = _names(decode(first.data, first.starts[0], first.ends[0])) if columns.header else []
    there += [""] * (columns.width - len(there))
    there = _named(there, places)
    at_head = np.arange(first.starts.size)[int(columns.header) :]
    table = cut(first, columns.width)
    verdict = np.zeros(first.starts.size, np.int8)
    check_text(first.data, first.starts, first.ends, verdict)
    sound = at_head[(verdict == 0)[at_head] & (table.counts == columns.width)[at_head]]

    def odd(place: int, kind: pa.DataType) -> int:
        """Rows at the head that hold no number of a type."""
        starts, ends = table.spans(place)
        return int(typed(first.data, starts[sound], ends[sound], kind)[1].sum())

    if columns.score is not None and not score and 2 * odd(columns.score, pa.float32()) > sound.size:
        columns = columns._replace(score=None)
        places = {field: place for field, place in places.items() if field != "score"}
    names: list[tuple[str, int]] = []
    for place, name in enumerate(there):
        fields = [field for field, at in places.items() if at == place]
        names += [(field, place) for field in fields or ([] if name in places else [name])]
    beyond = [place for place in places.values() if place >= columns.width]
    if beyond:
        problem = f"its first line has {columns.width} columns, and no column {beyond[0]}"
        raise InputError(file, problem, "Count the columns from 0", 0)
    twice = [name for i, (name, _) in enumerate(names) if name in dict(names[:i])]
    if twice:
        raise InputError(file, f"its header names the column {twice[0]!r} twice", "Rename one of the two", 0)
    warnings = shadowed(there, {field: there[place] for field, place in places.items()}, file)
    kinds = [(place, _NUMBERS[name]) for name, place in names if name in _NUMBERS and not odd(place, _NUMBERS[name])]
    return columns._replace(names=tuple(names), kinds=tuple(kinds)), warnings
