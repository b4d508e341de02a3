"""JSON lines: one record a line, flat or with a `translation` of two languages."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.errors import InputError
from corpusprep.sources._json_kernel import ABSENT, scan, unescape
from corpusprep.sources.base import (
    COLUMNS,
    ENCODING,
    JSON,
    LANGUAGE,
    MAX_BYTES,
    MAX_ROWS,
    NUL,
    SCORE,
    Found,
    RawBatch,
    Shard,
    Source,
    empty_batch,
    is_language,
    label,
    make_batch,
    pair_in_path,
    pair_name,
    row_languages,
)
from corpusprep.sources.delimited import numbers
from corpusprep.sources.files import blocks, printable, unpacked_name
from corpusprep.sources.lines import LineCutter, Lines, as_buffer, batches_of, check_text, decode, head
from corpusprep.sources.record_tables import RecordTables
from corpusprep.sources.remedies import LANGUAGES, OR_NAME_LANGUAGES
from corpusprep.sources.settings import SourceSettings, split_in_path
from corpusprep.sources.whole import finite, shadowed, whole_batch
from corpusprep.stage import PAIR_COLUMNS

_SUFFIXES = (".jsonl", ".ndjson", ".json")
_NO_KEY = "\0"
_SHALLOW = 32  # brackets of a line that cannot be nested too deeply


class Fields(NamedTuple):
    """The keys of a record: of either side's text, of the codes where records name their own (None for one that they do not),
    of a score, and of the object that holds the two texts, if one does."""

    first: str
    second: str
    languages: tuple[str | None, str | None] | None
    score: str
    outer: str | None


class JsonlSource(Source):
    """`.jsonl`, `.ndjson` and `.json` files with a record a line, packed or not."""

    def _find(self) -> list[Found]:
        tree = self._tree()
        found = []
        for name in tree.names:
            if not tree.single and not unpacked_name(name).endswith(_SUFFIXES):
                continue
            path = tree.path(name)
            split = self.settings.splits[0] if tree.single else split_in_path(name)
            pairs = self._languages(path, name, tree.single)
            for languages, members in pairs:
                shard = pair_name(name, languages, len(pairs))
                found.append(Found(shard, (path,), languages, split, members))
        return found

    def _languages(self, path: str, name: str, single: bool) -> list[tuple[tuple[str, str] | None, tuple[str, ...]]]:
        settings = self.settings
        records = _sample(path)
        pairs = translation_pairs(settings, [_translation(settings, record) for record in records])
        if pairs:
            return [(pair, pair) for pair in pairs]
        where = path if "/" not in name else name
        if self.whole:
            if not records:
                return [(None, ())]
            told = self._told(_named(settings, records), where)
            if not told and (single or not unpacked_name(name).endswith(".json")):
                raise InputError(printable(path), "nothing tells its languages", _NO_LANGUAGES)
            return [(pair, ()) for pair in told]
        if settings.src_lang is not None and settings.tgt_lang is not None:
            return [((settings.src_lang, settings.tgt_lang), ())]
        columns = settings.columns
        keys = columns.get("src_lang", "src_lang"), columns.get("tgt_lang", "tgt_lang")
        if not records or any(all(key in record for key in keys) for record in records):
            return [(None, ())]
        languages = pair_in_path(where)
        if languages is None:
            if not single and unpacked_name(name).endswith(".json"):
                return []  # such files stand beside data sets too
            raise InputError(printable(path), "nothing tells its languages", _NO_LANGUAGES)
        return [(languages, ())]

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        keep = self.settings.on_error == "keep"
        problems = list(shard.lost)
        cutter = LineCutter(blocks(shard.files[0], salvage=keep), keep=keep, problems=problems)
        file = printable(shard.files[0])
        if not head(cutter, 1).starts.size:
            yield self._empty(shard, problems or [f"{file}: it is empty."])
            return
        records = [record for record in map(parse, _raw(head(cutter, 100, 1 << 20))) if isinstance(record, dict)]
        if not records:
            problems.append(f"{file}: no line at its head is a JSON object.")
        fields = _fields(self.settings, shard, records if self.whole else None)
        tables = RecordTables(file) if self.whole else None
        if self.whole:
            problems += shadowed([key for record in records for key in record], _taken(fields), file)
        for lines in batches_of(cutter, self._extent(shard, max_rows, max_bytes)):
            batch = _batch(shard, lines, fields, self.settings, problems, tables)
            problems.clear()
            yield batch
        if problems:
            yield self._empty(shard, problems)

    def _empty(self, shard: Shard, problems: list[str]) -> RawBatch:
        if self.whole:
            return whole_batch(shard, {}, self.settings, problems=problems)
        return empty_batch(shard, problems)


_NO_LANGUAGES = ("Name the file as in en-sw.jsonl, give ", LANGUAGES, *OR_NAME_LANGUAGES)


def _sample(path: str) -> list[dict[str, Any]]:
    """The records at the head of a file; none where it cannot be read, which reading will meet again and say."""
    cutter = LineCutter(blocks(path, look=True), keep=True, problems=[])
    lines = head(cutter, 100, 1 << 20)
    return [record for record in map(parse, _raw(lines)) if isinstance(record, dict)]


def _raw(lines: Lines) -> list[bytes]:
    spans = zip(lines.starts.tolist(), lines.ends.tolist(), strict=True)
    return [lines.data[start:end].tobytes() for start, end in spans]


def parse(line: bytes) -> Any:
    """What a line holds, or None where it is not JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _translation(settings: SourceSettings, record: dict[str, Any]) -> list[str] | None:
    """The languages of a record's `translation`, or None where it is flat."""
    if "src" in settings.columns or settings.columns.get("src", "src") in record:
        return None
    inner = record.get(str(settings.columns.get("translation", "translation")))
    return [key for key in inner if is_language(key)] if isinstance(inner, dict) else None


def translation_pairs(settings: SourceSettings, languages: list[list[str] | None]) -> list[tuple[str, str]]:
    """The pairs to read from a `translation`: the two languages that it has, or of many those that are asked for.

    Args:
        languages: the keys of each record's translation; None for a flat record.
    """
    known = list(dict.fromkeys(key for keys in languages if keys for key in keys))
    pairs = list(itertools.combinations(known, 2))
    if len(pairs) <= 1:
        return pairs
    wanted = settings.wanted()
    return [pair for pair in pairs if wanted and label(pair, wanted)] or pairs


def _keys(settings: SourceSettings) -> tuple[str, str]:
    """The keys of the two languages."""
    return str(settings.columns.get("src_lang", "src_lang")), str(settings.columns.get("tgt_lang", "tgt_lang"))


def _named(settings: SourceSettings, records: list[dict[str, Any]]) -> tuple[bool, bool]:
    """Which of the two languages records name."""
    src, tgt = _keys(settings)
    return any(src in record for record in records), any(tgt in record for record in records)


def _fields(settings: SourceSettings, shard: Shard, whole: list[dict[str, Any]] | None) -> Fields:
    """The keys that a shard is read by.

    Args:
        whole: for a whole table, the records at its head.
    """
    columns = {field: str(column) for field, column in settings.columns.items()}
    score = columns.get("score", "score")
    if whole and "score" not in columns and 2 * sum(_is_number(record.get(score)) for record in whole) < len(whole):
        score = _NO_KEY  # most are text: it is no score
    if shard.members:
        return Fields(shard.members[0], shard.members[1], None, score, columns.get("translation", "translation"))
    languages: tuple[str | None, str | None] | None = None
    if shard.pair is None:
        languages = _keys(settings)
        if whole is not None:  # the settings name a language where the file does not
            named, given = _named(settings, whole), (settings.src_lang, settings.tgt_lang)
            languages = (
                languages[0] if named[0] or given[0] is None else None,
                languages[1] if named[1] or given[1] is None else None,
            )
    return Fields(columns.get("src", "src"), columns.get("tgt", "tgt"), languages, score, None)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _taken(fields: Fields) -> dict[str, str]:
    """The keys that hold the columns of every table."""
    keys = {"src": fields.first, "tgt": fields.second}
    if fields.score != _NO_KEY:
        keys["score"] = fields.score
    if fields.outer is not None:
        keys |= dict.fromkeys(PAIR_COLUMNS, fields.outer)
    codes = zip(("src_lang", "tgt_lang"), fields.languages or (), strict=False)
    return keys | {name: key for name, key in codes if key is not None}


def _scan(
    lines: Lines, fields: Fields
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Spans (begin and end) and kinds of first, second, score and the two codes in each line, and which lines the
    kernel has read."""
    names = [fields.first, fields.second, fields.score, *(key for key in fields.languages or () if key is not None)]
    encoded = [(fields.outer or _NO_KEY).encode(), *(name.encode("utf-8", "surrogatepass") for name in names)]
    ends = np.cumsum([len(name) for name in encoded])
    levels = np.zeros(len(names), np.int8)
    levels[:2] = int(fields.outer is not None)
    n = lines.starts.size
    begins, finishes = np.empty((n, len(names)), np.int64), np.empty((n, len(names)), np.int64)
    kinds, sure = np.empty((n, len(names)), np.int8), np.empty(n, np.bool_)
    packed = np.frombuffer(b"".join(encoded), np.uint8)
    scan(lines.data, lines.starts, lines.ends, packed, ends, levels, 2, begins, finishes, kinds, sure)
    required = [0, 1, *range(3, len(names))]
    sure &= (kinds[:, required] != ABSENT).all(axis=1)
    return begins, finishes, kinds, sure


class _Slow(NamedTuple):
    """What Python makes of one line; texts and codes are those of a bad line too, as far as they are known."""

    texts: tuple[str, str | None]
    codes: tuple[str, str]
    score: float | None
    verdict: int


def _slow(line: bytes, fields: Fields) -> _Slow:
    """Reads one line with Python."""
    whole = line.decode("utf-8", "replace")
    record = parse(line)
    if not isinstance(record, dict):
        return _Slow((whole, None), ("", ""), None, JSON)
    inner = record if fields.outer is None else record.get(fields.outer)
    if not isinstance(inner, dict) or fields.first not in inner or fields.second not in inner:
        return _Slow((whole, None), ("", ""), None, COLUMNS)
    values = ["" if inner[key] is None else inner[key] for key in (fields.first, fields.second)]
    if not all(isinstance(value, str) for value in values):
        return _Slow((whole, None), ("", ""), None, COLUMNS)
    texts = [value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for value in values]
    verdict = 0
    codes = ("", "")
    if fields.languages is not None:
        named = ["" if key is None else record.get(key) for key in fields.languages]
        codes = (str(named[0]), str(named[1]))
        pairs = zip(fields.languages, named, strict=True)
        sound = all(key is None or (isinstance(code, str) and is_language(code)) for key, code in pairs)
        verdict = 0 if sound else LANGUAGE
    number = record.get(fields.score)
    score = None
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        try:
            score = None if math.isnan(number) else float(number)
        except OverflowError:
            score = math.inf
        with np.errstate(over="ignore"):
            if score is not None and not np.isfinite(np.float32(score)):
                verdict = verdict or SCORE
    elif number is not None:
        verdict = verdict or SCORE
    if any("\0" in text for text in texts):
        verdict = NUL
    if texts != values:
        verdict = ENCODING
    return _Slow((texts[0], texts[1]), codes, score, verdict)


def _texts(lines: Lines, begins: Any, finishes: Any, kinds: Any) -> tuple[pa.Array[Any], npt.NDArray[np.bool_]]:
    """Strings without their escapes, and which of them hold NUL."""
    n = len(begins)
    begins, finishes, kinds = (np.ascontiguousarray(each) for each in (begins, finishes, kinds))
    buffer = pa.allocate_buffer(int((finishes - begins).sum()))
    out = np.frombuffer(memoryview(buffer), np.uint8) if buffer.size else np.empty(0, np.uint8)
    places = np.empty(n + 1, np.int64)
    unescape(lines.data, begins, finishes, kinds, out, places)
    out = out[: places[n]]
    nul = np.zeros(n, np.bool_)
    if out.size and out.min() == 0:
        nul[np.searchsorted(places, np.flatnonzero(out == 0), "right") - 1] = True
    offsets = as_buffer(places.astype(np.int32))  # a batch is far below 2 GiB
    return pa.Array.from_buffers(pa.string(), n, [None, offsets, buffer]), nul


def _batch(
    shard: Shard,
    lines: Lines,
    fields: Fields,
    settings: SourceSettings,
    problems: list[str],
    tables: RecordTables | None,
) -> RawBatch:
    n = lines.starts.size
    verdict = np.zeros(n, np.int8)
    for i, reason in lines.spoilt.items():
        verdict[i] = reason
    check_text(lines.data, lines.starts, lines.ends, verdict)
    broken = verdict != 0
    begins, finishes, kinds, sure = _scan(lines, fields)
    sure &= ~broken
    slow_rows = np.flatnonzero(~sure & ~broken)
    slow = [_slow(lines.data[lines.starts[i] : lines.ends[i]].tobytes(), fields) for i in slow_rows.tolist()]
    begins[~sure], finishes[~sure] = 0, 0

    values, state = numbers(lines.data, begins[:, 2], finishes[:, 2])
    scores = np.where(state == 0, values, np.nan).astype(np.float32)
    verdict[sure & (state == 2)] = SCORE
    sides = []
    for side in (0, 1):
        texts, nul = _texts(lines, begins[:, side], finishes[:, side], kinds[:, side])
        verdict[sure & nul] = NUL
        sides.append(texts)
    for i, each in zip(slow_rows.tolist(), slow, strict=True):
        verdict[i] = each.verdict
        scores[i] = np.nan if each.score is None or each.verdict == SCORE else each.score
    sides = [_patch(sides[side], slow_rows, [each.texts[side] for each in slow]) for side in (0, 1)]

    table, read = pa.table({}), np.flatnonzero(verdict == 0)
    if tables is not None:
        shallow = all(_brackets(lines, i) <= _SHALLOW for i in slow_rows.tolist())
        table, unread = tables.read(lines, read, shallow)
        for i, reason in unread.items():
            verdict[i] = reason
        read = np.setdiff1d(read, list(unread)) if unread else read
        _refuse_late_languages(table, fields, settings, printable(shard.files[0]), lines.first + read)

    languages: tuple[pa.Array[Any], pa.Array[Any]] | None = None
    swap: npt.NDArray[np.bool_] | None = None
    if fields.languages is not None:
        named: list[Any] = []
        place = 3
        for side, given in enumerate((settings.src_lang, settings.tgt_lang)):
            if fields.languages[side] is None:
                named.append(pa.repeat(pa.scalar(given, pa.string()), n))
                continue
            codes, _ = _texts(lines, begins[:, place], finishes[:, place], kinds[:, place])
            named.append(_patch(codes, slow_rows, [_encodable(each.codes[side]) for each in slow]))
            place += 1
        sound = pa.array(verdict == 0)
        wanted = None if tables is not None else settings.wanted()
        labels = row_languages(named[0].filter(sound), named[1].filter(sound), wanted)
        verdict[verdict == 0] = labels.verdict
        chosen = pa.array(labels.verdict == 0)
        languages = (labels.languages[0].filter(chosen), labels.languages[1].filter(chosen))
        swap = labels.swap[labels.verdict == 0]

    rejects: list[tuple[int, str | None, str | None, int]] = []
    for i in np.flatnonzero(verdict > 0).tolist():
        if broken[i]:
            first, second = decode(lines.data, lines.starts[i], lines.ends[i]), None
        else:
            first, second = sides[0][i].as_py(), sides[1][i].as_py()
        rejects.append((lines.first + i, first, second, int(verdict[i])))
    rows = np.arange(lines.first, lines.first + n)
    if verdict.any():
        good = verdict == 0
        mask = pa.array(good)
        rows, scores, sides = rows[good], scores[good], [side.filter(mask) for side in sides]
    if tables is not None:
        table = table if (verdict[read] == 0).all() else table.filter(pa.array(verdict[read] == 0))
        arrays = _whole(table, fields, sides, languages)
        return whole_batch(shard, arrays, settings, rejects=rejects, problems=problems)
    score = pa.array(scores, mask=np.isnan(scores))
    return make_batch(
        shard, rows, *sides, score=score, languages=languages, swap=swap, rejects=rejects, problems=problems
    )


def _refuse_late_languages(
    table: pa.Table, fields: Fields, settings: SourceSettings, file: str, rows: npt.NDArray[np.int64]
) -> None:
    """Raises an InputError if a record names a language that the records at the head do not: it must not be overwritten."""
    for key in _keys(settings):
        late = fields.outer is None and key in table.column_names and key not in (fields.languages or ())
        if late and table[key].null_count < table.num_rows:
            row = int(rows[np.flatnonzero(table[key].is_valid().to_numpy())[0]])
            problem = f"it names its language in {key!r}, which the first records of the file do not"
            raise InputError(file, problem, "Give all records that field, or none", row)


def _brackets(lines: Lines, i: int) -> int:
    line = lines.data[lines.starts[i] : lines.ends[i]].tobytes()
    return line.count(b"[") + line.count(b"{")


def _whole(
    table: pa.Table, fields: Fields, sides: list[pa.Array[Any]], languages: tuple[pa.Array[Any], pa.Array[Any]] | None
) -> dict[str, Any]:
    """The columns of a whole table, in the order of its fields.

    Args:
        table: n records.
        fields: the keys of what `sides` and `languages` hold.
    """
    taken = _taken(fields)
    found: dict[str, Any] = dict(zip(PAIR_COLUMNS, (*sides, *(languages or ())), strict=False))
    columns: dict[str, Any] = {}
    for name in table.column_names:
        held = [field for field, key in taken.items() if key == name]
        for field in held:
            if field == "score":
                columns[field] = finite(table[name])
            elif field in found:
                columns[field] = found[field]
        if not held and name not in (*taken, *PAIR_COLUMNS):
            columns[name] = table[name]
    return {**columns, **{field: found[field] for field in found if field not in columns}}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _patch(column: pa.Array[Any], rows: npt.NDArray[np.int64], texts: list[str | None]) -> pa.Array[Any]:
    """The column with other texts in some rows."""
    if not rows.size:
        return column
    take = np.arange(len(column))
    take[rows] = len(column) + np.arange(rows.size)
    patched: pa.Array[Any] = pa.concat_arrays([column, pa.array(texts, column.type)]).take(pa.array(take))
    return patched
