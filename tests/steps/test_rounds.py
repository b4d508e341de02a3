"""Rows are scored in rounds until the budget is filled; what thresholds would leave; what a scorer is worth."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import sentences
from runs import digests, mix, recipe, rejects

from corpusprep import InputError, RunError, SettingsError, load_recipe, run
from corpusprep.arrow import hash_strings
from corpusprep.cli import cli, main
from corpusprep.commands.agree import agree, describe
from corpusprep.commands.thresholds import read_scores
from corpusprep.stages.quality import QualitySettings, quality

Corpus = Callable[..., Path]
SCORER = "quality.scorer=test_rounds:by_hash"


def by_hash(table: pa.Table) -> np.ndarray:
    """A score in [0, 1) that text alone decides, and length does not."""
    return (hash_strings(table["src"], 7) >> np.uint64(40)).astype(np.float64) / 2**24


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


# Thresholds


def test_thresholds_show_what_is_left(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=700, shards=2), tmp_path / "out"
    run(recipe(data, SCORER, "quality.threshold=0.3"), out, until="quality")
    [found] = read_scores(out)
    assert found.pair == "en-de"
    assert found.cutoff == 0.3
    assert np.all(np.diff(found.scores) >= 0)
    rows, tokens = found.left(0.3)
    result = run(recipe(data, SCORER, "quality.threshold=0.3"), out)
    assert result.manifest is not None
    assert rows == result.manifest["mix"]["pairs"]["en-de"]["rows"]
    assert tokens == result.manifest["mix"]["tokens"]
    wanted = tokens // 2
    threshold = found.threshold_for(wanted)
    assert found.left(threshold)[1] >= wanted > found.left(np.nextafter(np.float32(threshold), np.float32(2)))[1]
    assert [len(found.above), len(found.below)] == [3, 3]
    assert max(row[0] for row in found.below) < 0.3 <= min(row[0] for row in found.above)
    shown = CliRunner().invoke(cli, ["thresholds", str(out), "--budget", str(wanted)])
    assert shown.exit_code == 0, shown.output
    assert "the run's" in shown.output
    alone = CliRunner().invoke(cli, ["thresholds", str(out), "--budget", str(wanted), "--pair", "en-de"])
    assert "leave out --pair" in alone.output
    assert "[quality.pair" not in alone.output
    suggested = re.search(r"\[quality\.pair\.en-de\]\nthreshold = (\S+)", shown.output)
    assert suggested is not None
    assert float(suggested[1]) == pytest.approx(threshold, abs=0.0011)
    again = run(recipe(data, SCORER, f"quality.threshold={suggested[1]}"), out)
    assert again.manifest is not None
    assert again.made.get("quality", 0) == 0
    assert again.manifest["mix"]["tokens"] >= wanted


def test_tokens_of_many_rows_are_those_of_a_sample(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corpusprep.commands import thresholds

    data, out = bitext(rows=900, shards=2), tmp_path / "out"
    run(recipe(data, SCORER), out, until="quality")
    [whole] = read_scores(out, examples=0)
    monkeypatch.setattr(thresholds, "_SAMPLE", 500)
    [part] = read_scores(out, examples=0)
    assert len(part.tokens) == len(whole.tokens)
    for threshold in (0, 0.5, 0.9):
        assert part.left(threshold)[0] == whole.left(threshold)[0]
        assert part.left(threshold)[1] == pytest.approx(whole.left(threshold)[1], rel=0.05)


def test_thresholds_of_no_run_say_so(bitext: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run that came to score rows"):
        list(read_scores(tmp_path))
    data, out = bitext(rows=60, shards=0), tmp_path / "out"
    (data / "nllb" / "deu_Latn-eng_Latn.gz").write_bytes(gzip.compress(b""))
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"], overrides=[SCORER])
    run(loaded, out, until="quality")
    with pytest.raises(InputError, match=r"has no scores of en-sw\. Name one of en-de"):
        list(read_scores(out, ["en-sw"]))
    for path in (out / "parts" / "quality").iterdir():
        path.unlink()
    with pytest.raises(RunError, match=r"is gone\. Start the run again"):
        list(read_scores(out))


def test_a_terminal_is_not_written_to_by_a_corpus(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=60, shards=0), tmp_path / "out"
    (data / "own.en-de.tsv").write_text("A house\x1b[2J and \u202ea garden.\tEin Haus\x1b[2J und ein Garten.\n" * 3)
    overrides = [SCORER, "clean.enabled=false", "langid.enabled=false", "dedup.enabled=false"]
    run(load_recipe(None, sources=[f"tsv={data / 'own.en-de.tsv'}"], overrides=overrides), out, until="quality")
    shown = CliRunner().invoke(cli, ["thresholds", str(out)])
    assert "A house" in shown.output
    assert not set("\x1b\u202e") & set(shown.output)


# Agreement


def with_human_scores(path: Path, rows: int = 400, header: str = "") -> Path:
    """Pairs of which a third is mismatched, with scores that say so."""
    draw = random.Random(3)
    pairs = sentences(rows, 11)
    lines = []
    for number, (english, german) in enumerate(pairs):
        wrong = number % 3 == 0
        other = pairs[(number + 7) % rows][1] if wrong else german
        lines.append(f"{english}\t{other}\t{draw.gauss(20 if wrong else 80, 5):.2f}\t{draw.random()}")
    content = (header + "\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_agreement_with_human_scores(tmp_path: Path) -> None:
    found = agree(with_human_scores(tmp_path / "en-de.tsv.gz"), QualitySettings())
    assert (found.pair, found.rows, found.unjudged) == ("en-de", 400, 0)
    assert found.spearman is not None
    assert found.pearson is not None
    assert found.spearman > 0.6
    assert found.pearson > 0.8
    assert found.auc is not None
    noise = agree(tmp_path / "en-de.tsv.gz", QualitySettings(), human=3, shuffled=0)
    assert noise.spearman is not None
    assert noise.margin is not None
    assert abs(noise.spearman) < 2 * noise.margin
    assert noise.auc is None
    table = describe([found, noise])
    assert "mean" in table.split("\n")[-1]


def test_correlations_are_those_of_their_definition(tmp_path: Path) -> None:
    path = with_human_scores(tmp_path / "a.tsv", header="src\tmt\tda_mean\tnoise\n")
    settings = QualitySettings(scorer="test_rounds:by_hash")
    found = agree(path, settings, src_lang="eng_Latn", tgt_lang="de", shuffled=0.3)
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    ours = by_hash(pa.table({"src": [row[0] for row in rows]})).astype(np.float32)
    human = np.array([float(row[2]) for row in rows])
    ranks = [values.argsort().argsort().astype(float) for values in (ours, human)]
    assert found.pearson == pytest.approx(np.corrcoef(ours, human)[0, 1], abs=1e-6)
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-3)
    assert found.auc == pytest.approx(0.5, abs=0.08)  # the scorer looks at one side alone


def test_true_pairs_are_told_from_shuffled_ones(tmp_path: Path) -> None:
    path = tmp_path / "de-en.tsv"
    path.write_text("".join(f"{german}\t{english}\n" for english, german in sentences(1500, 12)))
    found = agree(path, QualitySettings())
    assert found.pair == "de-en"
    assert found.spearman is None
    assert found.auc is not None
    assert found.auc > 0.95


def test_the_lexical_score_orders_machine_translations_as_people_do(data: Path) -> None:
    """Weakly, as it sees words and no sense; the bound is half of what was measured."""
    file = data / "qe" / "qe_mlqe-pe_train" / "ro-en.tsv.gz"
    found = agree(file, QualitySettings(), human=3, shuffled=0)
    assert found.spearman is not None
    assert found.spearman > 0.16


def test_good_rows_are_told_apart_by_the_lexical_score() -> None:
    rows = sentences(1500, 12)
    table = pa.table(
        {"src": [a for a, _ in rows], "tgt": [b for _, b in rows], "src_lang": ["en"] * 1500, "tgt_lang": ["de"] * 1500}
    )
    scores = quality(table).kept["quality"].to_numpy()
    assert (scores < 1).all()
    assert len(np.unique(scores)) > 0.9 * len(scores)


def test_files_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    for content, problem in (
        (b"", "is empty"),
        (b"one column\n", "its first line has one column"),
        (b"a\tb\tc\n" * 30, "has 0 rows that can be compared"),
        (b"a\tb\n", "has 1 rows that can be compared"),
    ):
        (tmp_path / "en-de.tsv").write_bytes(content)
        with pytest.raises(InputError, match=problem):
            agree(tmp_path / "en-de.tsv", QualitySettings())
    (tmp_path / "en-de.tsv.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(InputError, match="cannot be read"):
        agree(tmp_path / "en-de.tsv.gz", QualitySettings())
    with pytest.raises(InputError, match="cannot be read"):
        agree(tmp_path / "en-fr.tsv", QualitySettings())
    with pytest.raises(SettingsError, match="nothing tells its languages"):
        agree(tmp_path / "scores.tsv", QualitySettings())
    (tmp_path / "en-de.tsv").write_text("a\tb\t1\n" * 30)
    with pytest.raises(InputError, match="names no column 'da'"):
        agree(tmp_path / "en-de.tsv", QualitySettings(), human="da")


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    path = with_human_scores(tmp_path / "en-de.tsv")
    shown = CliRunner().invoke(cli, ["agree", str(path), str(path), "--set", "sample=5000", "--human", "2"])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"^en-de +400 +0\.\d{3} +0\.\d{3} +±0\.\d{3} +0\.\d{3}$", shown.output, re.MULTILINE)


def test_a_file_that_cannot_be_read_hides_nothing_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_human_scores(tmp_path / "en-de.tsv")
    missing = [str(tmp_path / name) for name in ("en-fr.tsv", "en-cs.tsv")]
    with pytest.raises(SystemExit) as ended:
        main(["agree", missing[0], str(path), missing[1], "--scorer", "test_rounds:by_hash"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert re.search(r"^en-de +400 ", printed.out, re.MULTILINE)
    assert all(f"error: {file}: cannot be read" in printed.err for file in missing)


def test_thresholds_of_a_run_in_rounds_say_what_they_are_of(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=600, shards=2), tmp_path / "out"
    run(in_budget(data), out)
    shown = CliRunner().invoke(cli, ["thresholds", str(out)])
    assert "These are only the rows that were scored until the budget was filled" in shown.output
    assert "[quality.pair" not in shown.output
