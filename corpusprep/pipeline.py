"""A run: its steps in order. Each step makes only the parts whose keys have changed."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corpusprep.arrow import count_values
from corpusprep.derive import Run, RunResult
from corpusprep.engines import WORKER_MEMORY, Engine
from corpusprep.engines.local import LocalEngine
from corpusprep.errors import InputError, RunError
from corpusprep.parts import Column, Part, pair_column
from corpusprep.recipe import STAGES, Recipe
from corpusprep.report.accounts import Accounts, summary
from corpusprep.report.progress import Progress
from corpusprep.report.tables import columns
from corpusprep.sources import Shard, Source, open_source
from corpusprep.sources.texts import texts_identity
from corpusprep.stages import balance, quality
from corpusprep.steps.balance import choose, count_tokens
from corpusprep.steps.dedup import find_duplicates
from corpusprep.steps.finish import Decided, finish
from corpusprep.steps.quality import apply_thresholds, find_cutoffs, learn, score, write_index
from corpusprep.steps.read import Dropped, open_stages, read, tally
from corpusprep.steps.rounds import score_until_filled
from corpusprep.steps.verdicts import VERDICTS
from corpusprep.steps.verify import verify
from corpusprep.store import Store, lock

__all__ = ["RunResult", "dry_run", "run"]

_OWN_MEMORY = 700 << 20
_PROCESS = 350 << 20  # a process that holds no data
_LEAST_DATA = 256 << 20
_HEADS = 200  # shards that a dry run reads
_SMALL_INPUT = 4 << 20  # below this many bytes of input, starting processes takes longer than the work
_KINDS = {  # the kinds of parts that a stage makes, for --redo
    "clean": ("pass1", "verify"),
    "langid": ("pass1", "verify"),
    "dedup": ("dedup", "verify"),
    "quality": ("state", "prior", "wanted", "quality", "cutoff", "passed"),
    "balance": ("estimate", "candidates", "tokens", "sums", "balance"),
    "instruct": ("taken", "output"),
}


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    workers: int | None = None,
    memory: int | None = None,
    until: str | None = None,
    redo: str | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Runs a recipe into a folder; an interrupted run continues where it stopped.

    Args:
        recipe: see `corpusprep.recipe.load_recipe`.
        out: a folder on a local or shared POSIX file system; it will hold `mix/`, `rejects/`, `manifest.json` and
            `parts/`.
        workers: processes; by default one per core, or only one if the input is small.
        memory: bytes that the run may use: limits the number of workers, and what the steps that decide about many rows hold
            at a time; by default four fifths of what is free.
        until: stop after this stage; `mix/` is then not written.
        redo: make the parts of this stage again, and all parts that follow from them.
        engine: runs the tasks; by default `LocalEngine`.
        progress: receives the progress.

    Raises:
        InputError: a source cannot be read.
        RunError: the folder is in use, a model is missing, a check failed.
    """
    for name in (until, redo):
        if name is not None and name not in STAGES:
            raise RunError(f"{name} is not a stage. The stages are {', '.join(STAGES)}.")
    if until == "clean":
        recipe = _clean_alone(recipe)
    out = Path(out)
    with lock(out):
        store = Store(out / "parts")
        if redo is not None:
            (out / "manifest.json").unlink(missing_ok=True)
            store.forget(tuple(kind for stage in STAGES[STAGES.index(redo) :] for kind in _KINDS[stage]))
        store.begin()
        sources = open_sources(recipe)
        if STAGES.index(until or STAGES[-1]) >= STAGES.index("quality"):
            quality.require(recipe.quality)
        own = None
        if engine is None:
            size = sum(_file_size(file) for _, shards in sources for shard in shards for file in shard.files)
            engine = own = LocalEngine(default_workers(workers, memory, size))
        engine.check(out, [shards[0].files[0] for _, shards in sources if shards])
        result = RunResult(Accounts(accounted(recipe)))
        context = Run(
            recipe, out, store, engine, progress or Progress(), result, data_memory(memory, engine.workers_here)
        )
        with own or contextlib.nullcontext():
            _take_steps(context, sources, until or STAGES[-1])
    return context.result


def accounted(recipe: Recipe) -> list[str]:
    """The stages that drop rows, in the order of the tables: reading, the built-in stages, and the user's after `langid`."""
    users = [stage.function.rpartition(":")[2] for stage in recipe.stage]
    return list(dict.fromkeys(["read", "clean", "langid", *users, *STAGES[2:]]))


def _clean_alone(recipe: Recipe) -> Recipe:
    """The recipe without the stages that follow `clean` in the first pass."""
    off = {"enabled": False}
    return recipe.model_copy(
        update={
            "langid": recipe.langid.model_copy(update=off),
            "dedup": recipe.dedup.model_copy(update=off),
            "stage": tuple(stage for stage in recipe.stage if stage.after != "langid"),
        }
    )


def default_workers(workers: int | None, memory: int | None, input_bytes: int) -> int:
    """The number of processes for an input, within a memory limit."""
    if workers is None:
        workers = 1 if input_bytes < _SMALL_INPUT else os.cpu_count() or 1
    if memory is not None:
        workers = min(workers, max(1, (memory - _OWN_MEMORY) // WORKER_MEMORY))
    return max(1, workers)


def data_memory(memory: int | None, workers: int) -> int:
    """The bytes that the data of tasks may take, of those that a run may use."""
    if memory is None:
        memory = 4 * free_memory() // 5
    return max(_LEAST_DATA, memory - (workers + 1) * _PROCESS)


def free_memory() -> int:
    """The bytes that this process can have, as the system and its control group say."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # there it is "max" without a limit
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        kinds = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(kinds.get("inactive_file", 0))  # pages of files, which the system takes back when it needs them
        free.append(int((group / "memory.max").read_text()) - used)
    return max(0, min(free))


def open_sources(recipe: Recipe) -> list[tuple[Source, list[Shard]]]:
    """The recipe's sources and their shards.

    Raises:
        InputError: a source has nothing to read, or no source has a pair that the recipe names.
    """
    opened = []
    missing: dict[str, int] = {}
    for settings in recipe.source:
        source = open_source(settings)
        opened.append((source, source.shards()))
        for pair in source.missing():
            missing[pair] = missing.get(pair, 0) + 1
    for pair, times in missing.items():
        asked = sum(1 for settings in recipe.source if pair in settings.pairs)
        if times >= asked:
            raise InputError(
                ", ".join(s.path for s in recipe.source if pair in s.pairs),
                f"has no pair {pair}",
                "Remove it from `pairs`, or add the source that has it",
            )
    return opened


def _take_steps(run: Run, sources: list[tuple[Source, list[Shard]]], until: str) -> None:
    def ends(stage: str) -> bool:
        return STAGES.index(until) <= STAGES.index(stage)

    units = read(run, sources)
    for unit in units:
        for batch in unit.batches:
            run.result.accounts.add(batch.read, batch.dropped)
            run.result.notes += [note for note in batch.problems if note not in run.result.notes]
    verify(run, units)
    parts = [part for unit in units for part in unit.parts]
    if ends("langid"):
        return
    # From here on, a step that drops rows takes the verdicts so far and returns those that hold for the steps below it.
    verdicts = duplicates = find_duplicates(run, parts)
    if ends("dedup"):
        _count_verdicts(run, parts, verdicts)
        return
    settings = run.recipe.quality
    if settings.enabled and settings.until == "budget":
        found = score_until_filled(run, parts, verdicts)
        scores, cutoffs, tokens, at_hand = found.scores, found.cutoffs, found.tokens, found.counts
        write_index(run, parts, verdicts, scores, cutoffs, found.wanted)
        if ends("quality"):
            _count_verdicts(run, parts, tokens, but=("instruct",))
            return
    else:
        states = learn(run, parts, verdicts, settings)
        scores = score(run, parts, verdicts, states, settings)
        cutoffs = find_cutoffs(run, parts, scores, states)
        write_index(run, parts, verdicts, scores, cutoffs)
        verdicts = apply_thresholds(run, parts, verdicts, scores, cutoffs)
        if ends("quality"):
            _count_verdicts(run, parts, verdicts)
            return
        tokens, at_hand = count_tokens(run, parts, verdicts, scores)
    plan, outcome = choose(run, parts, tokens, at_hand, scores)
    if ends("balance"):
        _count_verdicts(run, parts, outcome)
        return
    finish(run, Decided(sources, units, duplicates, tokens, scores, cutoffs, outcome, plan))


def _count_verdicts(run: Run, parts: Sequence[Part], verdicts: Column, but: Sequence[str] = ()) -> None:
    """Adds the rows that a column of verdicts drops to the accounts, but for those of the stages in `but`."""
    for part in parts:
        values, counts = np.unique(verdicts.array(part, "verdict"), return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            reason = VERDICTS[value]
            stage = reason.partition(".")[0]
            if value and stage not in but:
                run.result.accounts.add({}, [(stage, part.pair, reason, count)])


def _file_size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:
        return _SMALL_INPUT  # not a local file: its size is not known


def dry_run(recipe: Recipe, rows: int = 1000) -> str:
    """Describes what a run would do, from the first rows of each shard: shards, sizes, and counts of the first stages.

    Args:
        rows: number of rows to read from the beginning of each shard.
    """
    opened = open_sources(recipe)
    names = accounted(recipe)
    accounts = Accounts(names[: names.index("dedup") + 1])
    lines = []
    texts_identity(recipe.dedup.against)
    if recipe.balance.tokenizer is not None:
        balance.tokenizer_file(recipe.balance.tokenizer)
    stages = open_stages(recipe, None)
    shards = [(source, shard) for source, found in opened for shard in found]
    for source, shard in shards[:_HEADS]:
        batch = next(iter(source.read(shard, max_rows=rows)), None)
        size = sum(_file_size(file) for file in shard.files)
        pair = "-".join(shard.pair) if shard.pair else "set in each row"
        lines.append((shard.source, shard.shard, pair, f"{size / 2**20:,.1f} MiB"))
        if batch is None:
            continue
        dropped: Dropped = Counter()
        tally(dropped, "read", batch.rejected)
        read = Counter(count_values(pair_column(batch.table)))
        if batch.rejected.num_rows:
            read.update(count_values(pair_column(batch.rejected)))
        table = batch.table
        for stage, function in stages.chain:
            if table.num_rows:
                table, lost = function(table)
                tally(dropped, stage, lost)
        accounts.add(read, [(*names, count) for names, count in dropped.items()])
    against = sum(len(source.evaluation()) for source, _ in opened)
    text = [
        f"recipe {recipe.name}: {len(shards)} shards of {len(opened)} sources",
        columns(lines, ("source", "shard", "pair", "size")),
        f"evaluation text: {len(recipe.dedup.against)} paths in the recipe, {against} shards of the sources' dev and "
        "test splits",
        f"first pass on the first {rows:,} rows of each shard ({min(len(shards), _HEADS)} shards; duplicates, scores "
        "and quotas need all rows):",
        summary(accounts),
        f"then: duplicates within {recipe.dedup.max_distance} bits, scorer {recipe.quality.scorer}, budget "
        + (f"{recipe.balance.budget:,} tokens" if recipe.balance.budget else "none"),
    ]
    return "\n\n".join(text)
