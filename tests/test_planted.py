"""The acceptance on real bitext with planted defects, where it is at hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from comet_models import Models
from planted import judge, recipe_for
from runs import redone, rejects

from corpusprep import Recipe, run
from corpusprep.stages.instruct import invert

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, Path]:
    folder = data / "planted"
    if not folder.is_dir():
        pytest.skip(f"no planted bitext in {folder}")
    recipe = recipe_for(folder, [])
    out = tmp_path_factory.mktemp("planted")
    run(recipe, out)
    return folder, recipe, out


def test_defects_go_and_clean_rows_stay(
    finished: tuple[Path, Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recipe, out = finished
    met = judge(folder, out, recipe)
    assert met, capsys.readouterr().out


def test_a_budget_of_real_tokens_is_met(finished: tuple[Path, Recipe, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder, _, out = finished
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "evaluation").glob("*.tsv"))]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((text[:60_000] for text in texts), trainer)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))

    recipe = recipe_for(folder, ["balance.budget=300000", f"balance.tokenizer='{file}'"])
    result = run(recipe, out)
    assert "quality" not in {kind for kind, count in result.made.items() if count}  # scored by the run before
    manifest = json.loads((out / "manifest.json").read_text())

    mix = pa.concat_tables([pq.read_table(path) for path in sorted((out / "mix").glob("*.parquet"))])
    contents = [[turn["content"] for turn in turns] for turns in mix["messages"].to_pylist()]
    counts = [sum(len(e.ids) for e in tokenizer.encode_batch(turns, add_special_tokens=False)) for turns in contents]
    assert abs(sum(counts) - 300_000) <= 3_000
    assert manifest["mix"]["tokens"] == sum(counts)
    frame = pl.DataFrame({"src": mix["src_lang"].to_pylist(), "tgt": mix["tgt_lang"].to_pylist(), "tokens": counts})
    shares = frame.group_by(pl.col("src") + "-" + pl.col("tgt")).agg(pl.col("tokens").sum())
    targets = manifest["tokens"]["plan"]["targets"]
    for pair, tokens in shares.iter_rows():
        assert abs(tokens - targets[pair]) <= 0.02 * targets[pair], pair
    copies = mix.group_by(["source", "shard", "row", "direction"]).aggregate([([], "count_all")])
    assert set(copies["count_all"].to_pylist()) == {1}

    # Every example inverts to its row as the clean stage wrote it.
    parts = [pl.read_parquet(path, columns=["source", "shard", "row", "src", "tgt"])
             for path in (out / "parts" / "pass1").glob("*/*-*.parquet")]  # fmt: skip
    written = pl.concat(parts)
    back = pl.DataFrame(pl.from_arrow(invert(mix, recipe.instruct))).select("source", "shard", "row", "src", "tgt")
    joined = back.join(written, on=["source", "shard", "row"], suffix="_written")
    assert joined.height == mix.num_rows
    assert (
        joined.filter((pl.col("src") != pl.col("src_written")) | (pl.col("tgt") != pl.col("tgt_written"))).height == 0
    )


def test_a_comet_model_takes_the_place_of_the_lexical_scorer(
    finished: tuple[Path, Recipe, Path], tmp_path: Path
) -> None:
    """A model is another setting to the same parts: nothing is read or deduplicated again."""
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[quality]'")
    folder, _, out = finished
    shutil.copytree(out / "parts", tmp_path / "out" / "parts", copy_function=os.link)
    (tmp_path / "out" / ".lock").touch()
    model = Models(tmp_path / "models")["kiwi"]
    overrides = ["quality.scorer=comet", f'quality.model="{model}"', "quality.quantile=0.1"]
    result = run(recipe_for(folder, overrides), tmp_path / "out")
    assert result.manifest is not None
    assert not {"pass1", "dedup"} & set(redone(result))
    found = result.manifest["quality"]["scores"]
    assert found["computed"] > 50_000
    dropped = rejects(tmp_path / "out").filter(pl.col("reason") == "quality.score").height
    assert dropped == pytest.approx(0.1 * sum(found.values()), rel=0.01)
    assert result.manifest["mix"]["examples"] == 2 * (sum(found.values()) - dropped)
