"""Any data set that `datasets.load_dataset` opens, streamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from corpusprep.errors import InputError
from corpusprep.sources.base import MAX_BYTES, MAX_ROWS, Found, RawBatch, Shard, Source, label, named_pair, pair_name
from corpusprep.sources.columnar import flatten, languages_of, layout, read_tables
from corpusprep.sources.files import find, identity, local, printable
from corpusprep.sources.settings import split_name

_PIECE = 4096


class HubSource(Source):
    """A data set by name or folder: each split of each configuration is a shard.

    Without `config`, a data set that has a configuration for each language pair is read through those that are asked
    for.
    """

    def _find(self) -> list[Found]:
        found = []
        for config in self._configs():
            for split in self._ask(f"splits of {config or 'its configuration'}", _splits, self.settings.path, config):
                table = next(iter(self._tables(config, split, 1)), None)
                shard = f"{config}/{split}" if config else split
                members = (config or "", split)
                if table is None:
                    lost = (f"{printable(self.settings.path)}, split {split}: it is empty.",)
                    found.append(Found(shard, (self.settings.path,), None, split_name(split), lost=lost))
                    continue
                file = f"{printable(self.settings.path)}, split {split}"
                where = f"{self.settings.path}/{config or ''}"
                pairs = languages_of(table.schema, self.settings, file, f"{where}/.")
                for languages, fields in pairs:
                    name, files = pair_name(shard, languages, len(pairs)), (self.settings.path,)
                    found.append(Found(name, files, languages, split_name(split), (*members, *fields)))
        return found

    def _configs(self) -> list[str | None]:
        settings = self.settings
        if settings.config is not None:
            return [settings.config]
        names: list[str] = self._ask("configurations", _configs, settings.path)
        if len(names) <= 1:
            return [names[0] if names and names[0] != "default" else None]
        wanted = settings.wanted()
        pairs = {name: named_pair(name) for name in names}
        chosen = [name for name, pair in pairs.items() if pair and (not wanted or label(pair, wanted))]
        if chosen:
            return list(chosen)
        raise InputError(
            printable(settings.path),
            f"it has {len(names)} configurations: {', '.join(names[:20])}",
            f'Choose one, as in config = "{names[0]}"',
        )

    def _ask(self, what: str, question: Any, *args: Any) -> Any:
        """An answer of the `datasets` library, or its complaint as an InputError."""
        try:
            return question(*args)
        except Exception as error:  # its errors, its clients' and the file readers' have no base in common
            raise _refused(printable(self.settings.path), what, error) from None

    def _tables(self, config: str | None, split: str, size: int) -> Iterator[pa.Table]:
        path = printable(self.settings.path)
        stream = self._ask(f"split {split}", _load, self.settings.path, config, split, size)
        row = 0
        while True:
            try:
                table = next(stream, None)
            except Exception as error:
                raise _refused(path, f"split {split}", error, row) from None
            if table is None:
                return
            row += table.num_rows
            yield table

    def read(self, shard: Shard, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Iterator[RawBatch]:
        config, split = (*shard.members, "", "")[:2]
        file = f"{printable(self.settings.path)}, split {split or shard.split}"
        plain = Shard(
            shard.source, shard.shard, shard.files, shard.pair, shard.split, shard.swap, shard.members[2:], shard.lost
        )

        def tables(problems: list[str]) -> Iterator[pa.Table]:
            if not split:
                return
            row = 0
            for table in self._tables(config or None, split, _PIECE):
                yield flatten(table, layout(table.schema, self.settings, file, plain), row)
                row += table.num_rows

        return read_tables(tables, self.settings, plain, file, self._extent(shard, max_rows, max_bytes))

    def size(self, shard: Shard) -> int | None:
        return None

    def identity(self, shard: Shard) -> str:
        """For a folder the identity of its files; for a name that of the version on the hub."""
        if os.path.exists(local(self.settings.path)):
            tree = find(self.settings.path)
            return identity(tree.path(name) for name in tree.names)
        version = self._ask(
            "version", _version, self.settings.path, (shard.members[0] if shard.members else "") or None
        )
        return hashlib.blake2b(version.encode(), digest_size=16).hexdigest()


def _configs(path: str) -> list[str]:
    import datasets

    return list(datasets.get_dataset_config_names(path))


def _splits(path: str, config: str | None) -> list[str]:
    import datasets

    return [str(split) for split in datasets.get_dataset_split_names(path, config)]


def _load(path: str, config: str | None, split: str, size: int) -> Iterator[pa.Table]:
    import datasets

    data = datasets.load_dataset(path, name=config, split=split, streaming=True)
    return iter(data.with_format("arrow").iter(batch_size=size))


def _version(path: str, config: str | None) -> str:
    import datasets

    builder = datasets.load_dataset_builder(path, name=config)
    return f"{builder.hash} {builder.config.name} {builder.config.version}"


def _refused(path: str, what: str, error: Exception, row: int | None = None) -> InputError:
    """The complaint of the `datasets` library, with what to do about it."""
    kind, text = type(error).__name__, (str(error).splitlines() or [""])[0].rstrip(".")
    if "Gated" in kind or "401" in text or "403" in text:
        problem = "it is gated: it asks for consent and an account"
        remedy = "Accept its terms on its page and run `hf auth login`, or fetch its files and name the folder"
    elif ("NotFound" in kind or isinstance(error, FileNotFoundError)) and not os.path.exists(local(path)):
        problem = "there is no such data set on the hub, or no such folder"
        remedy = "Check the name, as in Helsinki-NLP/opus-100, and that you have access if it is private"
    elif "Offline" in kind or isinstance(error, ConnectionError):
        problem = "the hub cannot be reached"
        remedy = "Check the network, or fetch the data set's files elsewhere and name their folder"
    else:
        problem = f"its {what} cannot be read ({kind}: {text})"
        remedy = "Check the data set with datasets.load_dataset, or fetch its files and name their folder"
    return InputError(path, problem, remedy, row)
