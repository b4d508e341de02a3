"""The last step of a run: the mix, the rejects, the dataset card and the manifest, made aside and put in place."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corpusprep import output
from corpusprep.budget import counting
from corpusprep.context import Context, RunResult, dump
from corpusprep.passes import Part, Unit
from corpusprep.recipe import STAGES
from corpusprep.sources import Shard, Source
from corpusprep.stages import balance, instruct
from corpusprep.store import code_version, digest, file_digest, remove, versions, write_table


@dataclass(frozen=True)
class Decided:
    """All that the steps before decided about the rows of a run.

    Attributes:
        sources: the recipe's sources and their shards.
        units: what the first pass made.
        decisions, tokens, scores, outcomes: part -> file of verdicts on duplicates, of counts of tokens, of scores, and of
            what becomes of each row.
        cutoffs: pair -> the score below which rows went.
        plan: quotas; None without a budget.
    """

    sources: list[tuple[Source, list[Shard]]]
    units: Sequence[Unit]
    decisions: dict[str, str]
    tokens: dict[str, str]
    scores: dict[str, str]
    outcomes: dict[str, str]
    cutoffs: dict[str, float | None]
    plan: balance.Plan | None


def write_output(run: Context, decided: Decided) -> RunResult:
    """Writes mix, rejects and manifest, or finds them as an earlier run wrote them."""
    recipe, result = run.recipe, run.result
    units, decisions, scores, outcomes = decided.units, decided.decisions, decided.scores, decided.outcomes
    key = digest(
        code_version(*STAGES, "output"), versions(), dump(recipe), counting(recipe.balance),
        [Path(unit.folder).name for unit in units], sorted(Path(path).name for path in scores.values()),
        sorted((identity, file_digest(path)) for identity, path in outcomes.items()), sorted(decided.cutoffs.items()),
        sorted((identity, file_digest(path)) for identity, path in decisions.items()) if recipe.dedup.clusters else None,
    )  # fmt: skip
    manifest = _finished(run, key)
    staging = run.store.path("output", "run", key)
    if manifest is None:
        manifest = _make_output(run, key, staging, decided)
    else:
        run.reuse("output", 1)
    result.accounts.dropped.clear()
    for stage, pair, reason, count in manifest["counts"]["dropped"]:
        result.accounts.dropped[stage, pair, reason] = count
    result.manifest = manifest
    run.store.prune()
    remove(staging)
    return result


def _finished(run: Context, key: str) -> dict[str, Any] | None:
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


def _make_output(run: Context, key: str, staging: Path, decided: Decided) -> dict[str, Any]:
    recipe, result = run.recipe, run.result
    units, decisions, outcomes = decided.units, decided.decisions, decided.outcomes
    accounts = result.accounts
    settings = recipe.instruct
    parts = [part for unit in units for part in unit.parts]
    selected = 0
    for part in parts:
        selected += int(pq.read_table(outcomes[part.identity], columns=["copies"])["copies"].to_numpy().sum())
    validation = output.lowest(_validation_keys(run, parts, outcomes), settings.validation)
    examples = selected * (1 if settings.directions in ("forward", "backward") else 2)
    files = max(1, -(-examples // settings.shard_rows))
    rendered: dict[str, output.Rendered] = {}
    tasks = []
    for unit in units:
        ids = [part.identity for part in unit.parts]
        marker = staging / "done" / f"{unit.name}.json"
        if (earlier := output.recall_rendered(marker)) is not None:
            rendered[unit.name] = earlier
            run.reuse("render", 1)
            continue
        task = output.RenderTask(
            unit, tuple(outcomes[i] for i in ids), tuple(decisions[i] for i in ids), tuple(decided.tokens[i] for i in ids),
            tuple(decided.scores.get(i) for i in ids), files, validation, str(staging / "examples" / f"{unit.name}.parquet"),
            str(staging / "rejects" / f"{unit.name}.parquet"), str(marker), recipe,
        )  # fmt: skip
        tasks.append((task, sum(unit.read.values())))
    for piece in run.map("write examples and rejects", output.run_render, tasks, made="render"):
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
            run.reuse("mix", 1)
        else:
            gather = output.MixTask(name, tuple(pieces[file]), str(staging / name), str(marker), recipe)
            mix_tasks.append((gather, 1))
    made += run.map("shuffle the mix", output.run_mix, mix_tasks, made="mix")
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
    (staging / "mix" / "README.md").write_text(_card(run, facts, names), encoding="utf-8")
    manifest = _manifest(run, key, staging, made, facts, decided)
    (run.out / "manifest.json").unlink(missing_ok=True)
    for name in ("mix", "rejects"):
        remove(run.out / name)
        os.replace(staging / name, run.out / name)
    scratch = run.store.scratch()
    scratch.write_text(json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(scratch, run.out / "manifest.json")
    return manifest


def _card(run: Context, facts: dict[str, Any], names: dict[int, str]) -> str:
    recipe = run.recipe
    suffix = recipe.instruct.container
    splits = {"train": f"train-*.{suffix}"} | ({"validation": f"validation/*.{suffix}"} if -1 in names else {})
    return instruct.card(
        instruct.CardFacts(
            name=recipe.name,
            pairs={
                pair: instruct.PairFacts(n["rows"], n["examples"], n["tokens"]) for pair, n in facts["pairs"].items()
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


def _validation_keys(run: Context, parts: Sequence[Part], outcomes: dict[str, str]) -> Iterator[Any]:
    for part in parts:
        chosen = pq.read_table(outcomes[part.identity])["verdict"].to_numpy() == 0
        keys = pq.read_table(part.path, columns=["key"])["key"].to_numpy()[chosen]
        yield output.validation_hashes(keys, run.recipe.seed)


def _manifest(
    run: Context,
    key: str,
    staging: Path,
    made: Sequence[output.MixFile],
    facts: dict[str, Any],
    decided: Decided,
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
        "quality": {"cutoffs": decided.cutoffs, "scores": run.result.scored},
        "verified": run.result.verified,
        "notes": run.result.notes,
        "files": files,
    }  # fmt: skip
