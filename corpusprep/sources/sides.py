"""Line pairs: the first side in one file, the second in another."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from zipfile import ZipInfo

import numpy as np

from corpusprep.errors import InputError
from corpusprep.sources import base
from corpusprep.sources.base import MAX_BYTES, MAX_ROWS, RawBatch, Shard, Source
from corpusprep.sources.files import Tree, blocks, printable
from corpusprep.sources.lines import LineCutter, Lines, check_text, decode, fit, gather
from corpusprep.sources.remedies import or_keep
from corpusprep.sources.settings import SourceSettings
from corpusprep.sources.zips import zip_blocks, zip_members


class LinePairSource(Source):
    """A source whose shards are two files, or two members of a zip, with a line a row."""

    has_first_side = False

    def __init__(self, settings: SourceSettings, whole: bool = False) -> None:
        super().__init__(settings, whole)
        self._zips: dict[str, dict[str, ZipInfo]] = {}  # path -> members

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        problems = list(shard.lost)
        if len(self._names(shard)) < 2:
            yield base.empty_batch(shard, problems)
            return
        keep = self.settings.on_error == "keep"
        limit = self._extent(shard, max_rows, max_bytes).limit
        sides = [LineCutter(stream, keep=keep, problems=problems) for stream in self._streams(shard, keep)]
        while limit is None or sides[0].row < limit:
            wanted = max_rows if limit is None else min(max_rows, limit - sides[0].row)
            count = min(wanted, *(side.fill(wanted, max_bytes) for side in sides))
            if count == 0:
                break
            lines = [side.lines(count) for side in sides]
            count = fit(lines, max_bytes) if count > 1 else count
            batch = _pair_up(shard, [side.lines(count) for side in sides], problems)
            problems.clear()
            for side in sides:
                side.drop(count)
            yield batch
        else:
            return
        yield from self._surplus(shard, sides, max_rows, max_bytes, problems)

    def size(self, shard: Shard) -> int | None:
        if not shard.members:
            return super().size(shard)
        try:
            return sum(self._member(shard.files[0], member).compress_size for member in shard.members)
        except InputError:  # reading it says what is wrong
            return None

    def _member(self, path: str, member: str) -> ZipInfo:
        if path not in self._zips:
            self._zips[path] = zip_members(path)
        try:
            return self._zips[path][member]
        except KeyError:
            name = f"{printable(path)}, member {printable(member)}"
            raise InputError(name, "it is no longer in the zip", "Start again") from None

    def _names(self, shard: Shard) -> list[str]:
        if shard.members:
            return [f"{shard.files[0]}/{member}" for member in shard.members]
        return list(shard.files)

    def _streams(self, shard: Shard, keep: bool) -> list[Iterator[bytes]]:
        if shard.members:
            path = shard.files[0]
            return [zip_blocks(path, self._member(path, member), salvage=keep) for member in shard.members]
        return [blocks(path, salvage=keep) for path in shard.files]

    def _surplus(
        self, shard: Shard, sides: list[LineCutter], max_rows: int, max_bytes: int, problems: list[str]
    ) -> Iterator[RawBatch]:
        """What is left when one side has ended: nothing, an error, or lines to reject."""
        names = [printable(name) for name in self._names(shard)]
        rows = sides[0].row
        left = [side.fill(max_rows, max_bytes) for side in sides]
        if not any(left):
            if rows == 0 and not problems:
                problems.append(f"{names[0]}: it is empty.")
            if problems:
                yield base.empty_batch(shard, problems)
            return
        longer = 0 if left[0] else 1
        if self.settings.on_error == "stop":
            total = rows + sides[longer].count_rest()
            raise InputError(
                names[longer],
                f"it has {total} lines and its other side, {names[1 - longer]}, has {rows}",
                ("Fetch both again", or_keep("to read the lines that both have")),
                rows,
            )
        limit = self._extent(shard, max_rows, max_bytes).limit
        while count := sides[longer].fill(max_rows, max_bytes):
            if limit is not None:
                count = min(count, limit - sides[longer].row)
            count = min(count, max_rows)
            if count <= 0:
                break
            lines = sides[longer].lines(count)
            count = fit([lines], max_bytes)
            texts = [decode(lines.data, lines.starts[i], lines.ends[i]) for i in range(min(count, lines.starts.size))]
            rejects = [
                (
                    lines.first + i,
                    None if longer else text,
                    text if longer else None,
                    lines.spoilt.get(i, base.UNPAIRED),
                )
                for i, text in enumerate(texts)
            ]
            sides[longer].drop(len(texts))
            ended = sides[longer].fill(1, 0) == 0
            if ended:
                problems.append(
                    f"{names[longer]}: it has {sides[longer].row} lines and its other side, {names[1 - longer]}, has "
                    f"{rows}; the lines beyond are rejected."
                )
            none = np.empty(0, np.int64)
            empty = gather(lines.data, none, none)
            yield base.make_batch(shard, none, empty, empty, rejects=rejects, problems=problems)
            problems.clear()


def _pair_up(shard: Shard, sides: list[Lines], problems: list[str]) -> RawBatch:
    """A batch from as many lines of either side."""
    first = sides[0]
    verdict = np.zeros(first.starts.size, np.int8)
    for side in sides:
        for i, reason in side.spoilt.items():
            verdict[i] = reason
    for side in sides:
        check_text(side.data, side.starts, side.ends, verdict)
    rows = np.arange(first.first, first.first + verdict.size)
    rejects: list[tuple[int, str | None, str | None, int]] = []
    if verdict.any():
        for i in np.flatnonzero(verdict).tolist():
            texts = [decode(side.data, side.starts[i], side.ends[i]) for side in sides]
            rejects.append((first.first + i, texts[0], texts[1], int(verdict[i])))
        good = verdict == 0
        rows = rows[good]
        sides = [side._replace(starts=side.starts[good], ends=side.ends[good]) for side in sides]
    texts_ = [gather(side.data, side.starts, side.ends) for side in sides]
    return base.make_batch(shard, rows, texts_[0], texts_[1], rejects=rejects, problems=problems)


def one_sided(
    settings: SourceSettings,
    tree: Tree,
    stem: str,
    languages: tuple[str, str] | None,
    split: str,
    sides: Mapping[str, str],
) -> base.Found:
    """A line pair of which a side is missing: a shard of no rows that says so.

    Raises:
        InputError: the settings say to stop.
    """
    names = ", ".join(sorted(printable(tree.path(name)) for name in sides.values()))
    error = InputError(
        names,
        f"the other side of the line pair {printable(posixpath.basename(stem))} is missing",
        ("Fetch it", or_keep("to go on without the pair")),
    )
    if settings.on_error == "stop" and split in settings.splits:
        wanted = settings.wanted()
        if not wanted or (languages and base.label(languages, wanted)):
            raise error
    files = tuple(tree.path(name) for name in sorted(sides.values()))[:1]
    return base.Found(stem, files, languages, split, lost=(f"{error.file}: {error.problem}.",))
