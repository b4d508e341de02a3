"""A run: the passes in their order, each remaking only what its keys say has changed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpusprep import output, passes
from corpusprep.engines import Engine
from corpusprep.engines.local import LocalEngine
from corpusprep.errors import InputError, RunError
from corpusprep.passes import Part, Unit
from corpusprep.recipe import STAGES, Recipe
from corpusprep.report import Accounts, Progress, columns, summary
from corpusprep.sources import Shard, Source, open_source
from corpusprep.sources.texts import read_texts, texts_identity
from corpusprep.stage import Settings
from corpusprep.stages import balance, dedup, instruct, langid, quality
from corpusprep.store import (
    Store,
    code_version,
    digest,
    file_digest,
    lock,
    ready,
    remove,
    user_code,
    versions,
    write_table,
)  # fmt: skip

T = TypeVar("T")

_WORKER_MEMORY = 900 << 20  # measured: a worker with the embedded models at work on full batches
_OWN_MEMORY = 700 << 20
_HEADS = 200  # shards whose heads a dry run reads
_SMALL_INPUT = 32 << 20  # below this many bytes of input, starting processes takes longer than the work
_DECIDING = (
    "exact",
    "near",
    "max_distance",
    "scope",
    "keep",
    "clusters",
    "against",
)  # fields of dedup that follow the fingerprint
_JUDGING = ("threshold", "quantile", "pair", "min_rows")  # fields of quality that follow the score
_KINDS = {  # the kinds of parts that a stage makes, for --redo
    "clean": ("pass1",),
    "langid": ("pass1",),
    "dedup": ("dedup",),
    "quality": ("state", "quality"),
    "balance": ("estimate", "candidates", "tokens", "balance"),
    "instruct": ("output",),
}


@dataclass
class RunResult:
    """What a run did.

    Attributes:
        accounts: rows read, kept and dropped.
        manifest: the content of `manifest.json`; None where the run was to stop early.
        made: pass -> parts made in this run.
        reused: pass -> parts that were there.
        notes: what a reader of the result must know.
    """

    accounts: Accounts
    manifest: dict[str, Any] | None = None
    made: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
    """Runs a recipe into a folder; a run that was interrupted goes on where it stopped.

    Args:
        recipe: see `corpusprep.recipe.load_recipe`.
        out: a folder on a local or shared POSIX file system; it will hold `mix/`, `rejects/`, `manifest.json` and
            `parts/`.
        workers: processes; by default one a core, or one alone where the input is small.
        memory: bytes that the run may take; it bounds the workers.
        until: stop after this stage; `mix/` is then not written.
        redo: make this stage's parts, and so all that follows from them, again.
        engine: where the tasks run; by default `LocalEngine`.
        progress: told of what happens.

    Raises:
        InputError: a source cannot be read as it stands.
        RunError: the folder is in use, a model is missing, a check failed.
    """
    out = Path(out)
    with lock(out):
        return _Run(recipe, out, memory=memory, workers=workers, until=until, engine=engine, progress=progress).run(
            redo
        )


def default_workers(workers: int | None, memory: int | None, input_bytes: int) -> int:
    """The number of processes for an input, within a bound of memory."""
    if workers is None:
        workers = 1 if input_bytes < _SMALL_INPUT else os.cpu_count() or 1
    if memory is not None:
        workers = min(workers, max(1, (memory - _OWN_MEMORY) // _WORKER_MEMORY))
    return max(1, workers)


def open_sources(recipe: Recipe) -> list[tuple[Source, list[Shard]]]:
    """The recipe's sources and their shards.

    Raises:
        InputError: a source has nothing to read, or a pair that the recipe names is nowhere.
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
                f"holds no pair {pair}",
                "Take it from `pairs`, or name the source that holds it",
            )
    return opened


def _dump(settings: Settings, *without: str) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(without))


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        workers: int | None,
        memory: int | None,
        until: str | None,
        engine: Engine | None,
        progress: Progress | None,
    ) -> None:
        if until is not None and until not in STAGES:
            raise RunError(f"{until} is not a stage. The stages are {', '.join(STAGES)}.")
        if until == "clean":  # the first pass alone, without what follows in it
            off = {"langid": recipe.langid.model_copy(update={"enabled": False}),
                   "dedup": recipe.dedup.model_copy(update={"enabled": False}),
                   "stage": tuple(stage for stage in recipe.stage if stage.after != "langid")}  # fmt: skip
            recipe = recipe.model_copy(update=off)
        self.recipe, self.out = recipe, out
        self.until = until or STAGES[-1]
        self.progress = progress or Progress()
        self.store = Store(out / "parts")
        self.workers, self.memory, self.engine = workers, memory, engine
        users = [stage.function.rpartition(":")[2] for stage in recipe.stage]
        self.result = RunResult(
            Accounts(list(dict.fromkeys(["read", "clean", "langid", *users, "dedup", *STAGES[3:]])))
        )

    # ------------------------------------------------------------------------------------------------ the whole

    def run(self, redo: str | None) -> RunResult:
        if redo is not None:
            if redo not in STAGES:
                raise RunError(f"{redo} is not a stage. The stages are {', '.join(STAGES)}.")
            (self.out / "manifest.json").unlink(missing_ok=True)
            self.store.forget(tuple(kind for stage in STAGES[STAGES.index(redo) :] for kind in _KINDS[stage]))
        self.store.begin()
        sources = open_sources(self.recipe)
        own = None
        if self.engine is None:
            size = sum(_size(file) for _, shards in sources for shard in shards for file in shard.files)
            self.engine = own = LocalEngine(default_workers(self.workers, self.memory, size))
        with own or contextlib.nullcontext():
            return self._run(sources)

    def _run(self, sources: list[tuple[Source, list[Shard]]]) -> RunResult:
        accounts = self.result.accounts
        units = self._first_pass(sources)
        for unit in units:
            accounts.add(unit.read, unit.dropped)
            self.result.notes += [note for note in unit.problems if note not in self.result.notes]
        parts = [part for unit in units for part in unit.parts]
        if self._stops("langid"):
            return self.result
        decisions = self._dedup(parts)
        if self._stops("dedup"):
            return self._count(accounts, parts, decisions)
        states = self._learn(parts, decisions)
        scores = self._score(parts, decisions, states)
        cutoffs = self._cutoffs(parts, decisions, scores, states)
        if self._stops("quality"):
            self._count(accounts, parts, decisions)
            return self._count_scores(accounts, parts, decisions, scores, cutoffs)
        tokens, at_hand = self._tokens(parts, decisions, scores, cutoffs)
        plan, outcomes = self._balance(parts, tokens, at_hand, scores)
        if self._stops("balance"):
            return self._count(accounts, parts, outcomes)
        return self._write(units, decisions, tokens, scores, outcomes, cutoffs, plan, sources)

    def _stops(self, stage: str) -> bool:
        return STAGES.index(self.until) <= STAGES.index(stage)

    def _count_scores(
        self,
        accounts: Accounts,
        parts: Sequence[Part],
        decisions: dict[str, str],
        scores: dict[str, str],
        cutoffs: dict[str, float | None],
    ) -> RunResult:
        for part in parts:
            cutoff = cutoffs.get(part.pair)
            if cutoff is not None:
                score = pq.read_table(scores[part.identity])["quality"].to_numpy(zero_copy_only=False)
                below = int((score[passes.kept_rows(decisions[part.identity])] < np.float32(cutoff)).sum())
                accounts.add({}, [("quality", part.pair, "quality.score", below)] if below else [])
        return self.result

    def _count(self, accounts: Accounts, parts: Sequence[Part], verdicts: dict[str, str]) -> RunResult:
        for part in parts:
            values, counts = np.unique(pq.read_table(verdicts[part.identity])["verdict"].to_numpy(), return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                if value:
                    reason = passes.VERDICTS[value]
                    accounts.add({}, [(reason.partition(".")[0], part.pair, reason, count)])
        return self.result

    def _map(
        self,
        title: str,
        function: Callable[..., Any],
        tasks: Iterable[tuple[T, int]],
        *,
        made: str,
        setup: Callable[[], Any] | None = None,
        resources: dict[str, float] | None = None,
        total: int | None = None,
    ) -> Iterator[Any]:
        """Runs tasks of known numbers of rows through the engine, with progress."""
        assert self.engine is not None
        listed = list(tasks)
        self.result.made[made] = self.result.made.get(made, 0) + len(listed)
        if not listed:
            return
        self.progress.start(title, sum(rows for _, rows in listed) if total is None else total)
        sizes = (rows for _, rows in listed)
        for result in self.engine.map(function, [task for task, _ in listed], setup=setup, resources=resources):
            self.progress.advance(next(sizes))
            yield result
        self.progress.end()

    def _reuse(self, kind: str, count: int) -> None:
        self.result.reused[kind] = self.result.reused.get(kind, 0) + count

    # ------------------------------------------------------------------------------------------------ the first pass

    def _first_pass(self, sources: list[tuple[Source, list[Shard]]]) -> list[Unit]:
        """Reads every shard whose parts are not all there, and makes those that are missing."""
        recipe, store = self.recipe, self.store
        evaluation = self._evaluation(sources)
        settings_key = digest(
            code_version("sources", "clean", "langid", "dedup"),
            versions(),
            recipe.seed,
            [_dump(stage) for stage in recipe.stage],
            user_code(*(stage.function for stage in recipe.stage), *recipe.clean.rules),
            _dump(recipe.clean),
            _dump(recipe.langid) | {"model": None},
            [file_digest(file) for file in langid.model_files(recipe.langid)] if recipe.langid.enabled else None,
            _dump(recipe.dedup, *_DECIDING) | {"form": recipe.dedup.keep == "form"} if recipe.dedup.enabled else None,
            evaluation.key,
        )
        units: list[Unit] = []
        todo: list[tuple[Source, Shard, str, str, tuple[int, int]]] = []
        for number, (source, shards) in enumerate(sources):
            for index, shard in enumerate(shards):
                # A shard of one pair is the same whatever other pairs the recipe names.
                pairs = shard.pair or source.settings.wanted()
                key = digest(settings_key, _dump(source.settings, "path", "pairs"), pairs, source.identity(shard))
                name = f"{shard.source}-{digest(shard.shard, shard.split, shard.pair, shard.files)[:16]}"
                marker = store.path("pass1", f"{name}.shard", key)
                if ready(marker):
                    count = json.loads(marker.read_text(encoding="utf-8"))["units"]
                    folders = [store.path("pass1", f"{name}-{i:05d}", key) for i in range(count)]
                    if all(ready(folder / "unit.json") for folder in folders):
                        self._reuse("pass1", count)
                        units += [
                            passes.load_unit(
                                f"{name}-{i:05d}", key, folder, shard.source, shard.shard, (number, index, i)
                            )
                            for i, folder in enumerate(folders)
                        ]
                        continue
                todo.append((source, shard, key, name, (number, index)))
        names = Counter(unit.name for unit in units) + Counter(name for _, _, _, name, _ in todo)
        if twice := [name for name, count in names.items() if count > 1]:
            raise InputError(twice[0], "two shards of this source bear one name", "Rename one of them")
        if todo:
            units += self._read(todo, evaluation)
        return sorted(units, key=lambda unit: unit.rank)

    def _read(
        self, todo: Sequence[tuple[Source, Shard, str, str, tuple[int, int]]], evaluation: _Evaluation
    ) -> list[Unit]:
        assert self.engine is not None
        store = self.store
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

        def tasks() -> Iterator[passes.RawBatchTask]:
            for source, shard, key, name, (number, index) in todo:
                count = 0
                for batch in source.read(shard):
                    unit, rank = f"{name}-{count:05d}", (number, index, count)
                    folder = store.path("pass1", unit, key)
                    count += 1
                    if ready(folder / "unit.json"):
                        self._reuse("pass1", 1)
                        units.append(passes.load_unit(unit, key, folder, shard.source, shard.shard, rank))
                        done[name] += 1
                        continue
                    for problem in batch.problems:
                        self.progress.say(f"warning: {problem}")
                    yield passes.RawBatchTask(
                        unit, key, shard.source, shard.shard, rank, _spool(batch, store), str(folder), str(store.scratch()),
                        tuple(batch.problems),
                    )  # fmt: skip
                    self.result.made["pass1"] = self.result.made.get("pass1", 0) + 1
                reading["shards"] += 1
                counts[name] = count
                mark(name)

        self.progress.start("read, clean, identify, fingerprint", None)
        setup = partial(passes.open_first_pass, self.recipe, evaluation.index())
        for unit in self.engine.map(passes.run_first_pass, tasks(), setup=setup):
            units.append(unit)
            shard_name = unit.name.rpartition("-")[0]
            done[shard_name] += 1
            mark(shard_name)
            self.progress.advance(
                sum(unit.read.values()), f"shard {min(reading['shards'] + 1, len(todo))} of {len(todo)}"
            )
        self.progress.end()
        return units

    def _evaluation(self, sources: list[tuple[Source, list[Shard]]]) -> _Evaluation:
        settings = self.recipe.dedup
        shards = [(source, shard) for source, _ in sources for shard in source.evaluation()] if settings.enabled else []
        return _Evaluation(settings, shards)

    # ------------------------------------------------------------------------------------------------ duplicates

    def _dedup(self, parts: Sequence[Part]) -> dict[str, str]:
        """part -> file of verdicts."""
        settings = self.recipe.dedup
        partitions: dict[str, list[Part]] = {}
        for part in parts:
            partitions.setdefault("all" if settings.scope == "all" else part.pair, []).append(part)
        decisions: dict[str, str] = {}
        tasks = []
        for name, members in sorted(partitions.items()):
            members.sort(key=lambda part: (part.rank, part.pair))
            key = digest(code_version("dedup"), versions(), _dump(settings), [part.identity for part in members])
            files = [str(self.store.path("dedup", part.name, key)) for part in members]
            decisions |= {part.identity: file for part, file in zip(members, files, strict=True)}
            if all(ready(file) for file in files):
                self._reuse("dedup", 1)
            elif not settings.enabled:
                for part, file in zip(members, files, strict=True):
                    passes.write_narrow({"verdict": np.zeros(part.rows, np.uint8)}, file, part)
            else:
                task = passes.DedupTask(name, tuple(members), tuple(files), settings)
                tasks.append((task, sum(part.rows for part in members)))
        for _ in self._map("find duplicates", passes.run_dedup, tasks, made="dedup"):
            pass
        return decisions

    # ------------------------------------------------------------------------------------------------ quality

    def _learn(self, parts: Sequence[Part], decisions: dict[str, str]) -> dict[str, str]:
        """pair -> file of the scorer's state."""
        settings = self.recipe.quality
        if not settings.enabled or not quality.learns(settings):
            return {}
        states: dict[str, str] = {}
        tasks = []
        for pair, members in _by_pair(parts).items():
            key = digest(
                code_version("quality"),
                versions(),
                self.recipe.seed,
                _dump(settings, *_JUDGING),
                [(part.identity, file_digest(decisions[part.identity])) for part in members],
            )
            states[pair] = str(self.store.path("state", pair, key))
            if ready(states[pair]):
                self._reuse("state", 1)
                continue
            chosen = tuple(decisions[part.identity] for part in members)
            task = passes.LearnTask(pair, tuple(members), chosen, states[pair], settings, self.recipe.seed)
            tasks.append((task, sum(part.rows for part in members)))
        tasks.sort(key=lambda item: -item[1])  # the longest first, so that no worker is left with it at the end
        for _ in self._map("learn to judge", passes.run_learn, tasks, made="state"):
            pass
        return states

    def _score(self, parts: Sequence[Part], decisions: dict[str, str], states: dict[str, str]) -> dict[str, str]:
        """part -> file of scores."""
        settings = self.recipe.quality
        if not settings.enabled:
            return {}
        scores: dict[str, str] = {}
        tasks = []
        checksums = {pair: file_digest(path) for pair, path in states.items()}
        common = digest(
            code_version("quality"),
            versions(),
            _dump(settings, *_JUDGING),
            [file_digest(file) for file in quality.model_files(settings)],
            user_code(settings.scorer) if ":" in settings.scorer else None,
        )
        for part in parts:
            decision = decisions[part.identity]
            key = digest(common, part.identity, file_digest(decision), checksums.get(part.pair))
            scores[part.identity] = str(self.store.path("quality", part.name, key))
            if ready(scores[part.identity]):
                self._reuse("quality", 1)
                continue
            task = passes.ScoreTask(part, decision, states.get(part.pair), scores[part.identity], settings)
            tasks.append((task, part.rows))
        tasks.sort(key=lambda item: item[0].part.pair)  # a worker keeps the state of the pair that it is at
        resources = {"gpu": 1.0} if settings.scorer == "comet" else None
        for _ in self._map("score", passes.run_score, tasks, made="quality", resources=resources):
            pass
        return scores

    def _cutoffs(
        self, parts: Sequence[Part], decisions: dict[str, str], scores: dict[str, str], states: dict[str, str]
    ) -> dict[str, float | None]:
        settings = self.recipe.quality
        if not scores:
            return {}
        tasks = [
            passes.CutoffTask(
                pair,
                tuple(members),
                tuple(decisions[p.identity] for p in members),
                tuple(scores[p.identity] for p in members),
                states.get(pair),
                settings,
            )
            for pair, members in _by_pair(parts).items()
        ]
        assert self.engine is not None
        cutoffs = {}
        for pair, value, note in self.engine.map(passes.run_cutoff, tasks, ordered=True):
            cutoffs[pair] = value
            if note:
                self.result.notes.append(note)
        return cutoffs

    # ------------------------------------------------------------------------------------------------ tokens, balance

    def _tokens(
        self,
        parts: Sequence[Part],
        decisions: dict[str, str],
        scores: dict[str, str],
        cutoffs: dict[str, float | None],
    ) -> tuple[dict[str, str], dict[str, balance.PairCount]]:
        """part -> file of verdicts so far, and tokens; and what is at hand of each pair.

        With a tokenizer and far more text than the budget wants, only candidates are counted exactly: the rows that a
        selection by estimates takes with a margin, or with a wider one where the estimate proves to be off.
        """
        settings = self.recipe.balance
        if settings.tokenizer is None or settings.budget is None or not settings.enabled:
            tokens = self._count_tokens("tokens", settings, parts, decisions, scores, cutoffs)
            return tokens, self._at_hand(parts, tokens)
        rough = settings.model_copy(update={"tokenizer": None})
        estimates = self._count_tokens("estimate", rough, parts, decisions, scores, cutoffs)
        estimated = self._at_hand(parts, estimates)
        ratios = dict.fromkeys(estimated, 1.0)
        limits: dict[str, int] = {}
        margin = 1.15
        while True:
            counts = {p: balance.PairCount(c.rows, int(c.tokens * ratios[p])) for p, c in estimated.items()}
            targets = balance.plan(counts, settings).targets
            for pair, count in estimated.items():
                limit = int(targets[pair] / ratios[pair] * margin) + 1
                limits[pair] = min(count.tokens, max(limit, limits.get(pair, 0)))
            candidates = self._candidates(parts, estimates, scores, limits)
            tokens = self._count_tokens("tokens", settings, parts, decisions, scores, cutoffs, candidates)
            exact = self._at_hand(parts, tokens)
            whole = {pair for pair, limit in limits.items() if limit >= estimated[pair].tokens}
            for pair in estimated:
                if exact[pair].tokens:
                    share = estimated[pair].tokens if pair in whole else limits[pair]
                    ratios[pair] = exact[pair].tokens / share
            counts = {
                pair: exact[pair] if pair in whole else balance.PairCount(c.rows, int(c.tokens * ratios[pair]))
                for pair, c in estimated.items()
            }
            targets = balance.plan(counts, settings).targets
            if all(pair in whole or exact[pair].tokens >= targets[pair] for pair in estimated):
                return tokens, counts
            margin *= 1.5

    def _candidates(
        self, parts: Sequence[Part], estimates: dict[str, str], scores: dict[str, str], limits: dict[str, int]
    ) -> dict[str, str]:
        """part -> file that marks the rows to be counted exactly."""
        settings = self.recipe.balance
        candidates: dict[str, str] = {}
        tasks = []
        for pair, members in _by_pair(parts).items():
            key = digest(self._selecting(members, estimates, scores), limits[pair])
            files = tuple(str(self.store.path("candidates", part.name, key)) for part in members)
            candidates |= {part.identity: file for part, file in zip(members, files, strict=True)}
            if all(ready(file) for file in files):
                continue
            task = passes.CandidateTask(
                pair, tuple(members), tuple(estimates[p.identity] for p in members),
                tuple(scores.get(p.identity) for p in members), files, limits[pair], settings, self.recipe.seed,
            )  # fmt: skip
            tasks.append((task, sum(part.rows for part in members)))
        for _ in self._map("choose what to count", passes.run_candidates, tasks, made="candidates"):
            pass
        return candidates

    def _selecting(self, members: Sequence[Part], tokens: dict[str, str], scores: dict[str, str]) -> str:
        """A digest of all that a selection among the rows of a pair depends on but for its target."""
        settings = self.recipe.balance
        return digest(
            code_version("balance"), versions(), self.recipe.seed, _dump(settings, "tokenizer"),
            [(p.identity, file_digest(tokens[p.identity])) for p in members],
            [file_digest(scores[p.identity]) for p in members] if settings.select == "score" and scores else None,
        )  # fmt: skip

    def _count_tokens(
        self,
        kind: str,
        settings: balance.BalanceSettings,
        parts: Sequence[Part],
        decisions: dict[str, str],
        scores: dict[str, str],
        cutoffs: dict[str, float | None],
        candidates: dict[str, str] | None = None,
    ) -> dict[str, str]:
        recipe = self.recipe
        common = digest(
            code_version("balance", "instruct"), versions(), recipe.seed, _counting(settings),
            _dump(recipe.instruct, "validation", "shard_rows", "container"),
        )  # fmt: skip
        tokens: dict[str, str] = {}
        tasks = []
        for part in parts:
            score, cutoff = scores.get(part.identity), cutoffs.get(part.pair)
            marks = candidates[part.identity] if candidates is not None else None
            key = digest(
                common, part.identity, file_digest(decisions[part.identity]),
                file_digest(score) if score and cutoff is not None else None, cutoff, file_digest(marks) if marks else None,
            )  # fmt: skip
            tokens[part.identity] = file = str(self.store.path(kind, part.name, key))
            if ready(file):
                self._reuse(kind, 1)
                continue
            task = passes.TokenTask(
                part, decisions[part.identity], score, cutoff, marks, file, settings, recipe.instruct, recipe.seed
            )
            tasks.append((task, part.rows))
        title = "estimate tokens" if kind == "estimate" else "count tokens"
        for _ in self._map(title, passes.run_tokens, tasks, made=kind):
            pass
        return tokens

    def _at_hand(self, parts: Sequence[Part], tokens: dict[str, str]) -> dict[str, balance.PairCount]:
        """Rows and tokens of each pair that may be selected."""
        counts: dict[str, balance.PairCount] = {}
        for pair, members in _by_pair(parts).items():
            rows = total = 0
            for part in members:
                table = pq.read_table(tokens[part.identity])
                found = table["tokens"].to_numpy()[table["verdict"].to_numpy() == 0]
                rows += int((found > 0).sum())
                total += int(found.sum(dtype=np.int64))
            counts[pair] = balance.PairCount(rows, total)
        return counts

    def _balance(
        self,
        parts: Sequence[Part],
        tokens: dict[str, str],
        counts: dict[str, balance.PairCount],
        scores: dict[str, str],
    ) -> tuple[balance.Plan | None, dict[str, str]]:
        """The plan, and part -> file of verdicts and copies."""
        settings = self.recipe.balance
        plan = balance.plan(counts, settings) if settings.enabled else None
        outcomes: dict[str, str] = {}
        tasks = []
        for pair, members in _by_pair(parts).items():
            key = digest(self._selecting(members, tokens, scores), plan.targets[pair] if plan else None)
            files = tuple(str(self.store.path("balance", part.name, key)) for part in members)
            outcomes |= {part.identity: file for part, file in zip(members, files, strict=True)}
            if all(ready(file) for file in files):
                self._reuse("balance", 1)
                continue
            task = passes.BalanceTask(
                pair, tuple(members), tuple(tokens[p.identity] for p in members),
                tuple(scores.get(p.identity) for p in members), files, plan, settings, self.recipe.seed,
            )  # fmt: skip
            tasks.append((task, sum(part.rows for part in members)))
        for _ in self._map("balance", passes.run_balance, tasks, made="balance"):
            pass
        return plan, outcomes

    # ------------------------------------------------------------------------------------------------ output

    def _write(
        self,
        units: Sequence[Unit],
        decisions: dict[str, str],
        tokens: dict[str, str],
        scores: dict[str, str],
        outcomes: dict[str, str],
        cutoffs: dict[str, float | None],
        plan: balance.Plan | None,
        sources: list[tuple[Source, list[Shard]]],
    ) -> RunResult:
        recipe, result = self.recipe, self.result
        key = digest(
            code_version(*STAGES, "output"), versions(), _dump(recipe), _counting(recipe.balance),
            [Path(unit.folder).name for unit in units], sorted(Path(path).name for path in scores.values()),
            sorted((identity, file_digest(path)) for identity, path in outcomes.items()), sorted(cutoffs.items()),
            sorted((identity, file_digest(path)) for identity, path in decisions.items()) if recipe.dedup.clusters else None,
        )  # fmt: skip
        manifest = self._finished(key)
        staging = self.store.path("output", "run", key)
        if manifest is None:
            manifest = self._make_output(
                key, staging, units, decisions, tokens, scores, outcomes, cutoffs, plan, sources
            )
        else:
            self._reuse("output", 1)
        result.accounts.dropped.clear()
        for stage, pair, reason, count in manifest["counts"]["dropped"]:
            result.accounts.dropped[stage, pair, reason] = count
        result.manifest = manifest
        self.store.prune()
        remove(staging)
        return result

    def _finished(self, key: str) -> dict[str, Any] | None:
        """The manifest of an earlier run with the same key, if all its files are there still."""
        path = self.out / "manifest.json"
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if manifest["key"] != key:
                return None
            whole = all((self.out / f["path"]).stat().st_size == f["bytes"] for f in manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return manifest if whole else None

    def _make_output(
        self,
        key: str,
        staging: Path,
        units: Sequence[Unit],
        decisions: dict[str, str],
        tokens: dict[str, str],
        scores: dict[str, str],
        outcomes: dict[str, str],
        cutoffs: dict[str, float | None],
        plan: balance.Plan | None,
        sources: list[tuple[Source, list[Shard]]],
    ) -> dict[str, Any]:
        recipe, result = self.recipe, self.result
        accounts = result.accounts
        settings = recipe.instruct
        parts = [part for unit in units for part in unit.parts]
        selected = 0
        for part in parts:
            selected += int(pq.read_table(outcomes[part.identity], columns=["copies"])["copies"].to_numpy().sum())
        validation = output.lowest(self._validation_keys(parts, outcomes), settings.validation)
        examples = selected * (1 if settings.directions in ("forward", "backward") else 2)
        files = max(1, -(-examples // settings.shard_rows))
        rendered: dict[str, output.Rendered] = {}
        tasks = []
        for unit in units:
            ids = [part.identity for part in unit.parts]
            marker = staging / "done" / f"{unit.name}.json"
            if (earlier := output.recall_rendered(marker)) is not None:
                rendered[unit.name] = earlier
                self._reuse("render", 1)
                continue
            task = output.RenderTask(
                unit, tuple(outcomes[i] for i in ids), tuple(decisions[i] for i in ids), tuple(tokens[i] for i in ids),
                tuple(scores.get(i) for i in ids), files, validation, str(staging / "examples" / f"{unit.name}.parquet"),
                str(staging / "rejects" / f"{unit.name}.parquet"), str(marker), recipe,
            )  # fmt: skip
            tasks.append((task, sum(unit.read.values())))
        for piece in self._map("write examples and rejects", output.run_render, tasks, made="render"):
            rendered[piece.name] = piece
        pieces: dict[int, list[tuple[str, int]]] = {}
        kept_rows = rejected = 0
        by_pair: dict[str, list[int]] = {}
        for unit in units:
            piece = rendered[unit.name]
            accounts.add({}, piece.dropped)
            rejected += piece.rejects
            for file, group in piece.groups:
                assert piece.examples is not None
                pieces.setdefault(file, []).append((piece.examples, group))
            for pair, rows, examples in piece.kept:
                kept_rows += rows
                entry = by_pair.setdefault(pair, [0, 0])
                entry[0], entry[1] = entry[0] + rows, entry[1] + examples
        accounts.check(kept_rows, rejected)
        suffix = settings.container
        present = sorted(file for file in pieces if file >= 0)
        names = {f: f"mix/train-{n:05d}-of-{len(present):05d}.{suffix}" for n, f in enumerate(present)}
        if -1 in pieces:
            names[-1] = f"mix/validation/validation-00000-of-00001.{suffix}"
        made: list[output.MixFile] = []
        mix_tasks = []
        for file, name in names.items():
            marker = staging / "done" / f"{name}.json"
            if (done := output.recall_mix(marker, staging / name)) is not None:
                made.append(done)
                self._reuse("mix", 1)
            else:
                gather = output.MixTask(name, tuple(pieces[file]), str(staging / name), str(marker), recipe)
                mix_tasks.append((gather, 1))
        made += self._map("shuffle the mix", output.run_mix, mix_tasks, made="mix")
        made.sort(key=lambda file: file.name)
        if not present:
            empty = staging / f"mix/train-00000-of-00001.{suffix}"
            empty.parent.mkdir(parents=True, exist_ok=True)
            nothing = pa.table({name: pa.array([], pa.string()) for name in ("src", "tgt", "src_lang", "tgt_lang")})
            instruct.write(instruct.instruct(nothing, settings, recipe.seed).kept, empty, settings.container)
            made.insert(0, output.MixFile(f"mix/{empty.name}", 0, {}))
        (staging / "rejects").mkdir(parents=True, exist_ok=True)
        if not any((staging / "rejects").glob("*.parquet")):
            write_table(output.REJECT_COLUMNS.empty_table(), staging / "rejects" / "none.parquet")
        tokens_of: Counter[str] = Counter()
        for file_made in made:
            tokens_of.update(file_made.tokens)
        facts = {
            "pairs": {
                pair: {"rows": rows, "examples": n, "tokens": tokens_of[pair]}
                for pair, (rows, n) in sorted(by_pair.items())
            },
            "examples": sum(file.rows for file in made),
            "validation": sum(file.rows for file in made if "/validation/" in file.name),
            "tokens": sum(tokens_of.values()),
        }
        (staging / "mix" / "README.md").write_text(self._card(facts, names), encoding="utf-8")
        manifest = self._manifest(key, staging, made, facts, cutoffs, plan, sources)
        (self.out / "manifest.json").unlink(missing_ok=True)
        for name in ("mix", "rejects"):
            remove(self.out / name)
            os.replace(staging / name, self.out / name)
        scratch = self.store.scratch()
        scratch.write_text(json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(scratch, self.out / "manifest.json")
        return manifest

    def _card(self, facts: dict[str, Any], names: dict[int, str]) -> str:
        recipe = self.recipe
        suffix = recipe.instruct.container
        splits = {"train": f"train-*.{suffix}"} | ({"validation": f"validation/*.{suffix}"} if -1 in names else {})
        return instruct.card(
            instruct.CardFacts(
                name=recipe.name,
                pairs={
                    pair: instruct.PairFacts(n["rows"], n["examples"], n["tokens"])
                    for pair, n in facts["pairs"].items()
                },
                files={split: [pattern] for split, pattern in splits.items()},
                examples={"train": facts["examples"] - facts["validation"]}
                | ({"validation": facts["validation"]} if -1 in names else {}),
                format=recipe.instruct.format,
                container=suffix,
                sources=[f"{source.label}: {source.format}" for source in recipe.source],
                tokenizer=recipe.balance.tokenizer,
                budget=recipe.balance.budget,
                seed=recipe.seed,
            )
        )

    def _validation_keys(self, parts: Sequence[Part], outcomes: dict[str, str]) -> Iterator[Any]:
        for part in parts:
            chosen = pq.read_table(outcomes[part.identity])["verdict"].to_numpy() == 0
            keys = pq.read_table(part.path, columns=["key"])["key"].to_numpy()[chosen]
            yield output.validation_hashes(keys, self.recipe.seed)

    def _manifest(
        self,
        key: str,
        staging: Path,
        made: Sequence[output.MixFile],
        facts: dict[str, Any],
        cutoffs: dict[str, float | None],
        plan: balance.Plan | None,
        sources: list[tuple[Source, list[Shard]]],
    ) -> dict[str, Any]:
        accounts, recipe = self.result.accounts, self.recipe
        rows = {file.name: file.rows for file in made}
        files = [
            {"path": str(path.relative_to(staging)), "bytes": path.stat().st_size, "sha256": file_digest(path)}
            | ({"rows": rows[str(path.relative_to(staging))]} if str(path.relative_to(staging)) in rows else {})
            for name in ("mix", "rejects")
            for path in sorted((staging / name).rglob("*"))
            if path.is_file()
        ]
        return {
            "name": recipe.name,
            "key": key,
            "recipe": recipe.model_dump(mode="json"),
            "versions": versions() | {"python": platform.python_version()},
            "inputs": [
                {"source": shard.source, "shard": shard.shard, "pair": "-".join(shard.pair) if shard.pair else None,
                 "files": list(shard.files), "identity": source.identity(shard)}
                for source, shards in sources for shard in shards
            ],
            "counts": {
                "read": sum(accounts.read.values()),
                "kept": accounts.kept(),
                "by_stage": accounts.by_stage(),
                "by_pair": accounts.by_pair(),
                "dropped": [[*names, count] for names, count in sorted(accounts.dropped.items())],
            },
            "mix": facts,
            "tokens": {
                "counted": "estimate from bytes" if recipe.balance.tokenizer is None else recipe.balance.tokenizer,
                "budget": recipe.balance.budget,
                "reached": facts["tokens"],
                "plan": plan.to_dict() if plan is not None else None,
            },
            "quality": {"cutoffs": cutoffs},
            "notes": self.result.notes,
            "files": files,
        }  # fmt: skip


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
            (source.identity(shard), shard.pair, _dump(source.settings, "path", "pairs", "on_error"))
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


def _counting(settings: balance.BalanceSettings) -> list[Any]:
    """What decides the number of tokens of a text."""
    file = balance.tokenizer_file(settings.tokenizer) if settings.tokenizer is not None else None
    return [file_digest(file) if file is not None else None, settings.message_overhead]


def _by_pair(parts: Sequence[Part]) -> dict[str, list[Part]]:
    pairs: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        pairs.setdefault(part.pair, []).append(part)
    return dict(sorted(pairs.items()))


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


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:
        return _SMALL_INPUT  # not a local file: its size is not known


def dry_run(recipe: Recipe, rows: int = 1000) -> str:
    """What a run would do, from the heads of the sources: shards, sizes, and what the first stages make of the first rows.

    Args:
        rows: read from the beginning of each shard.
    """
    opened = open_sources(recipe)
    accounts = Accounts(["read", "clean", "langid", "dedup"])
    lines = []
    texts_identity(recipe.dedup.against)
    if recipe.balance.tokenizer is not None:
        balance.tokenizer_file(recipe.balance.tokenizer)
    context = passes.open_first_pass(recipe, None)
    shards = [(source, shard) for source, found in opened for shard in found]
    for source, shard in shards[:_HEADS]:
        batch = next(iter(source.read(shard, max_rows=rows)), None)
        size = sum(_size(file) for file in shard.files)
        pair = "-".join(shard.pair) if shard.pair else "as its rows say"
        lines.append((shard.source, shard.shard, pair, f"{size / 2**20:,.1f} MiB"))
        if batch is None:
            continue
        dropped: passes.Dropped = Counter()
        passes.tally(dropped, "read", batch.rejected)
        read = Counter(passes.count_values(passes.pairs_of(batch.table)))
        if batch.rejected.num_rows:
            read.update(passes.count_values(passes.pairs_of(batch.rejected)))
        table = batch.table
        for stage, function in context.stages:
            if table.num_rows:
                table, lost = function(table)
                passes.tally(dropped, stage, lost)
        accounts.add(read, [(*names, count) for names, count in dropped.items()])
    against = sum(len(source.evaluation()) for source, _ in opened)
    text = [
        f"recipe {recipe.name}: {len(shards)} shards of {len(opened)} sources",
        columns(lines, ("source", "shard", "pair", "size")),
        f"evaluation text: {len(recipe.dedup.against)} paths named, {against} shards of the sources' own dev and test splits",
        f"the first {rows:,} rows of each shard (of {min(len(shards), _HEADS)} shards) through the first pass (duplicates, scores and quotas need the whole):",
        summary(accounts),
        f"then: duplicates within {recipe.dedup.max_distance} bits, scorer {recipe.quality.scorer}, budget "
        + (f"{recipe.balance.budget:,} tokens" if recipe.balance.budget else "none"),
    ]
    return "\n\n".join(text)
