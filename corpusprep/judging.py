"""The steps that judge rows by other rows: duplicates, scores, and the scores below which rows go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from corpusprep import passes
from corpusprep.context import Context, by_pair, dump
from corpusprep.passes import Part
from corpusprep.stages import quality
from corpusprep.store import code_version, digest, file_digest, ready, user_code, versions

_CUTTING = ("threshold", "quantile", "pair", "min_rows")  # settings of quality that follow the score


def find_duplicates(run: Context, parts: Sequence[Part]) -> dict[str, str]:
    """part -> file of verdicts."""
    settings = run.recipe.dedup
    partitions: dict[str, list[Part]] = {}
    for part in parts:
        partitions.setdefault("all" if settings.scope == "all" else part.pair, []).append(part)
    decisions: dict[str, str] = {}
    tasks = []
    for name, members in sorted(partitions.items()):
        members.sort(key=lambda part: (part.rank, part.pair))
        key = digest(code_version("dedup"), versions(), dump(settings), [part.identity for part in members])
        files = [str(run.store.path("dedup", part.name, key)) for part in members]
        decisions |= {part.identity: file for part, file in zip(members, files, strict=True)}
        if all(ready(file) for file in files):
            run.reuse("dedup", 1)
        elif not settings.enabled:
            for part, file in zip(members, files, strict=True):
                passes.write_narrow({"verdict": np.zeros(part.rows, np.uint8)}, file, part)
        else:
            task = passes.DedupTask(name, tuple(members), tuple(files), settings)
            tasks.append((task, sum(part.rows for part in members)))
    # Where there are fewer partitions than workers, each has several workers' cores.
    threads = max(1, run.workers // max(1, len(tasks)))
    tasks = [(replace(task, threads=threads), rows) for task, rows in tasks]
    for _ in run.map("find duplicates", passes.run_dedup, tasks, made="dedup"):
        pass
    return decisions


def learn(run: Context, parts: Sequence[Part], decisions: dict[str, str]) -> dict[str, str]:
    """pair -> file of the scorer's state."""
    settings = run.recipe.quality
    if not settings.enabled or not quality.learns(settings):
        return {}
    states: dict[str, str] = {}
    tasks = []
    for pair, members in by_pair(parts).items():
        key = digest(
            code_version("quality"),
            versions(),
            run.recipe.seed,
            dump(settings, *_CUTTING),
            [(part.identity, file_digest(decisions[part.identity])) for part in members],
        )
        states[pair] = str(run.store.path("state", pair, key))
        if ready(states[pair]):
            run.reuse("state", 1)
            continue
        chosen = tuple(decisions[part.identity] for part in members)
        task = passes.LearnTask(pair, tuple(members), chosen, states[pair], settings, run.recipe.seed)
        tasks.append((task, sum(part.rows for part in members)))
    tasks.sort(key=lambda item: -item[1])  # the longest first, so that no worker is left with it at the end
    for _ in run.map("learn to judge", passes.run_learn, tasks, made="state"):
        pass
    return states


def score(run: Context, parts: Sequence[Part], decisions: dict[str, str], states: dict[str, str]) -> dict[str, str]:
    """part -> file of scores."""
    settings = run.recipe.quality
    if not settings.enabled:
        return {}
    scores: dict[str, str] = {}
    tasks = []
    checksums = {pair: file_digest(path) for pair, path in states.items()}
    common = digest(
        code_version("quality"),
        versions(),
        dump(settings, *_CUTTING),
        [file_digest(file) for file in quality.model_files(settings)],
        user_code(settings.scorer) if ":" in settings.scorer else None,
    )
    for part in parts:
        decision = decisions[part.identity]
        key = digest(common, part.identity, file_digest(decision), checksums.get(part.pair))
        scores[part.identity] = str(run.store.path("quality", part.name, key))
        if ready(scores[part.identity]):
            run.reuse("quality", 1)
            continue
        task = passes.ScoreTask(part, decision, states.get(part.pair), scores[part.identity], settings)
        tasks.append((task, part.rows))
    tasks.sort(key=lambda item: item[0].part.pair)  # a worker keeps the state of the pair that it is at
    resources = {"gpu": 1.0} if settings.scorer == "comet" else None
    for _ in run.map("score", passes.run_score, tasks, made="quality", resources=resources):
        pass
    return scores


def find_cutoffs(
    run: Context, parts: Sequence[Part], decisions: dict[str, str], scores: dict[str, str], states: dict[str, str]
) -> dict[str, float | None]:
    settings = run.recipe.quality
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
        for pair, members in by_pair(parts).items()
    ]
    cutoffs = {}
    for pair, value, note in run.engine.map(passes.run_cutoff, tasks, ordered=True):
        cutoffs[pair] = value
        if note:
            run.result.notes.append(note)
    return cutoffs
