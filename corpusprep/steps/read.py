"""Step 1: shards that are new or have changed are read, batch by batch, and go through the stages that judge each row by itself.

Of each batch a worker writes a folder with a file for each language pair, and the rejects. Where there are many shards, workers
read them. A large shard is read by one reader for all: it writes each batch to a file, from which a worker goes on. Small shards
are read together, as if they were one. Batches of a very large shard are taken together by the steps that follow.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.arrow import count_values, join, row_keys
from corpusprep.errors import CorpusprepError, InputError, RunError
from corpusprep.keys import code_digest, digest, file_digest, user_code, versions
from corpusprep.parts import Batch, Unit, pair_column
from corpusprep.sources import RawBatch, open_source
from corpusprep.sources.read_ahead import read_ahead
from corpusprep.sources.texts import read_texts, texts_identity
from corpusprep.stage import Outcome, load_function
from corpusprep.stages import clean, langid
from corpusprep.stages.dedup import rows as dedup_rows
from corpusprep.steps.readings import Reading, for_workers, plan
from corpusprep.store import Store, commit, ready, remove, write_table

if TYPE_CHECKING:
    from corpusprep.derive import Run
    from corpusprep.recipe import Recipe, UserStage
    from corpusprep.sources import Shard, Source
    from corpusprep.stages.dedup import DedupSettings

Dropped = Counter[tuple[str, str, str]]
"""(stage, pair, reason) -> rows."""

_DECIDING = ("exact", "near", "max_distance", "scope", "keep", "clusters", "against")
"""Settings of dedup that follow the fingerprint, and so are no part of this step."""

_LOOK = 2.0  # seconds between looks at what workers have done of the shards that they read


def read(run: Run, sources: list[tuple[Source, list[Shard]]]) -> list[Unit]:
    """Reads every shard that has batches missing, and makes these; returns all units in rank order."""
    evaluation = _evaluation(run, sources)
    common = _common_key(run.recipe, evaluation)
    units: list[Unit] = []
    todo: list[tuple[Source, Reading]] = []
    names = Counter[str]()
    for number, (source, shards) in enumerate(sources):
        for reading in plan(source, shards, number, [common, code_digest(run_batch, type(source))]):
            names[reading.name] += 1
            found = _find_batches(run.store, reading)
            if found is None:
                todo.append((source, reading))
            else:
                run.reuse("pass1", len(found))
                units += reading.units(found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(twice[0], "two shards of this source have the same name", "Rename one of them")
    if todo:
        units += _read_all(run, todo, evaluation)
    return sorted(units, key=lambda unit: unit.rank)


def _common_key(recipe: Recipe, evaluation: _Evaluation) -> str:
    """A digest of what the parts of all shards depend on."""
    models = langid.model_files(recipe.langid) if recipe.langid.enabled else []
    return digest(
        versions(), recipe.seed, recipe.stage, user_code([*(stage.function for stage in recipe.stage), *recipe.clean.rules]),
        recipe.clean, recipe.langid.without("model"), [file_digest(file) for file in models],
        [recipe.dedup.without(*_DECIDING), recipe.dedup.keep == "form"] if recipe.dedup.enabled else None, evaluation.key,
    )  # fmt: skip


def _find_batches(store: Store, reading: Reading) -> list[Batch] | None:
    """The batches of shards that were read to their end, if they are all there."""
    marker = store.path("pass1", f"{reading.name}.shard", reading.key)
    if not ready(marker):
        return None
    count = json.loads(marker.read_text(encoding="utf-8"))["batches"]
    folders = [store.path("pass1", reading.batch_name(number), reading.key) for number in range(count)]
    if not all(ready(folder / "batch.json") for folder in folders):
        return None
    return [load_batch(reading.batch_name(number), folder) for number, folder in enumerate(folders)]


def _read_all(run: Run, todo: Sequence[tuple[Source, Reading]], evaluation: _Evaluation) -> list[Unit]:
    progress = _Done(run, [reading for _, reading in todo])
    whole = for_workers([reading for _, reading in todo], run.engine.workers)
    cut: list[Callable[[], Iterator[_Message]]] = [
        functools.partial(_cut, source, reading, run.store) for source, reading in todo if reading.name not in whole
    ]

    def shards() -> Iterator[_Message]:
        for _, reading in todo:
            if reading.name in whole:
                yield ReadTask(reading, str(run.store.folder / "pass1"), str(run.store.scratch()))

    def tasks() -> Generator[BatchTask | ReadTask]:
        # One reader keeps about ten workers busy; a shard has one, as a gzip file can be read from its beginning only.
        readers = min(len(cut), 1 + run.engine.workers // 8)
        reading_ahead = read_ahead([shards, *cut] if whole else cut, readers + bool(whole))
        with contextlib.closing(reading_ahead) as messages:
            for message in messages:
                if isinstance(message, _End):
                    progress.end(message.name, message.batches)
                elif isinstance(message, Batch):
                    progress.add(message, made=False)
                else:
                    if isinstance(message, ReadTask):
                        progress.begin(message.reading.name)
                    yield message

    run.progress.start("read, clean, identify, fingerprint", None)
    setup = functools.partial(open_stages, run.recipe, evaluation.index())
    with progress.watching(), contextlib.closing(tasks()) as made:  # nobody reads on after a failure
        for done in run.engine.map(run_task, made, setup=setup):
            for batch, new in done.batches:
                progress.add(batch, new)
            if done.whole is not None:
                progress.end(done.whole, len(done.batches))
    run.progress.end()
    return progress.units()


def _cut(source: Source, reading: Reading, store: Store) -> Iterator[_Message]:
    """Cuts a shard into batches, and writes those that are not done yet to files."""
    count = 0
    for batch in reading.cut(source):
        name = reading.batch_name(count)
        folder = store.path("pass1", name, reading.key)
        count += 1
        if ready(folder / "batch.json"):
            yield load_batch(name, folder)
        else:
            task = BatchTask(name, str(folder), str(store.scratch()), tuple(batch.problems))
            yield replace(task, raw=_spool(batch, store))
    yield _End(reading.name, count)


class _End(NamedTuple):
    """A shard was read to its end."""

    name: str
    batches: int


_Message = Union["BatchTask", "ReadTask", Batch, _End]
"""What a reader says: a task, a batch that is there, or that it has come to an end."""


class _Done:
    """What is done of all that is to be read."""

    def __init__(self, run: Run, todo: Sequence[Reading]) -> None:
        self._run = run
        self._todo = {reading.name: reading for reading in todo}
        self._batches: dict[str, list[Batch]] = {reading.name: [] for reading in todo}
        self._counts: dict[str, int] = {}  # of what was read to its end
        self._shards = sum(len(reading.shards) for reading in todo)
        self._ended = 0  # shards
        self._shown: dict[str, int] = {}  # by what a worker reads, the first batch that is not shown
        self._failure: Exception | None = None  # of the display, in the thread that watches
        self._lock = threading.Lock()  # of the display, and of what was shown

    def begin(self, name: str) -> None:
        """Notes that a worker is given something to read."""
        with self._lock:
            self._shown[name] = self._ready(name, 0)

    def _ready(self, name: str, first: int) -> int:
        """The number of the first batch, not before `first`, that is not there."""
        while ready(self._folder(name, first) / "batch.json"):
            first += 1
        return first

    def _folder(self, name: str, number: int) -> Path:
        return self._todo[name].folder(self._run.store.folder / "pass1", number)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile, batches of what workers read are shown as they are done.

        Raises:
            Exception: what the display raised.
        """
        ended = threading.Event()

        def watch() -> None:
            try:
                while not ended.wait(_LOOK):
                    self._look()
            except Exception as error:  # of the caller's own progress
                self._failure = error

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _look(self) -> None:
        with self._lock:
            for name, first in self._shown.items():
                self._shown[name] = last = self._ready(name, first)
                for number in range(first, last):
                    self._show(load_batch(self._todo[name].batch_name(number), self._folder(name, number)))

    def _show(self, batch: Batch) -> None:
        for problem in batch.problems:
            self._run.progress.say(f"warning: {problem}")
        shard = f"shard {min(self._ended + 1, self._shards)} of {self._shards}"
        self._run.progress.advance(sum(batch.read.values()), shard)

    def add(self, batch: Batch, made: bool) -> None:
        """Notes a batch that was made, or was there."""
        self._check()
        run, name = self._run, batch.name.rpartition("-")[0]
        run.store.path("pass1", batch.name, self._todo[name].key)  # so that it is not removed at the end
        self._batches[name].append(batch)
        if made:
            run.result.made["pass1"] = run.result.made.get("pass1", 0) + 1
            with self._lock:
                if batch.number >= self._shown.get(name, 0):
                    self._show(batch)
        else:
            run.reuse("pass1", 1)
        self._mark(name)

    def end(self, name: str, batches: int) -> None:
        """Notes that something was read to its end, in so many batches."""
        with self._lock:
            self._shown.pop(name, None)
        self._counts[name] = batches
        self._ended += len(self._todo[name].shards)
        self._mark(name)

    def _mark(self, name: str) -> None:
        """Marks what is done once all its batches are, so that a later run does not read it."""
        if self._counts.get(name) == len(self._batches[name]):
            store = self._run.store
            scratch = store.scratch()
            scratch.write_text(json.dumps({"batches": self._counts[name]}), encoding="utf-8")
            commit(scratch, store.path("pass1", f"{name}.shard", self._todo[name].key))

    def units(self) -> list[Unit]:
        return [
            unit
            for name, batches in self._batches.items()
            for unit in self._todo[name].units(sorted(batches, key=lambda batch: batch.number))
        ]


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
    """Writes a raw batch to a file."""
    table = _all_rows(batch)
    path = store.scratch(".arrow")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def _all_rows(batch: RawBatch) -> pa.Table:
    """The good rows of a batch, and the rejected ones; the column `reason` is null for good rows."""
    schema = batch.table.schema.append(pa.field("reason", pa.string()))
    table = batch.table.append_column("reason", pa.nulls(batch.table.num_rows, pa.string()))
    return pa.concat_tables([table.cast(schema), batch.rejected.select(schema.names).cast(schema)])


# ---------------------------------------------------------------------------------------------------------- first pass


@dataclass(frozen=True)
class BatchTask:
    """One batch of a shard, as a reader cut it."""

    name: str
    folder: str
    scratch: str
    problems: tuple[str, ...]
    raw: str = ""
    """Arrow file with all rows, see `_all_rows`; removed when the task is done."""


@dataclass(frozen=True)
class ReadTask:
    """Something to be read, and all its batches."""

    reading: Reading
    folder: str
    """Where the folders of batches lie."""
    scratch: str


class Done(NamedTuple):
    """What a task did.

    Attributes:
        batches: each with whether it was made, or was there.
        whole: the name of what was read to its end.
    """

    batches: list[tuple[Batch, bool]]
    whole: str | None = None


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
        place: Any = [("shard", "ascending"), ("row", "ascending")]
        before = table.select(same).sort_by(place)
        after = pa.concat_tables([kept.select(same), dropped.select(same)]).sort_by(place)
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


def run_task(stages: Stages, task: BatchTask | ReadTask) -> Done:
    """Does one batch, or reads something and does all its batches that are not done yet."""
    if isinstance(task, BatchTask):
        if ready(f"{task.folder}/batch.json"):  # by a worker that was lost before it could say so
            return Done([(load_batch(task.name, Path(task.folder)), True)])
        with pa.memory_map(task.raw) as source:
            batch = run_batch(stages, task, pa.ipc.open_file(source).read_all())
        Path(task.raw).unlink(missing_ok=True)
        return Done([(batch, True)])
    reading, found = task.reading, []
    for number, raw in enumerate(reading.cut(open_source(reading.settings))):
        name = reading.batch_name(number)
        folder = reading.folder(task.folder, number)
        if ready(folder / "batch.json"):
            found.append((load_batch(name, folder), False))
        else:
            mine = BatchTask(name, str(folder), f"{task.scratch}-{number}", tuple(raw.problems))
            found.append((run_batch(stages, mine, _all_rows(raw)), True))
    return Done(found, reading.name)


def run_batch(stages: Stages, task: BatchTask, everything: pa.Table) -> Batch:
    """Cleans, identifies, protects and fingerprints one batch; writes its folder."""
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
        first, last = (
            (" ".join(str(everything[name][k]) for name in ("shard", "row")) for k in (0, -1))
            if everything.num_rows
            else ("?", "?")
        )
        raise RunError(
            f"{everything['source'][0] if everything.num_rows else '?'}: rows {first} to {last}: stage {stage} failed with {type(error).__name__}: {error}. "
            f"This is a bug in corpusprep: please report it with those rows. `enabled = false` under [{stage}] skips the stage."
        ) from error
    if "key" in table.column_names:
        table = table.drop_columns(["key"])
    table = table.append_column("key", pa.array(row_keys(table, stages.recipe.seed), pa.uint64()))
    scratch = Path(f"{task.scratch}.{secrets.token_hex(4)}")  # not that of a worker that was lost
    scratch.mkdir(parents=True)
    write_table(pa.concat_tables([r for r in rejects if r.num_rows] or rejects[:1], promote_options="default"),
                scratch / "rejects.parquet")  # fmt: skip
    kept = {}
    pairs = pair_column(table)
    for pair, rows in sorted(count_values(pairs).items()):
        chosen = table if rows == table.num_rows else table.filter(pc.equal(pairs, pa.scalar(pair)))
        write_table(chosen, scratch / f"{pair}.parquet")
        kept[pair] = rows
    summary = {
        "read": read,
        "dropped": [[*names, count] for names, count in sorted(dropped.items())],
        "kept": kept,
        "problems": task.problems,
    }
    (scratch / "batch.json").write_text(json.dumps(summary), encoding="utf-8")
    folder = Path(task.folder)
    if not ready(folder / "batch.json"):
        remove(folder)  # a power failure can leave a folder without its last file
    commit(scratch, folder)
    return load_batch(task.name, folder)


def load_batch(name: str, folder: Path) -> Batch:
    """A finished batch, from its folder."""
    summary = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    dropped = [(d[0], d[1], d[2], d[3]) for d in summary["dropped"]]
    return Batch(name, str(folder), summary["read"], dropped, summary["kept"], tuple(summary["problems"]))
