"""Rows are scored in rounds until the budget is filled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import sentences
from runs import digests, mix, recipe, rejects

from corpusprep import SettingsError, load_recipe, run

Corpus = Callable[..., Path]
SCORER = "quality.scorer=scorers:by_hash"


def in_budget(data: Path, *more: str) -> Any:
    return recipe(data, SCORER, "quality.threshold=0.6", "balance.budget=9000", 'quality.until="budget"', *more)


def scored(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "manifest.json").read_text())["quality"]["scores"]
    return found


def test_no_more_is_scored_than_fills_the_budget(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=1500, shards=2)
    every, some = tmp_path / "every", tmp_path / "some"
    run(recipe(data, SCORER, "quality.threshold=0.6", "balance.budget=9000"), every)
    result = run(in_budget(data), some)
    assert result.manifest is not None
    plans = [json.loads((out / "manifest.json").read_text())["tokens"] for out in (every, some)]
    assert plans[0]["plan"]["targets"] == plans[1]["plan"]["targets"] == {"en-de": 9000}
    assert all(abs(plan["reached"] - 9000) < 100 for plan in plans)
    lost = rejects(some)
    counts = dict(lost.group_by("reason").len().iter_rows())
    judged = mix(some).height // 2 + counts["quality.score"] + counts.get("balance.quota", 0)
    assert scored(some) == {"computed": judged, "reused": 0}
    assert scored(every)["computed"] > 4000
    # The share of rows that pass is 0.4: twice as many as needed at most.
    assert judged < 2 * (mix(some).height // 2) / 0.4
    assert counts["quality.not_needed"] == scored(every)["computed"] - judged
    missing = lost.filter(pl.col("reason") == "quality.not_needed")
    assert missing["quality"].null_count() == missing["src"].null_count() == missing.height
    assert sum(result.accounts.read.values()) == mix(some).height // 2 + lost.height


def test_rounds_do_not_depend_on_workers_or_interruption(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=800, shards=3)
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    run(in_budget(data), one, workers=1)
    run(in_budget(data), two, workers=2)
    run(in_budget(data), killed, until="quality")
    for kind in ("quality", "wanted"):
        for path in sorted((killed / "parts" / kind).iterdir())[::2]:
            path.unlink()
    run(in_budget(data), killed)
    assert digests(one) == digests(two) == digests(killed)
    again = run(in_budget(data), one)
    assert sum(again.made.values()) == 0


def test_a_pair_that_has_too_little_is_scored_whole(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=200, shards=1)
    result = run(in_budget(data, "balance.budget=1000000"), tmp_path / "out")
    assert result.manifest is not None
    assert not rejects(tmp_path / "out").filter(pl.col("reason") == "quality.not_needed").height
    assert result.manifest["tokens"]["plan"]["missing"] > 0


def test_a_pair_of_which_nothing_passes_ends_too(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=300, shards=1)
    result = run(in_budget(data, "quality.threshold=2"), tmp_path / "out")
    assert result.manifest is not None
    assert result.manifest["mix"]["examples"] == 0
    assert scored(tmp_path / "out")["computed"] > 500


def test_a_pair_that_is_given_up_is_named(bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corpusprep.steps import rounds

    monkeypatch.setattr(rounds, "_LOOK", 2000)
    data = bitext(rows=300, shards=1)
    result = run(in_budget(data, "quality.threshold=2"), tmp_path / "out")
    assert any(note.startswith("en-de: none of the first rows passes") for note in result.notes)
    assert 0 < scored(tmp_path / "out")["computed"] < 500


def test_leftovers_of_a_poor_pair_go_to_the_others(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=700, shards=1)
    for number, (english, german) in enumerate(sentences(40, 77)):
        # French has few rows: what it cannot fill is German's.
        with (data / "few.en-fr.tsv").open("a", encoding="utf-8") as file:
            file.write(f"{english} {number}\tOui, {german} {number}\n")
    loaded = load_recipe(
        None,
        sources=[f"opus100={data / 'opus'}", f"nllb={data / 'nllb'}", f"tsv={data / 'few.en-fr.tsv'}"],
        overrides=[SCORER, "quality.threshold=0.6", "balance.budget=8000", 'quality.until="budget"',
                   "langid.enabled=false", "balance.method=unimax"],
    )  # fmt: skip
    result = run(loaded, tmp_path / "out")
    assert result.manifest is not None
    pairs = result.manifest["mix"]["pairs"]
    assert pairs["en-fr"]["tokens"] < 4000
    assert pairs["en-fr"]["tokens"] + pairs["en-de"]["tokens"] == pytest.approx(8000, abs=120)
    reasons = rejects(tmp_path / "out").filter(pl.col("tgt_lang") == "fr")["reason"].unique().to_list()
    assert "quality.not_needed" not in reasons


@pytest.mark.parametrize("prior", ["score", "lexical"])
def test_a_prior_puts_the_best_first(bitext: Corpus, tmp_path: Path, prior: str) -> None:
    data = bitext(rows=600, shards=2)
    overrides = (f"quality.prior={prior}", "quality.threshold=0.1", "dedup.keep=first")
    run(in_budget(data, *overrides), tmp_path / "out")
    lost = rejects(tmp_path / "out").filter(pl.col("reason") == "quality.not_needed")
    assert lost.height
    if prior == "lexical":
        scored, waiting = [], []
        for path in (tmp_path / "out" / "parts" / "prior").iterdir():
            scores = pl.read_parquet(path)["quality"].to_numpy()
            # The mark of the last round: no row is taken from it again.
            name = path.name.rsplit(".", 1)[0]
            files = [p for p in (tmp_path / "out" / "parts" / "wanted").iterdir() if p.name.startswith(name + ".")]
            marks = np.logical_or.reduce([pl.read_parquet(file)["candidate"].to_numpy() for file in files])
            scored.append(scores[marks & ~np.isnan(scores)])
            waiting.append(scores[~marks & ~np.isnan(scores)])
        assert np.concatenate(scored).min() >= np.concatenate(waiting).max() - 1e-6
    if prior == "score":
        kept = mix(tmp_path / "out").filter(pl.col("source") == "nllb").select("shard", "row").unique()
        scores = dict(lost.filter(pl.col("source") == "nllb").select("row", "score").iter_rows())
        worst_kept = min(1.1 + (row % 90) / 1000 for row in kept["row"])
        assert worst_kept >= max(scores.values()) - 0.002
        assert "nllb" in mix(tmp_path / "out")["source"].to_list()


def test_rows_that_no_example_can_be_made_of_keep_their_reason(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=400, shards=0)
    loaded = load_recipe(
        None,
        sources=[f"opus100={data / 'opus'}"],
        overrides=[SCORER, "quality.threshold=0.6", "balance.budget=3000", 'quality.until="budget"',
                   "clean.template_tokens=false"],
    )  # fmt: skip
    run(loaded, tmp_path / "out")
    reasons = dict(rejects(tmp_path / "out").select("row", "reason").iter_rows())
    assert reasons[6] == "instruct.template_tokens"
    assert "quality.not_needed" in reasons.values()


def test_settings_that_do_not_go_together_are_refused(bitext: Corpus) -> None:
    data = bitext(rows=10, shards=0)
    for overrides, problem in (
        (['quality.until="budget"'], r'quality\.until = "budget" needs balance\.budget'),
        (
            ['quality.until="budget"', "balance.budget=9", "quality.quantile=0.1"],
            "a quantile needs the scores of all rows",
        ),
        (['quality.prior="score"'], 'prior is used only with until = "budget"'),
    ):
        with pytest.raises(SettingsError, match=problem):
            load_recipe(None, sources=[f"opus100={data / 'opus'}"], overrides=overrides)
