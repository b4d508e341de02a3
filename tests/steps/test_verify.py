"""Trust: a sample of every run is computed again with the reference packages, and a value that differs stops the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpusprep import Recipe, RunError, load_recipe, run
from corpusprep.stages.dedup import DedupSettings, compare_with_reference, fingerprint
from corpusprep.stages.langid import compare_with_reference as compare_languages
from corpusprep.stages.langid import langid

Corpus = Callable[..., Path]


def recipe(data: Path, *overrides: str) -> Recipe:
    return load_recipe(
        None, sources=[f"opus100={data / 'opus'}", f"nllb={data / 'nllb'}"], overrides=["quality.enabled=false", *overrides]
    )  # fmt: skip


def tamper(out: Path, column: str, change: Callable[[np.ndarray], object]) -> None:
    """Changes a column of every part of the first pass, as a fault of a kernel would have."""
    paths = sorted((out / "parts" / "pass1").rglob("??-??.parquet"))
    assert paths
    for path in paths:
        table = pq.read_table(path)
        at = table.schema.get_field_index(column)
        new = pa.array(change(table[column].to_numpy(zero_copy_only=False)), table.schema.field(at).type)
        pq.write_table(table.set_column(at, column, new), path)


def test_the_agreement_is_in_the_manifest(bitext: Corpus, tmp_path: Path) -> None:
    result = run(recipe(bitext(), "verify=100"), tmp_path / "out")
    found = json.loads((tmp_path / "out/manifest.json").read_text())["verified"]
    assert found == result.verified
    assert found["langid"]["reference"].startswith("fasttext-predict ")
    assert found["dedup"]["reference"].startswith("simhash ")
    for stage in found.values():
        assert stage["agree"] == stage["compared"]
        assert stage["of"] == "stored"
        assert 90 <= stage["rows"] <= 110
    assert found["langid"]["compared"] == 2 * found["langid"]["rows"]
    assert 0 < found["langid"]["largest_difference"] <= 1e-5
    assert found["dedup"]["largest_difference"] == 0


@pytest.mark.parametrize(
    ("column", "change", "stage"),
    [
        ("fingerprint", lambda values: values ^ np.uint64(1 << 7), "dedup"),
        ("tgt_lid_prob", lambda values: values - np.float32(1e-3), "langid"),
        ("src_lid", lambda values: ["xx"] * len(values), "langid"),
    ],
)
def test_a_value_that_differs_stops_the_run_and_is_named(
    bitext: Corpus, tmp_path: Path, column: str, change: Callable[[np.ndarray], object], stage: str
) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data, "verify=0"), out, until="langid")
    tamper(out, column, change)
    with pytest.raises(RunError, match=rf"^{stage}: \d+ of \d+ values .* row \d+: .* is right") as caught:
        run(recipe(data), out)
    assert "verify = 0" in str(caught.value)
    assert not (out / "manifest.json").exists()
    with pytest.raises(RunError, match=stage):  # nor does a second run take it for good
        run(recipe(data), out)
    assert run(recipe(data, "verify=0"), out).verified == {}


def test_the_rows_that_langid_dropped_are_verified_too(bitext: Corpus, tmp_path: Path) -> None:
    """With thresholds that drop every row there is nothing else to verify."""
    result = run(recipe(bitext(), "langid.reject_below=1.0", "langid.evidence=0.0"), tmp_path / "out")
    assert result.accounts.kept() == 0
    assert result.verified["langid"]["rows"] > 100
    assert "dedup" not in result.verified


def test_nothing_to_verify(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=20, shards=0)
    loaded = load_recipe(
        None, sources=[f"opus100={data / 'opus'}"], overrides=["clean.min_chars=4000", "clean.max_chars=5000"]
    )
    result = run(loaded, tmp_path / "out")
    assert result.accounts.kept() == 0
    assert result.verified == {}


def test_a_stage_of_the_users_own_may_change_the_text(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_too.py").write_text(
        "def shout(table, options):\n"
        "    import pyarrow.compute as pc\n"
        "    at = table.schema.get_field_index('src')\n"
        "    table = table.set_column(at, 'src', pc.utf8_reverse(table['src']))\n"
        "    return table, table.slice(0, 0).append_column('reason', [[]])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = bitext(rows=120, shards=0)
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[[source]]\nformat = "opus100"\npath = "{data / "opus"}"\n[[stage]]\nfunction = "mine_too:shout"\n'
        "[quality]\nenabled = false\n"
    )
    result = run(load_recipe(path), tmp_path / "out")
    assert result.verified["langid"]["rows"] > 80
    assert result.verified["langid"]["of"] == "recomputed"
    assert result.verified["dedup"]["rows"] > 80


def test_the_comparison_of_single_tables() -> None:
    """Odd text, and each kind of disagreement."""
    texts = [
        "Der Hund bellt laut in der Nacht.",
        "",
        "?!",
        "ALL OF THIS IS IN CAPITALS",
        "line\nbreak here",
        "x" * 5000,
    ]
    table = pa.table({"src": texts, "tgt": texts[::-1], "src_lang": ["de"] * 6, "tgt_lang": ["en"] * 6})
    kept, dropped = langid(table)
    both = pa.concat_tables([kept, dropped], promote_options="default")
    found = compare_languages(both)
    assert found.compared == 12
    assert found.disagreements == []
    wrong = both.set_column(both.schema.get_field_index("src_lid"), "src_lid", pa.array([None] * 6, pa.string()))
    assert len(compare_languages(wrong).disagreements) == sum(
        label is not None for label in both["src_lid"].to_pylist()
    )

    settings = DedupSettings()
    table = fingerprint(table, settings)
    assert compare_with_reference(table, settings).disagreements == []
    flipped = pa.array(table["fingerprint"].to_numpy() ^ np.uint64(0b101))
    table = table.set_column(table.schema.get_field_index("fingerprint"), "fingerprint", flipped)
    found = compare_with_reference(table, settings)
    assert len(found.disagreements) == 6
    assert found.largest_difference == 2


def test_parts_made_anew_are_verified_anew(bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the same key, as after an installation that has gone wrong."""
    data, out = bitext(), tmp_path / "out"
    run(recipe(data), out)

    def wrong(table: pa.Table, settings: DedupSettings) -> pa.Table:
        table = fingerprint(table, settings)
        flipped = pa.array(table["fingerprint"].to_numpy() ^ np.uint64(1))
        return table.set_column(table.schema.get_field_index("fingerprint"), "fingerprint", flipped)

    monkeypatch.setattr("corpusprep.stages.dedup.rows.fingerprint", wrong)
    with pytest.raises(RunError, match="dedup"):
        run(recipe(data), out, redo="clean")


def test_every_pair_is_verified_and_no_column_of_the_users_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adds_a_column.py").write_text(
        "import pyarrow as pa\n"
        "def add(table, options):\n"
        "    kind = pa.int64() if table['shard'][0].as_py().startswith('a') else pa.float64()\n"
        "    table = table.append_column('extra', pa.array([1] * len(table), kind))\n"
        "    return table, table.slice(0, 0).append_column('reason', [[]])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    english = [f"The ship left port {n} at noon and came back by night." for n in range(3000)]
    german = [f"Das Schiff verließ Hafen {n} am Mittag und kam nachts zurück." for n in range(3000)]
    for name in "ab":
        rows = [
            {"src": e, "tgt": d, "src_lang": "en", "tgt_lang": "de" if n % 1000 else "fr"}
            for n, (e, d) in enumerate(zip(english, german, strict=True))
        ]  # three rows of each file are filed under a language that they are not in
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'verify = 200\n[[source]]\nformat = "jsonl"\npath = "{tmp_path}/*.jsonl"\n'
        '[[stage]]\nfunction = "adds_a_column:add"\nafter = "clean"\n[quality]\nenabled = false\n'
    )
    found = run(load_recipe(path), tmp_path / "out").verified
    assert found["langid"]["rows_by_pair"]["en-fr"] == 6  # all were dropped
    assert found["langid"]["rows_by_pair"]["en-de"] >= 90
    assert found["dedup"]["rows_by_pair"].keys() == {"en-de"}


def test_long_rows_make_the_sample_smaller(bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpusprep.steps.verify._BYTES", 2_000)
    found = run(recipe(bitext(), "verify=500"), tmp_path / "out").verified
    assert 1 <= found["dedup"]["rows"] < 50


def test_verify_is_not_redone(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data), out)
    path = next((out / "parts/verify").iterdir())
    before = os.stat(path).st_mtime_ns
    again = run(recipe(data), out)
    assert os.stat(path).st_mtime_ns == before
    assert again.verified == json.loads(path.read_text())
