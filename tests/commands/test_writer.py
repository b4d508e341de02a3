"""The writer of tables: formats, packing, columns that come late, and what it leaves when it fails."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from stage_files import read

from corpusprep import InputError, SettingsError
from corpusprep.commands.writer import TableWriter

TABLE = pa.table(
    {
        "text": ["a\tb", "é\r", None],
        "kind": pa.array(["p", "q\n", None]).dictionary_encode(),
        "count": pa.array([1, None, 1 << 63], pa.uint64()),
        "score": pa.array([0.1, 1e-7, None], pa.float32()),
        "last": ["x\r", "y\0z", ""],
    }
)


def write(path: Path, *tables: pa.Table, **options: Any) -> Path:
    with TableWriter(path, **options) as writer:
        for table in tables:
            writer.write(table)
    return path


def test_tsv_has_a_line_a_row(tmp_path: Path) -> None:
    content = write(tmp_path / "new" / "out.tsv", TABLE, TABLE.select(["count"])).read_bytes().decode()
    assert content.split("\n") == [
        "text\tkind\tcount\tscore\tlast",
        "a b\tp\t1\t0.1\tx ",
        "é\r\tq \t\t1e-7\ty z",
        "\t\t9223372036854775808\t\t",
        "\t\t1\t\t",
        "\t\t\t\t",
        "\t\t9223372036854775808\t\t",
        "",
    ]


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.jsonl.gz", "out.jsonl.bz2", "OUT.JSONL.XZ"])
def test_formats_and_packing(tmp_path: Path, name: str) -> None:
    first = write(tmp_path / name, TABLE.slice(0, 1), TABLE.slice(1)).read_bytes()
    assert write(tmp_path / name, TABLE.slice(0, 1), TABLE.slice(1)).read_bytes() == first
    found = read((tmp_path / name).rename(tmp_path / name.lower()))
    assert found["count"].to_list() == TABLE["count"].to_pylist()
    assert found["text"].to_list() == TABLE["text"].to_pylist()
    assert [path.name for path in tmp_path.iterdir()] == [name.lower()]


def test_large_tables_are_written_in_parts(tmp_path: Path) -> None:
    table = pa.table({"n": range(150_000)})
    assert read(write(tmp_path / "out.tsv", table))["n"].to_list() == list(range(150_000))
    assert read(write(tmp_path / "out.jsonl.gz", table))["n"].to_list() == list(range(150_000))


@pytest.mark.parametrize("name", ["out.tsv", "out.parquet", "out.tsv.gz"])
def test_what_comes_late_is_not_lost(tmp_path: Path, name: str) -> None:
    for later, message in (
        (pa.table({"late": [1]}), r"column 'late' is missing in the first 3 rows, .* Write \.jsonl"),
        (pa.table({"count": ["many"]}), "changes its type after the first 3 rows"),
    ):
        with pytest.raises(InputError, match=message):
            write(tmp_path / name, TABLE, later)
        assert list(tmp_path.iterdir()) == []
    found = write(tmp_path / "out.jsonl", TABLE, pa.table({"late": [[1]]}))
    assert pl.read_ndjson(found)["late"].to_list()[-1] == [1]


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("out.tsv", pa.array([[1]]), "column x holds lists, which TSV cannot. Write .jsonl or .parquet"),
        ("out.tsv", pa.array([{"a": 1}]), "holds struct"),
        ("out.tsv", pa.array([b"\xff"]), "holds binary, which TSV cannot"),
        ("out.jsonl", pa.array([[b"\xff"]]), "which JSONL cannot. Write .parquet"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, name: str, column: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        write(tmp_path / name, pa.table({"x": column}))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_there_stays_until_all_is_written(tmp_path: Path) -> None:
    write(tmp_path / "out.tsv.gz", TABLE)
    before = (tmp_path / "out.tsv.gz").read_bytes()
    with pytest.raises(InputError):
        write(tmp_path / "out.tsv.gz", TABLE, pa.table({"late": [1]}))
    assert (tmp_path / "out.tsv.gz").read_bytes() == before
    assert gzip.decompress(before).startswith(b"text\tkind")
    assert [path.name for path in tmp_path.iterdir()] == ["out.tsv.gz"]
    with pytest.raises(SettingsError, match="is a folder"):
        TableWriter(tmp_path, "tsv")
