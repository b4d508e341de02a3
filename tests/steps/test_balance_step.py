"""The step balance: tokens are counted, and what is chosen of many parts is what the stage chooses of one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import sentences
from runs import mix
from stepping import begin, nothing_dropped, read_parts, with_column, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from corpusprep import Recipe, load_recipe, run
from corpusprep.derive import Run
from corpusprep.parts import Column, Part, write_column
from corpusprep.stages import balance as stage
from corpusprep.steps.balance import choose, count_tokens
from corpusprep.steps.verdicts import VERDICTS

OFF = [f"{stage}.enabled=false" for stage in ("clean", "langid", "dedup", "quality")]
PLACE = ("source", "shard", "row")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of two pairs: en-de with three rows of four, en-nl with the fourth."""
    rows = [
        {"src": src, "tgt": tgt, "src_lang": "en", "tgt_lang": "nl" if k % 4 == 3 else "de"}
        for k, (src, tgt) in enumerate(sentences(600, 4))
    ]
    for number in range(2):
        write_jsonl(tmp_path / "data" / f"{number}.jsonl", rows[number * 300 : (number + 1) * 300])
    return tmp_path / "data"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer whose tokens are words, far fewer than are estimated from bytes."""
    path = tmp_path / "words.json"
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(path))
    return path


def of(corpus: Path, *overrides: str) -> Recipe:
    return load_recipe(None, sources=[f"jsonl={corpus}"], overrides=[*OFF, *overrides])


def quality_of(parts: list[Part], folder: Path) -> Column:
    """A score for each row, that neither text nor place decides."""
    column = Column("quality")
    for number, part in enumerate(parts):
        column.files[part.identity] = str(folder / f"{part.name}.quality.parquet")
        draw = np.random.default_rng(number)
        write_column(column.file(part), part, {"quality": draw.random(part.rows).astype(np.float32)})
    return column


def take(step: Run, scored: bool = False) -> tuple[pa.Table, stage.Plan | None]:
    """All rows with `tokens`, `copies` and `verdict`, and with `quality` where they are scored; and the plan."""
    parts = read_parts(step)
    kept = nothing_dropped(step.out, parts)
    scores = quality_of(parts, step.out) if scored else Column("quality")
    tokens, counts = count_tokens(step, parts, kept, scores)
    plan, outcome = choose(step, parts, tokens, counts, scores)
    table = with_column(parts, outcome)
    table = table.append_column("tokens", with_column(parts, tokens)["tokens"])
    return table.append_column("quality", with_column(parts, scores)["quality"]) if scored else table, plan


def placed(table: pa.Table, column: str) -> dict[Any, Any]:
    return dict(
        zip(zip(*(table[name].to_pylist() for name in PLACE), strict=True), table[column].to_pylist(), strict=True)
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("balance.budget=9000",),
        ("balance.budget=9000", "balance.method=unimax"),
        ("balance.budget=9000", "balance.select=score"),
        ("balance.budget=60000", "balance.epochs=2.5"),
        ("balance.budget=9000", "balance.method=shares", "balance.shares={nl=0.1}"),
    ],
)
def test_what_is_taken_is_what_the_stage_takes_of_the_whole_table(
    corpus: Path, words: Path, tmp_path: Path, exact: bool, overrides: tuple[str, ...]
) -> None:
    counting = [f"balance.tokenizer='{words}'"] if exact else []
    step = begin(of(corpus, *counting, *overrides), tmp_path / "out")
    scored = "balance.select=score" in overrides
    found, plan = take(step, scored)
    assert plan is not None
    settings = step.recipe.balance
    whole = found.select(["src", "tgt", "src_lang", "tgt_lang", *PLACE, *(["quality"] if scored else [])])
    kept, dropped = stage.balance(whole, settings, step.recipe.seed)
    expected = placed(kept, "copies") if "copies" in kept.column_names else dict.fromkeys(placed(kept, "row"), 1)
    expected |= dict.fromkeys(placed(dropped, "row"), 0)
    copies = placed(found, "copies")
    counted = {place: count for place, count in placed(found, "tokens").items() if count}
    everything = placed(kept, "tokens") | placed(dropped, "tokens")
    assert counted == {place: everything[place] for place in counted}
    if len(counted) == len(copies):
        assert copies == expected
    else:  # only candidates are counted: what the plan gives a pair rests on them, and the order of rows on nothing else
        assert exact
        pairs = placed(found, "tgt_lang")
        for pair in ("de", "nl"):
            mine = {place for place in copies if pairs[place] == pair}
            taken, wanted = ({place for place in mine if of[place]} for of in (copies, expected))
            fewer, more = sorted((taken, wanted), key=len)
            assert len(fewer - more) <= 1  # the last one may be another that fits
            assert len(more) - len(fewer) <= 1 + 0.05 * len(more)
            spent = sum(counted[place] * copies[place] for place in taken)
            assert abs(spent - plan.targets[f"en-{pair}"]) <= max(counted[place] for place in mine & set(counted))
    verdicts = placed(found, "verdict")
    assert {VERDICTS[code] for place, code in verdicts.items() if not copies[place]} <= {"balance.quota"}
    assert not any(verdicts[place] for place, number in copies.items() if number)


def test_of_far_more_text_than_the_budget_wants_little_is_tokenised(corpus: Path, words: Path, tmp_path: Path) -> None:
    step = begin(of(corpus, f"balance.tokenizer='{words}'", "balance.budget=3000"), tmp_path / "out")
    found, plan = take(step)
    tokens, copies = found["tokens"].to_numpy(), found["copies"].to_numpy()
    assert plan is not None
    assert 0 < np.count_nonzero(tokens) < found.num_rows / 2
    assert not copies[tokens == 0].any()
    assert abs(int((tokens * copies).sum()) - 3000) < 2 * tokens.max()  # of each pair, the last row may not fit
    lost = found["verdict"].to_numpy()[copies == 0]
    assert {VERDICTS[code] for code in lost.tolist()} == {"balance.quota"}
    words_of = placed(found, "src")
    for place, count in placed(found, "tokens").items():
        if count:
            assert count > 2 * len(words_of[place].split())  # both directions of both sides, and the instruction


def test_rows_with_template_tokens_are_not_counted(tmp_path: Path) -> None:
    rows = [
        {"src": text, "tgt": "ein Satz", "src_lang": "en", "tgt_lang": "de"}
        for text in ("a sentence", "<|im_start|>system", "another", "")
    ]
    write_jsonl(tmp_path / "data" / "x.jsonl", rows)
    found, _ = take(begin(of(tmp_path / "data"), tmp_path / "out"))
    verdicts = [VERDICTS[code] for code in found["verdict"].to_pylist()]
    assert verdicts == ["", "instruct.template_tokens", "", "instruct.empty"]
    assert [count > 0 for count in found["tokens"].to_pylist()] == [True, False, True, False]
    assert found["copies"].to_pylist() == [1, 0, 1, 0]


def test_no_parts(corpus: Path, tmp_path: Path) -> None:
    step = begin(of(corpus, "balance.budget=100"), tmp_path / "out")
    tokens, counts = count_tokens(step, [], Column("kept"), Column("quality"))
    plan, outcome = choose(step, [], tokens, counts, Column("quality"))
    assert (counts, outcome.files) == ({}, {})
    assert plan is not None
    assert plan.targets == {}


def test_settings_of_a_pair_with_a_script(tmp_path: Path) -> None:
    file = tmp_path / "eng_Latn-srp_Cyrl"
    file.write_text("".join(f"line number {i}\tред број {i}\t1.1\t1\t1\ta\tb\tc\td\n" for i in range(30)))
    for written in ("en-sr_Cyrl", "srp_Cyrl-eng_Latn"):
        loaded = load_recipe(
            None, sources=[f"nllb={file}"],
            overrides=[*OFF, "source.0.pairs=['eng_Latn-srp_Cyrl']", "balance.method=shares", "balance.budget=500",
                       f"balance.shares={{'{written}'=1.0}}", f"instruct.directions={{'{written}'='forward'}}"],
        )  # fmt: skip
        result = run(loaded, tmp_path / "out")
        assert result.manifest is not None
        assert result.manifest["tokens"]["plan"]["short"] == {}
        wanted = {"en-sr_Cyrl"} if written.startswith("en") else {"sr_Cyrl-en"}
        assert set(mix(tmp_path / "out")["direction"]) == wanted
