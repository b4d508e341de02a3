"""The tasks of a run up to the choice of rows: what a worker does with one batch, one part or one partition.

Every function here reads files, writes one file or folder under the path that it is given, and returns a small result.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.arrow import row_keys
from corpusprep.errors import CorpusprepError, RunError, SettingsError
from corpusprep.recipe import Recipe, UserStage
from corpusprep.stage import Outcome
from corpusprep.stages import balance, clean, dedup, instruct, langid
from corpusprep.store import commit, write_table, writing

VERDICTS = (
    "",
    "dedup.exact",
    "dedup.near",
    "quality.score",
    "instruct.template_tokens",
    "instruct.empty",
    "balance.quota",
    "quality.not_needed",
)
"""Reasons of the verdicts that follow the first pass, by their code."""

Dropped = Counter[tuple[str, str, str]]
"""(stage, pair, reason) -> rows."""


@dataclass(frozen=True)
class Part:
    """The kept rows of one pair in one batch: a Parquet file that later passes read and never rewrite."""

    name: str
    """Its name in the store, `UNIT.PAIR`."""
    key: str
    pair: str
    """`en-sw`."""
    rows: int
    path: str
    source: str
    shard: str
    rank: tuple[int, int, int]
    """(source, shard, batch): the order in which rows rank as first."""

    @property
    def identity(self) -> str:
        return f"{self.name}.{self.key}"


@dataclass(frozen=True)
class Unit:
    """What the first pass made of one batch."""

    name: str
    folder: str
    read: Mapping[str, int]
    dropped: Sequence[tuple[str, str, str, int]]
    parts: tuple[Part, ...]
    problems: tuple[str, ...]
    rank: tuple[int, int, int]


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
    """Arrow file with the rows and a column `reason`, null for rows that are well formed; removed when done."""
    folder: str
    scratch: str
    problems: tuple[str, ...]


@dataclass
class FirstPass:
    """The stages of the first pass, with what they need loaded."""

    recipe: Recipe
    stages: list[tuple[str, Callable[[pa.Table], Outcome]]]


def open_first_pass(recipe: Recipe, evaluation: dedup.EvaluationIndex | None) -> FirstPass:
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
        stages.append(("dedup", lambda table: dedup.protect(table, evaluation, recipe.dedup)))
    return FirstPass(recipe, stages)


def load_function(reference: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        SettingsError: it cannot be imported.
    """
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{reference}: cannot be imported ({error}). Name it module:function, with the module on PYTHONPATH."
        ) from None
    if not callable(found):
        raise SettingsError(f"{reference}: is not a function.")
    return found  # type: ignore[no-any-return]


def _run_user_stage(stage: UserStage, table: pa.Table) -> Outcome:
    name = stage.function.rpartition(":")[2]
    try:
        kept, dropped = load_function(stage.function)(table, dict(stage.options))
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
        raise RunError(f"stage {stage.function} failed: {type(error).__name__}: {error}. Mend the function.") from error
    if not whole:
        raise RunError(
            f"stage {stage.function} returned {kept.num_rows} kept and {dropped.num_rows} dropped rows of {table.num_rows} that "
            "are not those it was given. Each row must be in one of the two, with its source, shard, row and languages."
        )
    return Outcome(kept, dropped)


def pairs_of(table: pa.Table) -> pa.ChunkedArray[Any]:
    """`en-sw` for every row."""
    return join(*(pc.fill_null(table[name], pa.scalar("?")) for name in ("src_lang", "tgt_lang")), separator="-")


def join(*columns: Any, separator: str) -> pa.ChunkedArray[Any]:
    """Columns of text joined row by row."""
    function: Any = pc.binary_join_element_wise
    joined: pa.ChunkedArray[Any] = function(*columns, separator)
    return joined


def count_values(column: pa.ChunkedArray[Any] | pa.Array[Any]) -> dict[str, int]:
    counts: Any = pc.value_counts(column)
    return dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))


def tally(dropped: Dropped, stage: str, table: pa.Table) -> None:
    """Counts dropped rows by pair and reason."""
    if not table.num_rows:
        return
    joined = join(pairs_of(table), table["reason"], separator="\t")
    for value, count in count_values(joined).items():
        pair, _, reason = value.partition("\t")
        dropped[stage, pair, reason] += count


def run_first_pass(context: FirstPass, task: RawBatchTask) -> Unit:
    """Cleans, identifies, protects and fingerprints one batch; writes its folder of parts."""
    with pa.memory_map(task.raw) as source:
        everything = pa.ipc.open_file(source).read_all()
    well_formed = pc.is_null(everything["reason"])
    rejects = [everything.filter(pc.invert(well_formed))]
    dropped: Dropped = Counter()
    tally(dropped, "read", rejects[0])
    read = count_values(pairs_of(everything))
    table = everything.filter(well_formed).drop_columns(["reason"])
    stage = "fingerprint"
    try:
        for stage, function in context.stages:
            if not table.num_rows:
                break
            table, lost = function(table)
            tally(dropped, stage, lost)
            rejects.append(lost)
        if context.recipe.dedup.enabled and table.num_rows:
            table = dedup.fingerprint(table, context.recipe.dedup)
            if context.recipe.dedup.keep == "form":
                table = table.append_column("flaws", pa.array(dedup.flaws(table)))
    except CorpusprepError:
        raise
    except Exception as error:
        first, last = (everything["row"][0], everything["row"][-1]) if everything.num_rows else ("?", "?")
        raise RunError(
            f"{task.source}: {task.shard}, rows {first} to {last}: stage {stage} failed with {type(error).__name__}: {error}. "
            f"This is a fault of the program: please report it with those rows; `enabled = false` under [{stage}] goes round it."
        ) from error
    if "key" in table.column_names:
        table = table.drop_columns(["key"])
    table = table.append_column("key", pa.array(row_keys(table, context.recipe.seed), pa.uint64()))
    scratch = Path(task.scratch)
    scratch.mkdir(parents=True)
    write_table(pa.concat_tables([r for r in rejects if r.num_rows] or rejects[:1], promote_options="default"),
                scratch / "rejects.parquet")  # fmt: skip
    folder = Path(task.folder)
    parts = []
    pairs = pairs_of(table)
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


# --------------------------------------------------------------------------------------------------------------- dedup


@dataclass(frozen=True)
class DedupTask:
    """One partition: the parts within which duplicates are looked for, in rank order."""

    name: str
    parts: tuple[Part, ...]
    outputs: tuple[str, ...]
    settings: dedup.DedupSettings
    threads: int = 1


def run_dedup(task: DedupTask) -> str:
    """Decides which rows of a partition are duplicates; writes a verdict a row, aligned to each part."""
    preference = {"form": ["flaws"], "score": ["score"], "first": []}[task.settings.keep]
    mixed = len({part.pair for part in task.parts}) > 1
    tables = [pq.read_table(part.path, columns=["fingerprint", "text_hash", "row", *preference]) for part in task.parts]
    rows = pa.concat_tables(tables)
    ends = np.cumsum([table.num_rows for table in tables])
    total = int(ends[-1]) if len(ends) else 0
    part_of = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    order: npt.NDArray[np.int64] | None = None
    if mixed or preference:
        keys: list[npt.NDArray[Any]] = []
        if mixed:  # else the parts follow each other in the order of their rows, and sorting is stable
            ranks = np.array([part.rank for part in task.parts], np.int64).reshape(-1, 3)
            keys = [rows["row"].to_numpy(), ranks[part_of, 1], ranks[part_of, 0]]
        if task.settings.keep == "score":
            score = floats(rows["score"])
            keys.append(-np.where(np.isnan(score), -np.inf, score))
        elif task.settings.keep == "form":
            keys.append(rows["flaws"].to_numpy())
        order = np.lexsort(keys)
    fingerprints = rows["fingerprint"].to_numpy()
    hashes = rows["text_hash"].to_numpy()
    if order is not None:
        fingerprints, hashes = fingerprints[order], hashes[order]
    verdict, keeper = dedup.decide(fingerprints, hashes, task.settings, min(task.threads, os.cpu_count() or 1))
    if order is not None:
        unordered, keepers = np.empty_like(verdict), np.empty_like(keeper)
        unordered[order], keepers[order] = verdict, order[keeper]
        verdict, keeper = unordered, keepers
    numbers = rows["row"].to_numpy()
    start = 0
    for index, (output, end) in enumerate(zip(task.outputs, ends, strict=True)):
        columns: dict[str, Any] = {"verdict": verdict[start:end]}
        if task.settings.clusters:
            of = keeper[start:end]
            shards = pa.array([part.shard for part in task.parts], pa.string())
            sources = pa.array([part.source for part in task.parts], pa.string())
            columns["keeper_source"] = sources.take(part_of[of])
            columns["keeper_shard"] = shards.take(part_of[of])
            columns["keeper_row"] = numbers[of]
        write_narrow(columns, output, task.parts[index])
        start = int(end)
    assert start == total
    return task.name


def write_narrow(columns: Mapping[str, Any], output: str, part: Part, notes: Mapping[str, str] | None = None) -> None:
    table = pa.table(dict(columns), metadata=dict(notes) if notes else None)
    if table.num_rows != part.rows:
        raise RunError(
            f"{part.name}: {table.num_rows} values for {part.rows} rows. Please report this; --redo clean goes round it."
        )
    with writing(output) as scratch:
        write_table(table, scratch)


def kept_rows(decision: str | None) -> npt.NDArray[np.bool_]:
    """Which rows of a part a file of verdicts keeps."""
    assert decision is not None
    return np.asarray(pq.read_table(decision, columns=["verdict"])["verdict"].to_numpy() == 0)


def marked(file: str) -> npt.NDArray[np.bool_]:
    """The rows of a part that are candidates."""
    return np.asarray(pq.read_table(file)["candidate"].to_numpy(zero_copy_only=False), np.bool_)


def floats(column: pa.ChunkedArray[Any]) -> npt.NDArray[np.float32]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float32)


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenTask:
    """One part whose survivors are counted in tokens."""

    part: Part
    decision: str
    scores: str | None
    cutoff: float | None
    candidates: str | None
    """File that says which rows are to be counted; all where None."""
    wanted: str | None
    """File that says which rows were scored, where not all were: the others are not needed."""
    output: str
    balance: balance.BalanceSettings
    instruct: instruct.InstructSettings
    seed: int


@functools.lru_cache(maxsize=1)
def token_counter(settings: str) -> balance.TokenCounter:
    return balance.TokenCounter(balance.BalanceSettings.model_validate_json(settings))


def run_tokens(task: TokenTask) -> str:
    """Applies the quality cutoff and the check for template tokens, and counts the tokens of a row's examples.

    Writes `verdict` (uint8, see `VERDICTS`) and `tokens` (int32, 0 for rows that are dropped or no candidates).
    """
    table = pq.read_table(task.part.path)
    verdict = pq.read_table(task.decision, columns=["verdict"])["verdict"].to_numpy().astype(np.uint8)
    if task.scores is not None and task.cutoff is not None:
        score = floats(pq.read_table(task.scores)["quality"])
        with np.errstate(invalid="ignore"):
            verdict[(verdict == 0) & (score < np.float32(task.cutoff))] = 3
    alive = np.flatnonzero(verdict == 0)
    tokens = np.zeros(table.num_rows, np.int32)
    rows = table.take(alive)
    if alive.size:
        refused = instruct.screen(rows, task.instruct)
        verdict[alive] = np.where(refused, refused + 3, 0)
        alive = alive[refused == 0]
        rows = rows.filter(pa.array(refused == 0))
    if task.wanted is not None:
        scored = marked(task.wanted)[alive]
        verdict[alive[~scored]] = VERDICTS.index("quality.not_needed")
        rows, alive = rows.filter(pa.array(scored)), alive[scored]
    if task.candidates is not None:
        chosen = marked(task.candidates)[alive]
        rows, alive = rows.filter(pa.array(chosen)), alive[chosen]
    if alive.size:
        tokens[alive] = token_counter(task.balance.model_dump_json()).count_rows(rows, task.instruct, task.seed)
    write_narrow({"verdict": verdict, "tokens": tokens}, task.output, task.part)
    return task.part.name


# ------------------------------------------------------------------------------------------------------------- balance


@dataclass(frozen=True)
class BalanceTask:
    """The parts of one pair, and the plan."""

    pair: str
    parts: tuple[Part, ...]
    tokens: tuple[str, ...]
    scores: tuple[str | None, ...]
    outputs: tuple[str, ...]
    plan: balance.Plan | None
    settings: balance.BalanceSettings
    seed: int


@dataclass(frozen=True)
class CandidateTask:
    """The parts of one pair, and the tokens by estimate up to which its rows are candidates."""

    pair: str
    parts: tuple[Part, ...]
    tokens: tuple[str, ...]
    scores: tuple[str | None, ...]
    outputs: tuple[str, ...]
    limit: int
    settings: balance.BalanceSettings
    seed: int
    before: tuple[str, ...] = ()
    """Files of rows that are candidates already, one a part or none."""


def run_candidates(task: CandidateTask) -> str:
    """Marks the rows that a selection up to the limit takes: only those need a score, or an exact count of their tokens."""
    rows, _, eligible = _survivors(task.pair, task.parts, task.tokens, task.scores)
    plan = balance.Plan(task.limit, {task.pair: task.limit}, {}, {}, {}, 0)
    settings = task.settings.model_copy(update={"epochs": 1.0})
    copies = balance.select(rows, plan, settings, task.seed) if rows.num_rows else np.zeros(0, np.int32)
    before = task.before or (None,) * len(task.parts)
    lines = zip(task.parts, eligible, before, task.outputs, _apart(copies, eligible), strict=True)
    for part, mask, already, output, chosen in lines:
        marks = np.zeros(part.rows, np.bool_) if already is None else marked(already).copy()
        marks[mask] |= chosen > 0
        write_narrow({"candidate": marks}, output, part)
    return task.pair


def run_balance(task: BalanceTask) -> str:
    """Selects the rows of a pair that fill its quota; writes `verdict` (uint8) and `copies` (int32)."""
    rows, verdicts, eligible = _survivors(task.pair, task.parts, task.tokens, task.scores)
    copies = np.ones(rows.num_rows, np.int32)
    if task.plan is not None and rows.num_rows:
        copies = balance.select(rows, task.plan, task.settings, task.seed)
    lines = zip(task.parts, verdicts, eligible, task.outputs, _apart(copies, eligible), strict=True)
    for part, verdict, mask, output, chosen in lines:
        spread = np.zeros(part.rows, np.int32)
        spread[mask] = chosen
        verdict[(verdict == 0) & (spread == 0)] = VERDICTS.index("balance.quota")
        write_narrow({"verdict": verdict, "copies": spread}, output, part)
    return task.pair


def _survivors(
    pair: str, parts: Sequence[Part], tokens: Sequence[str], scores: Sequence[str | None]
) -> tuple[pa.Table, list[npt.NDArray[np.uint8]], list[npt.NDArray[np.bool_]]]:
    """The narrow columns of a pair's rows that may be selected, and by part the verdicts and which rows those are."""
    columns: dict[str, list[Any]] = {"key": [], "tokens": [], "quality": []}
    verdicts, eligible = [], []
    for part, path, score_path in zip(parts, tokens, scores, strict=True):
        table = pq.read_table(path)
        verdicts.append(table["verdict"].to_numpy().copy())
        counts = table["tokens"].to_numpy()
        mask = (verdicts[-1] == 0) & (counts > 0)
        eligible.append(mask)
        columns["tokens"].append(counts[mask])
        columns["key"].append(pq.read_table(part.path, columns=["key"])["key"].to_numpy()[mask])
        score = floats(pq.read_table(score_path)["quality"]) if score_path else np.full(part.rows, np.nan, np.float32)
        columns["quality"].append(score[mask])
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    total = len(joined["key"])
    rows = pa.table(
        {
            "pair": pa.repeat(pa.scalar(pair), total),
            "key": joined["key"],
            "tokens": joined["tokens"],
            "quality": pa.array(joined["quality"], from_pandas=True),
        }
    )
    return rows, verdicts, eligible


def _apart(values: npt.NDArray[np.int32], masks: Sequence[npt.NDArray[np.bool_]]) -> list[npt.NDArray[np.int32]]:
    """Values of all parts' rows, by part."""
    return np.split(values, np.cumsum([int(mask.sum()) for mask in masks])[:-1])
