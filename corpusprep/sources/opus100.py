"""OPUS-100: the v1.0 tree of line pairs, and the hub's layout of Parquet files."""

from __future__ import annotations

import re
from collections.abc import Iterator

from corpusprep.errors import InputError
from corpusprep.sources.base import MAX_BYTES, MAX_ROWS, Found, RawBatch, Shard, Source, is_language, named_pair
from corpusprep.sources.columnar import read_parquet
from corpusprep.sources.files import Tree, find, printable, unpacked_name
from corpusprep.sources.settings import split_name
from corpusprep.sources.sides import LinePairSource, one_sided

_PARQUET = re.compile(r"^(train|validation|dev|test)(?:-\d+-of-\d+)?\.parquet$")
_LINES = re.compile(r"^opus\.(?P<pair>.+)-(?P<split>train|dev|valid|test)\.(?P<language>[A-Za-z0-9_-]+)$")


class Opus100Source(LinePairSource):
    """`{pair}/opus.{pair}-{split}.{language}` at any depth, .gz or not, or `{pair}/{split}-*.parquet`."""

    def _find(self) -> list[Found]:
        tree = find(self.settings.path)
        found = []
        sides: dict[tuple[str, str], dict[str, str]] = {}
        for name in tree.names:
            folder, _, last = name.rpartition("/")
            lines = _LINES.match(unpacked_name(last))
            if lines and is_language(lines["language"]):
                stem = unpacked_name(name).removesuffix("." + lines["language"])
                side = sides.setdefault((stem, lines["pair"]), {})
                side[lines["language"]] = min(name, side.get(lines["language"], name), key=len)
                continue
            parquet = _PARQUET.match(last)
            languages = named_pair((folder or tree.base).rpartition("/")[2]) if parquet else None
            if parquet and languages:
                files = (tree.path(name),)
                found.append(Found(name, files, languages, split_name(parquet[1]), members=languages))
        for (stem, pair), files_of in sides.items():
            found.append(self._line_pair(tree, stem, pair, files_of))
        return found

    def _line_pair(self, tree: Tree, stem: str, pair: str, files: dict[str, str]) -> Found:
        split = split_name(stem.rpartition("-")[2])
        languages = named_pair(pair)
        if languages and all(language in files for language in languages):
            return Found(stem, tuple(tree.path(files[language]) for language in languages), languages, split)
        if tree.single:  # one of the two files was named: the other stands beside it
            raise InputError(
                printable(self.settings.path),
                "it is one side of a line pair",
                "Name the folder that holds both sides",
            )
        return one_sided(self.settings, tree, stem, languages, split, files)

    def size(self, shard: Shard) -> int | None:
        if shard.files and shard.files[0].endswith(".parquet"):  # whose members are fields
            return Source.size(self, shard)
        return super().size(shard)

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        if shard.files and shard.files[0].endswith(".parquet"):
            return read_parquet(self.settings, shard, self._extent(shard, max_rows, max_bytes))
        return super().read(shard, max_rows=max_rows, max_bytes=max_bytes)
