"""Help with the threshold of the quality stage: what is left of each pair at which score, and what rows look like there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from corpusprep.errors import InputError, RunError
from corpusprep.parts import take_rows
from corpusprep.recipe import Recipe
from corpusprep.report.tables import columns
from corpusprep.stages import balance
from corpusprep.steps.quality import INDEX

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_QUANTILES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
_DROPPED = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)  # shares of rows at whose scores a cut is tried
_SAMPLE = 50_000  # rows of a pair whose tokens are counted


@dataclass(frozen=True)
class PairScores:
    """The scores of one pair.

    Attributes:
        pair: its name.
        scores: of its judged rows, ascending, (n,).
        tokens: estimated tokens of the examples of a row, by the same order; where only a sample was counted, the mean of
            the rows of like score.
        unjudged: rows without a score.
        cutoff: the threshold of the run, None where nothing was dropped.
        above, below: (score, source, target) of rows next to the cut-off, or to the lower quartile where there is none.
    """

    pair: str
    scores: F32
    tokens: F64
    unjudged: int
    cutoff: float | None
    above: list[tuple[float, str, str]]
    below: list[tuple[float, str, str]]

    def left(self, threshold: float) -> tuple[int, int]:
        """Rows and tokens that score at least as much."""
        at = int(np.searchsorted(self.scores, np.float32(threshold)))
        return len(self.scores) - at, int(self.tokens[at:].sum())

    def threshold_for(self, tokens: float) -> float:
        """The highest threshold that leaves as many tokens, or the lowest score where there are not as many."""
        from_top = np.cumsum(self.tokens[::-1])
        rows = int(np.searchsorted(from_top, tokens)) + 1
        return float(self.scores[-min(rows, len(self.scores))])


def read_scores(out: str | Path, pairs: Sequence[str] = (), examples: int = 3) -> Iterator[PairScores]:
    """The scores of a run, pair by pair.

    Args:
        out: the run's folder.
        pairs: names as the run's tables show them; all where empty.
        examples: rows to show on either side of a cut-off.

    Raises:
        InputError: the folder holds no run that came to score, or not the pair.
    """
    index = _index(Path(out))
    unknown = [pair for pair in pairs if pair not in index["pairs"]]
    if unknown:
        raise InputError(str(out), f"has no scores of {unknown[0]}", f"Name one of {', '.join(index['pairs'])}")
    recipe = Recipe.model_validate(index["recipe"])
    for pair in pairs or index["pairs"]:
        files = [{name: _placed(Path(out), file) for name, file in f.items()} for f in index["pairs"][pair]]
        found = _read(files, pair, index["cutoffs"].get(pair), recipe, examples)
        if found is not None:
            yield found


def describe(found: Sequence[PairScores], budget: int | None, settings: balance.BalanceSettings) -> str:
    """Tables of quantiles, of what thresholds leave, and of rows beside the cut-off; thresholds for a budget."""
    if not found:
        return "No row has a score."
    quantiles = [
        (f.pair, len(f.scores), *(f"{value:.3f}" for value in np.quantile(f.scores, _QUANTILES))) for f in found
    ]
    text = [
        columns(
            quantiles, ("pair", "judged", *("min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in _QUANTILES))
        )
    ]
    for f in found:
        tried = {float(f"{value:.3g}") for value in np.quantile(f.scores, _DROPPED)}
        tried |= {f.cutoff} if f.cutoff is not None else set()
        lines = []
        for threshold in sorted(tried):
            rows, tokens = f.left(threshold)
            mark = "the run's" if threshold == f.cutoff else ""
            lines.append((f"{threshold:.3g}", rows, f"{rows / len(f.scores):.1%}", tokens, mark))
        text.append(f"{f.pair}\n" + columns(lines, ("threshold", "rows left", "share", "tokens (estimate)", "")))
        for name, rows_beside in (("above", f.above), ("below", f.below)):
            if rows_beside:
                where = "its cut-off" if f.cutoff is not None else "its lower quartile"
                text.append(f"{f.pair}, just {name} {where}\n" + "\n".join(_shown(*row) for row in rows_beside))
    if budget is not None:
        text.append(_suggestion(found, budget, settings))
    return "\n\n".join(text)


def _suggestion(found: Sequence[PairScores], budget: int, settings: balance.BalanceSettings) -> str:
    counts = {f.pair: balance.PairCount(len(f.scores), int(f.tokens.sum())) for f in found}
    targets = balance.plan(counts, settings.model_copy(update={"budget": budget})).targets
    lines, recipe = [], []
    for f in found:
        threshold = f.threshold_for(targets[f.pair] / settings.epochs)
        # Rounded down, so that what it is to leave is left.
        threshold = float(np.floor(threshold * 1000) / 1000)
        rows, tokens = f.left(threshold)
        lines.append((f.pair, targets[f.pair], f"{threshold:.3f}", rows, tokens))
        recipe.append(f"[quality.pair.{f.pair}]\nthreshold = {threshold:.3f}")
    return (
        f"the highest thresholds that leave each pair its share of {budget:,} tokens\n"
        + columns(lines, ("pair", "share", "threshold", "rows left", "tokens (estimate)"))
        + "\n\nas a recipe has them\n"
        + "\n".join(recipe)
    )


def read_recipe(out: str | Path) -> Recipe:
    """The recipe that the scores of a run's folder were made by.

    Raises:
        InputError: the folder holds no run that came to score.
    """
    return Recipe.model_validate(_index(Path(out))["recipe"])


def _index(out: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((out / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            str(out), "holds no run that came to score rows", "Name the folder that corpusprep run --out was given"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{out / 'parts' / INDEX}: cannot be read ({error}). Start the run again.") from None
    return index


def _read(
    files: list[dict[str, Any]], pair: str, cutoff: float | None, recipe: Recipe, examples: int
) -> PairScores | None:
    scores, keys, masks = [], [], []
    unjudged = 0
    for file in files:
        try:
            mask = pq.read_table(file["verdicts"], columns=["verdict"])["verdict"].to_numpy() == 0
            if file["wanted"] is not None:
                mask = mask & pq.read_table(file["wanted"])["candidate"].to_numpy(zero_copy_only=False)
            score = np.asarray(pq.read_table(file["scores"])["quality"].to_numpy(zero_copy_only=False), np.float32)
            key = np.concatenate([pq.read_table(path, columns=["key"])["key"].to_numpy() for path in file["parts"]])
        except KeyError:
            raise RunError(f"{pair}: the scores are of another version. Start the run again.") from None
        except FileNotFoundError as error:
            raise RunError(
                f"{error.filename or file['scores']}: is gone. Start the run again: it makes what is missing."
            ) from None
        unjudged += int((mask & np.isnan(score)).sum())
        mask = mask & ~np.isnan(score)
        masks.append(mask)
        scores.append(score[mask])
        keys.append(key[mask])
    every = np.concatenate(scores) if scores else np.empty(0, np.float32)
    if not len(every):
        return None
    ordered = np.sort(every)
    at = cutoff if cutoff is not None else float(np.quantile(ordered, 0.25))
    key_limit = _limit(np.concatenate(keys), _SAMPLE)
    counter = balance.TokenCounter(recipe.balance.model_copy(update={"tokenizer": None}))
    sampled: list[tuple[F32, Any]] = []
    beside: list[tuple[float, str, str]] = []
    for file, mask, score, key in zip(files, masks, scores, keys, strict=True):
        counted, shown = key <= key_limit, _beside(score, at, examples)
        if not counted.any() and not len(shown):
            continue
        wanted = np.union1d(np.flatnonzero(counted), shown)
        table = take_rows(file["parts"], np.flatnonzero(mask)[wanted])
        sample = table.filter(pa.array(counted[wanted]))
        sampled.append((score[counted], counter.count_rows(sample, recipe.instruct, recipe.seed)))
        rows = table.select(["src", "tgt"]).take(np.searchsorted(wanted, shown)).to_pylist()
        beside += [(float(s), r["src"], r["tgt"]) for s, r in zip(score[shown], rows, strict=True)]
    above = sorted(row for row in beside if row[0] >= np.float32(at))[:examples]
    below = sorted((row for row in beside if row[0] < np.float32(at)), reverse=True)[:examples]
    tokens = _spread(ordered, np.concatenate([s for s, _ in sampled]), np.concatenate([t for _, t in sampled]))
    return PairScores(pair, ordered, tokens, unjudged, cutoff, above, below)


def _placed(out: Path, file: str | list[str] | None) -> str | list[str] | None:
    """The paths of an index, which are relative to the run's folder."""
    if file is None:
        return None
    return str(out / file) if isinstance(file, str) else [str(out / each) for each in file]


def _beside(scores: F32, at: float, count: int) -> npt.NDArray[np.int64]:
    """The rows whose scores are next to a score, as many on either side."""
    order = np.argsort(scores, kind="stable")
    place = int(np.searchsorted(scores[order], np.float32(at)))
    return order[max(0, place - count) : place + count]


def _limit(keys: npt.NDArray[np.uint64], count: int) -> np.uint64:
    return np.partition(keys, count - 1)[count - 1] if len(keys) > count else np.uint64((1 << 64) - 1)


def _spread(ordered: F32, scores: F32, tokens: npt.NDArray[np.int32]) -> F64:
    """Tokens of all rows by those of a sample: exact where the sample is all, else the running mean over rows of like score."""
    by_score = np.argsort(scores, kind="stable")
    tokens = tokens[by_score]
    if len(tokens) == len(ordered):
        return tokens.astype(np.float64)
    bins = np.array_split(np.arange(len(tokens)), min(200, len(tokens)))
    means = np.array([tokens[b].mean() for b in bins])
    starts = scores[by_score][[b[0] for b in bins]]
    return np.asarray(means[np.maximum(np.searchsorted(starts, ordered, side="right") - 1, 0)])


def _shown(score: float, src: str, tgt: str) -> str:
    return f"  {score:.3f}  {_plain(src)}\n         {_plain(tgt)}"


def _plain(text: str, most: int = 100) -> str:
    """Text of a corpus as a terminal can bear it: one line, no control characters, not without end."""
    line = " ".join(text[: 4 * most].split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    return "".join(c if c.isprintable() else "\ufffd" for c in line)
