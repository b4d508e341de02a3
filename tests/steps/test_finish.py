"""The step finish: files of the mix, rejects, the card and the manifest."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from runs import digests, mix, recipe, redone, rejects

from corpusprep import RunError, load_recipe, run
from corpusprep.stages.instruct import InstructSettings, invert, render
from corpusprep.stages.instruct import text as instruct_text
from corpusprep.stages.instruct.examples import Examples
from corpusprep.steps import finish
from corpusprep.steps.render import RenderTask, file_of
from corpusprep.steps.taken import validation_hashes

Corpus = Callable[..., Path]


def test_every_example_inverts_to_the_row_that_it_came_from(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=120, shards=0), tmp_path / "out"
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"])
    run(loaded, out)
    english = (data / "opus/supervised/de-en/opus.de-en-train.en").read_text(encoding="utf-8").split("\n")
    german = (data / "opus/supervised/de-en/opus.de-en-train.de").read_text(encoding="utf-8").split("\n")
    back = invert(pq.read_table(next((out / "mix").glob("*.parquet"))), loaded.instruct)
    assert back.num_rows > 200
    for row, src, tgt in zip(back["row"].to_pylist(), back["src"].to_pylist(), back["tgt"].to_pylist(), strict=True):
        assert (src, tgt) == (english[row], german[row])


def test_manifest_names_recipe_inputs_counts_and_checksums(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data, "name=trial", "seed=9"), out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["name"] == "trial"
    assert manifest["recipe"]["seed"] == 9
    assert len(manifest["inputs"]) == 3
    assert manifest["counts"]["read"] == 900
    assert manifest["counts"]["kept"] == manifest["mix"]["pairs"]["en-de"]["rows"]
    assert manifest["tokens"]["counted"] == "estimate from bytes"
    assert {f["path"]: f["sha256"] for f in manifest["files"]} == digests(out)


def test_the_manifest_tells_of_the_recipe_that_was_run(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=60, shards=0)
    out = tmp_path / "out"
    run(load_recipe(None, sources=[f"opus100={data / 'opus'}"]), out)
    run(load_recipe(None, sources=[f"opus100={data / 'opus'}"], overrides=["balance.budget=100_000_000"]), out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"]["balance"]["budget"] == 100_000_000


def test_validation_rows_are_split_off(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data, "instruct.validation=25"), out)
    held = pl.read_parquet(next((out / "mix" / "validation").glob("*.parquet")))
    assert held.select("source", "shard", "row").unique().height == 25
    assert held.join(mix(out), on=["source", "shard", "row"]).height == 0


def test_the_mix_loads_with_datasets(bitext: Corpus, tmp_path: Path) -> None:
    from datasets import load_dataset

    data, out = bitext(rows=80), tmp_path / "out"
    run(recipe(data, "instruct.validation=5"), out)
    cache = str(tmp_path / "cache")
    mixed = load_dataset("parquet", data_files=str(out / "mix" / "*.parquet"), split="train", cache_dir=cache)
    assert mixed[0]["messages"][0]["role"] == "user"
    assert mixed.num_rows == mix(out).height
    by_card = load_dataset(str(out / "mix"), cache_dir=cache)
    assert by_card["validation"].num_rows == 10
    assert by_card["train"].num_rows == mixed.num_rows


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.en-de.tsv"
    file.write_text("one\teins\n")
    song = tmp_path / "out" / "mix" / "song.wav"
    song.parent.mkdir(parents=True)
    song.write_text("la la la")
    with pytest.raises(RunError, match="not from a run"):
        run(load_recipe(None, sources=[f"tsv={file}"]), tmp_path / "out")
    assert song.read_text() == "la la la"


def test_a_mix_of_many_files_holds_the_rows_of_one_in_the_same_order(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=120)
    run(recipe(data), tmp_path / "one")
    run(recipe(data, "instruct.shard_rows=100"), tmp_path / "many")
    files = sorted((tmp_path / "many" / "mix").glob("*.parquet"))
    rows = [pq.read_metadata(file).num_rows for file in files]
    assert len(files) == -(-sum(rows) // 100)
    assert [file.name for file in files] == [f"train-{k:05d}-of-{len(files):05d}.parquet" for k in range(len(files))]
    assert max(rows) < 150
    assert mix(tmp_path / "many").equals(mix(tmp_path / "one"))
    listed = {f["path"]: f.get("rows") for f in json.loads((tmp_path / "many" / "manifest.json").read_text())["files"]}
    assert [listed[f"mix/{file.name}"] for file in files] == rows


def test_keys_fall_into_files_in_order_and_evenly() -> None:
    keys = np.sort(np.random.default_rng(1).integers(0, 1 << 64, 100_000, np.uint64))
    keys[0], keys[-1] = 0, (1 << 64) - 1
    for files in (1, 7, 1000):
        found = file_of(keys, files)
        assert (np.diff(found) >= 0).all()
        counts = np.bincount(found, minlength=files)
        assert counts.size == files
        assert abs(counts - 100_000 / files).max() < 6 * (100_000 / files) ** 0.5 + 1


def test_the_validation_rows_are_those_of_the_lowest_hashes(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=120), tmp_path / "out"
    loaded = recipe(data, "instruct.validation=25", "balance.epochs=2", "balance.budget=1_000_000")
    run(loaded, out)
    held = pl.read_parquet(next((out / "mix" / "validation").glob("*.parquet")))
    chosen = set(held.select("source", "shard", "row").rows())
    assert len(chosen) == 25
    assert held.height == 50  # two directions, once each, although rows of the mix are there twice
    parts = pl.concat([pl.read_parquet(file) for file in (out / "parts" / "pass1").rglob("en-de.parquet")])
    parts = parts.with_columns(pl.Series("hash", validation_hashes(parts["key"].to_numpy(), loaded.seed)))
    kept = pl.concat([mix(out), held]).select("source", "shard", "row").unique()
    lowest = parts.join(kept, on=["source", "shard", "row"]).sort("hash").head(25)
    assert set(lowest.select("source", "shard", "row").rows()) == chosen


@pytest.mark.parametrize("text", ["all", "judged", "none"])
def test_rejects_hold_the_text_that_was_asked_for(bitext: Corpus, tmp_path: Path, text: str) -> None:
    data, out = bitext(rows=120), tmp_path / "out"
    run(recipe(data, f"rejects.text={text}", "balance.budget=5000"), out)
    lost = rejects(out)
    assert {"dedup.exact", "balance.quota", "clean.template_tokens"} <= set(lost["reason"])
    english = (data / "opus/supervised/de-en/opus.de-en-train.en").read_text(encoding="utf-8").split("\n")
    silent = {"all": (), "judged": ("dedup.exact", "quality.not_needed", "balance.quota"), "none": None}[text]
    for source, row, reason, src in lost.select("source", "row", "reason", "src").iter_rows():
        if silent is None or reason in silent:
            assert src is None, reason
        elif source == "opus100":
            assert src == english[row] or reason == "clean.empty"


def test_a_file_of_the_mix_that_was_lost_is_written_again(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=60), tmp_path / "out"
    run(recipe(data), out)
    before = digests(out)
    next((out / "mix").glob("*.parquet")).unlink()
    result = run(recipe(data), out)
    assert result.made["render"] > 0
    assert digests(out) == before


def test_the_card_says_what_the_mix_holds(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=60), tmp_path / "out"
    run(recipe(data, "name=trial", "instruct.validation=5"), out)
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    card = (out / "mix" / "README.md").read_text(encoding="utf-8")
    assert "trial" in card
    assert f"{manifest['mix']['examples'] - manifest['mix']['validation']:,}" in card
    assert "validation" in card


def test_settings_of_the_training_do_not_write_the_mix_again(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=60), tmp_path / "out"
    for override in ([], ["train.model=some/model"], ["train.model=other/model"]):
        result = run(recipe(data, *override), out)
        made = redone(result)
        assert made if not override else not made
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest == result.manifest
        assert manifest["recipe"] == recipe(data, *override).model_dump(mode="json")


def test_what_a_killed_worker_left_is_no_part_of_the_output(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corpusprep.steps import finish

    data, out = bitext(rows=60), tmp_path / "out"
    run(recipe(data), tmp_path / "whole")
    gather = finish.gather

    def leaving(task: finish.MixTask) -> finish.MixFile:
        folder = Path(task.output).parent
        for name in (f"{task.output}.7-abcd.tmp", folder.parent / "rejects" / "x.parquet.7-abcd.tmp"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(b"half")
        return gather(task)

    monkeypatch.setattr(finish, "gather", leaving)
    run(recipe(data), out, workers=1)
    assert digests(out) == digests(tmp_path / "whole")
    assert ".tmp" not in (out / "manifest.json").read_text()


def test_a_file_of_the_mix_is_gathered_from_more_files_than_may_be_open(tmp_path: Path) -> None:
    batch = pa.record_batch({"text": ["a", "b"]})
    for number in range(100):
        with ipc.new_file(str(tmp_path / f"{number}.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
            writer.write_batch(batch.slice(1))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, before[1]))
    try:
        tables = [finish._read_batch(str(tmp_path / f"{number}.arrow"), 1) for number in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert pa.concat_tables(tables)["text"].to_pylist() == ["b"] * 100


def test_columns_of_a_users_stage_may_change_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "changes_types.py").write_text(
        "import pyarrow as pa\n"
        "def change(table, options):\n"
        "    first = table['shard'][0].as_py().startswith('a')\n"
        "    table = table.append_column('extra', pa.array([1] * len(table), pa.int64() if first else pa.float64()))\n"
        "    kind = pa.large_string() if first else pa.string()\n"
        "    for name in ('src', 'tgt'):\n"
        "        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))\n"
        "    return table, table.slice(0, 0).append_column('reason', [[]])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in "ab":
        rows = [
            f"Ship {name}{n} left the port at noon.\tSchiff {name}{n} verließ den Hafen am Mittag." for n in range(60)
        ]
        (tmp_path / f"{name}.en-de.tsv").write_text("".join(f"{row}\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(
        f'[[source]]\nformat = "tsv"\npath = "{tmp_path}/*.tsv"\n[dedup]\nenabled = false\n[quality]\nenabled = false\n'
        '[[stage]]\nfunction = "changes_types:change"\nafter = "clean"\n'
    )
    run(load_recipe(tmp_path / "recipe.toml"), tmp_path / "out", workers=1)
    assert mix(tmp_path / "out").select("source", "shard", "row").unique().height == 120


def test_small_pieces_and_compressed_examples_give_the_same_bytes(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[RenderTask] = []

    def kept(*arguments: Any) -> RenderTask:
        tasks.append(RenderTask(*arguments))
        return tasks[-1]

    monkeypatch.setattr(finish, "RenderTask", kept)
    settings = recipe(bitext(), "instruct.shard_rows=300", "instruct.validation=25", "instruct.system='Translate.'")
    run(settings, tmp_path / "one", workers=1)
    assert not any(task.compressed for task in tasks)
    tasks.clear()
    monkeypatch.setattr(finish, "_PLAIN", 0)
    for function, limit in ((instruct_text.slices, 5000), (Examples.rendered, 4000)):
        monkeypatch.setattr(function, "__defaults__", (limit,))
    run(settings, tmp_path / "other", workers=1)
    assert tasks
    assert all(task.compressed for task in tasks)
    assert digests(tmp_path / "other") == digests(tmp_path / "one")


def test_examples_of_equal_keys_are_sorted_by_their_provenance(tmp_path: Path) -> None:
    n = 40
    rows = {"src": [f"bread {k}" for k in range(n)], "tgt": [f"Brot {k}" for k in range(n)], "src_lang": ["en"] * n,
            "tgt_lang": ["de"] * n, "source": ["one", "two"] * (n // 2), "shard": ["a"] * n, "row": list(range(n))}  # fmt: skip
    table = render(pa.table(rows), InstructSettings(), 1)
    table = table.set_column(table.column_names.index("key"), "key", pa.array([7] * 2 * n, pa.uint64()))
    table = table.take(np.random.default_rng(1).permutation(2 * n))
    with ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        for start in (0, 50):
            writer.write_table(table.slice(start, 50).combine_chunks())
    pieces = ((str(tmp_path / "a.arrow"), 0), (str(tmp_path / "a.arrow"), 1))
    task = finish.MixTask(
        "mix",
        pieces,
        str(tmp_path / "out.parquet"),
        str(tmp_path / "done.json"),
        load_recipe(None, sources=["tsv=a.tsv"]),
    )
    assert finish.gather(task).rows == 2 * n
    found = pq.read_table(task.output).select(["source", "shard", "row", "direction"]).to_pylist()
    assert found == sorted(found, key=lambda row: tuple(row.values()))
