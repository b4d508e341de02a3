"""Step 6: kept rows become the examples of the mix, dropped rows the rejects; card and manifest say what was done.

All of it is made in a folder of the store, `parts/output/run.KEY`, and put in its place when it is whole.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc

from corpusprep.keys import code_digest, digest, file_digest, versions
from corpusprep.parts import Column, Part, Unit, pair_column
from corpusprep.stages import balance, instruct
from corpusprep.steps.balance import token_counter, tokenizer_digest
from corpusprep.steps.render import REJECT_COLUMNS, VALIDATION, Rendered, RenderTask, recall, remember, render
from corpusprep.steps.taken import Selection, find_selection
from corpusprep.store import ready, remove, write_table, writing

if TYPE_CHECKING:
    from corpusprep.derive import Run, RunResult
    from corpusprep.recipe import Recipe
    from corpusprep.sources import Shard, Source

T = TypeVar("T")


@dataclass(frozen=True)
class Decided:
    """All that the steps before decided about the rows of a run.

    Attributes:
        sources: the recipe's sources and their shards.
        units: what the first step made.
        duplicates: verdicts on duplicates, with the rows that are kept instead.
        tokens: tokens of each row.
        scores: scores; empty without a scorer.
        cutoffs: the score of each pair below which rows went.
        outcome: what becomes of each row.
        plan: quotas; None without a budget.
    """

    sources: list[tuple[Source, list[Shard]]]
    units: Sequence[Unit]
    duplicates: Column
    tokens: Column
    scores: Column
    cutoffs: Column
    outcome: Column
    plan: balance.Plan | None

    def limits(self) -> dict[str, float | None]:
        """pair -> cut-off."""
        return {pair: value["cutoff"] for pair, value in self.cutoffs.values().items()}

    @property
    def parts(self) -> list[Part]:
        return [part for unit in self.units for part in unit.parts]


def finish(run: Run, decided: Decided) -> RunResult:
    """Writes mix, rejects and manifest, or finds them as an earlier run wrote them."""
    result = run.result
    key = _output_key(run, decided)
    selection = find_selection(run, decided.parts, decided.outcome)
    manifest = _finished(run, key)
    staging = run.store.path("output", "run", key)
    if manifest is None:
        manifest = _make_output(run, key, staging, decided, selection)
    else:
        run.reuse("output", 1)
        manifest = _with_recipe(run, manifest)
    result.accounts.dropped.clear()
    for stage, pair, reason, count in manifest["counts"]["dropped"]:
        result.accounts.dropped[stage, pair, reason] = count
    result.manifest = manifest
    run.store.prune()
    remove(staging)
    return result


def _output_key(run: Run, decided: Decided) -> str:
    """A digest of all that mix and rejects depend on."""
    recipe = run.recipe.of_the_mix()
    columns = [
        decided.outcome,
        decided.tokens,
        decided.scores,
        *([decided.duplicates] if recipe.dedup.clusters else []),
    ]
    states = [(part.identity, [column.digest(part) for column in columns]) for part in decided.parts]
    return digest(
        code_digest(render, gather, type(run.result.accounts)), versions(), recipe, tokenizer_digest(recipe.balance),
        [Path(batch.folder).name for unit in decided.units for batch in unit.batches], states, decided.limits(),
    )  # fmt: skip


def _finished(run: Run, key: str) -> dict[str, Any] | None:
    """The manifest of an earlier run with the same key, if all its files are there still."""
    path = run.out / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["key"] != key:
            return None
        whole = all((run.out / f["path"]).stat().st_size == f["bytes"] for f in manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


def _make_output(run: Run, key: str, staging: Path, decided: Decided, selection: Selection) -> dict[str, Any]:
    rendered = _render_all(run, staging, decided, selection)
    accounts = run.result.accounts
    pieces: dict[int, list[tuple[str, int]]] = {}  # file of the mix -> record batches
    pairs: dict[str, list[int]] = {}  # pair -> rows, examples
    for piece in rendered:
        accounts.add({}, piece.dropped)
        for number, file, group in piece.groups:
            pieces.setdefault(file, []).append((piece.examples[number], group))
        for pair, rows, examples in piece.kept:
            entry = pairs.setdefault(pair, [0, 0])
            entry[0], entry[1] = entry[0] + rows, entry[1] + examples
    accounts.check(sum(rows for rows, _ in pairs.values()), sum(sum(piece.rejects.values()) for piece in rendered))
    made = _gather_all(run, staging, pieces)
    (staging / "rejects").mkdir(parents=True, exist_ok=True)
    if not any((staging / "rejects").glob("*.parquet")):
        write_table(REJECT_COLUMNS.empty_table(), staging / "rejects" / "none.parquet")
    for path in staging.rglob("*.tmp"):  # of workers that were killed
        remove(path)
    facts = _facts(pairs, made)
    (staging / "mix" / "README.md").write_text(_card(run.recipe, facts, VALIDATION in pieces), encoding="utf-8")
    manifest = _manifest(run, key, staging, made, facts, decided)
    (run.out / "manifest.json").unlink(missing_ok=True)
    for name in ("mix", "rejects"):
        remove(run.out / name)
        os.replace(staging / name, run.out / name)
    _write_manifest(run, manifest)
    return manifest


def _with_recipe(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an earlier run, brought up to date where `[train]` has changed, which the output does not depend on."""
    recipe = run.recipe.model_dump(mode="json")
    if manifest["recipe"] == recipe:
        return manifest
    manifest = manifest | {"recipe": recipe}
    _write_manifest(run, manifest)
    return manifest


def _write_manifest(run: Run, manifest: Mapping[str, Any]) -> None:
    scratch = run.store.scratch()
    scratch.write_text(json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(scratch, run.out / "manifest.json")


# --------------------------------------------------------------------------------------------------------------- render

# Least and most that units rendered together may have: rows read, and copies of rows taken. And how many units they may be.
_TASK_ROWS, _TASK_COPIES, _TASK_UNITS = (1 << 14, 1 << 20), (1 << 10, 50_000), 256
_PLAIN = 4 << 30  # up to so many bytes of examples are not compressed until they are in the mix
_PACKED = 4  # bytes of an example for each byte that its row takes in a part, which is compressed, at most


def _render_all(run: Run, staging: Path, decided: Decided, selection: Selection) -> list[Rendered]:
    """Renders all units, in their order; those that an interrupted run rendered are found."""
    settings = run.recipe.instruct
    directions = 1 if settings.directions in ("forward", "backward") else 2
    examples = sum(selection.copies.values()) * directions
    files = max(1, -(-examples // settings.shard_rows))
    columns = {"outcome": decided.outcome, "tokens": decided.tokens, "scores": decided.scores}
    if run.recipe.dedup.clusters:
        columns["duplicates"] = decided.duplicates
    compressed = _PACKED * directions * _packed_bytes(decided.parts, selection.copies) > _PLAIN
    tasks = []
    for units in _together(decided.units, selection.copies, run.engine.workers):
        parts = [part for unit in units for part in unit.parts]
        mine = {name: column.of(parts) for name, column in columns.items()}
        tasks.append(RenderTask(units, mine, files, selection.validation, compressed, str(staging), run.recipe))
    return _staged(run, "render", "write examples and rejects", render, tasks)


def _packed_bytes(parts: Sequence[Part], copies: Mapping[str, int]) -> float:
    """Bytes that the rows of the mix take in the parts, each as often as it is taken."""
    sizes = ((sum(os.stat(path).st_size for path, _ in part.pieces), part) for part in parts)
    return sum(size * copies[part.identity] / part.rows for size, part in sizes if part.rows)


def _together(units: Sequence[Unit], copies: Mapping[str, int], workers: int) -> list[tuple[Unit, ...]]:
    """Units that are rendered together: so many that a file of the mix is gathered from few record batches, and that small units
    cost little, but enough tasks for all workers. The output does not depend on it."""
    share = 4 * workers
    rows, chosen = sum(unit.rows for unit in units), sum(copies.values())
    limits = _within(rows // share, *_TASK_ROWS), _within(chosen // share, *_TASK_COPIES)
    found: list[list[Unit]] = []
    read = taken = 0
    for unit in units:
        more = unit.rows, sum(copies[part.identity] for part in unit.parts)
        if not found or len(found[-1]) == _TASK_UNITS or read + more[0] > limits[0] or taken + more[1] > limits[1]:
            found.append([])
            read = taken = 0
        found[-1].append(unit)
        read, taken = read + more[0], taken + more[1]
    return list(map(tuple, found))


def _within(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))


# ------------------------------------------------------------------------------------------------------ files of the mix


@dataclass(frozen=True)
class MixTask:
    """One file of the mix: the record batches that fall into it."""

    name: str
    pieces: tuple[tuple[str, int], ...]
    output: str
    done: str
    recipe: Recipe
    rows: int = 1

    def recall(self) -> MixFile | None:
        """The result, if the file is done and there."""
        return recall(self.done, MixFile) if ready(self.output) else None


@dataclass(frozen=True)
class MixFile:
    """A file of the mix: its examples, and their tokens by pair."""

    name: str
    rows: int
    tokens: Mapping[str, int]


def _gather_all(run: Run, staging: Path, pieces: Mapping[int, Sequence[tuple[str, int]]]) -> list[MixFile]:
    """Writes the files of the mix, and returns them by name; one without rows where nothing is kept."""
    suffix = run.recipe.instruct.container
    present = sorted(file for file in pieces if file != VALIDATION)
    names = {file: f"mix/train-{n:05d}-of-{len(present):05d}.{suffix}" for n, file in enumerate(present)}
    if VALIDATION in pieces:
        names[VALIDATION] = f"mix/validation/validation-00000-of-00001.{suffix}"
    tasks = [
        MixTask(name, tuple(pieces[file]), str(staging / name), str(staging / "done" / f"{name}.json"), run.recipe)
        for file, name in names.items()
    ]
    made = _staged(run, "mix", "shuffle the mix", gather, tasks)
    made.sort(key=lambda file: file.name)
    if not present:
        settings, path = run.recipe.instruct, staging / f"mix/train-00000-of-00001.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        nothing = pa.table({name: pa.array([], pa.string()) for name in ("src", "tgt", "src_lang", "tgt_lang")})
        instruct.write(instruct.instruct(nothing, settings, run.recipe.seed).kept, path, settings.container)
        made.insert(0, MixFile(f"mix/{path.name}", 0, {}))
    return made


def gather(task: MixTask) -> MixFile:
    """Sorts the examples of one file by their key, brings them into the format asked for and writes them."""
    table = pa.concat_tables([_read_batch(*piece) for piece in task.pieces], promote_options="default")
    keys = table["key"].to_numpy()
    order = np.argsort(keys, kind="stable")
    if np.any(np.diff(keys[order]) == 0):
        names = ("key", "source", "shard", "row", "direction", "copy")
        order = pc.sort_indices(table, [(name, "ascending") for name in names]).to_numpy()
    settings, counting = task.recipe.instruct, task.recipe.balance
    counter = token_counter(counting.tokenizer, counting.message_overhead)
    counts = pa.array(counter.count_examples(table, settings), pa.int64())
    sums: Any = pa.table({"pair": pair_column(table), "tokens": counts}).group_by("pair").aggregate([("tokens", "sum")])
    tokens: dict[str, int] = dict(sorted(zip(sums["pair"].to_pylist(), sums["tokens_sum"].to_pylist(), strict=True)))
    with writing(task.output) as scratch:
        instruct.write(instruct.format_examples(table, settings, order), scratch, settings.container)
    result = MixFile(task.name, table.num_rows, tokens)
    remember(result, task.done)
    return result


def _read_batch(path: str, number: int) -> pa.Table:
    """One record batch of a file, which is closed again: a file of the mix can have thousands of them."""
    with pa.OSFile(path, "r") as file:
        return pa.Table.from_batches([ipc.open_file(file).get_batch(number)])


# ---------------------------------------------------------------------------------- results of tasks that are done


def _staged(run: Run, kind: str, title: str, function: Callable[[Any], T], tasks: Sequence[Any]) -> list[T]:
    """Results of tasks, in their order: of those that an interrupted run did, from their files.

    Args:
        tasks: with `name`, `rows` for the progress bar, and `recall`, which returns the result of an earlier run or None.
    """
    earlier = [task.recall() for task in tasks]
    todo = [task for task, result in zip(tasks, earlier, strict=True) if result is None]
    run.reuse(kind, len(tasks) - len(todo))
    made = {result.name: result for result in run.map(title, function, [(task, task.rows) for task in todo], made=kind)}
    return [result or made[task.name] for task, result in zip(tasks, earlier, strict=True)]


# -------------------------------------------------------------------------------------------------- card and manifest


def _facts(pairs: Mapping[str, Sequence[int]], made: Sequence[MixFile]) -> dict[str, Any]:
    """What the mix holds."""
    tokens: Counter[str] = Counter()
    for file in made:
        tokens.update(file.tokens)
    return {
        "pairs": {
            pair: {"rows": rows, "examples": count, "tokens": tokens[pair]}
            for pair, (rows, count) in sorted(pairs.items())
        },
        "examples": sum(file.rows for file in made),
        "validation": sum(file.rows for file in made if "/validation/" in file.name),
        "tokens": sum(tokens.values()),
    }


def _card(recipe: Recipe, facts: dict[str, Any], validation: bool) -> str:
    suffix = recipe.instruct.container
    splits = {"train": f"train-*.{suffix}"} | ({"validation": f"validation/*.{suffix}"} if validation else {})
    examples = {"train": facts["examples"] - facts["validation"], "validation": facts["validation"]}
    return instruct.card(
        instruct.CardFacts(
            name=recipe.name,
            pairs={p: instruct.PairFacts(n["rows"], n["examples"], n["tokens"]) for p, n in facts["pairs"].items()},
            files={split: [pattern] for split, pattern in splits.items()},
            examples={split: examples[split] for split in splits},
            format=recipe.instruct.format,
            container=suffix,
            sources=[f"{source.label}: {source.format}" for source in recipe.source],
            tokenizer=recipe.balance.tokenizer,
            budget=recipe.balance.budget,
            seed=recipe.seed,
        )
    )


def _manifest(
    run: Run, key: str, staging: Path, made: Sequence[MixFile], facts: dict[str, Any], decided: Decided
) -> dict[str, Any]:
    accounts, recipe = run.result.accounts, run.recipe
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
            for source, shards in decided.sources for shard in shards
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
            "plan": decided.plan.to_dict() if decided.plan is not None else None,
        },
        "quality": {"cutoffs": decided.limits(), "scores": run.result.scored},
        "verified": run.result.verified,
        "notes": run.result.notes,
        "files": files,
    }  # fmt: skip
