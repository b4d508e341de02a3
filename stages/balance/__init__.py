"""Stage `balance`: chooses rows so that the examples made of them fill a budget of tokens, shared out among pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from corpusprep import codes
from corpusprep.arrow import combine
from corpusprep.errors import RunError, SettingsError
from corpusprep.stage import Outcome, StageSettings, split
from corpusprep.stages.balance import shares as _arithmetic
from corpusprep.stages.balance.take import take
from corpusprep.stages.balance.tokens import TokenCounter, tokenizer_file
from corpusprep.stages.instruct import InstructSettings
from corpusprep.stages.instruct.examples import keys_of_rows, pairs_of
from corpusprep.stages.instruct.text import plain

__all__ = [
    "BalanceSettings",
    "PairCount",
    "Plan",
    "TokenCounter",
    "balance",
    "count_pairs",
    "pair_names",
    "plan",
    "select",
    "tokenizer_file",
]

REASONS = ("balance.quota",)
_SELECTION_SALT = 0x53454C
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Floor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BalanceSettings(StageSettings):
    """Settings of the stage `balance`.

    Where a setting is given by language or pair, a pair is written in either order (`en-sw`), and a language (`sw`)
    stands for all pairs of English with it, in any script unless it names one. A pair goes before a language.
    """

    budget: Annotated[int, Field(ge=1)] | None = None
    """Tokens of all emitted examples together; without it every row stays, once."""

    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Tokenizer that counts them: a name on the Hugging Face hub, a `tokenizer.json`, or the folder of one. Without it
    tokens are estimated from bytes."""

    method: Literal["temperature", "unimax", "shares"] = "temperature"
    """How the budget is shared out: `temperature` (in proportion to the tokens at hand, to the power of
    1 / `temperature`), `unimax` (the same to all, as far as the epoch cap allows; arXiv 2304.09151), or `shares`."""

    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.3
    """1 keeps the proportions of the data; the larger, the more even the shares."""

    epochs: Annotated[float, Field(ge=1, le=100)] = 1.0
    """How often a row may be used at most. With 1.5 half of a pair's tokens may come a second time."""

    shares: dict[str, Share] = Field(default_factory=dict)
    """Share of the budget by language or pair, for the method `shares`. What they leave is shared out among all other
    pairs by temperature."""

    weights: dict[str, Factor] = Field(default_factory=dict)
    """Factor on the share of a language or pair, before shares are made to sum to 1."""

    floors: dict[str, Floor] = Field(default_factory=dict)
    """Least that a pair gets, if it has as much, by language or pair; the key `default` stands for all others. Below 1
    it is a share of the budget, from 1 on a number of tokens."""

    message_overhead: Annotated[int, Field(ge=0)] = 0
    """Tokens that the chat template adds to each message when it is trained on: 5 for Qwen3's."""

    select: Literal["hash", "score"] = "hash"
    """Which rows of a pair are taken: a random choice by seeded hash, or those of the best `quality`."""

    @field_validator("shares", "weights", "floors")
    @classmethod
    def _known_keys(cls, value: dict[str, float], info: Any) -> dict[str, float]:
        for key in value:
            if key == "default" and info.field_name == "floors":
                continue
            try:
                _canonical_key(key)
            except SettingsError as error:
                raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _shares_fit(self) -> BalanceSettings:
        if self.method == "shares" and not self.shares:
            raise ValueError('method = "shares" needs shares: give them by language or pair')
        if self.method != "shares" and self.shares:
            raise ValueError('shares are given, but method is not "shares": set it, or leave them out')
        if sum(self.shares.values()) > 1 + 1e-9:
            raise ValueError(f"shares sum to {sum(self.shares.values()):g}, more than 1")
        return self


class PairCount(NamedTuple):
    """What is at hand of a pair: rows, and tokens of the examples that one copy of each makes."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """How many tokens of each pair go into the mix.

    Attributes:
        budget: tokens asked for, None for no limit.
        targets: tokens to take, by pair; they sum to the budget or, where the pairs do not have as much, to all they
            have.
        wanted: tokens that the method alone would give, before floors and what pairs have.
        available: tokens at hand, by pair, in one epoch.
        short: tokens that a pair would have got and does not have; also for a share whose pairs have no row at all.
        missing: tokens that the whole falls short of the budget.
    """

    budget: int | None
    targets: dict[str, int]
    wanted: dict[str, int]
    available: dict[str, int]
    short: dict[str, int]
    missing: int

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON's types."""
        return asdict(self)


def balance(
    table: pa.Table,
    settings: BalanceSettings = BalanceSettings(),
    seed: int = 1,
    instruct: InstructSettings = InstructSettings(),
) -> Outcome:
    """Chooses rows of a table within the budget.

    Args:
        table: n rows `src tgt src_lang tgt_lang`, with `source shard row` if they are known, and `quality` where rows
            are chosen by it. Where it has no column `tokens`, they are counted.
        settings: the stage's settings.
        seed: decides the choice, together with a row's provenance (or position, where that is not known).
        instruct: how examples are made of the rows, for their tokens are those that count.

    Returns:
        kept: the rows chosen, with `tokens` (int32: of the examples of one copy) and, where `epochs` lets rows repeat,
        `copies` (int32). dropped: the others, for `balance.quota`.

    Raises:
        RunError: the tokenizer cannot be had, or there is no `quality` to choose by.
        SettingsError: the floors ask for more than the budget.

    Examples:
        >>> sides = {"src": ["bread"] * 9, "tgt": ["Brot"] * 9, "src_lang": ["en"] * 9, "tgt_lang": ["de"] * 6 + ["nl"] * 3}
        >>> table = pa.table({**sides, "tokens": [10] * 9})
        >>> kept, dropped = balance(table, BalanceSettings(budget=40, method="unimax"))
        >>> sorted(kept["tgt_lang"].to_pylist())
        ['de', 'de', 'nl', 'nl']
    """
    table = plain(table)
    if "tokens" not in table.column_names:
        tokens = TokenCounter(settings).count_rows(table, instruct, seed)
        table = table.append_column("tokens", pa.array(tokens))
    columns: dict[str, Any] = {"pair": pair_names(table), "tokens": table["tokens"]}
    columns["key"] = pa.array(keys_of_rows(table, seed))
    if "quality" in table.column_names:
        columns["quality"] = table["quality"]
    rows = pa.table(columns)
    copies = select(rows, plan(count_pairs(rows), settings), settings, seed)
    if "copies" in table.column_names:
        table = table.drop_columns(["copies"])
    kept, dropped = split(table, copies == 0, list(REASONS))
    if settings.epochs > 1:
        kept = kept.append_column("copies", pa.array(copies[copies > 0]))
    return Outcome(kept, dropped)


def plan(counts: Mapping[str, PairCount], settings: BalanceSettings) -> Plan:
    """Shares a budget out among pairs.

    Each pair wants its share by the method. It gets no less than its floor and no more than it has (`epochs` times);
    what pairs cannot use goes round again among the others, in the proportions of the method, until the budget is met
    or nothing is left. For `unimax` this is the method of the paper (arXiv 2304.09151).

    Args:
        counts: what is at hand, by pair (`en-sw`).
        settings: the stage's settings.

    Raises:
        SettingsError: the floors ask for more than the budget.
    """
    pairs = sorted(counts)
    available = {pair: counts[pair].tokens for pair in pairs}
    if settings.budget is None:
        return Plan(None, dict(available), dict(available), available, {}, 0)
    budget = settings.budget
    caps = [int(available[pair] * settings.epochs) for pair in pairs]
    asked = [_floor(pair, settings) for pair in pairs]
    floors = [min(floor, cap) for floor, cap in zip(asked, caps, strict=True)]
    if sum(floors) > budget:
        raise SettingsError(
            f"balance.floors ask for {sum(floors):,} tokens, and balance.budget is {budget:,}. Lower the floors or "
            "raise the budget."
        )
    weights, missing_shares = _weights(available, settings)
    whole = _arithmetic.whole_weights([weights[pair] for pair in pairs])
    lost = {key: int(share * budget) for key, share in missing_shares.items()}
    unlimited = [budget] * len(pairs)
    wanted = _arithmetic.fill(budget - sum(lost.values()), whole, [0] * len(pairs), unlimited)
    targets = _arithmetic.fill(budget, whole, floors, caps)
    short = {
        pair: max(want, floor) - cap
        for pair, want, floor, cap, target in zip(pairs, wanted, asked, caps, targets, strict=True)
        if max(want, floor) > cap == target
    }
    return Plan(
        budget,
        dict(zip(pairs, targets, strict=True)),
        dict(zip(pairs, wanted, strict=True)),
        available,
        {**short, **lost},
        budget - sum(targets),
    )


def select(rows: pa.Table, plan: Plan, settings: BalanceSettings, seed: int) -> npt.NDArray[np.int32]:
    """How often each row goes into the mix.

    A pair whose target is several epochs takes all its rows as often as that, and for the rest of the target rows in
    order of `quality` (the best first, not judged last) or of the seeded hash. A row is taken if it brings the pair
    closer to its target.

    Args:
        rows: n rows `pair` (string), `tokens` (integer), `key` (uint64, a hash of the row's provenance) and, to select
            by score, `quality` (float).
        plan: with a target for every pair.
        settings: the stage's settings.
        seed: makes the order independent of other uses of the keys.

    Returns:
        int32 of shape (n,); 0 where the row is not used.

    Raises:
        RunError: the plan lacks a pair, or there is no `quality` to choose by.
    """
    if settings.select == "score" and "quality" not in rows.column_names:
        raise RunError(
            'balance.select = "score" needs a column quality: let the stage quality run, or select by "hash".'
        )
    names, code = _codes(rows["pair"])
    unknown = sorted(set(names) - set(plan.targets))
    if unknown:
        raise RunError(f"The plan has no target for {', '.join(unknown)}. Make the plan from these rows.")
    copies = np.ones(rows.num_rows, np.int32)
    if plan.budget is None:
        return copies
    tokens = np.ascontiguousarray(rows["tokens"].to_numpy(), np.int32)
    keys = np.ascontiguousarray(rows["key"].to_numpy(), np.uint64)
    quality = rows["quality"].to_numpy() if settings.select == "score" else None
    grouped = np.argsort(code, kind="stable")  # a radix sort: the codes have 16 bits
    ends = np.cumsum(np.bincount(code, minlength=len(names)))
    for at, name in enumerate(names):
        mine = grouped[ends[at - 1] if at else 0 : ends[at]]
        total = int(tokens[mine].sum(dtype=np.int64))
        epochs, rest = divmod(min(plan.targets[name], int(total * settings.epochs)), total) if total else (0, 0)
        copies[mine] = epochs
        if rest:
            order = np.argsort(combine(keys[mine], seed + _SELECTION_SALT), kind="stable")
            if quality is not None:
                order = order[np.argsort(-quality[mine[order]], kind="stable")]  # sorts what is not a number last
            take(tokens, mine[order], rest, copies)
    return copies


def pair_names(table: pa.Table) -> pa.Array[Any]:
    """The pair of each of n rows, as `plan` and `select` name it: `en-sw`, English first, else alphabetical."""
    pairs = pairs_of(table)
    names = ["-".join(codes.order_pair(*sides)) for sides in pairs.sides]
    return pa.array(names, pa.string()).take(pairs.code)


def count_pairs(rows: pa.Table) -> dict[str, PairCount]:
    """What a table of `pair` and `tokens` has of each pair."""
    names, code = _codes(rows["pair"])
    counts = np.bincount(code, minlength=len(names))
    tokens = np.bincount(code, weights=rows["tokens"].to_numpy(), minlength=len(names))
    return {name: PairCount(int(counts[at]), int(tokens[at])) for at, name in enumerate(names)}


def _codes(pairs: pa.ChunkedArray[Any]) -> tuple[list[str], npt.NDArray[np.uint16]]:
    """The distinct names of a column, in order, and which of them each row has."""
    encoded: Any = pairs if pa.types.is_dictionary(pairs.type) else pairs.cast(pa.large_string()).dictionary_encode()
    chunks = encoded.unify_dictionaries().chunks
    found = chunks[0].dictionary.to_pylist() if chunks else []
    names = sorted(found)
    rank = np.array([names.index(name) for name in found], np.uint16)
    return names, np.concatenate([rank[:0], *(rank[chunk.indices.to_numpy()] for chunk in chunks)])


def _keyed(settings: Mapping[str, float], pair: str) -> str | None:
    """The key under which a setting by language or pair has the value for this pair, None if it has none."""
    keys = {_canonical_key(key): key for key in settings if key != "default"}
    a, b = pair.split("-")
    wanted = [pair, "-".join(codes.order_pair(a, b)), "-".join(codes.order_pair(*map(codes.canonical, (a, b))))]
    if codes.language_of(a) == "en":
        wanted += [b, codes.canonical(b), codes.language_of(b)]
    return next((keys[key] for key in wanted if key in keys), "default" if "default" in settings else None)


def _canonical_key(key: str) -> str:
    if "-" not in key:
        return codes.explicit(key)
    return "-".join(codes.order_pair(*codes.parse_pair(key)))


def _floor(pair: str, settings: BalanceSettings) -> int:
    key = _keyed(settings.floors, pair)
    floor = settings.floors[key] if key is not None else 0.0
    return int(floor * (settings.budget or 0)) if floor < 1 else int(floor)


def _weights(available: Mapping[str, int], settings: BalanceSettings) -> tuple[dict[str, float], dict[str, float]]:
    """What each pair is to get in proportion, and the shares whose pairs have nothing."""
    power = 0.0 if settings.method == "unimax" else 1 / settings.temperature
    weights = {pair: float(tokens**power) for pair, tokens in available.items()}
    for pair in weights:
        named = _keyed(settings.weights, pair)
        weights[pair] *= settings.weights[named] if named is not None else 1.0
    if settings.method != "shares":
        return weights, {}
    groups: dict[str | None, list[str]] = {key: [] for key in (*settings.shares, None)}
    for pair, tokens in available.items():
        if tokens:
            groups[_keyed(settings.shares, pair)].append(pair)
    rest = max(0.0, 1 - sum(settings.shares.values()))
    wanted = dict.fromkeys(available, 0.0)
    for key, group in groups.items():
        share, whole = rest if key is None else settings.shares[key], sum(weights[pair] for pair in group)
        wanted.update((pair, share * weights[pair] / whole) for pair in group)
    return wanted, {key: share for key, share in settings.shares.items() if share and not groups[key]}
