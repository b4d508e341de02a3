"""NLLB and tsv: tab-separated lines."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from reading import read, reasons, source, texts

from corpusprep.errors import InputError
from corpusprep.sources.delimited import numbers

REST = "0.9\t0.8\tcc\thttp://a\tcc\thttp://b"


def nine(*rows: tuple[str, str, str]) -> str:
    return "".join(f"{src}\t{tgt}\t{score}\t{REST}\n" for src, tgt, score in rows)


def three(*rows: tuple[str, str, str]) -> str:
    return "".join(f"{score}\t{src}\t{tgt}\n" for src, tgt, score in rows)


def save(path: Path, text: str | bytes) -> Path:
    raw = text if isinstance(text, bytes) else text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("layout", [nine, three])
@pytest.mark.parametrize("name", ["eng_Latn-swh_Latn.gz", "en-sw.bitextf.tsv.gz", "en-sw.tsv", "eng-swh"])
def test_nllb_layouts(tmp_path: Path, layout: object, name: str) -> None:
    rows = [("one", "moja", "1.25"), ("two", "mbili", ""), ("three", "tatu", "1e-1"), ("1.5", "2.5", "-.5")]
    path = save(tmp_path / name, layout(*rows))  # type: ignore[operator]
    for where in (path, tmp_path):
        of = source("nllb", where)
        assert [(shard.shard, shard.pair) for shard in of.shards()] == [(name, ("en", "sw"))]
        reading = read(of)
        assert texts(reading) == [row[:2] for row in rows]
        assert [row["score"] for row in reading.rows] == [1.25, None, pytest.approx(0.1), -0.5]
        assert reading.rejects == []


def test_nllb_column_order_is_the_names(tmp_path: Path) -> None:
    save(tmp_path / "ben_Beng-eng_Latn.gz", nine(("এক", "one", "1.0")))
    save(tmp_path / "de-fr.bitextf.tsv.gz", three(("eins", "un", "1.0")))
    reading = read(source("nllb", tmp_path))
    assert texts(reading) == [("one", "এক"), ("eins", "un")]
    assert [(row["src_lang"], row["tgt_lang"]) for row in reading.rows] == [("en", "bn"), ("de", "fr")]
    assert texts(read(source("nllb", tmp_path, pairs=["fr-de"]))) == [("eins", "un")]


def test_nllb_bad_lines(tmp_path: Path) -> None:
    good = nine(("a", "b", "1.0")).encode()
    lines = [
        good,
        b"only\ttwo\n",
        good.replace(b"a\t", b"\xe9\t", 1),
        good.replace(b"b\t", b"b\0\t", 1),
        good.replace(b"1.0", b"high"),
        b"\n",
        good.replace(b"\n", b"\tten\n"),
        good,
    ]
    reading = read(source("nllb", save(tmp_path / "en-sw.gz", b"".join(lines))), max_rows=3)
    assert [row["row"] for row in reading.rows] == [0, 7]
    assert reasons(reading) == [
        (1, "read.columns"),
        (2, "read.encoding"),
        (3, "read.nul"),
        (4, "read.score"),
        (5, "read.columns"),
        (6, "read.columns"),
    ]
    assert reading.rejects[0]["src"] == "only\ttwo"
    assert reading.rejects[0]["tgt"] is None
    assert (reading.rejects[1]["src"], reading.rejects[1]["tgt"]) == ("\ufffd", "b")
    assert {(row["src_lang"], row["tgt_lang"]) for row in reading.rejects} == {("en", "sw")}


def test_nllb_layout_is_told_by_most_lines(tmp_path: Path) -> None:
    text = "stray line\n" + three(("a", "b", "1.0")) + nine(("a", "b", "1.0"), ("c", "d", "1.1"))
    reading = read(source("nllb", save(tmp_path / "en-sw.gz", text)))
    assert [row["row"] for row in reading.rows] == [2, 3]
    assert reasons(reading) == [(0, "read.columns"), (1, "read.columns")]
    nothing = read(source("nllb", save(tmp_path / "en-fr.gz", "a\tb\n"), pairs=["en-fr"]))
    assert reasons(nothing) == [(0, "read.columns")]
    assert "no line at its head has the nine columns" in nothing.problems[0]


def test_nllb_reject_of_a_swapped_file_keeps_the_line_in_src(tmp_path: Path) -> None:
    reading = read(source("nllb", save(tmp_path / "de-en.gz", nine(("eins", "one", "1")) + "broken\n")))
    assert (reading.rejects[0]["src"], reading.rejects[0]["tgt"]) == ("broken", None)


def test_nllb_name_without_languages(tmp_path: Path) -> None:
    path = save(tmp_path / "mined.gz", nine(("a", "b", "1")))
    with pytest.raises(InputError, match="its name does not tell its languages"):
        source("nllb", path).shards()
    assert read(source("nllb", path, src_lang="eng", tgt_lang="swh_Latn")).rows[0]["tgt_lang"] == "sw"


def test_nllb_wild_columns_survive(tmp_path: Path) -> None:
    """Tabs near the edges of the blocks that are scanned at once."""
    rows = [("s" * k, "t" * (97 - k), "1.5") for k in range(98)]
    assert texts(read(source("nllb", save(tmp_path / "en-sw.gz", nine(*rows))))) == [row[:2] for row in rows]


def test_tsv_languages_from_the_name(tmp_path: Path) -> None:
    save(tmp_path / "en-swa.tsv.gz", "one\tmoja\n")
    save(tmp_path / "ntrex128.ar-en.tsv", "واحد\tone\r\n")
    save(tmp_path / "de-en" / "part.txt", "eins\tone\n")
    save(tmp_path / "README.txt", "hello\n")
    reading = read(source("tsv", tmp_path))
    assert {row["shard"]: (row["src"], row["tgt"], row["tgt_lang"]) for row in reading.rows} == {
        "en-swa.tsv.gz": ("one", "moja", "sw"),
        "ntrex128.ar-en.tsv": ("one\r", "واحد", "ar"),
        "de-en/part.txt": ("one", "eins", "de"),
    }


def test_tsv_languages_from_settings(tmp_path: Path) -> None:
    path = save(tmp_path / "data.tsv", 'say "hi\tsema "jambo\n')
    with pytest.raises(InputError, match="nothing tells its languages"):
        source("tsv", path).shards()
    assert texts(read(source("tsv", path, src_lang="sw", tgt_lang="en"))) == [('sema "jambo', 'say "hi')]


def test_tsv_columns_by_number(tmp_path: Path) -> None:
    path = save(tmp_path / "en-sw.tsv", "1\ten a\t0.5\tsw a\n2\ten b\t\tsw b\n3\tshort\n")
    reading = read(source("tsv", path, columns={"src": 1, "tgt": 3, "score": 2}))
    assert texts(reading) == [("en a", "sw a"), ("en b", "sw b")]
    assert [row["score"] for row in reading.rows] == [0.5, None]
    assert reasons(reading) == [(2, "read.columns")]


def test_tsv_header(tmp_path: Path) -> None:
    path = save(
        tmp_path / "x.tsv",
        "\ufeffid\tsrc\ttgt\tsrc_lang\ttgt_lang\n7\tone\tmoja\teng\tswh_Latn\n8\teins\tone\tde\ten\n",
    )
    of = source("tsv", path)
    assert of.shards()[0].pair is None
    reading = read(of)
    assert [tuple(row[k] for k in ("src", "tgt", "src_lang", "tgt_lang", "row")) for row in reading.rows] == [
        ("one", "moja", "en", "sw", 1),
        ("one", "eins", "en", "de", 2),
    ]
    assert len(read(source("tsv", path, limit=1)).rows) == 1
    with pytest.raises(InputError, match=r"names no column 'german'; it names 'id', 'src'"):
        read(source("tsv", path, columns={"src": "german"}))


def test_tsv_rows_name_their_languages(tmp_path: Path) -> None:
    rows = ["en\tsw\tone\tmoja", "deu\teng_Latn\teins\tone", "en\tklingon\ta\tb", "\tsw\ta\tb", "fr\ten\tun\tone", "en"]
    path = save(tmp_path / "x.tsv", "\n".join(rows))
    columns = {"src_lang": 0, "tgt_lang": 1, "src": 2, "tgt": 3}
    reading = read(source("tsv", path, columns=columns))
    assert texts(reading) == [("one", "moja"), ("one", "eins"), ("one", "un")]
    assert reasons(reading) == [(2, "read.language"), (3, "read.language"), (5, "read.columns")]
    of = source("tsv", path, columns=columns, pairs=["en-de", "en-cs"])
    assert of.missing() == []  # only reading could tell
    assert [(row["row"], row["tgt_lang"]) for row in read(of).rows] == [(1, "de")]


def test_numbers_are_python_floats() -> None:
    fields = ["1.25", "0.1", "-3", "+7.", ".5", "123456789012345", "1234567890.1234567", "1e-5", "2E3", "0.30000001"]
    odd = ["", "nan", "NaN", "abc", "1_0", "inf", "1e999", "1.2.3", "--1", ".", "١"]
    raw = [field.encode() for field in fields + odd]
    data = np.frombuffer(b"".join(raw), np.uint8)
    ends = np.cumsum([len(field) for field in raw])
    values, state = numbers(data, ends - [len(field) for field in raw], ends)
    assert state.tolist() == [0] * len(fields) + [1, 1, 1] + [2] * 8
    assert values[: len(fields)].tolist() == [float(np.float32(float(field))) for field in fields]
