"""The steps that judge rows by other rows: duplicates, scores, and the scores below which rows go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from corpusprep import passes, scoring
from corpusprep.context import Context, by_pair, dump
from corpusprep.passes import Part
from corpusprep.scores import ScoreStore
from corpusprep.stages import quality
from corpusprep.store import code_version, digest, file_digest, large_file_digest, ready, user_code, versions
from corpusprep.thresholds import INDEX, write_index

# Settings of quality that follow the score, or that do not change it.
_CUTTING = ("threshold", "quantile", "pair", "min_rows", "cache", "until", "prior")


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


def learn(
    run: Context, parts: Sequence[Part], decisions: dict[str, str], settings: quality.QualitySettings
) -> dict[str, str]:
    """pair -> file of the scorer's state."""
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
        task = scoring.LearnTask(pair, tuple(members), chosen, states[pair], settings, run.recipe.seed)
        tasks.append((task, sum(part.rows for part in members)))
    tasks.sort(key=lambda item: -item[1])  # the longest first, so that no worker is left with it at the end
    for _ in run.map("learn to judge", scoring.run_learn, tasks, made="state"):
        pass
    return states


@dataclass(frozen=True)
class Round:
    """Scoring of some rows, after others.

    Attributes:
        number: from 1.
        wanted: part -> file that says which rows are to have a score after this round.
        before: part -> scores that there are, and the file that says of which rows.
    """

    number: int
    wanted: dict[str, str]
    before: dict[str, tuple[str, str]]


def score(
    run: Context,
    parts: Sequence[Part],
    decisions: dict[str, str],
    states: dict[str, str],
    settings: quality.QualitySettings,
    kind: str = "quality",
    some: Round | None = None,
) -> dict[str, str]:
    """part -> file of scores, of all rows that are no duplicates, or of those that a round wants."""
    if not settings.enabled:
        return {}
    scores: dict[str, str] = {}
    tasks = []
    checksums = {pair: file_digest(path) for pair, path in states.items()}
    if settings.scorer == "comet":  # decided here, for all workers
        settings = quality.decided(settings)
    model = _model(settings)
    common = digest(
        code_version("quality"),
        versions(),
        dump(settings, *_CUTTING),
        model,
        quality.packages(settings),
        user_code(settings.scorer) if ":" in settings.scorer else None,
    )
    # Not by version of this program: a score that took a GPU to compute outlives a changed line elsewhere.
    kept = _kept_folder(run, model) if settings.scorer == "comet" else None
    for part in parts:
        decision = decisions[part.identity]
        wanted = some.wanted[part.identity] if some is not None else None
        before = some.before.get(part.identity) if some is not None else None
        key = digest(
            common, part.identity, file_digest(decision), checksums.get(part.pair),
            [file_digest(file) for file in (wanted, *(before or ())) if file is not None],
        )  # fmt: skip
        scores[part.identity] = str(run.store.path(kind, part.name, key))
        if ready(scores[part.identity]):
            run.reuse(kind, 1)
            continue
        task = scoring.ScoreTask(
            part, decision, states.get(part.pair), scores[part.identity], settings, str(kept) if kept is not None else None,
            f"{part.name}.{key}", wanted, before, model,
        )  # fmt: skip
        rows = int(passes.marked(wanted).sum()) if wanted is not None else part.rows
        tasks.append((task, rows - (int(passes.marked(before[1]).sum()) if before is not None else 0)))
    if kept is not None:
        # What a run left that went another way. What this one left, interrupted, stays aside till its end: a run that goes
        # on must find what it would have found.
        ScoreStore(kept).settle(but=frozenset(Path(file).name for file in scores.values()))
    tasks.sort(key=lambda item: item[0].part.pair)  # a worker keeps the state of the pair that it is at
    resources = {"gpu": 1.0} if settings.scorer == "comet" else None
    title = "score" if some is None else f"score, round {some.number}"
    for _ in run.map(title, scoring.run_score, tasks, made=kind, resources=resources):
        pass
    if kept is not None:
        ScoreStore(kept).settle()
    if kind == "quality":
        run.result.scored = _count_scored(scores.values())
    return scores


def find_prior(run: Context, parts: Sequence[Part], decisions: dict[str, str]) -> dict[str, str]:
    """part -> file of what the rows are put in order by before they are scored; empty where it is the seeded hash."""
    settings = run.recipe.quality
    if settings.prior == "lexical":
        lexical = quality.QualitySettings(scorer="lexical", sample=settings.sample, min_rows=settings.min_rows)
        states = learn(run, parts, decisions, lexical)
        return score(run, parts, decisions, states, lexical, kind="prior")
    if settings.prior == "hash":
        return {}
    found: dict[str, str] = {}
    tasks = []
    for part in parts:
        found[part.identity] = str(run.store.path("prior", part.name, digest(code_version(), part.identity)))
        if ready(found[part.identity]):
            run.reuse("prior", 1)
        else:
            tasks.append((scoring.PriorTask(part, found[part.identity]), part.rows))
    for _ in run.map("read scores", scoring.run_prior, tasks, made="prior"):
        pass
    return found


def _model(settings: quality.QualitySettings) -> str:
    """A digest of what decides a model's scores but for their last digits: its files, precision and kind of device."""
    if settings.scorer != "comet":
        return ""
    files = [large_file_digest(file) for file in quality.model_files(settings)]
    return digest(
        quality.SCORE_VERSION, files, settings.backend, settings.precision, quality.device(), settings.kernels
    )


def _kept_folder(run: Context, model: str) -> Path:
    cache = run.recipe.quality.cache
    return (Path(cache).expanduser() if cache is not None else run.out / "scores") / model


def _count_scored(files: Iterable[str]) -> dict[str, int]:
    """How many scores of a run were computed, and how many were kept from elsewhere."""
    counts = {"computed": 0, "reused": 0}
    for file in files:
        notes: Any = pq.read_schema(file).metadata or {}
        for name in counts:
            counts[name] += int(notes.get(name.encode(), 0))
    return counts


def find_cutoffs(
    run: Context, parts: Sequence[Part], decisions: dict[str, str], scores: dict[str, str], states: dict[str, str]
) -> dict[str, float | None]:
    settings = run.recipe.quality
    if not scores:
        return {}
    tasks = [
        scoring.CutoffTask(
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
    for pair, value, note in run.engine.map(scoring.run_cutoff, tasks, ordered=True):
        cutoffs[pair] = value
        if note and note not in run.result.notes:
            run.result.notes.append(note)
    return cutoffs


def note_scores(
    run: Context,
    parts: Sequence[Part],
    decisions: dict[str, str],
    scores: dict[str, str],
    cutoffs: dict[str, float | None],
    wanted: dict[str, str] | None = None,
) -> None:
    """Notes where the scores are, for `corpusprep thresholds`."""
    if not scores:
        return

    def files(part: Part) -> dict[str, str | None]:
        mark = wanted[part.identity] if wanted is not None else None
        found = {
            "part": part.path,
            "decision": decisions[part.identity],
            "scores": scores[part.identity],
            "wanted": mark,
        }
        return {name: os.path.relpath(file, run.out) if file else None for name, file in found.items()}

    pairs = {pair: [files(part) for part in members] for pair, members in by_pair(parts).items()}
    write_index(run.out / "parts" / INDEX, run.recipe, pairs, cutoffs)
