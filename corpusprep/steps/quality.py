"""Step 4: scores, and the cut-off below which rows go."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from corpusprep.keys import digest, large_file_digest, user_code
from corpusprep.parts import Column, Group, Part, Work, by_pair, one_by_one, take_rows
from corpusprep.stages import quality
from corpusprep.stages.quality import QualitySettings
from corpusprep.steps.kept_scores import ScoreStore
from corpusprep.steps.verdicts import code
from corpusprep.store import ready, write_table, writing

if TYPE_CHECKING:
    from corpusprep.derive import Run

F32 = npt.NDArray[np.float32]

INDEX = "parts/scored.json"
"""The file in a run's folder that says where its scores lie."""

# ---------------------------------------------------------------------------------------------------------------- learn


def learn(run: Run, parts: Sequence[Part], verdicts: Column, settings: QualitySettings) -> Column:
    """The column of the scorer's states, one file a pair; empty where the scorer learns nothing."""
    groups = by_pair(parts) if settings.enabled and quality.learns(settings) else []
    groups.sort(key=lambda group: -group.rows)  # the longest task first, so that none is left alone at the end
    return run.derive(
        "state", "learn to judge", learn_pair, groups, (_scoring(settings), run.recipe.seed), of={"verdicts": verdicts}, whole=True
    )  # fmt: skip


def learn_pair(work: Work) -> None:
    """Learns a pair's state from the rows of lowest key among those that are no duplicates."""
    settings, seed = work.settings
    verdicts = work.columns["verdicts"]
    chosen = []  # of each part, places and keys of rows that may be in the sample
    lowest = np.empty(0, np.uint64)
    for part in work.parts:
        key = part.read("key")["key"].to_numpy()
        mask = verdicts.kept(part)
        if lowest.size == settings.sample:
            mask &= key <= lowest.max()
        chosen.append((np.flatnonzero(mask), key[mask]))
        lowest = np.concatenate([lowest, key[mask]])
        if lowest.size > settings.sample:
            lowest = np.partition(lowest, settings.sample - 1)[: settings.sample]
    last = lowest.max(initial=0)
    tables = [
        take_rows([path for path, _ in part.pieces], places[keys <= last], "src", "tgt", "src_lang", "tgt_lang")
        for part, (places, keys) in zip(work.parts, chosen, strict=True)
    ]
    state = quality.prepare(pa.concat_tables(tables), settings, seed)
    with writing(work.outputs[0]) as scratch:
        scratch.write_bytes(state)


def _scoring(settings: QualitySettings) -> QualitySettings:
    """The settings that decide a score, without those of the cut-off and of which rows are scored."""
    return settings.without("threshold", "quantile", "pair", "min_rows", "cache", "until", "prior")


# ---------------------------------------------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Wanted:
    """Scoring of some rows, after others.

    Attributes:
        round: from 1.
        marks: the rows that are to have a score after this round.
        before: the scores that there are, and the rows that have them.
    """

    round: int
    marks: Column
    before: tuple[Column, Column] | None


def score(
    run: Run,
    parts: Sequence[Part],
    verdicts: Column,
    states: Column,
    settings: QualitySettings,
    kind: str = "quality",
    wanted: Wanted | None = None,
) -> Column:
    """The column of scores, of all rows that are no duplicates, or of those that a round wants; empty without a scorer."""
    of = {"verdicts": verdicts, "states": states}
    title, rows = "score", None
    if wanted is not None:
        of["wanted"] = marks = wanted.marks
        title = f"score, round {wanted.round}"
        if wanted.before is not None:
            of["scores"], of["scored"] = wanted.before
        rows = functools.partial(_new_rows, marks, of.get("scored"))
    comet = settings.scorer == "comet"
    if comet and settings.enabled:
        settings = quality.decided(settings)  # here, for all workers
    model = _model(settings) if comet and settings.enabled else ""
    # The folder's name does not depend on the version of this program: a score that took a GPU to compute outlives an edit.
    kept = _kept_folder(run, model) if model else None
    this = digest(run.recipe.of_the_mix(), model)
    if kept is not None:
        # Merges what other runs left. What this run left, in whichever round, stays aside until it ends: when it goes on after an
        # interruption, it must find what it would have found.
        ScoreStore(kept).settle(but=frozenset(_window(part, verdicts, this) for part in parts))
    scores = run.derive(
        kind, title, score_part, one_by_one(parts) if settings.enabled else [], _scoring(settings), of=of,
        depends=[model, quality.packages(settings), user_code([settings.scorer]) if ":" in settings.scorer else None],
        hints={"kept": str(kept) if kept is not None else None, "model": model, "run": this},
        resources={"gpu": 1.0} if comet else None,
        rows=rows,
    )  # fmt: skip
    if kept is not None and wanted is None:
        ScoreStore(kept).settle()
    if kind == "quality" and settings.enabled:
        run.result.scored = _count_scored(scores.files.values())
    return scores


def settle_scores(run: Run, settings: QualitySettings) -> None:
    """Merges the scores that the rounds of this run added to those that are kept."""
    if settings.scorer == "comet":
        ScoreStore(_kept_folder(run, _model(quality.decided(settings)))).settle()


def _new_rows(marks: Column, before: Column | None, group: Group) -> int:
    """Rows of a group that a round scores."""
    return sum(int(marks.marked(p).sum()) - (int(before.marked(p).sum()) if before else 0) for p in group.parts)


def score_part(work: Work) -> None:
    """Scores the rows of a part that are no duplicates; writes `quality`, float32, null where a row was not judged."""
    (part,) = work.parts
    columns = work.columns
    mask = columns["verdicts"].kept(part)
    scores = np.full(part.rows, np.nan, np.float32)
    computed = reused = 0
    if "wanted" in columns:
        mask &= columns["wanted"].marked(part)
    if "scores" in columns:
        before = columns["scores"]
        scores = before.floats(part, "quality").copy()
        computed, reused = _counts(before.file(part))
        mask &= ~columns["scored"].marked(part)
    for number, (rows, table) in enumerate(part.read_pieces() if mask.any() else ()):
        here = mask[rows]
        if here.any():
            found, new = _score_piece(table.filter(pa.array(here)), number, work)
            scores[rows][here] = found
            computed, reused = computed + new, reused + found.size - new
    notes = {"computed": str(computed), "reused": str(reused)}
    work.write(part, {"quality": pa.array(scores, from_pandas=True)}, notes)
    for number in range(len(part.pieces)):
        Path(_piece(work, number)).unlink(missing_ok=True)


def _score_piece(rows: pa.Table, number: int, work: Work) -> tuple[F32, int]:
    """Scores of rows of one file of a part, and how many of them had to be computed. If there are several files, those that are
    done are kept for the case of an interruption."""
    path = _piece(work, number)
    if ready(path):
        return np.asarray(pq.read_table(path)["quality"].to_numpy(), np.float32), _counts(path)[0]
    found, new = _score_rows(rows, work)
    if len(work.parts[0].pieces) > 1:
        with writing(path) as scratch:
            write_table(pa.table({"quality": found}, metadata={"computed": str(new)}), scratch)
    return found, new


def _piece(work: Work, number: int) -> str:
    return f"{work.outputs[0]}.{number}.piece"


def _score_rows(rows: pa.Table, work: Work) -> tuple[F32, int]:
    """Scores of rows, and how many of them had to be computed."""
    (part,) = work.parts
    states = work.columns["states"]
    # A scorer without a state is the same for all pairs: a model is not opened once a pair.
    pair, state, checksum = (part.pair, states.file(part), states.digest(part)) if part in states else ("", "", "")
    scorer = _scorer(work.settings.model_dump_json(), pair, state, checksum, work.hints["model"])
    if work.hints["kept"] is None:
        return scorer.score(rows), rows.num_rows
    store = _kept_scores(work.hints["kept"])
    window = _window(part, work.columns["verdicts"], work.hints["run"])
    return _score_once(rows, scorer.score, store, work.settings, window)


@functools.lru_cache(maxsize=2)
def _scorer(settings: str, pair: str, state: str, _checksum: str, _model: str) -> quality.Scorer:
    """The scorer of settings in JSON, kept from one part to the next; another if its state or model has changed."""
    states = {pair: Path(state).read_bytes()} if state else {}
    return quality.open_scorer(QualitySettings.model_validate_json(settings), states)


@functools.lru_cache(maxsize=1)
def _kept_scores(folder: str) -> ScoreStore:
    return ScoreStore(folder)


def _score_once(
    rows: pa.Table, score: Callable[[pa.Table], F32], store: ScoreStore, settings: QualitySettings, window: str
) -> tuple[F32, int]:
    """Scores of rows, and how many of them were computed: not those that are kept, and equal rows once.

    Args:
        window: the name under which new scores are kept.
    """
    keys = quality.score_keys(rows, settings)
    scores, there = store.lookup(keys)
    missing = np.flatnonzero(~there)
    if not missing.size:
        return scores, 0
    _, first, place = np.unique(keys[missing], axis=0, return_index=True, return_inverse=True)
    chosen = missing[np.sort(first)]  # in the order of the rows
    found = score(rows.take(chosen))
    store.add(keys[chosen], found, window)
    by_key = np.empty(len(first), np.float32)
    by_key[np.argsort(first, kind="stable")] = found
    scores[missing] = by_key[place.reshape(-1)]
    return scores, len(chosen)


def _window(part: Part, verdicts: Column, run: str) -> str:
    """The name under which the scores of a part's rows are kept: the same in all rounds of a run and when it goes on after an
    interruption, another if the recipe, the model or the rows differ."""
    return f"{part.name}.{digest(part.identity, verdicts.digest(part), run)}"


def _model(settings: QualitySettings) -> str:
    """A digest of what decides a model's scores but for their last digits: its files, precision and kind of device."""
    files = [large_file_digest(file) for file in quality.model_files(settings)]
    return digest(
        quality.SCORE_VERSION, files, settings.backend, settings.precision, quality.device(), settings.kernels
    )


def _kept_folder(run: Run, model: str) -> Path:
    cache = run.recipe.quality.cache
    return (Path(cache).expanduser() if cache is not None else run.out / "scores") / model


def _count_scored(files: Iterable[str]) -> dict[str, int]:
    """How many scores were computed, and how many were kept from elsewhere."""
    counts = [_counts(file) for file in files]
    return {"computed": sum(new for new, _ in counts), "reused": sum(old for _, old in counts)}


def _counts(file: str) -> tuple[int, int]:
    """The same of one file, from its metadata."""
    notes: Any = pq.read_schema(file).metadata or {}
    return int(notes.get(b"computed", 0)), int(notes.get(b"reused", 0))


def own_scores(run: Run, parts: Sequence[Part]) -> Column:
    """The column of the scores that the sources brought, where scores are looked for."""
    return run.derive("prior", "read scores", copy_score, one_by_one(parts), None)


def copy_score(work: Work) -> None:
    """Writes a part's own column `score` as `quality`."""
    (part,) = work.parts
    work.write(part, {"quality": part.read("score")["score"].cast(pa.float32(), safe=False)})


# --------------------------------------------------------------------------------------------------------------- cutoff


def find_cutoffs(run: Run, parts: Sequence[Part], scores: Column, states: Column) -> Column:
    """The column of cut-offs, one value a pair: `cutoff`, None where nothing is dropped, and `note`, why that is so."""
    settings = run.recipe.quality
    cutoffs = run.derive(
        "cutoff", "", find_cutoff, by_pair(part for part in parts if part in scores),
        settings.without("cache", "until", "prior"),
        of={"scores": scores, "states": states}, whole=True,
    )  # fmt: skip
    for value in cutoffs.values().values():
        note = value["note"]
        if note and note not in run.result.notes:
            run.result.notes.append(note)
    return cutoffs


def find_cutoff(work: Work) -> None:
    """Decides a pair's cut-off."""
    scores, states = work.columns["scores"], work.columns["states"]
    pair = work.group.name
    learned = quality.evidence(work.settings, Path(states.groups[pair]).read_bytes()) if pair in states.groups else None
    work.write_value(
        {
            "cutoff": quality.cutoff(
                lambda: (scores.floats(part, "quality") for part in work.parts), work.settings, pair, learned
            ),
            "note": quality.explain(work.settings, pair, learned),
        }
    )


def apply_thresholds(run: Run, parts: Sequence[Part], verdicts: Column, scores: Column, cutoffs: Column) -> Column:
    """The column of verdicts with `quality.score` for rows below their pair's cut-off."""
    if not scores.files:
        return verdicts
    of = {"verdicts": verdicts, "scores": scores, "cutoffs": cutoffs}
    return run.derive("passed", "apply thresholds", apply_threshold, one_by_one(parts), None, of=of)


def apply_threshold(work: Work) -> None:
    """Applies the cut-off to the rows of a part; a row without a score stays."""
    (part,) = work.parts
    verdict = work.columns["verdicts"].array(part, "verdict").astype(np.uint8)
    cutoff = work.columns["cutoffs"].value(part.pair)["cutoff"]
    if cutoff is not None:
        scores = work.columns["scores"].floats(part, "quality")
        with np.errstate(invalid="ignore"):
            verdict[(verdict == 0) & (scores < np.float32(cutoff))] = code("quality.score")
    work.write(part, {"verdict": verdict})


def write_index(
    run: Run, parts: Sequence[Part], verdicts: Column, scores: Column, cutoffs: Column, wanted: Column | None = None
) -> None:
    """Notes where the scores of a run lie, for `corpusprep thresholds`."""
    if not scores.files:
        return

    def relative(file: str) -> str:
        return os.path.relpath(file, run.out)

    def files(part: Part) -> dict[str, Any]:
        return {
            "parts": [relative(path) for path, _ in part.pieces],
            "verdicts": relative(verdicts.file(part)),
            "scores": relative(scores.file(part)),
            "wanted": relative(wanted.file(part)) if wanted is not None else None,
        }

    index = {
        "recipe": run.recipe.model_dump(mode="json"),
        "pairs": {group.name: [files(part) for part in group.parts] for group in by_pair(parts)},
        "cutoffs": {pair: value["cutoff"] for pair, value in cutoffs.values().items()},
    }
    path, text = run.out / INDEX, json.dumps(index)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with writing(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
