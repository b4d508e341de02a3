from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from corpusprep.errors import InputError, RunError
from corpusprep.stages.instruct import (
    DEFAULT_TEMPLATES,
    CardFacts,
    InstructSettings,
    PairFacts,
    card,
    format_examples,
    instruct,
    invert,
    render,
    screen,
    special_tokens,
    validation_mask,
    write,
)
from corpusprep.stages.instruct import text as _text
from corpusprep.stages.instruct.templates import halves
from corpusprep.stages.instruct.tokens import border_mask, risky, token_mask

FORMATS = ("messages", "prompt_completion", "alpaca", "sharegpt")
FIELDS = {
    "messages": ["messages"],
    "prompt_completion": ["prompt", "completion"],
    "alpaca": ["instruction", "input", "output"],
    "sharegpt": ["conversations"],
}


def table_of(
    rows: list[tuple[str | None, str | None]], pair: tuple[str, str] = ("en", "sw"), **columns: Any
) -> pa.Table:
    n = len(rows)
    base: dict[str, Any] = {
        "src": pa.array([src for src, _ in rows], pa.string()),
        "tgt": pa.array([tgt for _, tgt in rows], pa.string()),
        "src_lang": pa.array([pair[0]] * n, pa.string()),
        "tgt_lang": pa.array([pair[1]] * n, pa.string()),
        "source": pa.array(["web"] * n, pa.string()),
        "shard": pa.array(["a.tsv"] * n, pa.string()),
        "row": pa.array(range(n), pa.int64()),
    }
    return pa.table({**base, **columns})


def numbered(n: int, pair: tuple[str, str] = ("en", "sw")) -> pa.Table:
    return table_of([(f"The house number {i}.", f"Nyumba namba {i}.") for i in range(n)], pair)


# --- inversion --------------------------------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    ["{text}", "{target_language}", "{", "}", "\n", "\n\n", " ", "English", "Swahili:", "<|im_end|>", "\u2028", "\0",
     "é", "𝄞", "Translate the following text from English to Swahili.\n\n", DEFAULT_TEMPLATES[0], ""]
)  # fmt: skip
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(FRAGMENTS, max_size=5).map("".join),
)
TEMPLATES = st.one_of(
    st.just(DEFAULT_TEMPLATES),
    st.lists(
        st.tuples(
            st.sampled_from(["", " ", "{source_language}: ", "{ }", "\n"]), st.sampled_from(["", "\n", "}", " {x", " "])
        ).map(lambda parts: f"To {{target_language}}{parts[0]}{{text}}{parts[1]}"),
        min_size=1,
        max_size=4,
    ).map(tuple),
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=6),
    templates=TEMPLATES,
    format=st.sampled_from(FORMATS),
    directions=st.sampled_from(["both", "forward", "backward"]),
    system=st.sampled_from([None, "Be exact.", "From {source_language} to {target_language}"]),
    pair=st.sampled_from([("en", "sw"), ("sw", "en"), ("de", "zh_Hant"), ("sr", "sr_Latn")]),
    data=st.data(),
)
def test_every_example_inverts_to_its_row(
    rows: list[tuple[str, str]],
    templates: tuple[str, ...],
    format: Any,
    directions: Any,
    system: str | None,
    pair: tuple[str, str],
    data: st.DataObject,
) -> None:
    copies = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    chosen = InstructSettings(format=format, templates=templates, directions=directions, system=system)
    table = table_of(rows, pair, copies=pa.array(copies, pa.int32()))
    examples = format_examples(render(table, chosen, seed=3), chosen)
    assert examples.column_names[: len(FIELDS[format])] == FIELDS[format] or examples.column_names[0] == "system"
    back = invert(examples, chosen)
    per_row = 2 if directions == "both" else 1
    expected = [row for row, n in zip(rows, copies, strict=True) for _ in range(n * per_row)]
    assert list(zip(back["src"].to_pylist(), back["tgt"].to_pylist(), strict=True)) == expected
    assert back["src_lang"].to_pylist() == [pair[0]] * len(expected)
    assert back["row"].to_pylist() == [i for i, n in enumerate(copies) for _ in range(n * per_row)]


def test_inversion_refuses_examples_of_other_settings() -> None:
    table = numbered(40)
    examples = instruct(table, InstructSettings(), 1).kept
    with pytest.raises(RunError, match="was not made with these templates"):
        invert(examples, InstructSettings(templates=tuple(reversed(DEFAULT_TEMPLATES))))
    with pytest.raises(RunError, match="more templates than the 1"):
        invert(examples, InstructSettings(templates=DEFAULT_TEMPLATES[:1]))
    with pytest.raises(RunError, match="no column completion, prompt"):
        invert(examples, InstructSettings(format="prompt_completion"))


# --- what is emitted --------------------------------------------------------------------------------------------------


def test_the_formats() -> None:
    table = table_of([("Good morning.", "Habari za asubuhi.")])
    ends = ("Into {target_language} from {source_language}:\n{text}",)
    middle = ("Say {text} in {target_language}.",)

    def first(**given: Any) -> dict[str, Any]:
        chosen = InstructSettings(directions="forward", **given)
        example: dict[str, Any] = instruct(table, chosen, 1).kept.to_pylist()[0]
        return example

    assert first(templates=ends)["messages"] == [
        {"role": "user", "content": "Into Swahili from English:\nGood morning."},
        {"role": "assistant", "content": "Habari za asubuhi."},
    ]
    told = first(templates=ends, system="Translate into {target_language}.", format="sharegpt")
    assert told["conversations"] == [
        {"from": "system", "value": "Translate into Swahili."},
        {"from": "human", "value": "Into Swahili from English:\nGood morning."},
        {"from": "gpt", "value": "Habari za asubuhi."},
    ]
    plain = first(templates=middle, format="prompt_completion", system="Be exact.")
    assert (plain["system"], plain["prompt"]) == ("Be exact.", "Say Good morning. in Swahili.")
    assert plain["completion"] == "Habari za asubuhi."
    split_ = first(templates=ends, format="alpaca")
    assert (split_["instruction"], split_["input"]) == ("Into Swahili from English:", "Good morning.")
    whole = first(templates=middle, format="alpaca")
    assert (whole["instruction"], whole["input"]) == ("Say Good morning. in Swahili.", "")
    assert whole["output"] == "Habari za asubuhi."


def test_the_columns_beside_the_text() -> None:
    table = numbered(3).append_column("quality", pa.array([0.1, None, 0.9], pa.float32()))
    table = table.append_column("secret", pa.array(["x"] * 3))
    kept = instruct(table, InstructSettings(), 1).kept
    assert kept.column_names == [
        "messages", "src_lang", "tgt_lang", "direction", "template", "copy", "source", "shard", "row", "quality",
    ]  # fmt: skip
    assert kept.schema.field("template").type == pa.int32()
    assert sorted(kept["direction"].to_pylist()) == ["en-sw"] * 3 + ["sw-en"] * 3
    carried = instruct(table, InstructSettings(carry=("secret",)), 1).kept
    assert "secret" in carried.column_names
    assert "quality" not in carried.column_names


@pytest.mark.parametrize(
    ("directions", "expected"),
    [
        ("both", {"en-sw", "sw-en", "de-fr", "fr-de"}),
        ("forward", {"en-sw", "de-fr"}),
        ("backward", {"sw-en", "fr-de"}),
        ({"swh-eng": "forward"}, {"sw-en", "de-fr", "fr-de"}),
        ({"en-sw": "forward", "default": "backward"}, {"en-sw", "fr-de"}),
        ({"fr-de": "both", "default": "forward"}, {"en-sw", "de-fr", "fr-de"}),
    ],
)
def test_directions(directions: Any, expected: set[str]) -> None:
    table = pa.concat_tables([numbered(4), numbered(4, ("de", "fr"))])
    rendered = render(table, InstructSettings(directions=directions), 1)
    assert set(rendered["direction"].to_pylist()) == expected


def test_two_sides_of_one_language_are_used_once() -> None:
    rendered = render(numbered(4, ("en", "en")), InstructSettings(), 1)
    assert rendered["direction"].to_pylist() == ["en-en"] * 4


def test_all_templates_are_used_and_copies_go_through_them_in_turn() -> None:
    table = numbered(4000)
    rendered = render(table, InstructSettings(), 1)
    used = np.bincount(rendered["template"].to_numpy(), minlength=len(DEFAULT_TEMPLATES))
    assert used.min() > 0.8 * used.mean()
    copies = table.slice(0, 50).append_column("copies", pa.array([len(DEFAULT_TEMPLATES)] * 50, pa.int32()))
    repeated = render(copies, InstructSettings(directions="forward"), 1)
    assert (
        len(set(zip(repeated["row"].to_pylist(), repeated["template"].to_pylist(), strict=True))) == repeated.num_rows
    )
    assert repeated["copy"].to_pylist()[:3] == [0, 1, 2]


def test_the_built_in_templates_are_many_distinct_and_safe() -> None:
    assert len(set(DEFAULT_TEMPLATES)) == len(DEFAULT_TEMPLATES) >= 12
    assert not any(risky(*halves(template)) for template in DEFAULT_TEMPLATES)
    assert sum("{source_language}" in template for template in DEFAULT_TEMPLATES) >= 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"templates": ("Into {target_language}",)}, "{text} exactly once"),
        ({"templates": ("{text} {text} {target_language}",)}, "{text} exactly once"),
        ({"templates": ("{text}",)}, "must contain {target_language}"),
        ({"templates": ("{text} {target_language} {tongue}",)}, "{tongue}"),
        ({"templates": ()}, "at least 1 item"),
        ({"templates": ("<|im_start|>{text} {target_language}",)}, "control token"),
        ({"templates": ("XX {text} {target_language}",), "forbidden": ("XX",)}, "control token"),
        ({"system": "[INST]"}, "control token"),
        ({"system": "{text}"}, "is not a slot"),
        ({"directions": {"klingonese": "both"}}, "not a language pair"),
        ({"directions": "sideways"}, "backward"),
        ({"validation": -1}, "greater than or equal to 0"),
        ({"shard_rows": 0}, "greater than or equal to 1"),
        ({"container": "csv"}, "parquet"),
        ({"formats": "messages"}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        InstructSettings(**given)
    assert message in str(caught.value)


def test_settings_survive_json() -> None:
    chosen = InstructSettings(
        format="alpaca", directions={"en-sw": "forward"}, forbidden=("§§",), system="s", validation=3
    )
    assert InstructSettings.model_validate(chosen.model_dump(mode="json")) == chosen


# --- template tokens --------------------------------------------------------------------------------------------------

REFUSED = [
    "say <|im_start|>user", "<|im_end|>", "<|anything at all|>", "<｜begin▁of▁sentence｜>", "＜｜User｜＞",
    "<|turn>", "<turn|>",
    "[INST] x", "x [/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "a<bos>b", "<eos>", "<pad>", "<unk>", "<mask>",
    "<S>",
    "<start_of_turn>user", "<end_of_turn>", "<think>", "</think>", "<tool_call>", "</tool_response>", "<unused12>",
    "<extra_id_0>", "<reserved_106>", "[TOOL_CALLS]", "[gMASK]<sop>", "<BOS_TOKEN>", "### Response: no",
    "###Instruction:",
    "<fim_prefix>", "<eot_id>",
]  # fmt: skip
ADMITTED = [
    "a < b and c > d", "if (a<b || c>d)", "a <| b", "x |> f", "[1] See [inst] and [mask].", "<b>bold</b>", "<-- here",
    "# Heading",
    "### Heading", "¿Qué? <3", "|<>|", "< s >", "<ss>", "s>", "C<sub>2</sub>", "plain", "＜引用＞", "I think", "{text}",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_text_with_template_tokens_is_dropped(text: str) -> None:
    for row in ((text, "sawa"), ("fine", text)):
        outcome = instruct(table_of([row, ("good", "nzuri")]), InstructSettings(directions="forward"), 1)
        assert outcome.dropped["reason"].to_pylist() == ["instruct.template_tokens"]
        assert outcome.dropped["row"].to_pylist() == [0]
        assert outcome.kept["row"].to_pylist() == [1]


@pytest.mark.parametrize("text", ADMITTED)
def test_ordinary_text_is_let_through(text: str) -> None:
    assert screen(table_of([(text, "sawa")]), InstructSettings()).tolist() == [0]


def test_the_tokens_of_a_given_tokenizer_are_refused() -> None:
    table = table_of([("a §begin§ b", "x"), ("a ⟨turn⟩", "x"), ("fine", "x")])
    assert screen(table, InstructSettings(forbidden=("§begin§", "⟨turn⟩"))).tolist() == [1, 1, 0]


def test_blank_sides_are_dropped() -> None:
    outcome = instruct(table_of([("", "a"), ("a", None), (" \n", "a"), ("a", "b")]), InstructSettings(), 1)
    assert outcome.dropped["reason"].to_pylist() == ["instruct.empty"] * 3
    assert outcome.kept.num_rows == 2


def test_tokens_that_arise_where_text_meets_a_template() -> None:
    chosen = InstructSettings(templates=("Into {target_language}: <{text}>", "In {target_language}:\n{text}"))
    table = table_of([("s", "a"), ("a", "/think"), ("fine", "sawa"), ("|im_start|", "a")])
    assert screen(table, chosen).tolist() == [1, 1, 0, 1]
    assert screen(table, InstructSettings()).tolist() == [0, 0, 0, 0]


PIECES = st.lists(
    st.sampled_from(["<", "|", ">", "<|", "|>", "s",
                     "/", "[", "]", "INST", "#", "###", " ", ":", "Input", "think", "\n",
                     "x", "＜", "｜", "＞", "~", "!", "b", "<<", "SYS", "im_end", "§"]), max_size=5
).map("".join)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(before=PIECES, text=PIECES, after=PIECES)
def test_no_token_arises_at_a_border_that_is_called_safe(before: str, text: str, after: str) -> None:
    forbidden = ("§x", "x\n§")
    before, after = f"A\n{before}", f"{after}\nB"
    if any(token_mask(pa.array([part]), forbidden)[0] for part in (before, text, after)):
        return
    formed = bool(border_mask(pa.array([text]), before, after, forbidden)[0])
    assert not formed or risky(before, after, forbidden)


def test_special_tokens_of_a_tokenizer_file(tmp_path: Path) -> None:
    added = [
        {"content": "<|im_start|>", "special": True},
        {"content": "<think>", "special": False},
        {"content": "§§eot", "special": True},
        {"content": "  ", "special": False},
        {"content": "Hello", "special": True},
        {"content": "word", "special": False},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    assert special_tokens(tmp_path) == ("<think>", "<|im_start|>", "§§eot")
    assert special_tokens(tmp_path / "tokenizer.json") == special_tokens(tmp_path)
    (tmp_path / "bad.json").write_text("[1, 2", encoding="utf-8")
    for bad in ("bad.json", "none.json"):
        with pytest.raises(InputError, match=r"not a readable tokenizer\.json"):
            special_tokens(tmp_path / bad)


# --- order and splits -------------------------------------------------------------------------------------------------


def test_the_shuffle_depends_on_the_rows_alone() -> None:
    table = pa.concat_tables(
        [numbered(300), numbered(200, ("de", "fr")).set_column(4, "source", pa.array(["other"] * 200))]
    )
    table = table.append_column("copies", pa.array([1, 2] * 250, pa.int32()))
    chosen = InstructSettings(validation=20)
    first = instruct(table, chosen, 5).kept
    for seed in (0, 1):
        shuffled = table.take(np.random.default_rng(seed).permutation(table.num_rows))
        assert instruct(shuffled, chosen, 5).kept.combine_chunks().equals(first.combine_chunks())
    assert not instruct(table, chosen, 6).kept.combine_chunks().equals(first.combine_chunks())
    rows = first["row"].to_numpy()
    assert abs(np.corrcoef(rows, np.arange(rows.size))[0, 1]) < 0.15
    # Both directions of a row do not stand side by side.
    assert np.mean(rows[1:] == rows[:-1]) < 0.05


def test_rows_of_equal_provenance_do_not_confuse_the_shuffle() -> None:
    table = numbered(50).set_column(6, "row", pa.array([0] * 50))
    kept = instruct(table, InstructSettings(), 1).kept
    assert sorted(invert(kept, InstructSettings())["src"].to_pylist()) == sorted(table["src"].to_pylist() * 2)


def test_keys_are_distinct_and_do_not_depend_on_the_rest_of_the_table() -> None:
    table = numbered(500).append_column("copies", pa.array([3] * 500, pa.int32()))
    rendered = render(table, InstructSettings(), 1)
    assert rendered.schema.field("key").type == pa.uint64()
    assert len(set(rendered["key"].to_pylist())) == 3000
    alone = render(table.slice(100, 7), InstructSettings(), 1)
    assert alone.combine_chunks().equals(rendered.slice(600, 42).combine_chunks())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_string_types_and_chunks(kind: pa.DataType) -> None:
    table = numbered(30)
    expected = instruct(table, InstructSettings(), 1).kept.combine_chunks()
    for name in ("src", "tgt", "src_lang", "tgt_lang"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    table = pa.concat_tables([table.slice(0, 7), table.slice(7, 0), table.slice(7)])
    assert instruct(table, InstructSettings(), 1).kept.combine_chunks().equals(expected)


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_and_one_row(format: Any) -> None:
    chosen = InstructSettings(format=format, validation=1, system="s")
    none, one = instruct(numbered(0), chosen, 1), instruct(numbered(1), chosen, 1)
    assert none.kept.num_rows == 0
    assert none.kept.schema == one.kept.schema
    assert none.dropped.schema.names[-1] == "reason"
    assert one.kept["split"].to_pylist() == ["validation", "validation"]
    assert invert(none.kept, chosen).num_rows == 0
    assert invert(one.kept, chosen)["src"].to_pylist() == ["The house number 0."] * 2


def test_without_provenance_a_row_is_known_by_its_position() -> None:
    table = numbered(20).select(["src", "tgt", "src_lang", "tgt_lang"])
    kept = instruct(table, InstructSettings(), 1).kept
    assert kept.column_names == ["messages", "src_lang", "tgt_lang", "direction", "template", "copy"]
    assert sorted(invert(kept, InstructSettings())["src"].to_pylist()) == sorted(table["src"].to_pylist() * 2)


@given(n=st.integers(0, 60), rows=st.integers(0, 50), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_validation_takes_exactly_n_rows(n: int, rows: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**63, rows).astype(np.uint64)
    mask = validation_mask(keys, n, seed)
    assert mask.sum() == min(n, rows)
    order = np.random.default_rng(seed + 1).permutation(rows)
    assert np.array_equal(validation_mask(keys[order], n, seed), mask[order])


def test_validation_holds_both_directions_and_is_not_the_rows_of_lowest_key() -> None:
    table = numbered(400)
    kept = instruct(table, InstructSettings(validation=40), 1).kept
    sides: dict[int, set[str]] = {}
    for row, side in zip(kept["row"].to_pylist(), kept["split"].to_pylist(), strict=True):
        sides.setdefault(row, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {"validation"} for side in sides.values()) == 40
    keys = np.arange(1000, dtype=np.uint64)
    assert not validation_mask(keys, 10, 1)[:10].all()
    assert np.array_equal(validation_mask(table, 40, 1), validation_mask(table, 40, 1))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["parquet", "jsonl"])
@pytest.mark.parametrize("format", FORMATS)
def test_files_and_card_load_with_datasets(tmp_path: Path, format: Any, container: Any) -> None:
    datasets = pytest.importorskip("datasets")
    table = table_of([(f'Say "{i}"\n\u2028\tnow \\ {{text}}', f"Sema «{i}» 𝄞") for i in range(40)])
    chosen = InstructSettings(format=format, container=container, validation=10, shard_rows=30)
    kept = instruct(table, chosen, 1).kept
    mix = tmp_path / "mix"
    mix.mkdir()
    train, validation = (
        kept.filter(pa.array(np.array(kept["split"].to_pylist()) == name)) for name in ("train", "validation")
    )
    write(train.slice(0, 30), mix / f"train-00000.{container}", container)
    write(train.slice(30), mix / f"train-00001.{container}", container)
    write(validation, mix / f"validation-00000.{container}", container)
    facts = CardFacts(
        name="no: a mix",
        pairs={"en-sw": PairFacts(40, 80, 1234)},
        files={"train": [f"train-*.{container}"], "validation": [f"validation-*.{container}"]},
        examples={"train": 60, "validation": 20},
        format=format,
        container=container,
        sources=["web (tsv)"],
        budget=2000,
    )
    (mix / "README.md").write_text(card(facts), encoding="utf-8")
    loaded = datasets.load_dataset(str(mix), cache_dir=str(tmp_path / "cache"))
    assert {split: loaded[split].num_rows for split in loaded} == {"train": 60, "validation": 20}
    assert loaded["train"][0][FIELDS[format][0]] == train[FIELDS[format][0]][0].as_py()
    back = invert(loaded["train"].with_format("arrow")[:], chosen)
    assert back["src"].to_pylist() == invert(train, chosen)["src"].to_pylist()


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    kept = instruct(numbered(100), InstructSettings(), 1).kept
    for container in ("parquet", "jsonl"):
        write(kept, tmp_path / "a", container)
        write(pa.concat_tables([kept.slice(0, 33), kept.slice(33)]), tmp_path / "b", container)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write(kept, tmp_path / "a", "parquet")
    assert pq.read_table(tmp_path / "a").equals(kept)


def test_the_card_states_the_facts() -> None:
    facts = CardFacts(
        name="demo",
        pairs={"en-zh_Hant": PairFacts(10, 20, 300), "en-no": PairFacts(5, 10, 100)},
        files={"train": ["*.parquet"]},
        examples={"train": 30},
        tokenizer="my/tokenizer",
        seed=7,
    )
    text = card(facts)
    assert '- "no"' in text  # YAML would read a bare no as false
    assert '- "zh"' in text
    assert "| en-zh_Hant | English, Chinese (Traditional) | 10 | 20 | 300 |" in text
    assert "400 tokens (by the tokenizer my/tokenizer)" in text
    assert "license: unknown" in text
    assert "seed (7)" in text
    assert "n<1K" in text
    bare = card(CardFacts(name="x", pairs={}, files={}, examples={}))
    assert "0 examples" in bare


@pytest.mark.parametrize("format", FIELDS)
@pytest.mark.parametrize("system", [None, "Translate into {target_language}."])
def test_examples_are_formatted_in_any_order_and_in_pieces(
    format: Any, system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = InstructSettings(format=format, system=system)
    rendered = render(numbered(60), chosen, 1)
    rendered = pa.concat_tables([rendered.slice(0, 17), rendered.slice(17, 0), rendered.slice(17)])
    plain = format_examples(rendered, chosen).combine_chunks()
    order = np.random.default_rng(1).permutation(rendered.num_rows)[:100]
    monkeypatch.setattr(_text.slices, "__defaults__", (900,))
    found = format_examples(rendered, chosen, order)
    assert found[0].num_chunks > 5
    assert found.schema == plain.schema
    assert found.combine_chunks().equals(plain.take(order).combine_chunks())
    assert format_examples(rendered, chosen, order[:0]).schema == plain.schema


@given(st.lists(st.text(max_size=9), min_size=1, max_size=9), st.data())
def test_woven_texts(texts: list[str], data: st.DataObject) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    array = pa.array(["before", *texts, "after"], pa.large_string()).slice(1, len(texts))
    rows = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9)), np.int64)
    both = [(array, rows), (array, rows[::-1].copy())]
    first, second = [texts[k] for k in rows], [texts[k] for k in rows[::-1]]
    assert _text.weave(both, 1).to_pylist() == [text for pair in zip(first, second, strict=True) for text in pair]
    assert _text.weave(both, 2).to_pylist() == [a + b for a, b in zip(first, second, strict=True)]
    assert _text.repeated(["user", "", "ö"], len(rows)).to_pylist() == ["user", "", "ö"] * len(rows)
