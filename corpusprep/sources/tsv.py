"""Tab-separated text of any making."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from corpusprep.errors import InputError
from corpusprep.sources.base import (
    MAX_BYTES,
    MAX_ROWS,
    Field_,
    Found,
    RawBatch,
    Shard,
    Source,
    SourceSettings,
    pair_in_path,
    split_in_path,
)
from corpusprep.sources.delimited import Columns, cut, read_delimited
from corpusprep.sources.files import find, printable, read_head, unpacked_name
from corpusprep.sources.lines import Lines, decode

_HEAD = 64 << 10
_FIELDS: tuple[Field_, ...] = ("src", "tgt", "src_lang", "tgt_lang", "score")


class TsvSource(Source):
    """`.tsv` and `.txt` files, packed or not, without quoting, whose first line may name the columns."""

    def _find(self) -> list[Found]:
        tree = find(self.settings.path)
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
        if settings.src_lang is not None and settings.tgt_lang is not None:
            return [(settings.src_lang, settings.tgt_lang)]
        if _named_by_lines(settings, path):
            return [None]
        languages = pair_in_path(path if "/" not in name else name)
        if languages is None and single:
            raise InputError(
                printable(path),
                "nothing tells its languages",
                'Name it as in en-sw.tsv, give src_lang = "en" and tgt_lang = "sw", or name the columns that hold the '
                'languages, as in columns = {src_lang = "from", tgt_lang = "to"}',
            )
        return [languages] if languages else []

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        def layout(first: Lines) -> tuple[Columns, list[str]]:
            return _layout(first, self.settings, shard)

        return read_delimited(self.settings, shard, layout, self._limit(shard), max_rows, max_bytes)


def _named_by_lines(settings: SourceSettings, path: str) -> bool:
    """Whether the lines of a file name their languages."""
    columns = settings.columns
    if "src_lang" in columns and "tgt_lang" in columns:
        return True
    try:
        line = read_head(path, _HEAD).partition(b"\n")[0]
    except InputError:  # reading will meet it again and say so
        return False
    names = _names(line.decode("utf-8", "replace"))
    return _is_header(names, settings) and {"src_lang", "tgt_lang"} <= set(names)


def _names(line: str) -> list[str]:
    return line.removeprefix("\ufeff").removesuffix("\r").split("\t")


def _is_header(names: list[str], settings: SourceSettings) -> bool:
    """Whether a first line names columns: those that the settings name, or `src` and `tgt`."""
    asked = [column for column in settings.columns.values() if isinstance(column, str)]
    return bool(asked) or {"src", "tgt"} <= set(names)


def _layout(first: Lines, settings: SourceSettings, shard: Shard) -> tuple[Columns, list[str]]:
    """The columns from the settings, the header, and what most lines at the head of the file have.

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
                    "Set columns to names that are in the first line, or to numbers from 0 if it is no header",
                    0,
                )
            places[field] = names.index(name)
    if "src" not in places and "tgt" not in places and not header:
        places["src"], places["tgt"] = 0, 1
    for field in ("src", "tgt"):
        if field not in places:
            raise InputError(file, f"which column is {field} is not said", f"Add {field} to columns", 0)
    languages = None
    if shard.pair is None:
        if "src_lang" not in places or "tgt_lang" not in places:
            raise InputError(file, "its languages are not named by its lines any more", "Start again", 0)
        languages = (places["src_lang"], places["tgt_lang"])
    fields = Columns(0, places["src"], places["tgt"], places.get("score"), languages, header)
    needed = max(places.values()) + 1
    if header:
        return fields._replace(width=len(names)), []
    counts = cut(first, 1).counts
    values, often = np.unique(counts[counts >= needed], return_counts=True)
    if not values.size:
        problem = f"{file}: no line at its head has the {needed} columns that are asked for."
        return fields._replace(width=needed), [problem]
    return fields._replace(width=int(values[np.argmax(often)])), []
