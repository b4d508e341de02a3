"""Settings of a source: a `[[source]]` table of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from corpusprep.codes import explicit, order_pair, parse_pair
from corpusprep.errors import SettingsError
from corpusprep.stage import Settings

Format = Literal["opus100", "nllb", "moses", "tsv", "jsonl", "parquet", "hub"]
Field_ = Literal["src", "tgt", "src_lang", "tgt_lang", "score", "translation"]
Column = Annotated[int, Field(ge=0, strict=True)] | Annotated[str, Field(min_length=1)]

_DEV = {"dev": "dev", "valid": "dev", "validation": "dev", "val": "dev"}
_SPLITS = {"train": "train", "training": "train", "test": "test", "devtest": "devtest", **_DEV}
_BETWEEN = re.compile(r"[-._/\s]+")


class SourceSettings(Settings):
    """One `[[source]]` table of a recipe."""

    format: Format
    """The layout of the files: opus100, nllb, moses, tsv, jsonl, parquet or hub."""
    path: str = Field(min_length=1)
    """File, folder or glob, on this machine or any URL that fsspec opens; for moses also the prefix to which `.en`
    and `.sw` are added, or an OPUS zip; for hub the name of a data set or its folder."""
    name: str | None = Field(default=None, pattern=r"^[\w+][\w.+-]*$", max_length=80)
    """The source's name in the rows; the format where not given."""
    pairs: tuple[str, ...] = ()
    """Language pairs to read, in any codes and either order, as in `["en-de", "eng_Latn-swh_Latn"]`; all that are
    found where empty."""
    limit: PositiveInt | None = None
    """At most this many rows of each shard, from its beginning."""
    splits: tuple[str, ...] = Field(default=("train",), min_length=1)
    """Splits to read. `dev`, `valid` and `validation` are one."""
    protect: bool = True
    """The other splits of the same tree (dev, test) join the evaluation text to protect against."""
    on_error: Literal["stop", "keep"] = "stop"
    """What to do where a file is damaged: stop with a message, or keep the rows that can be read and say what was
    lost."""
    columns: dict[Field_, Column] = Field(default={})
    """Where a table's fields are, by name or, in tsv, by number from 0, as in `{src = 0, tgt = "german"}`. The default
    is the fields' own names (tsv without a header: the first two columns; of four, the others are the languages where
    nothing else tells them)."""
    src_lang: str | None = None
    """Language of the first side, for files that do not say; it holds for all files of the source."""
    tgt_lang: str | None = None
    """Language of the second side."""
    config: str | None = None
    """hub: the configuration of the data set."""

    @field_validator("pairs")
    @classmethod
    def _check_pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        for pair in pairs:
            _mend(parse_pair, pair)
        return pairs

    @field_validator("src_lang", "tgt_lang")
    @classmethod
    def _check_language(cls, code: str | None) -> str | None:
        return code if code is None else _mend(explicit, code)

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split_name(split) for split in splits))

    @model_validator(mode="after")
    def _check_sides(self) -> SourceSettings:
        if (self.src_lang is None) != (self.tgt_lang is None):
            raise ValueError("src_lang and tgt_lang go together: give both or neither.")
        if self.format not in ("tsv", "jsonl", "parquet", "hub") and self.columns:
            raise ValueError(f"columns has no meaning for the format {self.format}, whose columns are fixed.")
        if self.format != "tsv" and any(isinstance(column, int) for column in self.columns.values()):
            raise ValueError("columns by number are for tsv; name the columns.")
        if self.format != "hub" and self.config is not None:
            raise ValueError("config is for the format hub.")
        return self

    @property
    def label(self) -> str:
        """The source's name in the rows."""
        return self.name or self.format

    def wanted(self) -> tuple[tuple[str, str], ...]:
        """The pairs asked for, in canonical order: `pairs`, else the one that src_lang and tgt_lang name."""
        if not self.pairs and self.src_lang is not None and self.tgt_lang is not None:
            return (order_pair(self.src_lang, self.tgt_lang),)
        return tuple(dict.fromkeys(order_pair(*parse_pair(pair)) for pair in self.pairs))


def _mend(check: Any, text: str) -> Any:
    """`check(text)`, with the complaint as the error that pydantic collects."""
    try:
        return check(text)
    except SettingsError as error:
        raise ValueError(str(error)) from None


def split_name(name: str) -> str:
    """The usual name of a split: `validation` and `valid` are `dev`."""
    return _SPLITS.get(name.lower(), name)


def split_in_path(path: str) -> str:
    """The split that a word of a relative path names, from the file's name upwards; `train` where none does."""
    for part in reversed(path.split("/")):
        for word in _BETWEEN.split(part):
            if word.lower() in _SPLITS:
                return _SPLITS[word.lower()]
    return "train"
