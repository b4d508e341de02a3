"""Sources on real bitext in its real layouts; skipped where it is not."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
from reading import read, source, texts

from corpusprep.sources.texts import read_texts


def test_planted_rows_are_all_read(data: Path) -> None:
    planted = data / "planted"
    with gzip.open(planted / "truth.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        truth = [line.split("\t") for line in file.read().splitlines()[1:]]
    expected = Counter((file, pair) for file, _, pair, *_ in truth)
    last = {file: max(int(row) for name, row, *_ in truth if name == file) for file, _ in expected}
    found: Counter[tuple[str, str]] = Counter()
    for format, folder in (("opus100", "opus-100-corpus"), ("nllb", "nllb"), ("nllb", "ccmatrix")):
        of = source(format, planted / folder)
        for shard in of.shards():
            assert shard.pair is not None
            reading = read(of, [shard])
            assert not reading.rejects
            assert not reading.problems
            name = f"{folder}/{shard.shard}"
            found[name, "-".join(shard.pair)] += len(reading.rows)
            assert reading.rows[-1]["row"] == last[name]
            assert all((row["score"] is not None) == (format == "nllb") for row in reading.rows)
    assert found == expected


def test_tatoeba_and_lafand(data: Path) -> None:
    of = source("tsv", data / "bitext" / "lafand_train", pairs=["en-swh_Latn", "fra-wol"])
    assert of.missing() == []
    counts = Counter((row["src_lang"], row["tgt_lang"]) for row in read(of).rows)
    assert counts["en", "sw"] == 30_782
    assert set(counts) == {("en", "sw"), ("fr", "wo")}
    assert len(source("tsv", data / "bitext" / "tatoeba_test_v2021-08-07").shards()) == 25


def test_opus_zips(data: Path) -> None:
    of = source("moses", data / "raw" / "opus_moses_zip")
    assert sorted({shard.pair for shard in of.shards()}) == [("en", "fr"), ("en", "ru"), ("en", "zh")]
    reading = read(of)
    assert len(reading.rows) > 10_000
    assert not reading.rejects


def test_nine_columns_as_published(data: Path) -> None:
    reading = read(source("nllb", data / "raw" / "nllb_mined_sample" / "eng_Latn-zsm_Latn.raw9col.tsv"))
    assert [(row["src_lang"], row["tgt_lang"], row["score"]) for row in reading.rows] == [
        ("en", "ms", pytest.approx(1.07))
    ]


def test_human_judgements_without_quoting(data: Path) -> None:
    path = data / "qe" / "qe_mlqe-pe_dev" / "en-de.tsv.gz"
    with gzip.open(path, "rb") as file:
        lines = file.read().count(b"\n")
    reading = read(source("tsv", path, columns={"src": 0, "tgt": 1, "score": 2}))
    assert len(reading.rows) + len(reading.rejects) in (lines, lines - 1)
    assert len(texts(reading)) > 900


def test_evaluation_folder(data: Path) -> None:
    found = read_texts([str(data / "planted" / "evaluation")])
    assert len(found) == 15
    assert all(isinstance(each, tuple) and len(each[0]) == len(each[1]) == 1997 for each in found)
