"""Whole runs with a COMET model: scores are kept, found again, and computed once whatever happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from comet_models import Models
from conftest import sentences
from runs import digests, recipe, redone, rejects

from corpusprep import RunError, load_recipe, run

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[quality]'")

Corpus = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("comet"))


def settings(model: str, *more: str) -> tuple[str, ...]:
    return ("quality.scorer=comet", f'quality.model="{model}"', *more)


def scored(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "manifest.json").read_text())["quality"]["scores"]
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the scorer is given, in this process."""
    from corpusprep.stages.quality.comet import CometScorer

    rows: list[int] = []
    whole = CometScorer.score

    def score(self: Any, table: Any) -> Any:
        rows.append(table.num_rows)
        return whole(self, table)

    monkeypatch.setattr(CometScorer, "score", score)
    return rows


def test_a_changed_threshold_costs_no_scoring(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = bitext(), tmp_path / "out"
    rows = counted(monkeypatch)
    run(recipe(data, *settings(models["kiwi"])), out)
    count = sum(rows)
    assert scored(out) == {"computed": count, "reused": 0}
    assert count > 800
    scores = pl.concat([pl.read_parquet(path) for path in (out / "parts" / "quality").iterdir()])[
        "quality"
    ].drop_nulls()
    threshold = float(scores.quantile(0.3) or 0)
    result = run(recipe(data, *settings(models["kiwi"], f"quality.threshold={threshold}")), out)
    assert sum(rows) == count
    assert result.made.get("quality", 0) == 0
    assert rejects(out).filter(pl.col("reason") == "quality.score").height == pytest.approx(0.3 * count, abs=2)


def test_scores_that_are_found_by_text_make_nothing_else_again(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = bitext(), tmp_path / "out"
    rows = counted(monkeypatch)
    run(recipe(data, *settings(models["kiwi"])), out)
    count, before = sum(rows), digests(out)
    files = list((out / "parts" / "quality").iterdir())
    shutil.rmtree(out / "parts" / "quality")
    result = run(recipe(data, *settings(models["kiwi"])), out)
    assert redone(result) == {"quality": len(files)}
    assert result.scored == {"computed": 0, "reused": count}
    assert (sum(rows), digests(out)) == (count, before)


def test_scores_outlive_what_they_do_not_depend_on(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = bitext(), tmp_path / "out"
    rows = counted(monkeypatch)
    run(recipe(data, *settings(models["qe"], "dedup.max_distance=8")), out)
    first = sum(rows)
    before = digests(out)
    # Rows that are no duplicates any more are the only ones to be scored.
    run(recipe(data, *settings(models["qe"], "dedup.max_distance=0")), out)
    more = sum(rows) - first
    assert 0 < more < first
    assert scored(out)["reused"] == first
    run(recipe(data, *settings(models["qe"], "dedup.max_distance=8")), out, redo="quality")
    assert sum(rows) == first + more
    assert scored(out) == {"computed": 0, "reused": first}
    assert digests(out) == before


def test_scores_are_shared_by_recipes_where_a_folder_is_named(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bitext()
    cache = f'quality.cache="{tmp_path / "kept"}"'
    rows = counted(monkeypatch)
    run(recipe(data, *settings(models["kiwi"], cache)), tmp_path / "a")
    count = sum(rows)
    run(recipe(data, *settings(models["kiwi"], cache, "seed=4", "quality.threshold=-9")), tmp_path / "b")
    assert sum(rows) == count
    assert scored(tmp_path / "b") == {"computed": 0, "reused": count}
    assert not (tmp_path / "b" / "scores").exists()
    for other in ("quality.precision=bf16", "quality.direction=backward", f'quality.model="{models["qe"]}"'):
        run(recipe(data, *settings(models["kiwi"], cache, other)), tmp_path / "c")
        assert scored(tmp_path / "c")["reused"] == 0
    model = tmp_path / "model"
    shutil.copytree(models["kiwi"], model)
    run(recipe(data, *settings(str(model), cache)), tmp_path / "d")
    assert scored(tmp_path / "d") == {"computed": 0, "reused": count}  # the same model elsewhere
    checkpoint = torch.load(model / "checkpoints" / "model.ckpt", weights_only=True)
    checkpoint["state_dict"]["estimator.ff.0.bias"] += 1
    torch.save(checkpoint, model / "checkpoints" / "model.ckpt")
    run(recipe(data, *settings(str(model), cache)), tmp_path / "e")
    assert scored(tmp_path / "e")["reused"] == 0
    before = sum(rows)
    checkpoint["state_dict"]["estimator.ff.0.bias"] += 1
    replaced = model / "checkpoints" / "new.ckpt"
    torch.save(checkpoint, replaced)
    replaced.rename(model / "checkpoints" / "model.ckpt")  # in the life of a process that has the other one open
    run(recipe(data, *settings(str(model), cache)), tmp_path / "f")
    assert sum(rows) == before + count
    found = [sorted((tmp_path / out / "parts" / "quality").iterdir()) for out in ("e", "f")]
    apart = [pl.concat([pl.read_parquet(path) for path in paths])["quality"].drop_nulls() for paths in found]
    assert (apart[0] - apart[1]).abs().min() > 1e-4


def test_equal_rows_are_scored_once(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In words that the small tokenizer knows: to it, texts that differ in digits alone may be one.
    lines = [f"{english}\t{german}\n" for english, german in sentences(30, 3)]
    (tmp_path / "a.en-de.tsv").write_text("".join(lines * 4), encoding="utf-8")
    rows = counted(monkeypatch)
    off = ["clean.enabled=false", "langid.enabled=false", "dedup.enabled=false"]
    loaded = load_recipe(None, sources=[f"tsv={tmp_path / 'a.en-de.tsv'}"], overrides=[*settings(models["kiwi"]), *off])
    result = run(loaded, tmp_path / "out")
    assert result.manifest is not None
    assert sum(rows) == 30
    [part] = (tmp_path / "out" / "parts" / "quality").iterdir()
    found = pl.read_parquet(part)["quality"].to_numpy().reshape(4, 30)
    assert np.ptp(found, axis=0).max() == 0
    assert np.ptp(found[0]) > 0


def test_no_score_is_computed_twice_after_an_interruption(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corpusprep.stages.quality.comet import CometScorer

    data = bitext(shards=5)
    run(recipe(data, *settings(models["kiwi"])), tmp_path / "whole")
    whole = CometScorer.score
    done: list[int] = []
    stops = [2, 4, 5]

    def score(self: Any, table: Any) -> Any:
        if len(done) in stops:
            stops.remove(len(done))
            raise KeyboardInterrupt
        done.append(table.num_rows)
        return whole(self, table)

    monkeypatch.setattr(CometScorer, "score", score)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(recipe(data, *settings(models["kiwi"])), tmp_path / "out", workers=1)
    run(recipe(data, *settings(models["kiwi"])), tmp_path / "out", workers=1)
    assert sum(done) == scored(tmp_path / "whole")["computed"]
    assert scored(tmp_path / "out") == scored(tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_scores_of_an_interrupted_run_serve_another_recipe(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corpusprep.stages.quality.comet import CometScorer

    data, out = bitext(shards=4), tmp_path / "out"
    whole = CometScorer.score
    done: list[int] = []
    stops = [3]

    def score(self: Any, table: Any) -> Any:
        if len(done) in stops:
            stops.clear()
            raise KeyboardInterrupt
        done.append(table.num_rows)
        return whole(self, table)

    monkeypatch.setattr(CometScorer, "score", score)
    first = settings(models["qe"], "quality.threshold=0.6", "balance.budget=6000")
    with pytest.raises(KeyboardInterrupt):
        run(recipe(data, *first), out, workers=1)
    before = sum(done)
    assert before > 0
    run(recipe(data, *first, 'quality.until="budget"'), out, workers=1)
    assert scored(out)["reused"] > 0
    run(recipe(data, *first, "dedup.max_distance=0"), out, workers=1)
    run(recipe(data, *settings(models["qe"], "dedup.max_distance=0")), tmp_path / "whole", workers=1)
    every = scored(tmp_path / "whole")["computed"]
    assert sum(done) == 2 * every  # one round for all recipes of the first folder, one for the second folder


def test_rounds_score_until_the_budget_is_filled(bitext: Corpus, tmp_path: Path, models: Models) -> None:
    data = bitext(rows=600, shards=2)
    run(recipe(data, *settings(models["qe"])), tmp_path / "every", until="quality")
    files = (tmp_path / "every" / "parts" / "quality").iterdir()
    scores = pl.concat([pl.read_parquet(path) for path in files])["quality"].drop_nulls()
    limits = (f"quality.threshold={scores.median()}", "balance.budget=6000", 'quality.until="budget"')
    result = run(recipe(data, *settings(models["qe"], *limits)), tmp_path / "some")
    assert result.manifest is not None
    kept = result.manifest["mix"]["pairs"]["en-de"]["rows"]
    assert abs(result.manifest["tokens"]["reached"] - 6000) < 100
    assert kept < scored(tmp_path / "some")["computed"] <= 2 * kept / 0.5
    assert scored(tmp_path / "some")["reused"] == 0


def test_a_model_that_is_missing_shows_before_anything_is_read(bitext: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match="there is no such file or folder"):
        run(recipe(bitext(), *settings("/no/model")), out)
    assert not (out / "parts" / "pass1").exists()
    run(recipe(bitext(folder=tmp_path / "again"), *settings("/no/model")), out, until="dedup")


def test_rounds_count_and_end_the_same_after_an_interruption(
    bitext: Corpus, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window whose scores are kept, but whose part is not written yet, must not count as scored elsewhere."""
    from corpusprep import parts

    data = bitext(rows=400, shards=2)
    limits = ("quality.threshold=0.6", "balance.budget=6000", 'quality.until="budget"')
    chosen = recipe(data, *settings(models["qe"], *limits))
    run(chosen, tmp_path / "whole", workers=1)
    write = parts.write_column
    written = [0]

    def stopping(output: str, *rest: Any) -> None:
        written[0] += "/quality/" in output
        if "/quality/" in output and written[0] in (2, 6):  # in the first round, and in one that follows
            raise KeyboardInterrupt
        write(output, *rest)

    monkeypatch.setattr(parts, "write_column", stopping)
    for model in ("first", "second"):  # the training's settings count for nothing
        with pytest.raises(KeyboardInterrupt):
            run(recipe(data, *settings(models["qe"], *limits, f"train.model={model}")), tmp_path / "out", workers=1)
    run(chosen, tmp_path / "out", workers=1)
    assert scored(tmp_path / "out") == scored(tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    keys = [json.loads((tmp_path / name / "manifest.json").read_text())["key"] for name in ("out", "whole")]
    assert keys[0] == keys[1]
