"""Step 5: tokens are counted, a plan shares the budget out, and rows are chosen."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.keys import file_digest
from corpusprep.parts import Column, Part, Work, by_pair, one_by_one
from corpusprep.stages import balance, instruct
from corpusprep.stages.balance import BalanceSettings, PairCount
from corpusprep.stages.balance.take import Piece, select_pieces
from corpusprep.steps.verdicts import code

if TYPE_CHECKING:
    from corpusprep.derive import Run

Counts = dict[str, PairCount]
"""pair -> rows and tokens that may be selected."""

_BYTES = 40  # that a row takes if its columns are held
_MARGIN = 1.15  # by which the first candidates exceed a pair's target, and by how much more they do each time
_WIDER = 1.5

# --------------------------------------------------------------------------------------------------------------- tokens


def count_tokens(run: Run, parts: Sequence[Part], passed: Column, scores: Column) -> tuple[Column, Counts]:
    """The column of verdicts and tokens, and what is at hand of each pair.

    With a tokenizer and far more text than the budget wants, only candidates are counted exactly: the rows that a
    selection by estimates takes with a margin, or with a wider one where the estimate proves to be off.
    """
    settings = run.recipe.balance
    if settings.tokenizer is None or settings.budget is None or not settings.enabled:
        tokens = count(run, "tokens", settings, parts, passed)
        return tokens, at_hand(run, parts, tokens)
    estimates = estimate(run, parts, passed)
    estimated = at_hand(run, parts, estimates)
    order = ordering(settings, scores)
    ratios = dict.fromkeys(estimated, 1.0)  # exact tokens by estimated ones
    limits: dict[str, int] = {}
    margin = _MARGIN
    while True:
        counts = {p: PairCount(c.rows, int(c.tokens * ratios[p])) for p, c in estimated.items()}
        targets = balance.plan(counts, settings).targets
        for pair, whole in estimated.items():
            limit = int(targets[pair] / ratios[pair] * margin) + 1
            limits[pair] = min(whole.tokens, max(limit, limits.get(pair, 0)))
        candidates = choose_candidates(run, "candidates", parts, estimates, order, limits)
        tokens = count(run, "tokens", settings, parts, passed, {"candidates": candidates})
        exact = at_hand(run, parts, tokens)
        complete = {pair for pair, limit in limits.items() if limit >= estimated[pair].tokens}
        for pair in estimated:
            if exact[pair].tokens:
                share = estimated[pair].tokens if pair in complete else limits[pair]
                ratios[pair] = exact[pair].tokens / share
        counts = {
            pair: exact[pair] if pair in complete else PairCount(c.rows, int(c.tokens * ratios[pair]))
            for pair, c in estimated.items()
        }
        targets = balance.plan(counts, settings).targets
        if all(pair in complete or exact[pair].tokens >= targets[pair] for pair in estimated):
            return tokens, counts
        margin *= _WIDER


def estimate(run: Run, parts: Sequence[Part], verdicts: Column) -> Column:
    """The column of verdicts and estimated tokens, which needs no tokenizer."""
    settings = run.recipe.balance.model_copy(update={"tokenizer": None})
    return count(run, "estimate", settings, parts, verdicts)


def count(
    run: Run,
    kind: str,
    settings: BalanceSettings,
    parts: Sequence[Part],
    verdicts: Column,
    marks: Mapping[str, Column] | None = None,
) -> Column:
    """Refuses rows with template tokens, and counts the tokens of the others.

    Args:
        kind: `tokens` or `estimate`.
        verdicts: so far.
        marks: `candidates`, rows to be counted, and `wanted`, rows that were scored; all rows where they are not given.
    """
    recipe = run.recipe
    instructing = recipe.instruct.without("validation", "shard_rows", "container")
    return run.derive(
        kind, "estimate tokens" if kind == "estimate" else "count tokens", count_part, one_by_one(parts),
        (settings.message_overhead, instructing, recipe.seed), of={"verdicts": verdicts, **(marks or {})},
        depends=tokenizer_digest(settings), hints={"tokenizer": settings.tokenizer},
    )  # fmt: skip


def count_part(work: Work) -> None:
    """Writes `verdict` (uint8, see `VERDICTS`) and `tokens` (int32: of the examples of one copy of a row; 0 for rows that are
    dropped or no candidates)."""
    overhead, settings, seed = work.settings
    (part,) = work.parts
    verdict = work.columns["verdicts"].array(part, "verdict").astype(np.uint8)
    tokens = np.zeros(part.rows, np.int32)
    marks = {name: work.columns[name].marked(part) for name in ("wanted", "candidates") if name in work.columns}
    codes = np.array([0, *(code(reason) for reason in instruct.REASONS)], np.uint8)
    for here, table in part.read_pieces() if not verdict.all() else ():
        alive = np.flatnonzero(verdict[here] == 0)
        if not alive.size:
            continue
        rows = table.take(alive)
        refused = instruct.screen(rows, settings)
        verdict[here][alive] = codes[refused]
        alive, rows = alive[refused == 0], rows.filter(pa.array(refused == 0))
        if "wanted" in marks:
            scored = marks["wanted"][here][alive]
            verdict[here][alive[~scored]] = code("quality.not_needed")
            alive, rows = alive[scored], rows.filter(pa.array(scored))
        if "candidates" in marks:
            chosen = marks["candidates"][here][alive]
            alive, rows = alive[chosen], rows.filter(pa.array(chosen))
        if alive.size:
            tokens[here][alive] = token_counter(work.hints["tokenizer"], overhead).count_rows(rows, settings, seed)
    work.write(part, {"verdict": verdict, "tokens": tokens})


@functools.lru_cache(maxsize=1)
def token_counter(tokenizer: str | None, message_overhead: int) -> balance.TokenCounter:
    """The counter of tokens, kept from one task to the next."""
    return balance.TokenCounter(BalanceSettings(tokenizer=tokenizer, message_overhead=message_overhead))


def tokenizer_digest(settings: BalanceSettings) -> str | None:
    """A digest of the tokenizer's file; None without one."""
    file = balance.tokenizer_file(settings.tokenizer) if settings.tokenizer is not None else None
    return file_digest(file) if file is not None else None


def at_hand(run: Run, parts: Sequence[Part], tokens: Column) -> Counts:
    """Rows and tokens of each pair that may be selected."""
    sums = run.derive("sums", "", add_up, by_pair(parts), None, of={"tokens": tokens}, whole=True)
    return {pair: PairCount(*sums.value(pair)) for pair in sums.groups}


def add_up(work: Work) -> None:
    """Adds up the rows and tokens of a pair that may be selected."""
    rows = total = 0
    for part in work.parts:
        verdict, counts = _counted(work.columns["tokens"], part)
        found = counts[verdict == 0]
        rows += int((found > 0).sum())
        total += int(found.sum(dtype=np.int64))
    work.write_value([rows, total])


def _counted(tokens: Column, part: Part) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Verdicts and tokens of a part's rows, (rows,) each, read-only."""
    table = tokens.read(part, "verdict", "tokens")
    return table["verdict"].to_numpy(), table["tokens"].to_numpy()


# --------------------------------------------------------------------------------------------------------------- choose


def choose_candidates(
    run: Run,
    kind: str,
    parts: Sequence[Part],
    estimates: Column,
    order: Mapping[str, Column],
    limits: Mapping[str, int],
    before: Column | None = None,
) -> Column:
    """The column of marks of the rows that a selection up to the pairs' limits takes.

    Args:
        kind: `candidates`, rows to be counted exactly, or `wanted`, rows to be scored.
        order: see `ordering`.
        limits: pair -> estimated tokens.
        before: rows that are marked already, and stay so.
    """
    settings = BalanceSettings(select="score" if order else "hash")
    of = {"tokens": estimates, **order} | ({"before": before} if before is not None else {})
    title = "choose what to count" if kind == "candidates" else "choose what to score"
    return run.derive(
        kind, title, mark_candidates, by_pair(parts), (settings, run.recipe.seed), of=of, each=lambda pair: limits[pair.name]
    )  # fmt: skip


def mark_candidates(work: Work) -> None:
    """Writes `candidate` (Boolean): whether a selection up to the limit takes the row."""
    before = work.columns.get("before")
    for part, _, eligible, copies in _select(work):
        marks = before.marked(part).copy() if before is not None else np.zeros(part.rows, np.bool_)
        marks[eligible] |= copies > 0
        work.write(part, {"candidate": marks})


def choose(
    run: Run, parts: Sequence[Part], tokens: Column, counts: Counts, scores: Column
) -> tuple[balance.Plan | None, Column]:
    """The plan, and the column of final verdicts and copies."""
    settings = run.recipe.balance
    plan = balance.plan(counts, settings) if settings.enabled else None
    targets = plan.targets if plan is not None and plan.budget is not None else {}
    selecting = BalanceSettings(select=settings.select, epochs=settings.epochs)
    outcome = run.derive(
        "balance", "balance", choose_rows, by_pair(parts), (selecting, run.recipe.seed),
        of={"tokens": tokens, **ordering(settings, scores)}, each=lambda pair: targets.get(pair.name),
    )  # fmt: skip
    return plan, outcome


def choose_rows(work: Work) -> None:
    """Selects the rows of a pair that fill its target; writes `verdict` (uint8) and `copies` (int32)."""
    for part, verdict, eligible, copies in _select(work):
        verdict = verdict.copy()
        spread = np.zeros(part.rows, np.int32)
        spread[eligible] = copies
        verdict[(verdict == 0) & (spread == 0)] = code("balance.quota")
        work.write(part, {"verdict": verdict, "copies": spread})


def ordering(settings: BalanceSettings, scores: Column) -> dict[str, Column]:
    """The column by which rows are put in order before they are selected: scores, or none for the seeded hash."""
    return {"scores": scores} if settings.select == "score" and scores.files else {}


class _Selected(NamedTuple):
    """A part's verdicts so far, (rows,), which rows may be selected, (rows,), and how often each of these goes into the mix."""

    part: Part
    verdict: npt.NDArray[np.uint8]
    eligible: npt.NDArray[np.bool_]
    copies: npt.NDArray[np.int32]


def _select(work: Work) -> Iterator[_Selected]:
    """Selects among a pair's rows that are kept so far and have tokens, up to the target that is the group's own; all of them
    where there is none. Few rows are held at a time; columns are read again for each look at them, if memory is short."""
    settings, seed = work.settings
    tokens, scores = work.columns["tokens"], work.columns.get("scores")

    def read(part: Part) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], Piece]:
        verdict, counts = _counted(tokens, part)
        eligible = (verdict == 0) & (counts > 0)
        key = part.read("key")["key"].to_numpy()[eligible]
        quality = scores.floats(part, "quality")[eligible] if scores is not None else None
        return verdict, eligible, Piece(counts[eligible], key, quality)

    held = list(map(read, work.parts)) if _BYTES * work.group.rows <= work.memory else None

    def every() -> Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], Piece]]:
        return held if held is not None else map(read, work.parts)

    selection = None
    if work.own is not None:
        selection = select_pieces(
            lambda: (piece for _, _, piece in every()), work.own, settings.epochs, seed + balance.SELECTION_SALT,
            scores is not None,
        )  # fmt: skip
    for number, (part, (verdict, eligible, piece)) in enumerate(zip(work.parts, every(), strict=True)):
        copies = selection.copies(number, piece) if selection is not None else np.ones(piece.tokens.size, np.int32)
        yield _Selected(part, verdict, eligible, copies)
