"""Stage `balance`: selects rows so that their examples fill a budget of tokens, divided among language pairs."""

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
SELECTION_SALT = 0x53454C
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Floor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BalanceSettings(StageSettings):
    """Settings of the stage `balance`.

    Settings by language or pair accept a pair in either order (`en-sw`). A language (`sw`) stands for all pairs of
    English and that language, in any script unless the key names one. A pair takes precedence over a language.
    """

    budget: Annotated[int, Field(ge=1)] | None = None
    """Total tokens of all examples in the mix. If not set, each row is used once."""

    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Tokenizer that counts the tokens: a name on the Hugging Face hub, a `tokenizer.json`, or its folder. If not set,
    tokens are estimated from bytes."""

    method: Literal["temperature", "unimax", "shares"] = "temperature"
    """How the budget is divided among pairs: `temperature` (in proportion to each pair's tokens to the power of
    1 / `temperature`), `unimax` (equal amounts, up to the epoch cap; arXiv 2304.09151), or `shares`."""

    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.3
    """1 keeps the proportions of the data; larger values give more even shares."""

    epochs: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Maximum number of times that a row is used. With 1.5, up to half of a pair's tokens are used twice."""

    shares: dict[str, Share] = Field(default_factory=dict)
    """Share of the budget by language or pair, for the method `shares`. The remainder is divided among all other pairs
    by temperature."""

    weights: dict[str, Factor] = Field(default_factory=dict)
    """Factor on the share of a language or pair, applied before shares are scaled to sum to 1."""

    floors: dict[str, Floor] = Field(default_factory=dict)
    """Minimum by language or pair, limited to the tokens that the pair has; the key `default` stands for all other
    pairs. A value below 1 is a share of the budget, a value from 1 on is a number of tokens."""

    message_overhead: Annotated[int, Field(ge=0)] = 0
    """Tokens that the chat template adds to each message in training: 5 for Qwen3."""

    select: Literal["hash", "score"] = "hash"
    """Which rows of a pair are used: `hash` selects at random by a seeded hash, `score` selects the best `quality`."""

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
            raise ValueError('method = "shares" needs shares: set balance.shares by language or pair')
        if self.method != "shares" and self.shares:
            raise ValueError('shares are given, but method is not "shares": set method = "shares" or remove shares')
        if sum(self.shares.values()) > 1 + 1e-9:
            raise ValueError(f"shares sum to {sum(self.shares.values()):g}; they must sum to at most 1")
        return self


class PairCount(NamedTuple):
    """Number of rows of a pair, and tokens of the examples of one copy of each row."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """Number of tokens of each pair in the mix.

    Attributes:
        budget: requested tokens, None for no limit.
        targets: tokens to use, by pair. They sum to the budget, or to less if the pairs do not have enough tokens.
        wanted: tokens by the method alone, by pair, before floors and available tokens are taken into account.
        available: tokens in one epoch, by pair.
        short: tokens that a pair should get but does not have, by pair; also by share, if its pairs have no rows.
        missing: the budget minus the sum of the targets.
    """

    budget: int | None
    targets: dict[str, int]
    wanted: dict[str, int]
    available: dict[str, int]
    short: dict[str, int]
    missing: int

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return asdict(self)


def balance(
    table: pa.Table,
    settings: BalanceSettings = BalanceSettings(),
    seed: int = 1,
    instruct: InstructSettings = InstructSettings(),
) -> Outcome:
    """Selects rows of a table within the budget.

    Args:
        table: n rows `src tgt src_lang tgt_lang`, with `source shard row` if known, and with `quality` if rows are
            selected by it. If the column `tokens` is missing, tokens are counted.
        settings: the stage's settings.
        seed: determines the selection, together with each row's provenance (its position if that is unknown).
        instruct: how rows become examples, whose tokens are counted.

    Returns:
        kept: the selected rows, with `tokens` (int32: tokens of the examples of one copy) and, if `epochs` is above 1,
        `copies` (int32). dropped: the other rows, with the reason `balance.quota`.

    Raises:
        RunError: the tokenizer cannot be loaded, or the column `quality` is needed and missing.
        SettingsError: the floors sum to more than the budget.

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
    """Divides a budget among pairs.

    Each pair gets its share by the method, but at least its floor and at most `epochs` times its tokens. Tokens that a
    pair cannot use are divided among the other pairs, in the proportions of the method, until the budget is filled or
    no tokens are left. For `unimax` this is the method of the paper (arXiv 2304.09151).

    Args:
        counts: rows and tokens by pair (`en-sw`).
        settings: the stage's settings.

    Raises:
        SettingsError: the floors sum to more than the budget.
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
            f"balance.floors sum to {sum(floors):,} tokens, but balance.budget is {budget:,}. Lower the floors or "
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
    """Number of times that each row is used in the mix.

    A pair uses all its rows once per full epoch of its target. For the rest of the target it uses rows in order of
    `quality` (best first, unscored last) or of the seeded hash. A row is used if it brings the pair closer to its
    target.

    Args:
        rows: n rows `pair` (string), `tokens` (integer), `key` (uint64, a hash of the row's provenance) and, to select
            by score, `quality` (float).
        plan: must have a target for each pair.
        settings: the stage's settings.
        seed: makes the order independent of other uses of the keys.

    Returns:
        int32 of shape (n,); 0 if the row is not used.

    Raises:
        RunError: the plan has no target for a pair, or the column `quality` is needed and missing.
    """
    if settings.select == "score" and "quality" not in rows.column_names:
        raise RunError(
            'balance.select = "score" needs the column quality, which is missing. Enable the stage quality, or set '
            'select = "hash".'
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
            order = np.argsort(combine(keys[mine], seed + SELECTION_SALT), kind="stable")
            if quality is not None:
                order = order[np.argsort(-quality[mine[order]], kind="stable")]  # NaN sorts last
            take(tokens, mine[order], rest, copies)
    return copies


def pair_names(table: pa.Table) -> pa.Array[Any]:
    """The pair name of each of n rows, as in `plan` and `select`: `en-sw`, English first, else alphabetical."""
    pairs = pairs_of(table)
    names = ["-".join(codes.order_pair(*sides)) for sides in pairs.sides]
    return pa.array(names, pa.string()).take(pairs.code)


def count_pairs(rows: pa.Table) -> dict[str, PairCount]:
    """Rows and tokens by pair, of a table with the columns `pair` and `tokens`."""
    names, code = _codes(rows["pair"])
    counts = np.bincount(code, minlength=len(names))
    tokens = np.bincount(code, weights=rows["tokens"].to_numpy(), minlength=len(names))
    return {name: PairCount(int(counts[at]), int(tokens[at])) for at, name in enumerate(names)}


def _codes(pairs: pa.ChunkedArray[Any]) -> tuple[list[str], npt.NDArray[np.uint16]]:
    """The distinct names of a column, sorted, and the index of each row's name."""
    encoded: Any = pairs if pa.types.is_dictionary(pairs.type) else pairs.cast(pa.large_string()).dictionary_encode()
    chunks = encoded.unify_dictionaries().chunks
    found = chunks[0].dictionary.to_pylist() if chunks else []
    names = sorted(found)
    rank = np.array([names.index(name) for name in found], np.uint16)
    return names, np.concatenate([rank[:0], *(rank[chunk.indices.to_numpy()] for chunk in chunks)])


def _keyed(settings: Mapping[str, float], pair: str) -> str | None:
    """The key of a setting by language or pair that applies to this pair, or None."""
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
    """The weight of each pair, and the shares whose pairs have no tokens."""
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
