"""Parquet files, flat or with a struct column `translation`."""

from __future__ import annotations

from collections.abc import Iterator

from corpusprep.errors import InputError
from corpusprep.sources.base import MAX_BYTES, MAX_ROWS, Found, RawBatch, Shard, Source, pair_name
from corpusprep.sources.columnar import languages_of, open_parquet, read_parquet
from corpusprep.sources.files import open_binary, printable
from corpusprep.sources.settings import split_in_path


class ParquetSource(Source):
    """`.parquet` files."""

    def _find(self) -> list[Found]:
        tree = self._tree()
        found = []
        for name in tree.names:
            if not tree.single and not name.endswith((".parquet", ".pq")):
                continue
            path = tree.path(name)
            split = self.settings.splits[0] if tree.single else split_in_path(name)
            file = printable(path)
            try:
                with open_binary(path) as stream:
                    schema = open_parquet(stream, file).schema_arrow
            except InputError:
                if self.settings.on_error == "stop":
                    raise
                found.append(Found(name, (path,), None, split))  # reading meets the error again and says so
                continue
            where = path if "/" not in name else name
            pairs = languages_of(schema, self.settings, file, where, self._told if self.whole else None)
            for languages, members in pairs:
                shard = pair_name(name, languages, len(pairs))
                found.append(Found(shard, (path,), languages, split, members))
        return found

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        return read_parquet(self.settings, shard, self._extent(shard, max_rows, max_bytes), self.whole)
