"""The quality stage: what the scorers say, where the cut-offs lie, and what is dropped."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpusprep import SettingsError
from corpusprep.recipe import validate
from corpusprep.stages.quality import (
    QualitySettings,
    cutoff,
    evidence,
    explain,
    learns,
    model_files,
    open_scorer,
    prepare,
    quality,
)

_WORDS = [(f"{a}{b}{c}", f"{d}{e}{c}o") for a, d in zip("bdfgklmnprst", "zvwxqjhgfdcb", strict=True)
          for b, e in (("a", "u"), ("o", "i"), ("e", "a")) for c in ("n", "l", "s", "m")]  # fmt: skip


def corpus(rows: int, seed: int = 3, pair: tuple[str, str] = ("en", "sw")) -> pa.Table:
    """Sentences of a made-up language and their word-for-word translation into another."""
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        words = [draw.choice(_WORDS) for _ in range(draw.randint(5, 14))]
        number = f" {draw.randint(2, 99)}" if draw.random() < 0.3 else ""
        lines.append((" ".join(w for w, _ in words) + number + ".", " ".join(w for _, w in words) + number + "."))
    return table(lines, pair)


def table(lines: list[tuple[str, str]], pair: tuple[str, str] = ("en", "sw")) -> pa.Table:
    return pa.table(
        {
            "src": [src for src, _ in lines],
            "tgt": [tgt for _, tgt in lines],
            "src_lang": [pair[0]] * len(lines),
            "tgt_lang": [pair[1]] * len(lines),
        }
    )


def shuffled(rows: pa.Table) -> pa.Table:
    """The rows with each target moved on by one."""
    order = np.roll(np.arange(rows.num_rows), 1)
    return rows.set_column(1, "tgt", rows["tgt"].take(pa.array(order)))


@pytest.fixture(scope="module")
def learned() -> tuple[pa.Table, bytes]:
    rows = corpus(1500)
    return rows, prepare(rows, QualitySettings(), 1)


def test_translations_score_above_shuffled_ones(learned: tuple[pa.Table, bytes]) -> None:
    rows, state = learned
    scorer = open_scorer(QualitySettings(), {"en-sw": state})
    good, bad = scorer.score(rows), scorer.score(shuffled(rows))
    assert good.dtype == np.float32
    assert good.shape == (1500,)
    assert ((good >= 0) & (good <= 1)).all()
    ranks = np.argsort(np.argsort(np.concatenate([good, bad])))
    area = (ranks[:1500].sum() - 1500 * 1499 / 2) / 1500**2
    assert area > 0.97
    limit = cutoff(good, QualitySettings(), "en-sw", evidence(QualitySettings(), state))
    assert limit is not None
    assert (good < limit).mean() < 0.05
    assert (bad < limit).mean() > 0.85


def test_rows_that_were_not_learned_from_score_as_well(learned: tuple[pa.Table, bytes]) -> None:
    _, state = learned
    fresh = corpus(400, seed=77)
    scorer = open_scorer(QualitySettings(), {"en-sw": state})
    assert np.median(scorer.score(fresh)) > 0.9
    assert np.median(scorer.score(shuffled(fresh))) < 0.1


def test_a_stub_is_no_translation(learned: tuple[pa.Table, bytes]) -> None:
    rows, state = learned
    cut = table(
        [(src, tgt[: len(tgt) // 4]) for src, tgt in zip(rows["src"].to_pylist(), rows["tgt"].to_pylist(), strict=True)]
    )
    scores = open_scorer(QualitySettings(), {"en-sw": state}).score(cut)
    assert np.mean(scores < 0.25) > 0.9


def test_a_state_is_the_same_bytes_whatever_the_order(learned: tuple[pa.Table, bytes]) -> None:
    rows, state = learned
    order = np.random.default_rng(5).permutation(rows.num_rows)
    moved = rows.take(pa.array(order))
    chunked = pa.concat_tables([moved.slice(0, 100), moved.slice(100)])
    assert prepare(chunked, QualitySettings(), 1) == state
    assert prepare(rows, QualitySettings(), 2) != b""


def test_a_score_depends_on_its_row_alone(learned: tuple[pa.Table, bytes]) -> None:
    rows, state = learned
    scorer = open_scorer(QualitySettings(), {"en-sw": state})
    whole = scorer.score(rows)
    apart = np.concatenate([scorer.score(rows.slice(i, 1)) for i in range(0, 200, 7)])
    assert np.array_equal(whole[0:200:7], apart)


def test_the_stage_drops_the_misaligned() -> None:
    good, bad = corpus(1200), shuffled(corpus(60, seed=9))
    kept, dropped = quality(pa.concat_tables([good, bad]))
    assert set(dropped["reason"].to_pylist()) == {"quality.score"}
    assert kept.schema.field("quality").type == pa.float32()
    lost_bad = len(set(dropped["src"].to_pylist()) & set(bad["src"].to_pylist()))
    assert lost_bad >= 50
    assert dropped.num_rows - lost_bad < 40


def test_pairs_are_judged_apart_and_too_few_rows_not_at_all() -> None:
    many, few = corpus(600), shuffled(corpus(50, seed=4, pair=("en", "te")))
    kept, dropped = quality(pa.concat_tables([few, many]))
    assert set(dropped["tgt_lang"].to_pylist()) <= {"sw"}
    assert kept["tgt_lang"].to_pylist().count("te") == 50
    state = prepare(few, QualitySettings(), 1)
    found = evidence(QualitySettings(), state)
    assert found is not None
    assert found < QualitySettings().min_rows
    assert cutoff(np.zeros(50, np.float32), QualitySettings(), "en-te", found) is None
    assert "too few" in (explain(QualitySettings(), "en-te", found) or "")
    assert explain(QualitySettings(), "en-sw", 5000) is None


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_hardly_any_rows(rows: int) -> None:
    kept, dropped = quality(corpus(rows) if rows else corpus(1).slice(0, 0))
    assert (kept.num_rows, dropped.num_rows) == (rows, 0)
    assert "quality" in kept.column_names


def test_one_sentence_many_times_and_empty_text() -> None:
    rows = table([("the same words again.", "maneno yale yale tena.")] * 500 + [("", ""), ("x", ""), ("", "y")] * 20)
    kept, dropped = quality(rows)
    assert kept.num_rows + dropped.num_rows == 560


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), max_size=8))
def test_any_text_is_scored(lines: list[tuple[str, str]]) -> None:
    rows = pa.concat_tables([corpus(20), table(lines).cast(corpus(1).schema)])
    scores = open_scorer(QualitySettings(), {"en-sw": prepare(rows, QualitySettings(), 1)}).score(rows)
    assert scores.shape == (rows.num_rows,)
    judged = scores[~np.isnan(scores)]
    assert ((judged >= 0) & (judged <= 1)).all()


def test_spaceless_scripts_learn_from_characters() -> None:
    signs = [chr(0x4E00 + 37 * i) for i in range(len(_WORDS))]
    draw = random.Random(8)
    lines = []
    for _ in range(900):
        picks = [draw.randrange(len(_WORDS)) for _ in range(draw.randint(6, 14))]
        lines.append((" ".join(_WORDS[i][0] for i in picks) + ".", "".join(signs[i] for i in picks) + "。"))
    rows = table(lines, ("en", "zh"))
    scorer = open_scorer(QualitySettings(), {"en-zh": prepare(rows, QualitySettings(), 1)})
    assert np.median(scorer.score(rows)) > 0.9
    assert np.median(scorer.score(shuffled(rows))) < 0.1


def test_a_pair_without_a_state_is_not_judged(learned: tuple[pa.Table, bytes]) -> None:
    scorer = open_scorer(QualitySettings(), {"en-sw": learned[1]})
    assert np.isnan(scorer.score(corpus(3, pair=("en", "fi")))).all()


def test_the_column_scorer() -> None:
    rows = corpus(4).append_column("score", pa.array([1.2, None, 0.9, 1.05], pa.float32()))
    assert not learns(QualitySettings(scorer="column"))
    kept, dropped = quality(rows, QualitySettings(scorer="column", threshold=1.06))
    assert kept["quality"].to_pylist() == [pytest.approx(1.2), None]
    assert dropped["quality"].to_pylist() == [pytest.approx(0.9), pytest.approx(1.05)]
    untouched, nothing = quality(rows, QualitySettings(scorer="column"))
    assert (untouched.num_rows, nothing.num_rows) == (4, 0)
    with pytest.raises(SettingsError, match="no such column"):
        quality(rows, QualitySettings(scorer="column", column="laser"))
    with pytest.raises(SettingsError, match="numbers"):
        quality(rows, QualitySettings(scorer="column", column="src"))


def test_quantiles_and_thresholds_by_pair() -> None:
    rows = corpus(100).append_column("score", pa.array(np.arange(100) / 100, pa.float32()))
    _, dropped = quality(rows, QualitySettings(scorer="column", quantile=0.2))
    assert sorted(dropped["score"].to_pylist()) == pytest.approx([i / 100 for i in range(20)])
    for name in ("en-sw", "swh_Latn-eng_Latn"):
        own = validate(
            QualitySettings, {"scorer": "column", "threshold": 0.9, "pair": {name: {"threshold": 0.05}}}, where="test"
        )
        assert quality(rows, own)[1].num_rows == 5


def test_a_scorer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "myscorer.py").write_text(
        "import pyarrow.compute as pc\n"
        "def by_length(table):\n    return pc.utf8_length(table['tgt'])\n"
        "def too_short(table):\n    return [1.0]\n"
        "def words(table):\n    return table['src']\n"
        "value = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = corpus(20)
    _, dropped = quality(rows, QualitySettings(scorer="myscorer:by_length", threshold=50))
    assert dropped["tgt"].to_pylist() == [text for text in rows["tgt"].to_pylist() if len(text) < 50]
    for name, message in (
        ("too_short", "shape"),
        ("words", "float"),
        ("missing", "cannot be loaded"),
        ("value", "function"),
    ):
        with pytest.raises(SettingsError, match=message):
            quality(rows, QualitySettings(scorer=f"myscorer:{name}"))
    sys.modules.pop("myscorer")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scorer": "bleu"}, "no scorer"),
        ({"threshold": 0.5, "quantile": 0.1}, "not both"),
        ({"scorer": "comet"}, "needs a model"),
        ({"pair": {"english": {"threshold": 1}}}, "not a language pair"),
        ({"pair": {"en-sw": {}}}, "one of threshold and quantile"),
        ({"pair": {"en-sw": {"threshold": 1}, "sw-en": {"threshold": 2}}}, "same pair"),
        ({"quantile": 1.5}, "less than 1"),
        ({"threshold": float("nan")}, "finite"),
    ],
)
def test_settings_that_make_no_sense(data: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        validate(QualitySettings, data, where="test")


def test_model_files_are_those_of_a_local_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.ckpt").write_bytes(b"x")
    (tmp_path / "hparams.yaml").write_text("a: 1")
    found = model_files(QualitySettings(scorer="comet", model=str(tmp_path)))
    assert [path.name for path in found] == ["model.ckpt", "hparams.yaml"]
    assert model_files(QualitySettings(scorer="comet", model="Unbabel/wmt22-cometkiwi-da")) == []
    assert model_files(QualitySettings()) == []
