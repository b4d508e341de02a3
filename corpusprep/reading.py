"""The first step of a run: shards that are new or have changed are read and go through the row-wise stages."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from corpusprep import passes
from corpusprep.context import Context, dump
from corpusprep.errors import InputError
from corpusprep.passes import Unit
from corpusprep.readahead import read_ahead
from corpusprep.sources import Shard, Source
from corpusprep.sources.texts import read_texts, texts_identity
from corpusprep.stages import dedup, langid
from corpusprep.store import Store, code_version, digest, file_digest, ready, user_code, versions

DECIDING = ("exact", "near", "max_distance", "scope", "keep", "clusters", "against")
"""Settings of dedup that follow the fingerprint, and so are no part of the first pass."""


def first_pass(run: Context, sources: list[tuple[Source, list[Shard]]]) -> list[Unit]:
    """Reads every shard whose parts are not all there, and makes those that are missing."""
    recipe, store = run.recipe, run.store
    evaluation = _evaluation(run, sources)
    settings_key = digest(
        code_version("sources", "clean", "langid", "dedup"),
        versions(),
        recipe.seed,
        [dump(stage) for stage in recipe.stage],
        user_code(*(stage.function for stage in recipe.stage), *recipe.clean.rules),
        dump(recipe.clean),
        dump(recipe.langid) | {"model": None},
        [file_digest(file) for file in langid.model_files(recipe.langid)] if recipe.langid.enabled else None,
        dump(recipe.dedup, *DECIDING) | {"form": recipe.dedup.keep == "form"} if recipe.dedup.enabled else None,
        evaluation.key,
    )
    units: list[Unit] = []
    todo: list[tuple[Source, Shard, str, str, tuple[int, int]]] = []
    for number, (source, shards) in enumerate(sources):
        for index, shard in enumerate(shards):
            # A shard of one pair is the same whatever other pairs the recipe names.
            pairs = shard.pair or source.settings.wanted()
            key = digest(settings_key, dump(source.settings, "path", "pairs"), pairs, source.identity(shard))
            name = f"{shard.source}-{digest(shard.shard, shard.split, shard.pair, [os.path.basename(f) for f in shard.files])[:16]}"
            marker = store.path("pass1", f"{name}.shard", key)
            if ready(marker):
                count = json.loads(marker.read_text(encoding="utf-8"))["units"]
                folders = [store.path("pass1", f"{name}-{i:05d}", key) for i in range(count)]
                if all(ready(folder / "unit.json") for folder in folders):
                    run.reuse("pass1", count)
                    units += [
                        passes.load_unit(f"{name}-{i:05d}", key, folder, shard.source, shard.shard, (number, index, i))
                        for i, folder in enumerate(folders)
                    ]
                    continue
            todo.append((source, shard, key, name, (number, index)))
    names = Counter(unit.name for unit in units) + Counter(name for _, _, _, name, _ in todo)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(twice[0], "two shards of this source bear one name", "Rename one of them")
    if todo:
        units += _read(run, todo, evaluation)
    return sorted(units, key=lambda unit: unit.rank)


def _read(
    run: Context, todo: Sequence[tuple[Source, Shard, str, str, tuple[int, int]]], evaluation: _Evaluation
) -> list[Unit]:
    store = run.store
    units: list[Unit] = []
    reading = {"shards": 0}
    counts: dict[str, int] = {}  # shards read to their end -> units
    done = Counter[str]()
    keys = {name: key for _, _, key, name, _ in todo}

    def mark(name: str) -> None:
        """Notes a shard as done as soon as all its units are, so that a later run need not read it."""
        if counts.get(name) == done[name]:
            scratch = store.scratch()
            scratch.write_text(json.dumps({"units": counts[name]}), encoding="utf-8")
            store.put(scratch, store.path("pass1", f"{name}.shard", keys[name]))

    def read(item: tuple[Source, Shard, str, str, tuple[int, int]]) -> Iterator[_Spooled | _End]:
        """Cuts a shard into batches and lays down those that are to be worked on."""
        source, shard, key, name, (number, index) = item
        count = 0
        for batch in source.read(shard):
            unit, rank = f"{name}-{count:05d}", (number, index, count)
            folder = store.path("pass1", unit, key)
            count += 1
            task = passes.RawBatchTask(
                unit, key, shard.source, shard.shard, rank, "", str(folder), str(store.scratch()), tuple(batch.problems)
            )
            there = ready(folder / "unit.json")
            yield _Spooled(task if there else replace(task, raw=_spool(batch, store)), there)
        yield _End(name, count)

    def tasks() -> Generator[passes.RawBatchTask]:
        # One reader keeps about ten workers busy; a shard has one, as a gzip file can be read from its beginning only.
        with contextlib.closing(read_ahead([partial(read, item) for item in todo], 1 + run.workers // 8)) as messages:
            for message in messages:
                if isinstance(message, _End):
                    reading["shards"] += 1
                    counts[message.name] = message.units
                    mark(message.name)
                    continue
                task, there = message
                if there:
                    run.reuse("pass1", 1)
                    folder = Path(task.folder)
                    units.append(passes.load_unit(task.name, task.key, folder, task.source, task.shard, task.rank))
                    done[task.name.rpartition("-")[0]] += 1
                    continue
                for problem in task.problems:
                    run.progress.say(f"warning: {problem}")
                yield task
                run.result.made["pass1"] = run.result.made.get("pass1", 0) + 1

    run.progress.start("read, clean, identify, fingerprint", None)
    setup = partial(passes.open_first_pass, run.recipe, evaluation.index())
    with contextlib.closing(tasks()) as made:  # nobody reads on after a failure
        for unit in run.engine.map(passes.run_first_pass, made, setup=setup):
            units.append(unit)
            shard_name = unit.name.rpartition("-")[0]
            done[shard_name] += 1
            mark(shard_name)
            shard = min(reading["shards"] + 1, len(todo))
            run.progress.advance(sum(unit.read.values()), f"shard {shard} of {len(todo)}")
    run.progress.end()
    return units


class _Spooled(NamedTuple):
    """A batch that is laid down for a worker, or whose unit is there already."""

    task: passes.RawBatchTask
    there: bool


class _End(NamedTuple):
    """A shard was read to its end."""

    name: str
    units: int


def _evaluation(run: Context, sources: list[tuple[Source, list[Shard]]]) -> _Evaluation:
    settings = run.recipe.dedup
    shards = [(source, shard) for source, _ in sources for shard in source.evaluation()] if settings.enabled else []
    return _Evaluation(settings, shards)


@dataclass
class _Evaluation:
    """Evaluation text to protect against: its key is cheap, its index is built only where rows are to be checked."""

    settings: dedup.DedupSettings
    shards: list[tuple[Source, Shard]]

    @property
    def key(self) -> str:
        if not self.settings.enabled:
            return ""
        identities = [
            (source.identity(shard), shard.pair, dump(source.settings, "path", "pairs", "on_error"))
            for source, shard in self.shards
        ]
        return digest(texts_identity(self.settings.against), identities)

    def index(self) -> dedup.EvaluationIndex | None:
        if not self.settings.enabled or not (self.shards or self.settings.against):
            return None
        texts: list[Any] = list(read_texts(self.settings.against))
        for source, shard in self.shards:
            for batch in source.read(shard):
                if batch.rejected.num_rows:  # what is not read is not protected
                    row = batch.rejected["row"][0].as_py()
                    raise InputError(
                        ", ".join(shard.files), f"is evaluation text that cannot be read ({batch.rejected['reason'][0]})",
                        "Mend it, or set protect = false for this source", row,
                    )  # fmt: skip
                if batch.table.num_rows:
                    texts.append((batch.table["src"], batch.table["tgt"]))
        return dedup.EvaluationIndex.from_texts(texts, self.settings)


def _spool(batch: Any, store: Store) -> str:
    """Writes a raw batch for a worker: its rows, and those that the reader rejected with their reason."""
    schema = batch.table.schema.append(pa.field("reason", pa.string()))
    table = batch.table.append_column("reason", pa.nulls(batch.table.num_rows, pa.string()))
    rejected = batch.rejected
    both = pa.concat_tables([table.cast(schema), rejected.select(schema.names).cast(schema)])
    path = store.scratch(".arrow")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(both)
    return str(path)
