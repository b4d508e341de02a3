"""Whole tables: all columns of a file, in its order, and its sides as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read, reasons, source, texts

from corpusprep.errors import InputError
from corpusprep.sources import RawBatch, SourceSettings, open_source


def batches(format: str, path: Path, max_rows: int = 65_536, **settings: Any) -> list[RawBatch]:
    whole = open_source(SourceSettings(format=format, path=str(path), **settings), whole=True)  # type: ignore[arg-type]
    found = [batch for shard in whole.shards() for batch in whole.read(shard, max_rows=max_rows)]
    for batch in found:
        batch.table.validate(full=True)
    return found


def whole(format: str, path: Path, **options: Any) -> pa.Table:
    tables = [batch.table for batch in batches(format, path, **options)]
    for name in ("id", "fingerprint"):  # Arrow would make int64 of them where one batch has small values only
        tables = [
            table.set_column(table.column_names.index(name), name, table[name].cast(pa.uint64()))
            if name in table.column_names and pa.types.is_integer(table.schema.field(name).type)
            else table
            for table in tables
        ]
    return pa.concat_tables(tables, promote_options="permissive")


def test_four_columns_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("one\tmoja\teng_Latn\tswh\neins\tone\tde\ten\nun\tone\tfr\tklingon\n")
    reading = read(source("tsv", tmp_path / "x.tsv"))
    assert [(row["src"], row["tgt"], row["tgt_lang"]) for row in reading.rows] == [
        ("one", "moja", "sw"),
        ("one", "eins", "de"),
    ]
    assert reasons(reading) == [(2, "read.language")]
    table = whole("tsv", tmp_path / "x.tsv")
    assert table.column_names == ["src", "tgt", "src_lang", "tgt_lang"]
    assert table["src"].to_pylist() == ["one", "eins"]
    assert table["src_lang"].to_pylist() == ["en", "de"]
    (tmp_path / "en-sw.tsv").write_text("one\tmoja\ten\tde\n")
    assert [row["tgt_lang"] for row in read(source("tsv", tmp_path / "en-sw.tsv")).rows] == ["sw"], (
        "the name goes first"
    )
    for text in ("one\tmoja\ten\tnothing\n", "one\tmoja\ten\tsw\tmore\n", "one\tmoja\ten\n"):
        (tmp_path / "x.tsv").write_text(text)
        with pytest.raises(InputError, match="nothing tells its languages"):
            read(source("tsv", tmp_path / "x.tsv"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.tsv").write_text("one\tmoja\ten\tsw\n")
    with pytest.raises(InputError, match="no tsv files are here"):
        read(source("tsv", tmp_path / "folder"))


def test_sides_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "de-en.tsv").write_text("eins\tone\n")
    (tmp_path / "de-en.jsonl").write_text('{"src": "eins", "tgt": "one"}\n')
    (tmp_path / "x.json").write_text('{"translation": {"de": "eins", "en": "one"}, "id": 1}\n')
    pq.write_table(pa.table({"src": ["eins"], "tgt": ["one"]}), tmp_path / "de-en.parquet")
    pq.write_table(pa.table({"id": [1], "translation": [{"de": "eins", "en": "one"}]}), tmp_path / "x.parquet")
    (tmp_path / "de-en").write_text("eins\tone\t1.1\ta\tb\tc\td\te\tf\n")
    for format, name in (
        ("tsv", "de-en.tsv"), ("jsonl", "de-en.jsonl"), ("jsonl", "x.json"), ("parquet", "de-en.parquet"),
        ("parquet", "x.parquet"), ("nllb", "de-en"),
    ):  # fmt: skip
        assert texts(read(source(format, tmp_path / name))) == [("one", "eins")]
        (row,) = whole(format, tmp_path / name).to_pylist()
        assert (row["src"], row["tgt"], row["src_lang"], row["tgt_lang"]) == ("eins", "one", "de", "en"), name
        assert "translation" not in row
    (tmp_path / "c.de").write_text("eins\n")
    (tmp_path / "c.en").write_text("one\n")
    assert whole("moses", tmp_path / "c")["src"].to_pylist() == ["one"], "line pairs have no first side"
    given = whole("moses", tmp_path / "c", src_lang="de", tgt_lang="en")
    assert given.select(["src", "src_lang"]).to_pylist() == [{"src": "eins", "src_lang": "de"}]


def test_a_translation_of_many_languages(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"translation": {"de": "eins", "en": "one", "fr": "un"}, "src_lang": "x"}\n')
    assert whole("jsonl", tmp_path / "x.jsonl").num_rows == 3
    (row,) = whole("jsonl", tmp_path / "x.jsonl", src_lang="fr", tgt_lang="de").to_pylist()
    assert row == {"src": "un", "tgt": "eins", "src_lang": "fr", "tgt_lang": "de"}
    (batch, *_) = batches("jsonl", tmp_path / "x.jsonl")
    assert "its column 'src_lang' is left out, as src_lang is read from 'translation'" in batch.problems[0]


def test_json_fields_are_what_the_file_says(tmp_path: Path) -> None:
    records = [
        {"id": 18446744073709551615, "src": "a", "when": "2020-01-01T00:00:00", "tgt": "b", "n": {"t": ["2020-01-01"]}},
        {"id": 1, "src": "a", "when": "soon", "tgt": "b", "n": {"t": [], "x": None}, "fingerprint": 5},
        {"id": 2, "src": "a", "tgt": "b", "fingerprint": 18446744073709551615, "score": 0.123456789012},
    ]
    path = tmp_path / "en-sw.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for max_rows in (1, 2, 3):
        for line in ("", '{"src": "a", "src": "c", "tgt": "b", "x": "\\u00e9\\u0000"}\n'):  # Python reads this one
            path.write_text("".join(json.dumps(record) + "\n" for record in records) + line)
            table = whole("jsonl", path, max_rows=max_rows)
            for row, record in zip(table.to_pylist(), records, strict=False):
                expected = {"src_lang": "en", "tgt_lang": "sw", **record}
                got = {name: value for name, value in row.items() if value is not None}
                assert got | {"n": None} == expected | {"n": None}
            assert table.schema.field("fingerprint").type == pa.uint64()
            if line:
                assert table["src"].to_pylist()[-1] == "c"
                assert table["x"].to_pylist()[-1] == "é\0"
            assert table.column_names[:4] == ["id", "src", "when", "tgt"]


def test_json_fields_of_no_one_type(tmp_path: Path) -> None:
    lines = [{"src": "a", "tgt": "b", "x": value} for value in (1, None, 2.5, "text")]
    path = tmp_path / "en-sw.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"en-sw\.jsonl, row 3: the type of its field 'x' changes here"):
        whole("jsonl", path)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert whole("jsonl", path, max_rows=2)["x"].to_pylist() == [1.0, None, 2.5]
    for big in (10**30, 2**64, -(2**63) - 1):
        path.write_text("".join(json.dumps({"src": "a", "tgt": "b", "x": value}) + "\n" for value in (1, big)))
        assert whole("jsonl", path)["x"].to_pylist() == [1.0, float(big)]


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "a": pa.array([[1], None, []], pa.list_(pa.int16())),
            "src": pa.array(["x", "y", "z"]).dictionary_encode(),
            "view": pa.array(["p", None, "q"], pa.string_view()),
            "tgt": pa.array(["x", None, "z"], pa.large_string()),
            "score": pa.array([1.5, float("nan"), 2.5], pa.float64()),
            "cat": pa.array(["u", "u", None]).dictionary_encode(),
            "raw": pa.array([b"\xff", b"", None]),
        }
    )
    pq.write_table(table, tmp_path / "en-sw.parquet", row_group_size=2)
    for max_rows in (1, 2, 65_536):
        found = whole("parquet", tmp_path / "en-sw.parquet", max_rows=max_rows)
        assert found.column_names == [*table.column_names, "src_lang", "tgt_lang"]
        assert found["tgt"].to_pylist() == ["x", "", "z"]
        assert found["score"].to_pylist() == [1.5, None, 2.5]
        for name in ("a", "cat", "raw"):
            assert found[name].to_pylist() == table[name].to_pylist()
            assert found.schema.field(name).type == table.schema.field(name).type
    twice = pa.Table.from_arrays([pa.array(["x"])] * 4, names=["src", "tgt", "n", "n"])
    pq.write_table(twice, tmp_path / "en-sw.parquet")
    with pytest.raises(InputError, match="it has two columns 'n'"):
        whole("parquet", tmp_path / "en-sw.parquet")


def test_tsv_line_ends_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "en-sw.tsv").write_bytes(b"src\ttokens\ttgt\r\na\r\t 7\tb\r\nc\t\td\r\n\r\t8\t\r\n")
    table = whole("tsv", tmp_path / "en-sw.tsv")
    assert table["tgt"].to_pylist() == ["b", "d", ""]
    assert table["src"].to_pylist() == ["a\r", "c", "\r"], "only the end of a line is a line end"
    assert table["tokens"].to_pylist() == [7, None, 8]
    assert table.schema.field("tokens").type == pa.int32()
    with pytest.raises(InputError, match="has 3 columns, and no column 7"):
        whole("tsv", tmp_path / "en-sw.tsv", columns={"src": "src", "tgt": "tgt", "score": 7})


def test_damaged_files_under_keep(tmp_path: Path) -> None:
    (tmp_path / "en-sw.parquet").write_bytes(b"no parquet")
    (batch,) = batches("parquet", tmp_path / "en-sw.parquet", on_error="keep")
    assert batch.table.column_names == ["src", "tgt", "src_lang", "tgt_lang"]
    assert "it is not a Parquet file" in batch.problems[0]
