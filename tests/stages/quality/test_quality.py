"""The quality stage around its scorers: settings, cut-offs, the column scorer, a user's function, types of input."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from corpusprep.errors import SettingsError
from corpusprep.stages import quality
from corpusprep.stages.quality import QualitySettings


def table(src: list[str | None], tgt: list[str | None], pair: str = "en-de", **more: list[object]) -> pa.Table:
    left, right = pair.split("-")
    n = len(src)
    columns = {"src": pa.array(src, pa.string()), "tgt": pa.array(tgt, pa.string())}
    columns |= {"src_lang": pa.array([left] * n, pa.string()), "tgt_lang": pa.array([right] * n, pa.string())}
    return pa.table(columns | more)


def scored(scores: list[float | None]) -> pa.Table:
    n = len(scores)
    return table([f"line {k}" for k in range(n)], [f"Zeile {k}" for k in range(n)], score=scores)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.3, "quantile": 0.1}, "not both"),
        ({"quantile": 1.0}, "less than 1"),
        ({"quantile": -0.1}, "greater than or equal to 0"),
        ({"threshold": math.nan}, "finite"),
        ({"scorer": "laser"}, "not a scorer"),
        ({"scorer": ":score"}, "not a scorer"),
        ({"scorer": "comet"}, "needs a model"),
        ({"sample": 0}, "greater than or equal to 1"),
        ({"min_rows": -1}, "greater than or equal to 0"),
        ({"pair": {"en-de": {}}}, "one of threshold and quantile"),
        ({"pair": {"en-de": {"threshold": 0.1, "quantile": 0.1}}}, "one of threshold and quantile"),
        ({"pair": {"english": {"threshold": 0.1}}}, "not a language pair"),
        ({"pair": {"en-de": {"threshold": 0.1}, "deu-eng": {"threshold": 0.2}}}, "name the same pair"),
        ({"treshold": 0.1}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QualitySettings.model_validate(values)


def test_settings_round_trip() -> None:
    chosen = QualitySettings.model_validate({"quantile": 0.1, "pair": {"en-sw": {"threshold": 0.2}}})
    assert QualitySettings.model_validate(chosen.model_dump(mode="json")) == chosen


def test_column_scorer_drops_what_is_below_the_threshold_and_keeps_null() -> None:
    rows = scored([1.2, None, 1.04, 1.05, math.nan])
    kept, dropped = quality.quality(rows, QualitySettings(scorer="column", threshold=1.05))
    assert kept["src"].to_pylist() == ["line 0", "line 1", "line 3", "line 4"]
    assert kept["quality"].to_pylist() == pytest.approx([1.2, None, 1.05, None])
    assert kept.schema.field("quality").type == pa.float32()
    assert dropped["src"].to_pylist() == ["line 2"]
    assert dropped["reason"].to_pylist() == ["quality.score"]
    assert dropped["quality"].to_pylist() == pytest.approx([1.04])


def test_column_scorer_takes_integers_and_other_names() -> None:
    rows = table(["a", "b"], ["c", "d"], laser=[3, 1])
    kept, _ = quality.quality(rows, QualitySettings(scorer="column", column="laser", threshold=2))
    assert kept["src"].to_pylist() == ["a"]


def test_without_a_threshold_other_scorers_drop_nothing_and_say_so() -> None:
    chosen = QualitySettings(scorer="column")
    kept, dropped = quality.quality(scored([0.0, 1.0]), chosen)
    assert (kept.num_rows, dropped.num_rows) == (2, 0)
    assert "neither quality.threshold nor quality.quantile" in (quality.explain(chosen, "en-de") or "")


@pytest.mark.parametrize("column", ["laser", "src"])
def test_a_column_that_is_missing_or_no_number_is_named(column: str) -> None:
    with pytest.raises(SettingsError, match=column):
        quality.quality(scored([1.0]), QualitySettings(scorer="column", column=column))


def test_disabled_adds_nothing() -> None:
    kept, dropped = quality.quality(scored([0.0]), QualitySettings(scorer="column", threshold=1, enabled=False))
    assert kept.column_names == scored([0.0]).column_names
    assert dropped.num_rows == 0


def test_an_older_score_is_replaced() -> None:
    rows = scored([1.0, 2.0]).append_column("quality", pa.array([9.0, 9.0], pa.float32()))
    kept, _ = quality.quality(rows, QualitySettings(scorer="column"))
    assert kept["quality"].to_pylist() == [1.0, 2.0]
    assert kept.column_names.count("quality") == 1


@given(st.lists(st.one_of(st.floats(-9, 1, width=32), st.just(math.nan)), max_size=60), st.floats(0, 0.99))
def test_a_quantile_drops_that_share_at_most(values: list[float], quantile: float) -> None:
    scores = np.array(values, np.float32)
    pieces = [scores[::2], scores[1::2]]
    limit = quality.cutoff(lambda: pieces, QualitySettings(scorer="column", quantile=quantile), "en-de")
    judged = scores[~np.isnan(scores)]
    if limit is None:
        assert judged.size == 0
        return
    assert limit == np.sort(judged)[math.floor(quantile * judged.size)]
    lost = int((scores < limit).sum())
    assert lost <= quantile * judged.size
    if np.unique(judged).size == judged.size:
        assert lost == math.floor(quantile * judged.size)


def test_a_quantile_is_taken_within_each_pair() -> None:
    one = table(["a"] * 10, ["b"] * 10, "en-de", score=[float(k) for k in range(10)])
    two = table(["a"] * 10, ["b"] * 10, "en-sw", score=[100.0 + k for k in range(10)])
    _, dropped = quality.quality(pa.concat_tables([two, one]), QualitySettings(scorer="column", quantile=0.2))
    assert dropped["quality"].to_pylist() == [100.0, 101.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["en-sw", "sw-en", "eng-swh", "swh_Latn-eng_Latn"])
def test_a_pair_has_its_own_threshold_under_any_name(name: str) -> None:
    chosen = QualitySettings.model_validate({"threshold": 0.5, "pair": {name: {"threshold": 0.1}}})
    none = np.zeros(0, np.float32)
    assert quality.cutoff(lambda: [none], chosen, "en-sw") == 0.1
    assert quality.cutoff(lambda: [none], chosen, "en-de") == 0.5


def test_a_pairs_quantile_stands_in_place_of_the_common_threshold() -> None:
    chosen = QualitySettings.model_validate({"threshold": 0.5, "pair": {"en-sw": {"quantile": 0.5}}})
    scores = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    assert quality.cutoff(lambda: [scores], chosen, "en-sw") == pytest.approx(0.3)


def test_too_little_evidence_drops_nothing_and_says_so() -> None:
    chosen = QualitySettings(min_rows=200)
    assert quality.cutoff(lambda: [np.zeros(5, np.float32)], chosen, "en-th", 199) is None
    assert "199 rows are too few" in (quality.explain(chosen, "en-th", 199) or "")
    assert quality.cutoff(lambda: [np.zeros(5, np.float32)], chosen, "en-th", 200) is not None
    assert quality.explain(chosen, "en-th", 200) is None


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("own_scorers")
    monkeypatch.setitem(sys.modules, "own_scorers", module)
    return module


def test_a_users_function_may_return_arrow_with_nulls(own: types.ModuleType) -> None:
    own.score = lambda rows: pa.array([None, 0.5])
    chosen = QualitySettings(scorer="own_scorers:score", threshold=1)
    kept, dropped = quality.quality(table(["a", "b"], ["x", "y"]), chosen)
    assert kept["quality"].to_pylist() == [None]
    assert dropped["src"].to_pylist() == ["b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:score", "cannot be imported"),
        ("own_scorers:no_such", "cannot be imported"),
        ("own_scorers:text", "is not a function"),
        ("own_scorers:short", "one float per row"),
        ("own_scorers:words", "one float per row"),
    ],
)
def test_a_users_function_that_does_not_serve(own: types.ModuleType, name: str, message: str) -> None:
    own.text = "no function"
    own.short = lambda rows: [1.0]
    own.words = lambda rows: ["good"] * rows.num_rows
    with pytest.raises(SettingsError, match=message):
        quality.quality(table(["a", "b"], ["x", "y"]), QualitySettings(scorer=name))


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.text(max_size=30)),
            st.one_of(st.none(), st.text(max_size=30)),
            st.sampled_from(["de", "sw", "zh_Hant"]),
        ),
        max_size=60,
    )
)
def test_any_text_is_scored_or_left_unjudged(rows: list[tuple[str | None, str | None, str]]) -> None:
    parts = [table([s], [t], f"en-{language}", at=[k]) for k, (s, t, language) in enumerate(rows)]
    empty = table([], [], at=pa.array([], pa.int64()))
    kept, dropped = quality.quality(pa.concat_tables([empty, *parts]))
    assert dropped.num_rows == 0  # there is too little evidence
    assert kept["at"].to_pylist() == list(range(len(rows)))
    assert all(value is None or 0 <= value <= 1 for value in kept["quality"].to_pylist())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_all_string_types(kind: pa.DataType) -> None:
    rows = table(["a"] * 30, ["b"] * 30)
    kept, _ = quality.quality(pa.table({name: rows[name].cast(kind) for name in rows.column_names}))
    assert kept["src"].to_pylist() == ["a"] * 30
    assert kept["quality"].null_count == 0


def test_model_files_are_those_of_a_local_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.ckpt").write_bytes(b"x")
    (tmp_path / "hparams.yaml").write_text("class_identifier: unified_metric")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    settings = QualitySettings(scorer="comet", model=str(tmp_path))
    found = quality.model_files(settings)
    assert [path.name for path in found] == ["model.ckpt", "hparams.yaml", "config.json", "tokenizer.json"]
    found = quality.model_files(settings.model_copy(update={"backend": "unbabel"}))
    assert [path.name for path in found] == ["model.ckpt", "hparams.yaml"]
    assert quality.model_files(QualitySettings()) == []
