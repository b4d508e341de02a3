"""What every source is made of: its shards, and the batches that it reads."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.codes import canonical, explicit, matches, order_pair, parse_pair, script_of
from corpusprep.errors import InputError, SettingsError
from corpusprep.sources.files import Tree, find, identity, printable, size_of
from corpusprep.sources.settings import SourceSettings
from corpusprep.sources.standard_input import NAME, STANDARD_INPUT

MAX_ROWS, MAX_BYTES = 65_536, 32 << 20

_STRINGS = ("src", "tgt", "src_lang", "tgt_lang", "source", "shard")
_TYPES: dict[str, Any] = {**dict.fromkeys(_STRINGS, pa.string()), "row": pa.int64(), "score": pa.float32()}
RAW_SCHEMA = pa.schema([pa.field(name, kind) for name, kind in _TYPES.items()])
REJECT_SCHEMA = RAW_SCHEMA.append(pa.field("reason", pa.string()))

# Reasons by verdict; 0 is a good row, and the verdict -1 (a pair not asked for) has no reason: such a row is not read.
REASONS = (
    "read.columns",  # a line or record without the columns that its file has
    "read.encoding",  # bytes that are not UTF-8
    "read.nul",  # U+0000
    "read.score",  # a score that is not a number
    "read.json",  # a line that is not one JSON object
    "read.language",  # a row that names no language, or none that is known
    "read.line_length",  # a line beyond `lines.MAX_LINE`
    "read.truncated",  # the line that the damage to its file cut through
    "read.unpaired",  # a line that the other side lacks
)
COLUMNS, ENCODING, NUL, SCORE, JSON, LANGUAGE, LINE_LENGTH, TRUNCATED, UNPAIRED = range(1, len(REASONS) + 1)
UNWANTED = -1


@dataclass(frozen=True)
class Shard:
    """One unit of reading: a file, or the two files of a line pair.

    Attributes:
        source: the source's name.
        shard: path relative to the source's path, "/" between folders, for line pairs without the language suffix.
        files: full paths or URLs.
        pair: canonical (src_lang, tgt_lang), or None where the rows name their own.
        split: "train", "dev", "test" or what the data set calls it.
        swap: whether the file's first side is `tgt`.
        members: names inside the file: of a zip's two members, of a struct's two fields, of a data set's split.
        lost: what could not be read, found while the shards were listed under `on_error = "keep"`.
    """

    source: str
    shard: str
    files: tuple[str, ...]
    pair: tuple[str, str] | None
    split: str
    swap: bool = False
    members: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


class RawBatch(NamedTuple):
    """A run of rows of one shard.

    Attributes:
        table: the good rows, `RAW_SCHEMA`; of a whole table the file's columns, see `open_source`.
        rejected: the bad ones, `REJECT_SCHEMA`, with U+FFFD for what cannot be decoded; a line that has no columns is
            in `src` as a whole, and `tgt` is null.
        problems: what was lost, and warnings, a sentence each.
    """

    table: pa.Table
    rejected: pa.Table
    problems: list[str]


class Extent(NamedTuple):
    """How much is read: rows of a shard in all (None for all of them), and rows and bytes of text per batch."""

    limit: int | None
    max_rows: int
    max_bytes: int


class Found(NamedTuple):
    """A shard as a format finds it, before the recipe's pairs and splits are applied.

    `languages` are the codes as the files write them, in the order of the file's sides.
    """

    shard: str
    files: tuple[str, ...]
    languages: tuple[str, str] | None
    split: str
    members: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


class Source(ABC):
    """The shards of one `[[source]]` table.

    Args:
        settings: the table.
        whole: whether batches are whole tables, see `open_source`.
    """

    has_first_side: ClassVar[bool] = True
    """Whether the two sides of a shard have an order of their own, which whole tables keep."""

    def __init__(self, settings: SourceSettings, whole: bool = False) -> None:
        self.settings = settings
        self.whole = whole
        self._found: list[Found] | None = None

    @abstractmethod
    def _find(self) -> list[Found]:
        """Every shard of every pair and split."""

    @abstractmethod
    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        """The shard's rows, in their order, in batches.

        A batch ends at `max_rows` rows or before the row that would take it beyond `max_bytes` bytes of text (one
        row may be larger); where it ends depends on the shard's content alone.

        Raises:
            InputError: the shard is damaged and the settings say to stop.
        """

    def shards(self) -> list[Shard]:
        """The shards of the splits and pairs asked for, by name.

        Raises:
            InputError: nothing is found, or a file is not what it should be and the settings say to stop.
        """
        found = self._all()
        splits = self._splits()
        shards = [shard for each in found if each.split in splits for shard in self._shard(each)]
        if not shards:
            raise self._nothing(found)
        return shards

    def _splits(self) -> set[str]:
        """The splits that are read: of whole tables those that there are, if none of the settings' is there."""
        splits, there = set(self.settings.splits), {each.split for each in self._all()}
        return there if self.whole and not splits & there else splits

    def left_out(self) -> list[str]:
        """Names of the files of other splits, which are not read."""
        return [each.shard for each in self._all() if each.split not in self._splits()]

    def evaluation(self) -> list[Shard]:
        """The shards of the other splits but train, for the pairs asked for; none where `protect` is off."""
        if not self.settings.protect:
            return []
        return [
            shard
            for each in self._all()
            if each.split != "train" and each.split not in self.settings.splits
            for shard in self._shard(each)
        ]

    def available(self) -> list[str]:
        """The pairs that the wanted splits hold, as in "en-de", whether asked for or not."""
        return sorted(
            {
                "-".join(order_pair(canonical(each.languages[0]), canonical(each.languages[1])))
                for each in self._all()
                if each.languages is not None and each.split in self.settings.splits
            }
        )

    def missing(self) -> list[str]:
        """The pairs that are asked for and found nowhere, as the recipe writes them; none where rows name their own
        languages."""
        shards = [self._shard(each) for each in self._all() if each.split in self.settings.splits]
        pairs = {shard.pair for some in shards for shard in some}
        if None in pairs:
            return []
        return [pair for pair in self.settings.pairs if order_pair(*parse_pair(pair)) not in pairs]

    def _tree(self) -> Tree:
        """The files of the path; for whole tables it may be standard input.

        Raises:
            InputError: nothing is there.
        """
        piped = self.settings.path == STANDARD_INPUT
        if piped and not self.whole:
            raise InputError(NAME, "a run cannot read it, as it reads its sources more than once", "Name a file")
        return Tree("", [STANDARD_INPUT], True) if piped else find(self.settings.path)

    def _told(self, named: tuple[bool, bool], path: str) -> list[tuple[str, str] | None]:
        """The languages of a whole table: `[None]` if its rows name them, `[pair]` if the settings or its path do, else `[]`.

        Args:
            named: which of the two languages the rows name.
            path: a path whose name may tell the pair.
        """
        given = (self.settings.src_lang, self.settings.tgt_lang)
        if any(named):
            return [None] if all(a or b for a, b in zip(named, given, strict=True)) else []
        if all(given):
            return [(str(given[0]), str(given[1]))]
        there = pair_in_path(path)
        if there is None:
            return []
        if not _agree(given, there):
            problem = f"its name says that its sides are {there[0]} and {there[1]}, not {given[0] or given[1]}"
            raise InputError(printable(path), problem, "Give --src-lang and --tgt-lang, or neither")
        return [there]

    def _extent(self, shard: Shard, max_rows: int, max_bytes: int) -> Extent:
        """How much of a shard is read: all rows of evaluation text, whatever the limit."""
        limit = self.settings.limit if shard.split in self.settings.splits else None
        return Extent(limit, max_rows, max_bytes)

    def size(self, shard: Shard) -> int | None:
        """Bytes of the shard as it is stored; None where that is not known."""
        sizes = [size_of(file) for file in shard.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def identity(self, shard: Shard) -> str:
        """A digest of size, time and the first and last 64 KiB of every file of the shard."""
        return identity(shard.files)

    def _all(self) -> list[Found]:
        if self._found is None:
            self._found = sorted(self._find(), key=lambda each: (each.shard, each.split, each.languages or ("", "")))
        return self._found

    def _shard(self, found: Found) -> list[Shard]:
        """The found shard as the recipe's, or nothing where its pair is not asked for."""
        common = (printable(found.shard), found.files)
        if found.languages is None:
            shard = Shard(self.settings.label, *common, None, found.split, False, found.members, found.lost)
            return [shard]
        if self.whole:
            return [self._whole_shard(found, found.languages)]
        labels = label(found.languages, self.settings.wanted())
        if labels is None:
            return []
        pair = order_pair(*labels)
        swap = pair != labels
        return [Shard(self.settings.label, *common, pair, found.split, swap, found.members, found.lost)]

    def _whole_shard(self, found: Found, languages: tuple[str, str]) -> Shard:
        """The shard of a whole table: its sides as they stand, or turned to the languages that the settings name.

        Raises:
            InputError: the settings name other languages.
        """
        first, second = explicit(languages[0]), explicit(languages[1])
        given = (self.settings.src_lang, self.settings.tgt_lang)
        free = not self.has_first_side or bool(found.members)  # a record of translations has no first side either
        if not any(given):
            turned = not self.has_first_side and order_pair(first, second) != (first, second)
        elif _agree(given, (first, second)):
            turned = False
        elif free and _agree(given, (second, first)):
            turned = True
        else:
            asked = " and ".join(code for code in given if code)
            problem = f"its sides are {first} and {second}, where {asked} is asked for"
            raise InputError(
                printable(found.shard), problem, f"Give --src-lang {first} --tgt-lang {second}, or neither"
            )
        pair = (second, first) if turned else (first, second)
        pair = (given[0] or pair[0], given[1] or pair[1])
        members = found.members[::-1] if turned and self.has_first_side else found.members
        place = (printable(found.shard), found.files)
        swap = turned and not self.has_first_side
        return Shard(self.settings.label, *place, pair, found.split, swap, members, found.lost)

    def _nothing(self, found: list[Found]) -> InputError:
        """Why there is no shard, in words."""
        path, settings = printable(self.settings.path), self.settings
        if not found:
            return InputError(path, f"no {settings.format} files are here", "Check the path and the format")
        if not any(each.split in settings.splits for each in found):
            others = ", ".join(sorted({each.split for each in found}))
            return InputError(
                path,
                f"no split {' or '.join(settings.splits)} is here, only {others}",
                f'Set splits, as in splits = ["{found[0].split}"]',
            )
        there = self.available()
        near = [
            close for pair in settings.wanted() for close in difflib.get_close_matches("-".join(pair), there, 3, 0.5)
        ]
        names = ", ".join(there[:40]) + (f" and {len(there) - 40} more" if len(there) > 40 else "")
        return InputError(
            path,
            f"no pair {' or '.join(settings.pairs)} is here, only {names}",
            f"Did you mean {' or '.join(dict.fromkeys(near))}?" if near else "Ask for pairs that are here",
        )


def _agree(given: tuple[str | None, str | None], there: tuple[str, str]) -> bool:
    """Whether the languages that are given, one, both or none, are those of the two sides."""
    return all(code is None or matches(code, side) for code, side in zip(given, there, strict=True))


def label(languages: tuple[str, str], wanted: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The codes of two sides, in their order, as the recipe writes them, else in canonical form; None where the
    recipe asks for other pairs.

    Args:
        languages: the codes as the data writes them.
        wanted: the recipe's pairs; none asks for all.
    """
    first, second = canonical(languages[0]), canonical(languages[1])
    if not wanted:
        return first, second
    exact = [pair for pair in wanted if set(pair) == {first, second}]
    for a, b in (*exact, *wanted):
        if _answers(a, languages[0]) and _answers(b, languages[1]):
            return a, b
        if _answers(b, languages[0]) and _answers(a, languages[1]):
            return b, a
    return None


def _answers(asked: str, found: str) -> bool:
    """Whether data labelled `found` answers `asked`: no script is asked for against the one that the data names."""
    scripts = script_of(explicit(asked)), script_of(explicit(found))
    return matches(asked, found) and (None in scripts or scripts[0] == scripts[1])


def is_language(code: str) -> bool:
    """Whether the text is a language's code."""
    try:
        canonical(code)
    except SettingsError:
        return False
    return True


def named_pair(text: str) -> tuple[str, str] | None:
    """The two codes, as written, of a text that is a language pair and nothing else, or None."""
    for match in re.finditer("-", text):
        left, right = text[: match.start()], text[match.end() :]
        if is_language(left) and is_language(right):
            return left, right
    return None


def pair_in_path(path: str) -> tuple[str, str] | None:
    """The two codes that a file's name carries in one of its parts between dots, else its folder's name."""
    folders, _, name = path.rpartition("/")
    for part in (*name.split("."), folders.rpartition("/")[2]):
        pair = named_pair(part)
        if pair is not None:
            return pair
    return None


def pair_name(name: str, pair: tuple[str, str] | None, pairs: int) -> str:
    """The name of a shard that is one of several pairs of a file: with the pair behind it."""
    return name if pair is None or pairs == 1 else f"{name}.{'-'.join(pair)}"


def make_batch(
    shard: Shard,
    rows: npt.NDArray[np.int64],
    src: pa.Array[Any],
    tgt: pa.Array[Any],
    *,
    score: pa.Array[Any] | None = None,
    languages: tuple[pa.Array[Any], pa.Array[Any]] | None = None,
    swap: npt.NDArray[np.bool_] | None = None,
    rejects: Sequence[tuple[int, str | None, str | None, int]] = (),
    problems: Sequence[str] = (),
) -> RawBatch:
    """Builds a batch from good rows in the order of the file's sides.

    Args:
        shard: names the rows, and the order of the sides unless `swap` does.
        rows: n line numbers of the good rows.
        src, tgt: n strings each, first and second side of the file.
        score: n float32.
        languages: n canonical codes of the first and of the second side; the shard's where not given.
        swap: n flags: the second side is the source.
        rejects: (line, first side, second side, verdict) of the bad rows, in their order.
        problems: what goes with the batch.
    """
    n = rows.size
    if languages is None:
        assert shard.pair is not None
        languages = (pa.repeat(shard.pair[0], n), pa.repeat(shard.pair[1], n))
    if swap is None:
        src, tgt = (tgt, src) if shard.swap else (src, tgt)
    else:
        mask = pa.array(swap)
        src, tgt = pc.if_else(mask, tgt, src), pc.if_else(mask, src, tgt)
        first, second = languages
        languages = pc.if_else(mask, second, first), pc.if_else(mask, first, second)
    table = pa.Table.from_arrays(
        [
            src,
            tgt,
            languages[0],
            languages[1],
            pa.repeat(shard.source, n),
            pa.repeat(shard.shard, n),
            pa.array(rows),
            pa.nulls(n, pa.float32()) if score is None else score,
        ],
        schema=RAW_SCHEMA,
    )
    return RawBatch(table, rejected_rows(shard, rejects), list(problems))


def empty_batch(shard: Shard, problems: Sequence[str]) -> RawBatch:
    """A batch of no rows that carries problems."""
    return RawBatch(RAW_SCHEMA.empty_table(), rejected_rows(shard, ()), list(problems))


def rejected_rows(shard: Shard, rejects: Sequence[tuple[int, str | None, str | None, int]]) -> pa.Table:
    """The table of bad rows, `REJECT_SCHEMA`, from (line, first side, second side, verdict) each."""
    if not rejects:
        return REJECT_SCHEMA.empty_table()
    n = len(rejects)
    src, tgt = [], []
    for _, first, second, verdict in rejects:
        # A line that could not be parted stays in src; of an unpaired one the side is known.
        swap = shard.swap and (second is not None or verdict == UNPAIRED)
        src.append(second if swap else first)
        tgt.append(first if swap else second)
    pair = shard.pair or (None, None)
    return pa.Table.from_arrays(
        [
            pa.array(src, pa.string()),
            pa.array(tgt, pa.string()),
            pa.array([pair[0]] * n, pa.string()),
            pa.array([pair[1]] * n, pa.string()),
            pa.repeat(shard.source, n),
            pa.repeat(shard.shard, n),
            pa.array([reject[0] for reject in rejects], pa.int64()),
            pa.nulls(n, pa.float32()),
            pa.array([REASONS[reject[3] - 1] for reject in rejects], pa.string()),
        ],
        schema=REJECT_SCHEMA,
    )


class RowLanguages(NamedTuple):
    """What the languages that rows name come to.

    Attributes:
        languages: n canonical codes of the first and of the second side; null where `verdict` is not 0.
        swap: n flags: the second side is the canonical source.
        verdict: n int8: 0 good, LANGUAGE not a language, UNWANTED a pair that the recipe does not ask for.
    """

    languages: tuple[pa.Array[Any], pa.Array[Any]]
    swap: npt.NDArray[np.bool_]
    verdict: npt.NDArray[np.int8]


def row_languages(
    first: pa.Array[Any], second: pa.Array[Any], wanted: Sequence[tuple[str, str]] | None
) -> RowLanguages:
    """Labels rows by the codes that they name themselves (n strings each; null names none).

    Args:
        first, second: the codes of either side.
        wanted: the recipe's pairs; none asks for all. None stands for a whole table, whose sides are not swapped.
    """
    n = len(first)
    a, b = (side.fill_null("").dictionary_encode() for side in (first, second))
    left, right = a.dictionary.to_pylist(), b.dictionary.to_pylist()
    width = max(len(right), 1)
    keys = a.indices.to_numpy().astype(np.int64) * width + b.indices.to_numpy()
    unique, inverse = np.unique(keys, return_inverse=True)
    labels: list[tuple[str, str] | None] = []
    verdicts = np.zeros(unique.size, np.int8)
    for i, key in enumerate(unique.tolist()):
        codes = (left[key // width], right[key % width])
        pair = None
        if is_language(codes[0]) and is_language(codes[1]):
            pair = (explicit(codes[0]), explicit(codes[1])) if wanted is None else label(codes, wanted)
        if pair is None:
            verdicts[i] = UNWANTED if all(map(is_language, codes)) else LANGUAGE
        labels.append(pair)
    swaps = np.array([bool(pair and wanted is not None and order_pair(*pair) != pair) for pair in labels], np.bool_)
    places: Any = pa.array(inverse.reshape(n))
    sides = tuple(
        pa.array([None if pair is None else pair[side] for pair in labels], pa.string()).take(places) for side in (0, 1)
    )
    return RowLanguages((sides[0], sides[1]), swaps[inverse].reshape(n), verdicts[inverse].reshape(n))
