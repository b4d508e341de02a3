"""Steps 4 and 5 in turns, for `quality.until = "budget"`: rows are scored until those that pass fill the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from corpusprep.parts import Column, Part
from corpusprep.stages import balance
from corpusprep.stages.balance import PairCount
from corpusprep.stages.quality import QualitySettings
from corpusprep.steps.balance import Counts, at_hand, choose_candidates, count, estimate
from corpusprep.steps.quality import Wanted, apply_thresholds, find_cutoffs, learn, own_scores, score, settle_scores

if TYPE_CHECKING:
    from corpusprep.derive import Run

_MARGIN = 1.05  # on what a round scores to fill what is missing
_LOOK = 100_000  # tokens of a pair that are scored before it is given up, where none passes


@dataclass(frozen=True)
class Scored:
    """What the rounds come to: the columns of scores, of the rows that were scored, of cut-offs, and of verdicts and tokens;
    and what is at hand of each pair."""

    scores: Column
    wanted: Column
    cutoffs: Column
    tokens: Column
    counts: Counts


def score_until_filled(run: Run, parts: Sequence[Part], verdicts: Column) -> Scored:
    """Scores rows, in rounds, until those that pass fill each pair's share of the budget, or the pair is exhausted.

    A round marks rows, up to a limit of estimated tokens, in the order of the prior; scores them; and counts the tokens of those
    that pass. Then the budget is shared out again by what the pairs prove to have.
    """
    settings = run.recipe.balance
    estimates = estimate(run, parts, verdicts)
    available = at_hand(run, parts, estimates)
    states = learn(run, parts, verdicts, run.recipe.quality)
    prior = find_prior(run, parts, verdicts)
    limits = dict.fromkeys(available, 0)  # estimated tokens up to which rows are scored
    nothing = dict.fromkeys(available, PairCount(0, 0))
    found = Scored(Column("quality"), Column("wanted"), Column("cutoff"), estimates, nothing)
    number = 0
    while True:
        passed = found.counts
        counts, rates = _expect(available, limits, passed)
        targets = balance.plan(counts, settings).targets
        short = {
            pair: targets[pair] - passed[pair].tokens
            for pair, whole in available.items()
            if limits[pair] < whole.tokens
            and (passed[pair].tokens < targets[pair] or (not passed[pair].tokens and limits[pair] < _LOOK))
        }
        if number and not short:
            run.result.notes += [
                f"{pair}: none of the first rows passes (some {limits[pair]:,} tokens were scored), so the rest of this pair was "
                "not scored."
                for pair, whole in available.items()
                if not passed[pair].tokens and 0 < limits[pair] < whole.tokens
            ]
            settle_scores(run, run.recipe.quality)
            return replace(found, counts=counts)
        for pair, missing in short.items():
            # Half of what would do if all rows passed, in the first round: nothing is known then of how many do.
            more = missing / rates[pair] * (_MARGIN if number else 0.5) if rates[pair] else 3 * limits[pair]
            limits[pair] = min(available[pair].tokens, limits[pair] + max(int(more), limits[pair] // 20, 1))
        before = (found.scores, found.wanted) if number else None
        number += 1
        order = {"scores": prior} if prior.files else {}
        wanted = choose_candidates(run, "wanted", parts, estimates, order, limits, before[1] if before else None)
        scores = score(run, parts, verdicts, states, run.recipe.quality, wanted=Wanted(number, wanted, before))
        cutoffs = find_cutoffs(run, parts, scores, states)
        accepted = apply_thresholds(run, parts, verdicts, scores, cutoffs)
        tokens = count(run, "tokens", settings, parts, accepted, {"wanted": wanted})
        found = Scored(scores, wanted, cutoffs, tokens, at_hand(run, parts, tokens))


def _expect(available: Counts, limits: dict[str, int], passed: Counts) -> tuple[Counts, dict[str, float]]:
    """What each pair is expected to have in the end, by the share of its scored tokens that passed; and that share."""
    counts: Counts = {}
    rates: dict[str, float] = {}
    for pair, whole in available.items():
        rates[pair] = passed[pair].tokens / limits[pair] if limits[pair] else 1.0
        exhausted = limits[pair] >= whole.tokens
        counts[pair] = passed[pair] if exhausted else PairCount(whole.rows, int(whole.tokens * rates[pair]))
    return counts, rates


def find_prior(run: Run, parts: Sequence[Part], verdicts: Column) -> Column:
    """The column of what rows are put in order by before they are scored; empty where it is the seeded hash."""
    settings = run.recipe.quality
    if settings.prior == "lexical":
        lexical = QualitySettings(scorer="lexical", sample=settings.sample, min_rows=settings.min_rows)
        states = learn(run, parts, verdicts, lexical)
        return score(run, parts, verdicts, states, lexical, kind="prior")
    return own_scores(run, parts) if settings.prior == "score" else Column("prior")
