"""The steps that fill the budget: tokens are counted where it matters, a plan is made, rows are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from corpusprep import judging, passes
from corpusprep.context import Context, by_pair, dump
from corpusprep.passes import Part
from corpusprep.stages import balance
from corpusprep.store import code_version, digest, file_digest, ready, versions

_MARGIN = 1.05  # on what a round scores to fill what is missing
_LOOK = 100_000  # tokens of a pair that are scored before it is given up, where none passes


def count_tokens(
    run: Context,
    parts: Sequence[Part],
    decisions: dict[str, str],
    scores: dict[str, str],
    cutoffs: dict[str, float | None],
) -> tuple[dict[str, str], dict[str, balance.PairCount]]:
    """part -> file of verdicts so far, and tokens; and what is at hand of each pair.

    With a tokenizer and far more text than the budget wants, only candidates are counted exactly: the rows that a
    selection by estimates takes with a margin, or with a wider one where the estimate proves to be off.
    """
    settings = run.recipe.balance
    if settings.tokenizer is None or settings.budget is None or not settings.enabled:
        tokens = _count(run, "tokens", settings, parts, decisions, scores, cutoffs)
        return tokens, _at_hand(run, parts, tokens)
    rough = settings.model_copy(update={"tokenizer": None})
    estimates = _count(run, "estimate", rough, parts, decisions, scores, cutoffs)
    estimated = _at_hand(run, parts, estimates)
    ratios = dict.fromkeys(estimated, 1.0)
    limits: dict[str, int] = {}
    margin = 1.15
    while True:
        counts = {p: balance.PairCount(c.rows, int(c.tokens * ratios[p])) for p, c in estimated.items()}
        targets = balance.plan(counts, settings).targets
        for pair, count in estimated.items():
            limit = int(targets[pair] / ratios[pair] * margin) + 1
            limits[pair] = min(count.tokens, max(limit, limits.get(pair, 0)))
        candidates = _candidates(run, parts, estimates, scores, limits, settings)
        tokens = _count(run, "tokens", settings, parts, decisions, scores, cutoffs, candidates)
        exact = _at_hand(run, parts, tokens)
        whole = {pair for pair, limit in limits.items() if limit >= estimated[pair].tokens}
        for pair in estimated:
            if exact[pair].tokens:
                share = estimated[pair].tokens if pair in whole else limits[pair]
                ratios[pair] = exact[pair].tokens / share
        counts = {
            pair: exact[pair] if pair in whole else balance.PairCount(c.rows, int(c.tokens * ratios[pair]))
            for pair, c in estimated.items()
        }
        targets = balance.plan(counts, settings).targets
        if all(pair in whole or exact[pair].tokens >= targets[pair] for pair in estimated):
            return tokens, counts
        margin *= 1.5


def score_what_is_needed(
    run: Context, parts: Sequence[Part], decisions: dict[str, str], states: dict[str, str]
) -> tuple[dict[str, str], dict[str, str], dict[str, float | None], dict[str, str], dict[str, balance.PairCount]]:
    """Scores rows, in rounds, until those that pass fill each pair's share of the budget, or the pair is exhausted.

    Each round scores what it takes by the share of tokens that passed so far; then the budget is shared out again by what
    the pairs prove to have.

    Returns:
        part -> file of scores; part -> file of which rows were scored; pair -> cut-off; part -> file of verdicts so far, and
        tokens; and what is at hand of each pair.
    """
    settings = run.recipe.balance
    rough = settings.model_copy(update={"tokenizer": None})
    estimates = _count(run, "estimate", rough, parts, decisions, {}, {})
    estimated = _at_hand(run, parts, estimates)
    prior = judging.find_prior(run, parts, decisions)
    order = settings.model_copy(update={"select": "score" if prior else "hash"})
    limits = dict.fromkeys(estimated, 0)
    passed = {pair: balance.PairCount(0, 0) for pair in estimated}
    before: dict[str, tuple[str, str]] = {}
    scores: dict[str, str] = {}
    wanted: dict[str, str] = {}
    tokens: dict[str, str] = {}
    cutoffs: dict[str, float | None] = {}
    number = 0
    while True:
        counts: dict[str, balance.PairCount] = {}
        shares: dict[str, float] = {}
        for pair, whole in estimated.items():
            # Nothing is known before the first round: half of what would be scored if all rows passed shows the share.
            shares[pair] = passed[pair].tokens / limits[pair] if limits[pair] else 1.0
            exhausted = limits[pair] >= whole.tokens
            counts[pair] = (
                passed[pair] if exhausted else balance.PairCount(whole.rows, int(whole.tokens * shares[pair]))
            )
        targets = balance.plan(counts, settings).targets
        short = {
            pair: targets[pair] - passed[pair].tokens
            for pair, whole in estimated.items()
            if limits[pair] < whole.tokens
            and (passed[pair].tokens < targets[pair] or (not passed[pair].tokens and limits[pair] < _LOOK))
        }
        if number and not short:
            run.result.notes += [
                f"{pair}: none of the rows that were scored first passes (some {limits[pair]:,} tokens), so the rest of this "
                "pair was not scored."
                for pair, whole in estimated.items()
                if not passed[pair].tokens and 0 < limits[pair] < whole.tokens
            ]
            return scores, wanted, cutoffs, tokens, counts
        for pair, missing in short.items():
            more = missing / shares[pair] * (_MARGIN if number else 0.5) if shares[pair] else 3 * limits[pair]
            limits[pair] = min(estimated[pair].tokens, limits[pair] + max(int(more), limits[pair] // 20, 1))
        number += 1
        marks = {part: file for part, (_, file) in before.items()}
        wanted = _candidates(run, parts, estimates, prior, limits, order, "wanted", marks)
        some = judging.Round(number, wanted, before)
        scores = judging.score(run, parts, decisions, states, run.recipe.quality, some=some)
        cutoffs = judging.find_cutoffs(run, parts, decisions, scores, states)
        tokens = _count(run, "tokens", settings, parts, decisions, scores, cutoffs, wanted=wanted)
        passed = _at_hand(run, parts, tokens)
        before = {part: (scores[part], wanted[part]) for part in scores}


def _candidates(
    run: Context,
    parts: Sequence[Part],
    estimates: dict[str, str],
    scores: dict[str, str],
    limits: dict[str, int],
    settings: balance.BalanceSettings,
    kind: str = "candidates",
    before: dict[str, str] | None = None,
) -> dict[str, str]:
    """part -> file that marks the rows up to the pairs' limits, which are to be scored or to be counted exactly."""
    candidates: dict[str, str] = {}
    tasks = []
    for pair, members in by_pair(parts).items():
        already = tuple(before[part.identity] for part in members) if before else ()
        key = digest(
            _selecting(run, members, estimates, scores, settings), limits[pair], [file_digest(file) for file in already]
        )
        files = tuple(str(run.store.path(kind, part.name, key)) for part in members)
        candidates |= {part.identity: file for part, file in zip(members, files, strict=True)}
        if all(ready(file) for file in files):
            continue
        task = passes.CandidateTask(
            pair, tuple(members), tuple(estimates[p.identity] for p in members),
            tuple(scores.get(p.identity) for p in members), files, limits[pair], settings, run.recipe.seed, already,
        )  # fmt: skip
        tasks.append((task, sum(part.rows for part in members)))
    title = "choose what to count" if kind == "candidates" else "choose what to score"
    for _ in run.map(title, passes.run_candidates, tasks, made=kind):
        pass
    return candidates


def _selecting(
    run: Context,
    members: Sequence[Part],
    tokens: dict[str, str],
    scores: dict[str, str],
    settings: balance.BalanceSettings,
) -> str:
    """A digest of all that a selection among the rows of a pair depends on but for its target."""
    return digest(
        code_version("balance"), versions(), run.recipe.seed, dump(settings, "tokenizer"),
        [(p.identity, file_digest(tokens[p.identity])) for p in members],
        [file_digest(scores[p.identity]) for p in members] if settings.select == "score" and scores else None,
    )  # fmt: skip


def _count(
    run: Context,
    kind: str,
    settings: balance.BalanceSettings,
    parts: Sequence[Part],
    decisions: dict[str, str],
    scores: dict[str, str],
    cutoffs: dict[str, float | None],
    candidates: dict[str, str] | None = None,
    wanted: dict[str, str] | None = None,
) -> dict[str, str]:
    recipe = run.recipe
    common = digest(
        code_version("balance", "instruct"), versions(), recipe.seed, counting(settings),
        dump(recipe.instruct, "validation", "shard_rows", "container"),
    )  # fmt: skip
    tokens: dict[str, str] = {}
    tasks = []
    for part in parts:
        score, cutoff = scores.get(part.identity), cutoffs.get(part.pair)
        marks = candidates[part.identity] if candidates is not None else None
        scored = wanted[part.identity] if wanted is not None else None
        key = digest(
            common, part.identity, file_digest(decisions[part.identity]),
            file_digest(score) if score and cutoff is not None else None, cutoff,
            [file_digest(file) if file else None for file in (marks, scored)],
        )  # fmt: skip
        tokens[part.identity] = file = str(run.store.path(kind, part.name, key))
        if ready(file):
            run.reuse(kind, 1)
            continue
        task = passes.TokenTask(
            part, decisions[part.identity], score, cutoff, marks, scored, file, settings, recipe.instruct, recipe.seed
        )
        tasks.append((task, part.rows))
    title = "estimate tokens" if kind == "estimate" else "count tokens"
    for _ in run.map(title, passes.run_tokens, tasks, made=kind):
        pass
    return tokens


def _at_hand(run: Context, parts: Sequence[Part], tokens: dict[str, str]) -> dict[str, balance.PairCount]:
    """Rows and tokens of each pair that may be selected."""
    counts: dict[str, balance.PairCount] = {}
    for pair, members in by_pair(parts).items():
        rows = total = 0
        for part in members:
            table = pq.read_table(tokens[part.identity])
            found = table["tokens"].to_numpy()[table["verdict"].to_numpy() == 0]
            rows += int((found > 0).sum())
            total += int(found.sum(dtype=np.int64))
        counts[pair] = balance.PairCount(rows, total)
    return counts


def choose(
    run: Context,
    parts: Sequence[Part],
    tokens: dict[str, str],
    counts: dict[str, balance.PairCount],
    scores: dict[str, str],
) -> tuple[balance.Plan | None, dict[str, str]]:
    """The plan, and part -> file of verdicts and copies."""
    settings = run.recipe.balance
    plan = balance.plan(counts, settings) if settings.enabled else None
    outcomes: dict[str, str] = {}
    tasks = []
    for pair, members in by_pair(parts).items():
        key = digest(_selecting(run, members, tokens, scores, settings), plan.targets[pair] if plan else None)
        files = tuple(str(run.store.path("balance", part.name, key)) for part in members)
        outcomes |= {part.identity: file for part, file in zip(members, files, strict=True)}
        if all(ready(file) for file in files):
            run.reuse("balance", 1)
            continue
        task = passes.BalanceTask(
            pair, tuple(members), tuple(tokens[p.identity] for p in members),
            tuple(scores.get(p.identity) for p in members), files, plan, settings, run.recipe.seed,
        )  # fmt: skip
        tasks.append((task, sum(part.rows for part in members)))
    for _ in run.map("balance", passes.run_balance, tasks, made="balance"):
        pass
    return plan, outcomes


def counting(settings: balance.BalanceSettings) -> list[Any]:
    """What decides the number of tokens of a text."""
    file = balance.tokenizer_file(settings.tokenizer) if settings.tokenizer is not None else None
    return [file_digest(file) if file is not None else None, settings.message_overhead]
