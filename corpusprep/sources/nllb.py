"""NLLB's mined bitext: nine tab-separated columns, or the three of CCMatrix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from corpusprep.errors import InputError
from corpusprep.sources.base import MAX_BYTES, MAX_ROWS, Found, RawBatch, Shard, Source, named_pair
from corpusprep.sources.delimited import Columns, cut, numbers, read_delimited
from corpusprep.sources.files import find, printable
from corpusprep.sources.lines import Lines
from corpusprep.sources.remedies import LANGUAGES

_SUFFIXES = frozenset(["gz", "tsv", "txt", "bitextf", "bitext", "bz2", "xz"])

# src, tgt, laser_score, src_lid, tgt_lid, src_source, src_url, tgt_source, tgt_url
NINE = Columns(width=9, first=0, second=1, score=2)
# score, src, tgt
THREE = Columns(width=3, first=1, second=2, score=0)


class NllbSource(Source):
    """Files named `{first}-{second}.gz` or `{first}-{second}.bitextf.tsv.gz`, packed or not."""

    def _find(self) -> list[Found]:
        tree = find(self.settings.path)
        found = []
        for name in tree.names:
            first, *suffixes = name.rpartition("/")[2].split(".")
            languages = named_pair(first)
            if self.settings.src_lang is not None and self.settings.tgt_lang is not None:
                languages = (self.settings.src_lang, self.settings.tgt_lang)
            elif languages is None and tree.single:
                raise InputError(
                    printable(self.settings.path),
                    "its name does not tell its languages",
                    ("Name it as in eng_Latn-swh_Latn.gz, or give ", LANGUAGES),
                )
            if languages and (tree.single or not suffixes or _SUFFIXES.intersection(suffixes)):
                found.append(Found(name, (tree.path(name),), languages, self.settings.splits[0]))
        return found

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        def layout(first: Lines) -> tuple[Columns, list[str]]:
            return _layout(first, printable(shard.files[0]))

        return read_delimited(self.settings, shard, layout, self._extent(shard, max_rows, max_bytes))


def _layout(first: Lines, name: str) -> tuple[Columns, list[str]]:
    """Which of the two layouts most well-formed lines at the head of a file have."""
    table = cut(first, 3)
    _, scores_of_three = numbers(first.data, *table.spans(0))
    _, scores_of_nine = numbers(first.data, *table.spans(2))
    three = int(np.count_nonzero((table.counts == 3) & (scores_of_three == 0)))
    nine = int(np.count_nonzero((table.counts == 9) & (scores_of_nine != 2)))
    if not three and not nine:
        return NINE, [f"{name}: no line at its head has the nine columns of NLLB or the three of CCMatrix."]
    return (THREE if three > nine else NINE), []
