"""The tasks that judge rows by a scorer: what a worker does to learn, to score, and to find a threshold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from corpusprep.passes import Part, floats, kept_rows, marked, write_narrow
from corpusprep.scores import ScoreStore
from corpusprep.stages import quality
from corpusprep.store import file_digest, writing


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
    with writing(task.output) as scratch:
        scratch.write_bytes(state)
    return task.pair


@dataclass(frozen=True)
class ScoreTask:
    """One part to be scored."""

    part: Part
    decision: str
    state: str | None
    output: str
    settings: quality.QualitySettings
    kept: str | None = None
    """Folder of scores that are kept by what they are of."""
    window: str = ""
    """The name under which scores of this part are kept."""
    wanted: str | None = None
    """File that says which rows are to be scored; all where None."""
    before: tuple[str, str] | None = None
    """Scores that there are already, and the file that says of which rows."""
    model: str = ""
    """A digest of the scorer's model: a model that was replaced under its name is opened anew."""


@functools.lru_cache(maxsize=2)
def _scorer(settings: str, pair: str, state: str | None, state_digest: str, _model: str) -> quality.Scorer:
    """The scorer of settings in JSON, kept from one part to the next."""
    states = {pair: Path(state).read_bytes()} if state is not None else {}
    return quality.open_scorer(quality.QualitySettings.model_validate_json(settings), states)


def run_score(task: ScoreTask) -> str:
    """Scores the rows of a part that are no duplicates; writes `quality`, float32, null where not judged."""
    mask = kept_rows(task.decision)
    scores = np.full(task.part.rows, np.nan, np.float32)
    computed = reused = 0
    if task.wanted is not None:
        mask &= marked(task.wanted)
    if task.before is not None:
        scores = floats(pq.read_table(task.before[0])["quality"]).copy()
        notes: Any = pq.read_schema(task.before[0]).metadata
        computed, reused = int(notes[b"computed"]), int(notes[b"reused"])
        mask &= ~marked(task.before[1])
    # A scorer without state is the same for all pairs: the cache must not load a model once a pair.
    pair, checksum = (task.part.pair, file_digest(task.state)) if task.state else ("", "")
    if mask.any():
        rows = pq.read_table(task.part.path).filter(pa.array(mask))

        def score(some: pa.Table) -> npt.NDArray[np.float32]:
            return _scorer(task.settings.model_dump_json(), pair, task.state, checksum, task.model).score(some)

        found, new = (score(rows), rows.num_rows) if task.kept is None else _score_once(rows, score, task)
        scores[mask] = found
        computed, reused = computed + new, reused + rows.num_rows - new
    columns = {"quality": pa.array(scores, from_pandas=True)}
    write_narrow(columns, task.output, task.part, {"computed": str(computed), "reused": str(reused)})
    return task.part.name


def _score_once(
    rows: pa.Table, score: Callable[[pa.Table], npt.NDArray[np.float32]], task: ScoreTask
) -> tuple[npt.NDArray[np.float32], int]:
    """Scores of rows, and how many of them had to be computed: not those that are kept, and equal rows once."""
    assert task.kept is not None
    keys = quality.score_keys(rows, task.settings)
    store = _kept_scores(task.kept)
    scores, there = store.lookup(keys)
    missing = np.flatnonzero(~there)
    if not missing.size:
        return scores, 0
    _, first, place = np.unique(keys[missing], axis=0, return_index=True, return_inverse=True)
    chosen = missing[np.sort(first)]  # in the order of the rows
    found = score(rows.take(chosen))
    store.add(keys[chosen], found, task.window)
    by_key = np.empty(len(first), np.float32)
    by_key[np.argsort(first, kind="stable")] = found
    scores[missing] = by_key[place.reshape(-1)]
    return scores, len(chosen)


@functools.lru_cache(maxsize=1)
def _kept_scores(folder: str) -> ScoreStore:
    return ScoreStore(folder)


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
        floats(pq.read_table(path)["quality"])[kept_rows(decision)]
        for path, decision in zip(task.scores, task.decisions, strict=True)
    ]
    joined = np.concatenate(scores) if scores else np.empty(0, np.float32)
    learned = quality.evidence(task.settings, Path(task.state).read_bytes()) if task.state else None
    value = quality.cutoff(joined, task.settings, task.pair, learned)
    return task.pair, value, quality.explain(task.settings, task.pair, learned)


@dataclass(frozen=True)
class PriorTask:
    """A part whose source brought scores."""

    part: Part
    output: str


def run_prior(task: PriorTask) -> str:
    """Writes the source's own score where scores are looked for."""
    column = pq.read_table(task.part.path, columns=["score"])["score"].cast(pa.float32(), safe=False)
    write_narrow({"quality": column}, task.output, task.part)
    return task.part.name
