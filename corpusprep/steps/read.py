"""Step 1: shards that are new or have changed are read, batch by batch, and go through the stages that judge each row by itself.

A reader cuts a shard into batches and writes each batch to a file. A worker reads that file and writes a unit: a folder with one
part per language pair, and the rejects.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.arrow import count_values, join, row_keys
from corpusprep.errors import CorpusprepError, InputError, RunError
from corpusprep.keys import code_digest, digest, file_digest, user_code, versions
from corpusprep.parts import Part, Unit, pair_column
from corpusprep.sources.read_ahead import read_ahead
from corpusprep.sources.texts import read_texts, texts_identity
from corpusprep.stage import Outcome, load_function
from corpusprep.stages import clean, langid
from corpusprep.stages.dedup import rows as dedup_rows
from corpusprep.store import Store, commit, ready, write_table

if TYPE_CHECKING:
    from corpusprep.derive import Run
    from corpusprep.recipe import Recipe, UserStage
    from corpusprep.sources import RawBatch, Shard, Source
    from corpusprep.stages.dedup import DedupSettings

Dropped = Counter[tuple[str, str, str]]
"""(stage, pair, reason) -> rows."""

_DECIDING = ("exact", "near", "max_distance", "scope", "keep", "clusters", "against")
"""Settings of dedup that follow the fingerprint, and so are no part of this step."""


@dataclass(frozen=True)
class Reading:
    """A shard that is to be read: its unit names begin with `name`, and its parts bear `key`."""

    source: Source
    shard: Shard
    key: str
    name: str
    rank: tuple[int, int]


def read(run: Run, sources: list[tuple[Source, list[Shard]]]) -> list[Unit]:
    """Reads every shard that has units missing, and makes these; returns all units in rank order."""
    store = run.store
    evaluation = _evaluation(run, sources)
    common = _common_key(run.recipe, evaluation)
    units: list[Unit] = []
    todo: list[Reading] = []
    for number, (source, shards) in enumerate(sources):
        settings = source.settings.model_dump(mode="json", exclude={"path", "pairs"})
        code = code_digest(run_batch, type(source))
        for index, shard in enumerate(shards):
            # A shard of one pair is the same whatever other pairs the recipe names.
            pairs = shard.pair or source.settings.wanted()
            key = digest(common, code, settings, pairs, source.identity(shard))
            files = [os.path.basename(file) for file in shard.files]
            name = f"{shard.source}-{digest(shard.shard, shard.split, shard.pair, files)[:16]}"
            rank = (number, index)
            found = _find_units(store, name, key, shard, rank)
            if found is None:
                todo.append(Reading(source, shard, key, name, rank))
            else:
                run.reuse("pass1", len(found))
                units += found
    names = Counter(unit.name for unit in units) + Counter(reading.name for reading in todo)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(twice[0], "two shards of this source have the same name", "Rename one of them")
    if todo:
        units += _read_shards(run, todo, evaluation)
    return sorted(units, key=lambda unit: unit.rank)


def _common_key(recipe: Recipe, evaluation: _Evaluation) -> str:
    """A digest of what the parts of all shards depend on."""
    models = langid.model_files(recipe.langid) if recipe.langid.enabled else []
    return digest(
        versions(), recipe.seed, recipe.stage, user_code([*(stage.function for stage in recipe.stage), *recipe.clean.rules]),
        recipe.clean, recipe.langid.without("model"), [file_digest(file) for file in models],
        [recipe.dedup.without(*_DECIDING), recipe.dedup.keep == "form"] if recipe.dedup.enabled else None, evaluation.key,
    )  # fmt: skip


def _find_units(store: Store, name: str, key: str, shard: Shard, rank: tuple[int, int]) -> list[Unit] | None:
    """The units of a shard that was read to its end, if they are all there."""
    marker = store.path("pass1", f"{name}.shard", key)
    if not ready(marker):
        return None
    count = json.loads(marker.read_text(encoding="utf-8"))["units"]
    folders = [store.path("pass1", f"{name}-{i:05d}", key) for i in range(count)]
    if not all(ready(folder / "unit.json") for folder in folders):
        return None
    return [
        load_unit(f"{name}-{i:05d}", key, folder, shard.source, shard.shard, (*rank, i))
        for i, folder in enumerate(folders)
    ]


def _read_shards(run: Run, todo: Sequence[Reading], evaluation: _Evaluation) -> list[Unit]:
    store = run.store
    units: list[Unit] = []
    reached = 0  # shards read to their end
    counts: dict[str, int] = {}  # shards read to their end -> units
    done = Counter[str]()
    keys = {reading.name: reading.key for reading in todo}

    def mark(name: str) -> None:
        """Marks a shard as done once all its units are, so that a later run does not read it."""
        if counts.get(name) == done[name]:
            scratch = store.scratch()
            scratch.write_text(json.dumps({"units": counts[name]}), encoding="utf-8")
            commit(scratch, store.path("pass1", f"{name}.shard", keys[name]))

    def batches(reading: Reading) -> Iterator[_Spooled | _End]:
        """Cuts a shard into batches, and writes those that are not done yet to files."""
        shard, count = reading.shard, 0
        for batch in reading.source.read(shard):
            unit, rank = f"{reading.name}-{count:05d}", (*reading.rank, count)
            folder = store.path("pass1", unit, reading.key)
            count += 1
            task = RawBatchTask(
                unit, reading.key, shard.source, shard.shard, rank, "", str(folder), str(store.scratch()), tuple(batch.problems)
            )  # fmt: skip
            there = ready(folder / "unit.json")
            yield _Spooled(task if there else replace(task, raw=_spool(batch, store)), there)
        yield _End(reading.name, count)

    def tasks() -> Generator[RawBatchTask]:
        nonlocal reached
        # One reader keeps about ten workers busy; a shard has one, as a gzip file can be read from its beginning only.
        readers = [functools.partial(batches, reading) for reading in todo]
        with contextlib.closing(read_ahead(readers, 1 + run.engine.workers // 8)) as messages:
            for message in messages:
                if isinstance(message, _End):
                    reached += 1
                    counts[message.name] = message.units
                    mark(message.name)
                    continue
                task, there = message
                if there:
                    run.reuse("pass1", 1)
                    folder = Path(task.folder)
                    units.append(load_unit(task.name, task.key, folder, task.source, task.shard, task.rank))
                    done[task.name.rpartition("-")[0]] += 1
                    continue
                for problem in task.problems:
                    run.progress.say(f"warning: {problem}")
                yield task
                run.result.made["pass1"] = run.result.made.get("pass1", 0) + 1

    run.progress.start("read, clean, identify, fingerprint", None)
    setup = functools.partial(open_stages, run.recipe, evaluation.index())
    with contextlib.closing(tasks()) as made:  # nobody reads on after a failure
        for unit in run.engine.map(run_batch, made, setup=setup):
            units.append(unit)
            name = unit.name.rpartition("-")[0]
            done[name] += 1
            mark(name)
            run.progress.advance(sum(unit.read.values()), f"shard {min(reached + 1, len(todo))} of {len(todo)}")
    run.progress.end()
    return units


class _Spooled(NamedTuple):
    """A batch in a file for a worker, or one whose unit is done."""

    task: RawBatchTask
    there: bool


class _End(NamedTuple):
    """A shard was read to its end."""

    name: str
    units: int


def _evaluation(run: Run, sources: list[tuple[Source, list[Shard]]]) -> _Evaluation:
    settings = run.recipe.dedup
    shards = [(source, shard) for source, _ in sources for shard in source.evaluation()] if settings.enabled else []
    return _Evaluation(settings, shards)


@dataclass
class _Evaluation:
    """Evaluation text that must not reach the mix. Its key is cheap; its index is built only if rows must be checked."""

    settings: DedupSettings
    shards: list[tuple[Source, Shard]]

    @property
    def key(self) -> str:
        if not self.settings.enabled:
            return ""
        unread = {"path", "pairs", "on_error"}
        identities = [
            (source.identity(shard), shard.pair, source.settings.model_dump(mode="json", exclude=unread))
            for source, shard in self.shards
        ]
        code = code_digest(*{type(source) for source, _ in self.shards}) if self.shards else None
        return digest(texts_identity(self.settings.against), identities, code)

    def index(self) -> dedup_rows.EvaluationIndex | None:
        if not self.settings.enabled or not (self.shards or self.settings.against):
            return None
        texts: list[Any] = list(read_texts(self.settings.against))
        for source, shard in self.shards:
            for batch in source.read(shard):
                if batch.rejected.num_rows:  # a sentence that cannot be read would not be protected
                    row = batch.rejected["row"][0].as_py()
                    raise InputError(
                        ", ".join(shard.files), f"is evaluation text that cannot be read ({batch.rejected['reason'][0]})",
                        "Correct it, or set protect = false for this source", row,
                    )  # fmt: skip
                if batch.table.num_rows:
                    texts.append((batch.table["src"], batch.table["tgt"]))
        return dedup_rows.EvaluationIndex.from_texts(texts, self.settings)


def _spool(batch: RawBatch, store: Store) -> str:
    """Writes a raw batch to a file: its good rows, and the rejected ones with their reason."""
    schema = batch.table.schema.append(pa.field("reason", pa.string()))
    table = batch.table.append_column("reason", pa.nulls(batch.table.num_rows, pa.string()))
    rejected = batch.rejected
    both = pa.concat_tables([table.cast(schema), rejected.select(schema.names).cast(schema)])
    path = store.scratch(".arrow")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(both)
    return str(path)


# ---------------------------------------------------------------------------------------------------------- first pass


@dataclass(frozen=True)
class RawBatchTask:
    """One batch of a shard, as the reader cut it."""

    name: str
    key: str
    source: str
    shard: str
    rank: tuple[int, int, int]
    raw: str
    """Arrow file with the rows and a column `reason`, null for good rows; removed when the task is done."""
    folder: str
    scratch: str
    problems: tuple[str, ...]


@dataclass
class Stages:
    """The row-wise stages, in their order, with models loaded."""

    recipe: Recipe
    chain: list[tuple[str, Callable[[pa.Table], Outcome]]]


def open_stages(recipe: Recipe, evaluation: dedup_rows.EvaluationIndex | None) -> Stages:
    """Setup of a worker: the chain of stages up to the fingerprint."""
    stages: list[tuple[str, Callable[[pa.Table], Outcome]]] = []

    def add_users(after: str) -> None:
        chosen = [stage for stage in recipe.stage if stage.after == after]
        stages.extend((s.function.rpartition(":")[2], functools.partial(_run_user_stage, s)) for s in chosen)

    add_users("read")
    if recipe.clean.enabled:
        stages.append(("clean", lambda table: clean.clean(table, recipe.clean)))
    add_users("clean")
    if recipe.langid.enabled:
        stages.append(("langid", lambda table: langid.langid(table, recipe.langid)))
    add_users("langid")
    if recipe.dedup.enabled and evaluation is not None:
        stages.append(("dedup", lambda table: dedup_rows.protect(table, evaluation, recipe.dedup)))
    return Stages(recipe, stages)


def _run_user_stage(stage: UserStage, table: pa.Table) -> Outcome:
    name = stage.function.rpartition(":")[2]
    try:
        kept, dropped = load_function(stage.function, "stage.function")(table, dict(stage.options))
        reasons = [
            r if (r or "").startswith(f"{name}.") else f"{name}.{r or 'dropped'}" for r in dropped["reason"].to_pylist()
        ]
        dropped = dropped.drop_columns(["reason"]).append_column("reason", pa.array(reasons, pa.string()))
        same = ["source", "shard", "row", "src_lang", "tgt_lang"]
        before = table.select(same).sort_by("row")
        after = pa.concat_tables([kept.select(same), dropped.select(same)]).sort_by("row")
        whole = after.cast(before.schema).equals(before) and {"src", "tgt"} <= set(kept.column_names)
    except CorpusprepError:
        raise
    except Exception as error:
        raise RunError(
            f"stage {stage.function} failed: {type(error).__name__}: {error}. Correct the function."
        ) from error
    if not whole:
        raise RunError(
            f"stage {stage.function} returned {kept.num_rows} kept and {dropped.num_rows} dropped rows of {table.num_rows} that "
            "are not those it was given. Each row must be in one of the two, with its source, shard, row and languages."
        )
    return Outcome(kept, dropped)


def tally(dropped: Dropped, stage: str, table: pa.Table) -> None:
    """Counts dropped rows by pair and reason."""
    if not table.num_rows:
        return
    joined = join(pair_column(table), table["reason"], separator="\t")
    for value, count in count_values(joined).items():
        pair, _, reason = value.partition("\t")
        dropped[stage, pair, reason] += count


def run_batch(stages: Stages, task: RawBatchTask) -> Unit:
    """Cleans, identifies, protects and fingerprints one batch; writes its folder of parts."""
    with pa.memory_map(task.raw) as source:
        everything = pa.ipc.open_file(source).read_all()
    well_formed = pc.is_null(everything["reason"])
    rejects = [everything.filter(pc.invert(well_formed))]
    dropped: Dropped = Counter()
    tally(dropped, "read", rejects[0])
    read = count_values(pair_column(everything))
    table = everything.filter(well_formed).drop_columns(["reason"])
    stage = "fingerprint"
    try:
        for stage, function in stages.chain:
            if not table.num_rows:
                break
            table, lost = function(table)
            tally(dropped, stage, lost)
            rejects.append(lost)
        if stages.recipe.dedup.enabled and table.num_rows:
            table = dedup_rows.fingerprint(table, stages.recipe.dedup)
            if stages.recipe.dedup.keep == "form":
                table = table.append_column("flaws", pa.array(dedup_rows.flaws(table)))
    except CorpusprepError:
        raise
    except Exception as error:
        first, last = (everything["row"][0], everything["row"][-1]) if everything.num_rows else ("?", "?")
        raise RunError(
            f"{task.source}: {task.shard}, rows {first} to {last}: stage {stage} failed with {type(error).__name__}: {error}. "
            f"This is a bug in corpusprep: please report it with those rows. `enabled = false` under [{stage}] skips the stage."
        ) from error
    if "key" in table.column_names:
        table = table.drop_columns(["key"])
    table = table.append_column("key", pa.array(row_keys(table, stages.recipe.seed), pa.uint64()))
    scratch = Path(task.scratch)
    scratch.mkdir(parents=True)
    write_table(pa.concat_tables([r for r in rejects if r.num_rows] or rejects[:1], promote_options="default"),
                scratch / "rejects.parquet")  # fmt: skip
    folder = Path(task.folder)
    parts = []
    pairs = pair_column(table)
    for pair, rows in sorted(count_values(pairs).items()):
        chosen = table if rows == table.num_rows else table.filter(pc.equal(pairs, pa.scalar(pair)))
        write_table(chosen, scratch / f"{pair}.parquet")
        parts.append({"pair": pair, "rows": rows})
    summary = {
        "read": read,
        "dropped": [[*names, count] for names, count in sorted(dropped.items())],
        "parts": parts,
        "problems": task.problems,
    }
    (scratch / "unit.json").write_text(json.dumps(summary), encoding="utf-8")
    commit(scratch, folder)
    Path(task.raw).unlink(missing_ok=True)
    return load_unit(task.name, task.key, folder, task.source, task.shard, task.rank)


def load_unit(name: str, key: str, folder: Path, source: str, shard: str, rank: tuple[int, int, int]) -> Unit:
    """A finished unit, from its folder."""
    summary = json.loads((folder / "unit.json").read_text(encoding="utf-8"))
    parts = tuple(
        Part(
            f"{name}.{p['pair']}", key, p["pair"], p["rows"], str(folder / f"{p['pair']}.parquet"), source, shard, rank
        )
        for p in summary["parts"]
    )
    return Unit(
        name,
        str(folder),
        summary["read"],
        [(d[0], d[1], d[2], d[3]) for d in summary["dropped"]],
        parts,
        tuple(summary["problems"]),
        rank,
    )
