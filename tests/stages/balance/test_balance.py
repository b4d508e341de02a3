from __future__ import annotations

import importlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corpusprep.errors import RunError, SettingsError
from corpusprep.stages.balance import (
    SELECTION_SALT,
    BalanceSettings,
    PairCount,
    Plan,
    TokenCounter,
    balance,
    count_pairs,
    pair_names,
    plan,
    select,
    tokenizer_file,
)
from corpusprep.stages.balance.shares import fill
from corpusprep.stages.balance.tokens import bytes_per_token
from corpusprep.stages.instruct import InstructSettings, instruct, render

taking = importlib.import_module("corpusprep.stages.balance.take")  # the function of this name hides it in the package

PAIRS = [f"en-{language}" for language in ("ar", "cs", "de", "ja", "sr", "sr_Latn", "sw", "te", "zh", "zh_Hant")] + [
    "de-fr"
]


# --- the plan ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    shares=st.lists(
        st.tuples(st.integers(1, 2**40), st.integers(0, 50), st.integers(0, 500)).map(
            lambda t: (t[0], t[1], t[1] + t[2])
        ),
        min_size=1,
        max_size=8,
    ),
    extra=st.integers(0, 3000),
)
def test_fill_is_one_level_cut_at_floors_and_caps(shares: list[tuple[int, int, int]], extra: int) -> None:
    weights, floors, caps = zip(*shares, strict=True)
    total = sum(floors) + extra
    got = fill(total, weights, floors, caps)
    assert sum(got) == min(total, sum(caps))
    assert all(low <= x <= high for x, low, high in zip(got, floors, caps, strict=True))
    # One level explains every share, to the token that rounding moves: what is above its floor is not above the level,
    # and what is below its cap is not below it.
    above = [Fraction(x - 1, w) for x, w, low in zip(got, weights, floors, strict=True) if x > low]
    below = [Fraction(x + 1, w) for x, w, high in zip(got, weights, caps, strict=True) if x < high]
    if above and below:
        assert max(above) <= min(below)


COUNTS = st.dictionaries(
    st.sampled_from(PAIRS),
    st.tuples(st.integers(0, 1000), st.integers(0, 10**7)).map(lambda t: PairCount(*t)),
    max_size=11,
)


@settings(max_examples=150, deadline=None)
@given(
    counts=COUNTS,
    budget=st.integers(1, 3 * 10**7),
    method=st.sampled_from(["temperature", "unimax"]),
    epochs=st.sampled_from([1.0, 1.5, 4.0]),
    floors=st.dictionaries(st.sampled_from(["default", "sw", "en-de"]), st.sampled_from([0.0, 0.02, 500.0, 40_000.0])),
    weights=st.dictionaries(st.sampled_from(["sw", "fr-de"]), st.sampled_from([0.5, 4.0])),
    order=st.randoms(use_true_random=False),
)
def test_plan_meets_the_budget_within_caps_and_floors(
    counts: dict[str, PairCount],
    budget: int,
    method: Any,
    epochs: float,
    floors: dict[str, float],
    weights: dict[str, float],
    order: Any,
) -> None:
    chosen = BalanceSettings(budget=budget, method=method, epochs=epochs, floors=floors, weights=weights)
    caps = {pair: int(count.tokens * epochs) for pair, count in counts.items()}

    def floor(pair: str) -> int:
        key = {"en-sw": "sw", "en-de": "en-de"}.get(pair, "default")
        value = floors.get(key if key in floors else "default", 0.0)
        return min(caps[pair], int(value * budget) if value < 1 else int(value))

    if sum(map(floor, counts)) > budget:
        with pytest.raises(SettingsError, match="Lower the floors"):
            plan(counts, chosen)
        return
    made = plan(counts, chosen)
    assert sum(made.targets.values()) == min(budget, sum(caps.values()))
    assert made.missing == budget - sum(made.targets.values())
    assert all(floor(pair) <= made.targets[pair] <= caps[pair] for pair in counts)
    assert all(made.targets[pair] == caps[pair] for pair in made.short)
    pairs = list(counts)
    order.shuffle(pairs)
    assert plan({pair: counts[pair] for pair in pairs}, chosen) == made


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, budget=st.integers(1, 3 * 10**7), epochs=st.sampled_from([1.0, 2.0, 4.0]))
def test_unimax_is_that_of_the_paper(counts: dict[str, PairCount], budget: int, epochs: float) -> None:
    # Algorithm 1 of arXiv 2304.09151: from the smallest to the largest, an even part of what is left or N epochs.
    left, expected = Fraction(budget), {}
    for at, pair in enumerate(sorted(counts, key=lambda pair: counts[pair].tokens)):
        even = left / (len(counts) - at)
        expected[pair] = min(even, Fraction(int(counts[pair].tokens * epochs)))
        left -= expected[pair]
    made = plan(counts, BalanceSettings(budget=budget, method="unimax", epochs=epochs))
    assert all(abs(made.targets[pair] - expected[pair]) <= 1 for pair in counts)


def test_temperature() -> None:
    counts = {"en-de": PairCount(1, 8_000_000), "en-sw": PairCount(1, 1_000_000)}
    assert plan(counts, BalanceSettings(budget=900_000, temperature=1)).targets == {"en-de": 800_000, "en-sw": 100_000}
    assert plan(counts, BalanceSettings(budget=900_000, temperature=3)).targets == {"en-de": 600_000, "en-sw": 300_000}
    weighted = BalanceSettings(budget=900_000, temperature=3, weights={"swh": 4})
    assert plan(counts, weighted).targets == {"en-de": 300_000, "en-sw": 600_000}


def test_what_a_pair_lacks_is_said_and_goes_round() -> None:
    counts = {"en-de": PairCount(9, 900), "en-fr": PairCount(9, 900), "en-sw": PairCount(1, 100)}
    made = plan(counts, BalanceSettings(budget=1200, method="unimax"))
    assert made.targets == {"en-de": 550, "en-fr": 550, "en-sw": 100}
    assert made.wanted == {"en-de": 400, "en-fr": 400, "en-sw": 400}
    assert (made.short, made.missing) == ({"en-sw": 300}, 0)
    all_of_it = plan(counts, BalanceSettings(budget=5000, method="unimax"))
    assert all_of_it.targets == {"en-de": 900, "en-fr": 900, "en-sw": 100}
    assert all_of_it.missing == 3100
    twice = plan(counts, BalanceSettings(budget=1200, method="unimax", epochs=2.5))
    assert twice.targets == {"en-de": 475, "en-fr": 475, "en-sw": 250}


def test_shares() -> None:
    counts = {pair: PairCount(1000, 10**6) for pair in ("en-sr", "en-sr_Latn", "en-de", "en-fr", "de-fr")}
    chosen = BalanceSettings(budget=100_000, method="shares", shares={"sr": 0.4, "deu-eng": 0.3, "en-xh": 0.1})
    made = plan(counts, chosen)
    # Xhosa has nothing, so that its tenth goes round among all others in their proportion.
    assert made.short == {"en-xh": 10_000}
    assert made.wanted == {"de-fr": 10_000, "en-de": 30_000, "en-fr": 10_000, "en-sr": 20_000, "en-sr_Latn": 20_000}
    assert [round(made.targets[pair], -2) for pair in sorted(counts)] == [11_100, 33_300, 11_100, 22_200, 22_200]
    assert sum(made.targets.values()) == 100_000
    only = BalanceSettings(budget=100_000, method="shares", shares={"sr": 0.5, "sr_Latn": 0.5})
    assert plan(counts, only).targets == {
        "de-fr": 0, "en-de": 0, "en-fr": 0, "en-sr": 50_000, "en-sr_Latn": 50_000,
    }  # fmt: skip


def test_floors() -> None:
    counts = {"en-de": PairCount(9, 10**6), "en-sw": PairCount(9, 50_000), "en-te": PairCount(9, 1_000)}
    chosen = BalanceSettings(budget=100_000, temperature=1, floors={"default": 0.1, "sw": 30_000})
    made = plan(counts, chosen)
    assert made.targets == {"en-de": 69_000, "en-sw": 30_000, "en-te": 1_000}
    assert made.short == {"en-te": 9_000}


def test_without_a_budget_everything_stays() -> None:
    made = plan({"en-de": PairCount(9, 100), "en-sw": PairCount(2, 0)}, BalanceSettings(epochs=3))
    assert made.targets == {"en-de": 100, "en-sw": 0}
    assert plan({}, BalanceSettings(budget=5)).missing == 5
    assert made.to_dict()["budget"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0}, "greater than or equal to 1"),
        ({"temperature": 0.5}, "greater than or equal to 1"),
        ({"epochs": 0.5}, "greater than or equal to 1"),
        ({"method": "shares"}, "needs shares"),
        ({"shares": {"sw": 0.5}}, 'method is not "shares"'),
        ({"method": "shares", "shares": {"sw": 0.6, "de": 0.6}}, "sum to 1.2"),
        ({"method": "shares", "shares": {"swahili": 0.6}}, "not a language code"),
        ({"weights": {"sw": 0}}, "greater than 0"),
        ({"floors": {"sw": -1}}, "greater than or equal to 0"),
        ({"weights": {"default": 2}}, "not a language code"),
        ({"message_overhead": -1}, "greater than or equal to 0"),
        ({"budgets": 1}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BalanceSettings(**given)
    assert message in str(caught.value)


def test_settings_survive_json() -> None:
    chosen = BalanceSettings(budget=5, method="shares", shares={"sw": 0.5}, floors={"default": 1}, epochs=2.5)
    assert BalanceSettings.model_validate(chosen.model_dump(mode="json")) == chosen


# --- the selection ----------------------------------------------------------------------------------------------------


def rows_of(tokens: list[int] | np.ndarray[Any, Any], pairs: list[str] | None = None, **columns: Any) -> pa.Table:
    n = len(tokens)
    keys = np.random.default_rng(n).permutation(n).astype(np.uint64) * np.uint64(2**40)
    base = {"pair": pairs or ["en-sw"] * n, "tokens": pa.array(tokens, pa.int32()), "key": keys}
    return pa.table({**base, **columns})


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(PAIRS[:4]), st.integers(1, 300)), min_size=1, max_size=60),
    budget=st.integers(1, 15_000),
    epochs=st.sampled_from([1.0, 1.5, 2.0, 3.3]),
    method=st.sampled_from(["temperature", "unimax"]),
    how=st.sampled_from(["hash", "score"]),
    data=st.data(),
)
def test_selection_comes_as_near_as_half_a_row(
    rows: list[tuple[str, int]], budget: int, epochs: float, method: Any, how: Any, data: st.DataObject
) -> None:
    scores = data.draw(
        st.lists(st.one_of(st.none(), st.floats(0, 1, width=32)), min_size=len(rows), max_size=len(rows))
    )
    table = rows_of([n for _, n in rows], [pair for pair, _ in rows], quality=pa.array(scores, pa.float32()))
    chosen = BalanceSettings(budget=budget, epochs=epochs, method=method, select=how)
    made = plan(count_pairs(table), chosen)
    copies = select(table, made, chosen, 1)
    assert copies.dtype == np.int32
    assert copies.max(initial=0) <= math.ceil(epochs)
    tokens, pairs = np.array([n for _, n in rows]), np.array([pair for pair, _ in rows])
    for pair in set(pairs):
        mine = pairs == pair
        assert 2 * abs(int((tokens * copies)[mine].sum()) - made.targets[pair]) <= tokens[mine].max()
        assert copies[mine].max() - copies[mine].min() <= 1
    order = data.draw(st.permutations(range(len(rows))))
    assert select(table.take(order), made, chosen, 1).tolist() == copies[list(order)].tolist()


def test_the_best_rows_are_taken_by_score_and_those_not_judged_last() -> None:
    quality = pa.array([0.1, None, 0.9, float("nan"), 0.5], pa.float32())
    table = rows_of([10] * 5, quality=quality)
    for budget, expected in ((20, [2, 4]), (30, [0, 2, 4])):
        chosen = BalanceSettings(budget=budget, select="score")
        copies = select(table, plan(count_pairs(table), chosen), chosen, 1)
        assert np.flatnonzero(copies).tolist() == expected
    with pytest.raises(RunError, match="needs the column quality"):
        select(table.drop_columns(["quality"]), plan(count_pairs(table), chosen), chosen, 1)


def test_a_row_larger_than_what_is_left_does_not_end_the_filling() -> None:
    tokens = [100_000 if i % 3 == 0 else 50 for i in range(600)]
    chosen = BalanceSettings(budget=10_000)
    table = rows_of(tokens)
    copies = select(table, plan(count_pairs(table), chosen), chosen, 1)
    assert int((copies * np.array(tokens)).sum()) == 10_000


def test_the_seed_decides_and_the_keys_order_does_not() -> None:
    table = rows_of([10] * 1000).set_column(2, "key", pa.array(np.arange(1000, dtype=np.uint64)))
    chosen = BalanceSettings(budget=5000)
    made = plan(count_pairs(table), chosen)
    one, two = select(table, made, chosen, 1), select(table, made, chosen, 2)
    assert one.sum() == two.sum() == 500
    assert 150 < (one & two).sum() < 350
    assert 150 < one[:500].sum() < 350
    # A larger budget adds rows and takes none away.
    larger = BalanceSettings(budget=7000)
    assert np.all(select(table, plan(count_pairs(table), larger), larger, 1) >= one)


def test_selection_takes_dictionaries_chunks_and_no_rows() -> None:
    table = rows_of(list(range(1, 101)), PAIRS[:4] * 25)
    chosen = BalanceSettings(budget=2000)
    made = plan(count_pairs(table), chosen)
    expected = select(table, made, chosen, 1).tolist()
    coded = table.set_column(0, "pair", table["pair"].dictionary_encode())
    pieces = pa.concat_tables([coded.slice(0, 3), table.slice(3, 50).set_column(0, "pair", coded["pair"].slice(3, 50))])
    pieces = pa.concat_tables([pieces, coded.slice(53)])
    assert select(coded, made, chosen, 1).tolist() == expected
    assert select(pieces, made, chosen, 1).tolist() == expected
    assert select(table.slice(0, 0), made, chosen, 1).tolist() == []
    with pytest.raises(RunError, match="no target for en-xh"):
        select(rows_of([5], ["en-xh"]), made, chosen, 1)


# --- counting ---------------------------------------------------------------------------------------------------------

SYLLABLES = {
    "en": "the of and ing er on at st re ter", "sw": "ka wa ni na ku li m ya ha ba",
    "de": "sch ein er un ge lich keit ß ä der", "zh": "的 一 是 不 了 在 人 有 我 他", "te": "తె లు గు లో మా కి ను వా రు ది",
}  # fmt: skip


def sentences(language: str, n: int, seed: int) -> list[str]:
    rng = np.random.default_rng([seed, *language.encode()])
    parts = SYLLABLES[language].split()
    gap = "" if language == "zh" else " "
    words = [["".join(rng.choice(parts, rng.integers(1, 4))) for _ in range(rng.integers(3, 25))] for _ in range(n)]
    return [gap.join(row) + "." for row in words]


def corpus(sizes: dict[str, int], seed: int = 1) -> pa.Table:
    tables = []
    for language, n in sizes.items():
        columns = {
            "src": sentences("en", n, seed),
            "tgt": sentences(language, n, seed),
            "src_lang": ["en"] * n,
            "tgt_lang": [language] * n,
            "source": ["made"] * n,
            "shard": [f"en-{language}"] * n,
            "row": pa.array(range(n), pa.int64()),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A byte-level BPE tokenizer, with the truncation and padding that some files bring."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([text for language in SYLLABLES for text in sentences(language, 300, 2)], trainer)
    plain = Tokenizer.from_str(trained.to_str())
    trained.enable_truncation(8)
    trained.enable_padding(length=16)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path, plain


def test_exact_counts_are_those_of_the_tokenizer(tokenizer: tuple[Path, Tokenizer]) -> None:
    path, plain = tokenizer
    counter = TokenCounter(BalanceSettings(tokenizer=str(path)))
    assert counter.exact
    texts = [*sentences("te", 20, 3), "", "word " * 100_000, "x" * 2_000_000, "é\0\u2028𝄞"]
    expected = [len(plain.encode(text, add_special_tokens=False).ids) for text in texts]
    counts = counter.count(pa.chunked_array([pa.array(texts[:7]), pa.array(texts[7:])]))
    assert counts.dtype == np.int32
    assert counts.tolist() == expected
    assert counter.count(pa.array([None, "", "a"])).tolist() == [0, 0, 1]
    assert TokenCounter(BalanceSettings(tokenizer=str(path.parent))).count(pa.array(texts[:5])).tolist() == expected[:5]


@pytest.mark.parametrize("system", [None, "From {source_language}."])
def test_examples_are_counted_whole(tokenizer: tuple[Path, Tokenizer], system: str | None) -> None:
    path, plain = tokenizer
    told = InstructSettings(system=system)
    rendered = render(corpus({"sw": 40, "zh": 30}), told, 1)
    counter = TokenCounter(BalanceSettings(tokenizer=str(path), message_overhead=5))
    expected = [
        sum(len(plain.encode(row[name]).ids) + 5 for name in ("prompt", "completion", "system") if name in row)
        for row in rendered.to_pylist()
    ]
    assert counter.count_examples(rendered, told).tolist() == expected
    for each in (counter, TokenCounter(BalanceSettings())):
        assert each.count_examples(rendered.slice(0, 0), told).tolist() == []


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("directions", ["both", "backward"])
def test_tokens_of_a_row_are_those_of_its_examples(
    tokenizer: tuple[Path, Tokenizer], exact: bool, directions: Any
) -> None:
    told = InstructSettings(directions=directions, system="Be exact.")
    table = corpus({"sw": 40, "zh": 30}).append_column("copies", pa.array([2] * 70, pa.int32()))
    counter = TokenCounter(BalanceSettings(tokenizer=str(tokenizer[0]) if exact else None, message_overhead=3))
    rendered = render(table.drop_columns(["copies"]), told, 9)
    examples = counter.count_examples(rendered, told)
    per_row = examples.reshape(70, -1).sum(axis=1)
    assert counter.count_rows(table, told, 9).tolist() == per_row.tolist()
    assert counter.count_rows(table.slice(0, 0), told, 9).tolist() == []


def test_the_estimate() -> None:
    counter = TokenCounter(BalanceSettings())
    assert not counter.exact
    texts = pa.array(["", None, "a" * 450, "a"])
    assert counter.count(texts, "en").tolist() == [0, 0, 100, 1]
    assert counter.count(texts).tolist()[2] > 100
    assert bytes_per_token("sr") > bytes_per_token("sr_Latn")  # Cyrillic has two bytes a letter
    assert all(1 < bytes_per_token(code) < 6 for code in ("en", "zh_Hant", "xh", "ka", "mni_Mtei", "uz_Cyrl", "arz"))


def test_a_tokenizer_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    for name, message in (
        (str(tmp_path / "none.json"), "no such tokenizer file"),
        (str(tmp_path / "empty"), r"has no tokenizer\.json"),
        (str(tmp_path / "bad.json"), "cannot be read as a tokenizer"),
        ("not a name/on the hub", "cannot be downloaded from the Hugging Face hub"),
    ):
        with pytest.raises(RunError, match=message):
            TokenCounter(BalanceSettings(tokenizer=name)).count(pa.array(["x"]))
    with pytest.raises(RunError, match="no such tokenizer file"):
        tokenizer_file("./here.json")


# --- the stage --------------------------------------------------------------------------------------------------------


def test_the_mix_meets_budget_and_plan(tokenizer: tuple[Path, Tokenizer]) -> None:
    path, plain = tokenizer
    table = corpus({"de": 1500, "sw": 700, "zh": 900, "te": 20})
    chosen = BalanceSettings(budget=150_000, tokenizer=str(path), epochs=2)
    outcome = balance(table, chosen, 3)
    assert outcome.kept.num_rows + outcome.dropped.num_rows == table.num_rows
    assert set(outcome.dropped["reason"].to_pylist()) == {"balance.quota"}
    assert outcome.kept.column_names == [*table.column_names, "tokens", "copies"]
    assert outcome.dropped.column_names == [*table.column_names, "tokens", "reason"]
    assert outcome.kept.schema.field("tokens").type == pa.int32()
    assert set(outcome.kept["copies"].to_pylist()) == {1, 2}
    mix = instruct(outcome.kept, InstructSettings(), 3).kept.to_pylist()
    got: dict[str, int] = {}
    for example in mix:
        pair = f"{example['src_lang']}-{example['tgt_lang']}"
        got[pair] = got.get(pair, 0) + sum(len(plain.encode(turn["content"]).ids) for turn in example["messages"])
    assert sum(got.values()) == pytest.approx(150_000, rel=0.01)
    tokens = TokenCounter(chosen).count_rows(table, InstructSettings(), 3)
    rows = pa.table({"pair": pair_names(table), "tokens": tokens})
    made = plan(count_pairs(rows), chosen)
    for pair, target in made.targets.items():
        assert got[pair] / 150_000 == pytest.approx(target / 150_000, abs=0.02)
    assert made.short["en-te"] > 0


def test_the_stage_does_not_depend_on_the_order_of_rows() -> None:
    table = corpus({"de": 300, "sw": 200})
    chosen = BalanceSettings(budget=20_000)
    names = ["tgt_lang", "row"]
    first = {(row["tgt_lang"], row["row"]) for row in balance(table, chosen, 1).kept.select(names).to_pylist()}
    order = np.random.default_rng(0).permutation(table.num_rows)
    again = balance(pa.concat_tables([table.take(order[:100]), table.take(order[100:])]), chosen, 1)
    assert {(row["tgt_lang"], row["row"]) for row in again.kept.select(names).to_pylist()} == first
    kept_rows = [row["row"] for row in balance(table.slice(0, 300), chosen, 1).kept.select(names).to_pylist()]
    assert kept_rows == sorted(kept_rows)


def test_without_budget_all_rows_stay_and_carry_their_tokens() -> None:
    table = corpus({"de": 30, "sw": 20})
    outcome = balance(table)
    assert outcome.kept.drop_columns(["tokens"]).equals(table)
    assert outcome.dropped.num_rows == 0
    assert min(outcome.kept["tokens"].to_pylist()) > 20


def test_tokens_that_are_there_are_used() -> None:
    table = corpus({"sw": 30}).append_column("tokens", pa.array([100] * 30, pa.int32()))
    assert balance(table, BalanceSettings(budget=1000)).kept.num_rows == 10


def test_a_pair_is_one_whatever_its_order() -> None:
    table = corpus({"sw": 10})
    swapped = table.select(["tgt", "src", "tgt_lang", "src_lang", "source", "shard", "row"]).rename_columns(
        table.column_names
    )
    assert pair_names(pa.concat_tables([table, swapped])).to_pylist() == ["en-sw"] * 20


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_string_types_nulls_and_few_rows(kind: pa.DataType, n: int) -> None:
    table = corpus({"sw": 5}).slice(0, n)
    for name in ("src", "tgt", "src_lang", "tgt_lang"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    if n:
        table = table.set_column(1, "tgt", pa.array([None] * n, kind))
    outcome = balance(table, BalanceSettings(budget=10_000))
    assert outcome.kept.num_rows == n
    assert outcome.dropped.num_rows == 0


# --- rows in pieces ---------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1 << 32), n=st.integers(1, 3000), longest=st.sampled_from([2, 60, 3000]),
    size=st.integers(1, 500), quality=st.sampled_from([None, "all", "few", "none"]), same=st.booleans(),
    share=st.floats(0, 3), epochs=st.sampled_from([1.0, 2.5]), many=st.sampled_from([1, 50, 1 << 20]),
    some=st.sampled_from([1, 10, 1 << 16]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_selection_from_pieces_is_that_from_a_table(
    seed: int, n: int, longest: int, size: int, quality: str | None, same: bool, share: float, epochs: float, many: int,
    some: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, longest, n).astype(np.int32)
    key = rng.integers(0, 1 << 64, n, np.uint64)
    if same:
        key[: n // 2] = key[0]
    scores = {
        "all": rng.random(n), "few": rng.choice([0.0, -0.0, 1.0, np.nan, -2.5], n), "none": np.full(n, np.nan), None: None,
    }[quality]  # fmt: skip
    scores = scores.astype(np.float32) if scores is not None else None
    target = int(tokens.sum() * share) + 1
    chosen = BalanceSettings(select="hash" if scores is None else "score", epochs=epochs)
    columns: dict[str, Any] = {"pair": pa.repeat("en-de", n), "key": key, "tokens": tokens}
    if scores is not None:
        columns["quality"] = pa.array(scores, from_pandas=True)
    wanted = select(pa.table(columns), Plan(target, {"en-de": target}, {}, {}, {}, 0), chosen, 5)
    pieces = [
        taking.Piece(
            tokens[at : at + size], key[at : at + size], scores[at : at + size] if scores is not None else None
        )
        for at in range(0, n, size)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taking, "_SOME", some)
        found = taking.select_pieces(lambda: pieces, target, epochs, 5 + SELECTION_SALT, scores is not None, many)
    assert np.concatenate([found.copies(k, piece) for k, piece in enumerate(pieces)]).tolist() == wanted.tolist()


def test_few_rows_are_put_in_order_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nearly all rows have the same score, or none, and the target is reached just before them."""
    sizes: list[int] = []
    whole = taking.take

    def take(tokens: Any, order: Any, *rest: Any) -> Any:
        sizes.append(len(order))
        return whole(tokens, order, *rest)

    monkeypatch.setattr(taking, "take", take)
    rng = np.random.default_rng(3)
    n = 300_000
    quality = np.full(n, np.nan, np.float32)
    quality[:100] = 1
    piece = taking.Piece(np.full(n, 100, np.int32), rng.integers(0, 1 << 64, n, np.uint64), quality)
    for target in (9_900, 10_050, 2_000_000):
        found = taking.select_pieces(lambda: [piece], target, 1.0, 7, True, 20_000)
        assert abs(int(found.copies(0, piece).sum()) * 100 - target) <= 50
        assert found.copies(0, piece)[:99].sum() >= 98
    assert max(sizes) <= 20_000
