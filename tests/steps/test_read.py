"""The step read: evaluation text, a user's own stage, damaged shards, and rows that name their languages."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from runs import digests, mix, recipe, redone, rejects

from corpusprep import CorpusprepError, InputError, RunError, load_recipe, run

Corpus = Callable[..., Path]
OFF = [f"{stage}.enabled=false" for stage in ("clean", "langid", "dedup", "quality")]


def test_changed_evaluation_text_is_noticed(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    pairs = (data / "opus/supervised/de-en/opus.de-en-train.en").read_text(encoding="utf-8").split("\n")
    against = tmp_path / "evaluation.txt"
    against.write_text("Nothing of this sentence is anywhere in the corpus, I hope.\n")
    loaded = recipe(data, f"dedup.against=['{against}']")
    run(loaded, out)
    assert "dedup.evaluation" not in rejects(out)["reason"].to_list()
    stamp = against.stat()
    against.write_text(f"{pairs[30]}\n")
    os.utime(against, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    changed = run(loaded, out)
    assert redone(changed)["pass1"] == 3
    leaks = rejects(out).filter(pl.col("reason") == "dedup.evaluation")
    assert (30, "opus100") in leaks.select("row", "source").rows()
    run(loaded, tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


def test_dev_and_test_files_are_protected_unless_switched_off(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(shards=0)
    folder = data / "opus/supervised/de-en"
    for code in ("en", "de"):
        lines = (folder / f"opus.de-en-train.{code}").read_text(encoding="utf-8").split("\n")
        (folder / f"opus.de-en-test.{code}").write_text(f"{lines[40]}\n", encoding="utf-8")
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"])
    run(loaded, tmp_path / "on")
    assert 40 in rejects(tmp_path / "on").filter(pl.col("reason") == "dedup.evaluation")["row"].to_list()
    off = load_recipe(None, sources=[f"opus100={data / 'opus'}"], overrides=["source.0.protect=false"])
    run(off, tmp_path / "off")
    assert "dedup.evaluation" not in rejects(tmp_path / "off")["reason"].to_list()


def test_reading_dev_does_not_protect_against_train(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=60, shards=0)
    folder = data / "opus/supervised/de-en"
    for code in ("en", "de"):
        lines = (folder / f"opus.de-en-train.{code}").read_text(encoding="utf-8").split("\n")
        (folder / f"opus.de-en-dev.{code}").write_text("\n".join(lines[20:50]) + "\n", encoding="utf-8")
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"], overrides=["source.0.splits=['dev']"])
    run(loaded, tmp_path / "out")
    assert "dedup.evaluation" not in rejects(tmp_path / "out")["reason"].to_list()
    assert mix(tmp_path / "out").height > 40


def test_damaged_evaluation_text_stops_the_run(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=60, shards=0)
    folder = data / "opus/supervised/de-en"
    (folder / "opus.de-en-test.en").write_bytes(b"fine\n\xff\xfe\n")
    (folder / "opus.de-en-test.de").write_bytes(b"gut\nschlecht\n")
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"], overrides=["source.0.on_error=keep"])
    with pytest.raises(InputError, match="protect = false"):
        run(loaded, tmp_path / "out")


def test_a_damaged_file_stops_the_run_or_is_kept(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    file = data / "nllb" / "deu_Latn-eng_Latn.gz"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"deu_Latn-eng_Latn\.gz"):
        run(recipe(data), out)
    kept = run(recipe(data, "source.1.on_error=keep"), out)
    assert any("deu_Latn-eng_Latn.gz" in note for note in kept.notes)
    assert kept.manifest is not None
    assert kept.manifest["notes"] == kept.notes


def test_other_pairs_of_rows_that_name_their_own_languages(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"src": f"line {i}", "tgt": f"zeile {i}", "src_lang": "en", "tgt_lang": ("de", "nl")[i % 2]} for i in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    for pairs, count in (("['en-de', 'en-nl']", 20), ("['en-de']", 10), ("['nl-en', 'de-en']", 20)):
        loaded = load_recipe(None, sources=[f"jsonl={file}"], overrides=[*OFF, f"source.0.pairs={pairs}"])
        assert run(loaded, out).accounts.kept() == count


def test_users_stage_and_its_mistakes(bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mystages.py").write_text(
        "import pyarrow.compute as pc, pyarrow as pa\n"
        "def no_bread(table, options):\n"
        "    bad = pc.match_substring(table['src'], options['word'])\n"
        "    lost = table.filter(bad)\n"
        "    return table.filter(pc.invert(bad)), lost.append_column('reason', pa.repeat('word', lost.num_rows))\n"
        "def loses_rows(table, options):\n"
        "    return table.slice(0, 1), table.slice(0, 0).append_column('reason', pa.array([], pa.string()))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = bitext()
    stage = "stage=[{function='mystages:no_bread', after='clean', options={word='bread'}}]"
    run(recipe(data, stage), tmp_path / "out")
    lost = rejects(tmp_path / "out").filter(pl.col("stage") == "no_bread")
    assert lost.height > 50
    assert set(lost["reason"]) == {"no_bread.word"}
    with pytest.raises(RunError, match="Each row must be in one of the two"):
        run(recipe(data, "stage=[{function='mystages:loses_rows'}]"), tmp_path / "bad")
    with pytest.raises(CorpusprepError, match="cannot be imported"):
        run(recipe(data, "stage=[{function='mystages:missing'}]"), tmp_path / "bad")


def test_a_changed_line_of_a_users_function_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "changing.py"
    body = "def keep(table, options):\n    n = {n}\n    import pyarrow as pa\n    lost = table.slice(n)\n    return table.slice(0, n), lost.append_column('reason', pa.repeat('late', lost.num_rows))\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "x.en-de.tsv"
    file.write_text("".join(f"line {i}\tzeile {i}\n" for i in range(20)))
    for n in (5, 8):
        module.write_text(body.replace("{n}", str(n)))
        sys.modules.pop("changing", None)
        loaded = load_recipe(None, sources=[f"tsv={file}"], overrides=[*OFF, "stage=[{function='changing:keep'}]"])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        assert run(loaded, tmp_path / "out").accounts.kept() == n


def test_a_users_stage_may_not_double_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubling.py").write_text(
        "import pyarrow as pa\ndef first(table, options):\n"
        "    none = table.slice(0, 0).append_column('reason', pa.array([], pa.string()))\n"
        "    return table.take([0] * table.num_rows), none\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "x.en-de.tsv"
    file.write_text("one\teins\ntwo\tzwei\n")
    loaded = load_recipe(None, sources=[f"tsv={file}"], overrides=[*OFF, "stage=[{function='doubling:first'}]"])
    with pytest.raises(RunError, match="not those it was given"):
        run(loaded, tmp_path / "out")


def test_nobody_reads_on_after_a_failure(bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RunError("failed")

    data = bitext(shards=4)
    monkeypatch.setattr("corpusprep.steps.read.run_batch", failing)
    with pytest.raises(RunError, match="failed"):
        run(recipe(data), tmp_path / "out", workers=1)
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
