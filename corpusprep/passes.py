"""The tasks of a run: what a worker does with one part, one partition or one file of the mix.

Every function here reads files, writes one file or folder under the path that it is given, and returns a small result.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.arrow import combine, row_keys
from corpusprep.errors import CorpusprepError, RunError, SettingsError
from corpusprep.recipe import Recipe, UserStage
from corpusprep.stage import Outcome
from corpusprep.stages import balance, clean, dedup, instruct, langid, quality
from corpusprep.store import commit, file_digest, write_table

VERDICTS = ("", "dedup.exact", "dedup.near", "quality.score", "instruct.template_tokens", "instruct.empty", "balance.quota")
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
        for stage in recipe.stage:
            if stage.after == after:
                stages.append((stage.function.rpartition(":")[2], functools.partial(_run_user_stage, stage)))

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
        reasons = [r if "." in (r or "") else f"{name}.{r or 'dropped'}" for r in dropped["reason"].to_pylist()]
        dropped = dropped.drop_columns(["reason"]).append_column("reason", pa.array(reasons, pa.string()))
        lost = {"source", "shard", "row", "src", "tgt", "src_lang", "tgt_lang"} - set(kept.column_names)
    except CorpusprepError:
        raise
    except Exception as error:
        raise RunError(f"stage {stage.function} failed: {type(error).__name__}: {error}. Mend the function.") from error
    if lost or kept.num_rows + dropped.num_rows != table.num_rows:
        raise RunError(
            f"stage {stage.function} returned {kept.num_rows} kept and {dropped.num_rows} dropped rows of {table.num_rows}"
            f"{' without columns ' + ', '.join(sorted(lost)) if lost else ''}. Each row must be in one of the two, whole."
        )
    return Outcome(kept, dropped)


def pairs_of(table: pa.Table) -> pa.ChunkedArray[Any]:
    """`en-sw` for every row."""
    return pc.binary_join_element_wise(
        pc.fill_null(table["src_lang"], "?"), pc.fill_null(table["tgt_lang"], "?"), "-"
    )


def count_values(column: pa.ChunkedArray[Any] | pa.Array[Any]) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def tally(dropped: Dropped, stage: str, table: pa.Table) -> None:
    """Counts dropped rows by pair and reason."""
    if not table.num_rows:
        return
    joined = pc.binary_join_element_wise(pairs_of(table), table["reason"], "\t")
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
        chosen = table if rows == table.num_rows else table.filter(pc.equal(pairs, pair))
        write_table(chosen, scratch / f"{pair}.parquet")
        parts.append({"pair": pair, "rows": rows})
    summary = {
        "read": read,
        "dropped": [[*names, count] for names, count in sorted(dropped.items())],
        "parts": parts,
        "problems": task.problems,
    }
    (scratch / "unit.json").write_text(json.dumps(summary, ensure_ascii=False))
    commit(scratch, folder)
    Path(task.raw).unlink(missing_ok=True)
    return load_unit(task.name, task.key, folder, task.source, task.shard, task.rank)


def load_unit(name: str, key: str, folder: Path, source: str, shard: str, rank: tuple[int, int, int]) -> Unit:
    """A finished unit, from its folder."""
    summary = json.loads((folder / "unit.json").read_text())
    parts = tuple(
        Part(f"{name}.{p['pair']}", key, p["pair"], p["rows"], str(folder / f"{p['pair']}.parquet"), source, shard, rank)
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


def run_dedup(task: DedupTask) -> str:
    """Decides which rows of a partition are duplicates; writes a verdict a row, aligned to each part."""
    wanted = ["fingerprint", "text_hash"] + (["score"] if task.settings.keep == "score" else [])
    mixed = len({part.pair for part in task.parts}) > 1
    tables = [pq.read_table(part.path, columns=[*wanted, "row"]) for part in task.parts]
    rows = pa.concat_tables(tables)
    ends = np.cumsum([table.num_rows for table in tables])
    total = int(ends[-1]) if len(ends) else 0
    part_of = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    order: npt.NDArray[np.int64] | None = None
    if mixed or task.settings.keep == "score":
        ranks = np.array([part.rank for part in task.parts], np.int64).reshape(-1, 3)
        keys = [rows["row"].to_numpy(), ranks[part_of, 1], ranks[part_of, 0]]
        if task.settings.keep == "score":
            score = rows["score"].to_numpy(zero_copy_only=False).astype(np.float64)
            keys.append(-np.where(np.isnan(score), -np.inf, score))
        order = np.lexsort(keys)
    fingerprints = rows["fingerprint"].to_numpy()
    hashes = rows["text_hash"].to_numpy()
    if order is not None:
        fingerprints, hashes = fingerprints[order], hashes[order]
    verdict, keeper = dedup.decide(fingerprints, hashes, task.settings)
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
            columns["keeper_source"] = sources.take(pa.array(part_of[of]))
            columns["keeper_shard"] = shards.take(pa.array(part_of[of]))
            columns["keeper_row"] = numbers[of]
        _write_narrow(columns, output, task.parts[index])
        start = int(end)
    assert start == total
    return task.name


def _write_narrow(columns: Mapping[str, Any], output: str, part: Part) -> None:
    table = pa.table(dict(columns))
    if table.num_rows != part.rows:
        raise RunError(f"{part.name}: {table.num_rows} values for {part.rows} rows. Please report this; --redo clean goes round it.")
    scratch = Path(f"{output}.tmp")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, scratch)
    commit(scratch, Path(output))


# ------------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class LearnTask:
    """The parts of one pair, from which its scorer learns."""

    pair: str
    parts: tuple[Part, ...]
    decisions: tuple[str, ...]
    output: str
    settings: quality.QualitySettings
    seed: int


def run_learn(task: LearnTask) -> str:
    """Learns a pair's state from the rows of lowest key among those that are no duplicates."""
    limit = task.settings.sample
    keys = [
        pq.read_table(part.path, columns=["key"])["key"].to_numpy()[kept_rows(decision)]
        for part, decision in zip(task.parts, task.decisions, strict=True)
    ]
    everything = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    bound = np.partition(everything, limit - 1)[limit - 1] if everything.size > limit else None
    tables = []
    for part, decision in zip(task.parts, task.decisions, strict=True):
        table = pq.read_table(part.path, columns=["src", "tgt", "src_lang", "tgt_lang", "key"])
        mask = kept_rows(decision)
        if bound is not None:
            mask &= table["key"].to_numpy() <= bound
        tables.append(table.filter(pa.array(mask)).drop_columns(["key"]))
    state = quality.prepare(pa.concat_tables(tables), task.settings, task.seed)
    scratch = Path(f"{task.output}.tmp")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_bytes(state)
    commit(scratch, Path(task.output))
    return task.pair


def kept_rows(decision: str | None) -> npt.NDArray[np.bool_]:
    """Which rows of a part a file of verdicts keeps."""
    assert decision is not None
    return np.asarray(pq.read_table(decision, columns=["verdict"])["verdict"].to_numpy() == 0)


@dataclass(frozen=True)
class ScoreTask:
    """One part to be scored."""

    part: Part
    decision: str
    state: str | None
    output: str
    settings: quality.QualitySettings


@functools.lru_cache(maxsize=2)
def _scorer(settings: str, pair: str, state: str | None, state_digest: str) -> quality.Scorer:
    """The scorer of settings in JSON, kept from one part to the next."""
    states = {pair: Path(state).read_bytes()} if state is not None else {}
    return quality.open_scorer(quality.QualitySettings.model_validate_json(settings), states)


def run_score(task: ScoreTask) -> str:
    """Scores the rows of a part that are no duplicates; writes `quality`, float32, null where not judged."""
    mask = kept_rows(task.decision)
    # A scorer without state is the same for all pairs: the cache must not load a model once a pair.
    pair, checksum = (task.part.pair, file_digest(task.state)) if task.state else ("", "")
    table = pq.read_table(task.part.path)
    scores = np.full(table.num_rows, np.nan, np.float32)
    if mask.any():
        scorer = _scorer(task.settings.model_dump_json(), pair, task.state, checksum)
        scores[mask] = scorer.score(table.filter(pa.array(mask)))
    _write_narrow({"quality": pa.array(scores, from_pandas=True)}, task.output, task.part)
    return task.part.name


@dataclass(frozen=True)
class CutoffTask:
    """The scores of one pair."""

    pair: str
    parts: tuple[Part, ...]
    decisions: tuple[str, ...]
    scores: tuple[str, ...]
    state: str | None
    settings: quality.QualitySettings


def run_cutoff(task: CutoffTask) -> tuple[str, float | None, str | None]:
    """A pair's threshold, and why it has none."""
    scores = [
        _floats(pq.read_table(path)["quality"])[kept_rows(decision)]
        for path, decision in zip(task.scores, task.decisions, strict=True)
    ]
    joined = np.concatenate(scores) if scores else np.empty(0, np.float32)
    learned = quality.evidence(task.settings, Path(task.state).read_bytes()) if task.state else None
    value = quality.cutoff(joined, task.settings, task.pair, learned)
    return task.pair, value, quality.explain(task.settings, task.pair, learned)


def _floats(column: pa.ChunkedArray[Any]) -> npt.NDArray[np.float32]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float32)


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenTask:
    """One part whose survivors are counted in tokens."""

    part: Part
    decision: str
    scores: str | None
    cutoff: float | None
    output: str
    balance: balance.BalanceSettings
    instruct: instruct.InstructSettings
    seed: int


@functools.lru_cache(maxsize=1)
def _counter(settings: str) -> balance.TokenCounter:
    return balance.TokenCounter(balance.BalanceSettings.model_validate_json(settings))


def run_tokens(task: TokenTask) -> str:
    """Applies the quality cutoff and the check for template tokens, and counts the tokens of a row's examples.

    Writes `verdict` (uint8, see `VERDICTS`) and `tokens` (int32, 0 for rows that are dropped).
    """
    table = pq.read_table(task.part.path)
    verdict = pq.read_table(task.decision, columns=["verdict"])["verdict"].to_numpy().astype(np.uint8)
    if task.scores is not None and task.cutoff is not None:
        score = _floats(pq.read_table(task.scores)["quality"])
        with np.errstate(invalid="ignore"):
            verdict[(verdict == 0) & (score < np.float32(task.cutoff))] = 3
    alive = np.flatnonzero(verdict == 0)
    tokens = np.zeros(table.num_rows, np.int32)
    if alive.size:
        rows = table.take(pa.array(alive))
        refused = instruct.screen(rows, task.instruct)
        verdict[alive] = np.where(refused, refused + 3, 0)
        alive = alive[refused == 0]
        rows = rows.filter(pa.array(refused == 0))
    if alive.size:
        tokens[alive] = _counter(task.balance.model_dump_json()).count_rows(rows, task.instruct, task.seed)
    _write_narrow({"verdict": verdict, "tokens": tokens}, task.output, task.part)
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


def run_balance(task: BalanceTask) -> str:
    """Selects the rows of a pair that fill its quota; writes `verdict` (uint8) and `copies` (int32)."""
    columns: dict[str, list[Any]] = {"key": [], "tokens": [], "quality": []}
    verdicts = []
    for part, path, scores in zip(task.parts, task.tokens, task.scores, strict=True):
        table = pq.read_table(path)
        verdicts.append(table["verdict"].to_numpy().copy())
        alive = verdicts[-1] == 0
        columns["tokens"].append(table["tokens"].to_numpy()[alive])
        columns["key"].append(pq.read_table(part.path, columns=["key"])["key"].to_numpy()[alive])
        score = _floats(pq.read_table(scores)["quality"]) if scores else np.full(part.rows, np.nan, np.float32)
        columns["quality"].append(score[alive])
    joined = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    total = len(joined["key"])
    copies = np.ones(total, np.int32)
    if task.plan is not None and total:
        rows = pa.table(
            {
                "pair": pa.repeat(pa.scalar(task.pair), total),
                "key": joined["key"],
                "tokens": joined["tokens"],
                "quality": pa.array(joined["quality"], from_pandas=True),
            }
        )
        copies = balance.select(rows, task.plan, task.settings, task.seed)
    start = 0
    for part, verdict, output in zip(task.parts, verdicts, task.outputs, strict=True):
        alive = np.flatnonzero(verdict == 0)
        chosen = copies[start : start + alive.size]
        start += alive.size
        verdict[alive[chosen == 0]] = 6
        spread = np.zeros(part.rows, np.int32)
        spread[alive] = chosen
        _write_narrow({"verdict": verdict, "copies": spread}, output, part)
    return task.pair


# ------------------------------------------------------------------------------------------------------------ instruct


@dataclass(frozen=True)
class RenderTask:
    """One unit: its kept rows become examples, its dropped rows a file of rejects."""

    unit: Unit
    outcomes: tuple[str, ...]
    """Files with `verdict` and `copies`, one a part."""
    decisions: tuple[str, ...]
    tokens: tuple[str, ...]
    scores: tuple[str | None, ...]
    files: int
    """Number of files of the mix."""
    validation: int | None
    """Rows whose validation hash is not above this are the validation split."""
    examples: str
    rejects: str
    done: str
    """The file that says so."""
    recipe: Recipe


@dataclass(frozen=True)
class Rendered:
    """What came of a unit."""

    name: str
    examples: str | None
    groups: Sequence[tuple[int, int]]
    """File of the mix (-1: validation) -> row group in `examples`."""
    rejects: int
    rejects_path: str | None
    dropped: Sequence[tuple[str, str, str, int]]
    """(stage, pair, reason, rows) of the drops that follow the first pass."""
    kept: Sequence[tuple[str, int, int]]
    """(pair, rows, examples)"""


REJECT_COLUMNS = pa.schema(
    [
        ("source", pa.string()), ("shard", pa.string()), ("row", pa.int64()),
        ("src_lang", pa.string()), ("tgt_lang", pa.string()), ("src", pa.string()), ("tgt", pa.string()),
        ("stage", pa.string()), ("reason", pa.string()),
        ("src_lid", pa.string()), ("src_lid_prob", pa.float32()), ("tgt_lid", pa.string()), ("tgt_lid_prob", pa.float32()),
        ("fingerprint", pa.uint64()), ("quality", pa.float32()), ("tokens", pa.int32()), ("score", pa.float32()),
        ("keeper_source", pa.string()), ("keeper_shard", pa.string()), ("keeper_row", pa.int64()),
    ]
)  # fmt: skip
_WITHOUT_TEXT = {"judged": ("dedup.exact", "balance.quota"), "all": (), "none": None}


def _shape(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table's columns in the order of a schema; those that it lacks are null."""
    arrays = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema
    ]
    return pa.Table.from_arrays([pa.chunked_array([a]) if isinstance(a, pa.Array) else a for a in arrays], schema=schema)


def run_render(task: RenderTask) -> Rendered:
    """Writes a unit's examples, sorted into row groups by their file of the mix, and its rejects."""
    recipe = task.recipe
    first = pq.read_table(Path(task.unit.folder) / "rejects.parquet")
    if "stage" in first.column_names:
        first = first.drop_columns(["stage"])
    rejects = [_shape(first, REJECT_COLUMNS)]
    dropped: Dropped = Counter()
    rendered = []
    kept: dict[str, tuple[int, int]] = {}
    lines = zip(task.unit.parts, task.outcomes, task.decisions, task.tokens, task.scores, strict=True)
    for part, outcome, decision, tokens, scores in lines:
        table = pq.read_table(part.path)
        fate = pq.read_table(outcome)
        verdict = fate["verdict"].to_numpy()
        if scores is not None:
            table = table.append_column("quality", pq.read_table(scores)["quality"])
        table = table.append_column("tokens", pq.read_table(tokens, columns=["tokens"])["tokens"])
        lost = table.filter(pa.array(verdict != 0))
        names = pa.array(VERDICTS, pa.string()).take(pa.array(verdict[verdict != 0].astype(np.int64)))
        lost = lost.append_column("reason", names)
        if recipe.dedup.clusters:
            keepers = pq.read_table(decision).drop_columns(["verdict"]).filter(pa.array(verdict != 0))
            duplicate = pc.starts_with(names, "dedup.")
            for name in keepers.column_names:
                column = keepers[name].combine_chunks()
                lost = lost.append_column(name, pc.if_else(duplicate, column, pa.scalar(None, column.type)))
        for reason, count in count_values(names).items():
            dropped[reason.partition(".")[0], part.pair, reason] += count
        rejects.append(_shape(lost, REJECT_COLUMNS))
        table = table.filter(pa.array(verdict == 0))
        copies = fate["copies"].to_numpy()[verdict == 0]
        if not table.num_rows:
            continue
        table = table.append_column("copies", pa.array(copies, pa.int32()))
        held_out = np.zeros(table.num_rows, np.bool_)
        if task.validation is not None:
            held_out = validation_hashes(table["key"].to_numpy(), recipe.seed) <= np.uint64(task.validation)
        for held, mask in ((False, ~held_out), (True, held_out)):
            chosen = table.filter(pa.array(mask))
            if not chosen.num_rows:
                continue
            # A row of the validation split is there once, whatever the epochs.
            if held:
                chosen = chosen.set_column(
                    chosen.column_names.index("copies"), "copies", pa.array(np.ones(chosen.num_rows, np.int32))
                )
            examples = instruct.render(chosen, recipe.instruct, recipe.seed)
            files = np.full(examples.num_rows, -1, np.int64) if held else file_of(examples["key"].to_numpy(), task.files)
            rendered.append(examples.append_column("_file", pa.array(files)))
            rows, count = kept.get(part.pair, (0, 0))
            kept[part.pair] = (rows + chosen.num_rows, count + examples.num_rows)
    groups: dict[int, int] = {}
    if rendered:
        examples = pa.concat_tables(rendered, promote_options="default")
        files = examples["_file"].to_numpy()
        order = np.argsort(files, kind="stable")
        examples = examples.take(pa.array(order)).drop_columns(["_file"])
        values, starts = np.unique(files[order], return_index=True)
        scratch = Path(f"{task.examples}.tmp")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(scratch, examples.schema, compression="zstd") as writer:
            for group, (value, start) in enumerate(zip(values, starts, strict=True)):
                end = starts[group + 1] if group + 1 < len(starts) else examples.num_rows
                writer.write_table(examples.slice(start, end - start), row_group_size=max(1, int(end - start)))
                groups[int(value)] = group
        commit(scratch, Path(task.examples))
    count = _write_rejects(rejects, task)
    result = Rendered(
        task.unit.name, task.examples if rendered else None, sorted(groups.items()), count, task.rejects if count else None,
        [(*names, n) for names, n in sorted(dropped.items())], [(pair, *numbers) for pair, numbers in sorted(kept.items())],
    )  # fmt: skip
    remember(result, task.done)
    return result


def remember(result: Rendered | MixFile, marker: str) -> None:
    """Writes a task's result beside its files, last: an interrupted run finds there what is done."""
    scratch = Path(f"{marker}.tmp")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(asdict(result)))
    commit(scratch, Path(marker))


def recall_rendered(marker: Path) -> Rendered | None:
    """The result of a unit that is done, if its files are there."""
    if not marker.exists():
        return None
    result = Rendered(**json.loads(marker.read_text()))
    paths = [path for path in (result.examples, result.rejects_path) if path is not None]
    return result if all(Path(path).exists() for path in paths) else None


def recall_mix(marker: Path, output: Path) -> MixFile | None:
    """The result of a file of the mix that is done, if it is there."""
    return MixFile(**json.loads(marker.read_text())) if marker.exists() and output.exists() else None


def validation_hashes(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """The order in which rows are taken for validation, by their keys; see `instruct.validation_mask`."""
    return combine(keys, seed + instruct.VALIDATION_SALT)


def file_of(keys: npt.NDArray[np.uint64], files: int) -> npt.NDArray[np.int64]:
    """The file of the mix that a key falls into: equal ranges of the keys, in order, up to 2^32 files."""
    return ((keys >> np.uint64(32)) * np.uint64(files) >> np.uint64(32)).astype(np.int64)


def _write_rejects(tables: list[pa.Table], task: RenderTask) -> int:
    table = pa.concat_tables(tables)
    table = table.take(pc.sort_indices(table, [("row", "ascending")]))
    stage = pc.list_element(pc.split_pattern(table["reason"], ".", max_splits=1), 0)
    table = table.set_column(REJECT_COLUMNS.get_field_index("stage"), "stage", stage.cast(pa.string()))
    silent = _WITHOUT_TEXT[task.recipe.rejects.text]
    if silent is None or silent:
        hide: Any = True if silent is None else pc.is_in(table["reason"], value_set=pa.array(silent))
        for name in ("src", "tgt"):
            column = pc.if_else(hide, pa.scalar(None, pa.string()), table[name])
            if isinstance(column, pa.Scalar):
                column = pa.nulls(table.num_rows, pa.string())
            table = table.set_column(table.column_names.index(name), name, column)
    if not task.recipe.dedup.clusters:
        table = table.drop_columns(["keeper_source", "keeper_shard", "keeper_row"])
    if table.num_rows:
        scratch = Path(f"{task.rejects}.tmp")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, scratch)
        commit(scratch, Path(task.rejects))
    return table.num_rows


@dataclass(frozen=True)
class MixTask:
    """One file of the mix: the row groups that fall into it."""

    name: str
    pieces: tuple[tuple[str, int], ...]
    output: str
    done: str
    recipe: Recipe


@dataclass(frozen=True)
class MixFile:
    """A file of the mix: its examples, and their tokens by pair."""

    name: str
    rows: int
    tokens: Mapping[str, int]


def run_mix(task: MixTask) -> MixFile:
    """Sorts the examples of one file by their key, brings them into the format asked for and writes them."""
    groups = [pq.ParquetFile(path).read_row_group(group) for path, group in task.pieces]
    table = pa.concat_tables(groups, promote_options="default")
    order = pc.sort_indices(table, [(name, "ascending") for name in ("key", "source", "shard", "row", "direction", "copy")])
    table = table.take(order)
    settings = task.recipe.instruct
    counts = pa.array(_counter(task.recipe.balance.model_dump_json()).count_examples(table, settings), pa.int64())
    sums = pa.table({"pair": pairs_of(table), "tokens": counts}).group_by("pair").aggregate([("tokens", "sum")])
    tokens = dict(sorted(zip(sums["pair"].to_pylist(), sums["tokens_sum"].to_pylist(), strict=True)))
    scratch = Path(f"{task.output}.tmp")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    instruct.write(instruct.format_examples(table, settings), scratch, settings.container)
    commit(scratch, Path(task.output))
    result = MixFile(task.name, table.num_rows, tokens)
    remember(result, task.done)
    return result


def lowest(keys: Iterable[npt.NDArray[np.uint64]], n: int) -> int | None:
    """The n-th lowest of keys that come in pieces; None where n is 0, the highest where there are fewer."""
    if n <= 0:
        return None
    best = np.empty(0, np.uint64)
    for piece in keys:
        best = np.concatenate([best, piece])
        if best.size > n:
            best = np.partition(best, n - 1)[:n]
    return int(best.max()) if best.size else None
