"""Rows that cannot be read are the same for a command and for a run."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reading import read as read_source
from reading import source as normal_source
from stage_files import read

from corpusprep import InputError
from corpusprep.commands.stage import run_stage
from corpusprep.sources import SourceSettings, open_source

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
LANGUAGES = {"src_lang": "en", "tgt_lang": "sw"}


def in_a_run(format: str, path: Path, **options: Any) -> list[tuple[int, str]]:
    reading = read_source(normal_source(format, path, **options), max_rows=3)
    return [(row["row"], row["reason"]) for row in reading.rejects]


def in_a_command(path: Path, **options: Any) -> list[tuple[int, str]]:
    """The rejects of a stage that drops nothing itself."""
    folder = path.parent / "command"
    run_stage(
        "clean", path, folder / "out.jsonl", rejects=folder / "lost.parquet", overrides=["enabled=false"], **options
    )
    return read(folder / "lost.parquet").select("row", "reason").rows()


TSV = [
    b"id\tsrc\ttgt\tsrc_lang\ttgt_lang\tscore\tquality",
    b"1\tone\tmoja\ten\tsw\t0.5\t1",
    b"too few",
    b"3\tone\xff\tmoja\ten\tsw\t0.5\t1",
    b"4\xff\tone\tmoja\ten\tsw\t0.5\t1",
    b"5\tone\0\tmoja\ten\tsw\t0.5\t1",
    b"6\tone\tmoja\ten\tklingon\t0.5\t1",
    b"7\tone\tmoja\t\tsw\t0.5\t1",
    b"8\tone\tmoja\ten\tsw\thigh\t1",
    b"9\tone\tmoja\ten\tsw\t\t",
    b"10\tone\tmoja\ten\tsw\t0.5\t1\tmore",
    b"",
    b"12\tone\tmoja\ten\tsw\t1e999\t1",
    b"13\tdeux\tone\tfr\ten\tnan\t1",
]
JSONL = [
    b'{"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "de", "x": [1]}',
    b'{"src": 1',
    b"[1, 2]",
    b"",
    b'{"src": "\\ud800", "tgt": "x", "src_lang": "en", "tgt_lang": "de"}',
    b'{"src": 5, "tgt": "b", "src_lang": "en", "tgt_lang": "de"}',
    b'{"src": "a", "tgt": "b", "src_lang": null, "tgt_lang": "de"}',
    b'{"src": "a", "tgt": "b", "src_lang": "en"}',
    b'{"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "german"}',
    b'{"src": "a\\u0000", "tgt": "b", "src_lang": "en", "tgt_lang": "de"}',
    b'{"src": "a\xff", "tgt": "b", "src_lang": "en", "tgt_lang": "de"}',
    b'{"src": "a", "tgt": "b", "src_lang": "de", "tgt_lang": "en", "score": "high"}',
    b'{"src": "a", "tgt": null, "src_lang": "de", "tgt_lang": "en", "score": 1, "y": 12345678901234567890}',
    b'{"src": "a", "src": "c", "tgt": "b", "src_lang": "de", "tgt_lang": "en", "score": NaN}',
]


@pytest.mark.parametrize(("name", "lines"), [("in.tsv", TSV), ("in.jsonl", JSONL)])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_damaged_lines(tmp_path: Path, name: str, lines: list[bytes], end: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(end.join(lines) + end)
    expected = in_a_run(name[3:], path)
    assert len(expected) > 7
    assert in_a_command(path) == expected
    good = [row["row"] for row in read_source(normal_source(name[3:], path)).rows]
    kept = read(tmp_path / "command" / "out.jsonl")
    assert kept.height == len(good) == len(lines) - len(expected) - (name == "in.tsv")
    (tmp_path / (name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
    assert in_a_command(tmp_path / (name + ".gz")) == expected


def test_damaged_parquet_rows(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", b"n\0l", b"good", b"good", None], pa.binary())
    table = pa.table(
        {
            "src": raw,
            "tgt": ["a", "b", "c", "d", "e", "f"],
            "src_lang": ["en", "en", "en", "??", None, "en"],
            "tgt_lang": ["de"] * 6,
            "score": [1.0, float("inf"), None, 2, 3, float("nan")],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    expected = [(1, "read.encoding"), (2, "read.nul"), (3, "read.language"), (4, "read.language")]
    assert in_a_run("parquet", tmp_path / "in.parquet") == expected
    assert in_a_command(tmp_path / "in.parquet") == expected
    kept = read(tmp_path / "command" / "out.jsonl")
    assert kept["src"].to_list() == ["good", ""]
    assert kept["score"].to_list() == [1.0, None]


def test_other_columns_that_cannot_be_read(tmp_path: Path) -> None:
    """A run does not look at them."""
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff", b"ok"], pa.binary()).buffers())
    pq.write_table(
        pa.table({"src": ["a", "b", "c"], "tgt": ["d", "e", "f"], "note": broken}), tmp_path / "en-sw.parquet"
    )
    assert in_a_command(tmp_path / "en-sw.parquet") == [(1, "read.encoding")]
    lines = [b'{"src": "a", "tgt": "b", "note": "ok"}', b'{"src": "a", "tgt": "b", "note": "\\udfff"}',
             b'{"src": "a", "tgt": "b", "note": ' + b"[" * 500 + b"]" * 500 + b"}"]  # fmt: skip
    (tmp_path / "en-sw.jsonl").write_bytes(b"\n".join(lines))
    assert in_a_command(tmp_path / "en-sw.jsonl") == [(1, "read.encoding"), (2, "read.json")]
    rows = [f"a {i}\tb {i}\t{i}" for i in range(1500)] + ["a\tb\tmany"]
    (tmp_path / "en-sw.tsv").write_text("src\ttgt\ttokens\n" + "\n".join(rows))
    assert in_a_command(tmp_path / "en-sw.tsv") == [(1501, "read.score")]
    (tmp_path / "en-sw.tsv").write_text("src\ttgt\ttokens\n" + "\n".join(rows[-1:] + rows))
    assert in_a_command(tmp_path / "en-sw.tsv") == [], "a column that does not hold numbers is text"
    assert read(tmp_path / "command" / "out.jsonl")["tokens"][:2].to_list() == ["many", "0"]


def test_rejects_that_have_a_row_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "en-sw.tsv").write_text("src\ttgt\trow\na\tb\tx7\n\nc\n")
    run_stage("clean", tmp_path / "en-sw.tsv", tmp_path / "out.tsv", rejects=tmp_path / "lost.tsv")
    assert read(tmp_path / "lost.tsv")["row"].to_list() == [2, 3]
    (tmp_path / "en-sw.jsonl").write_text('{"src": "", "tgt": "b", "row": [1]}\n{\n')
    run_stage("clean", tmp_path / "en-sw.jsonl", tmp_path / "out.jsonl", rejects=tmp_path / "lost.jsonl")
    assert read(tmp_path / "lost.jsonl")["row"].to_list() == [[1], None]


_PIECES = st.sampled_from(
    [b"\n", b"\t", b"\r\n", b"\0", b"\xff", "é\u2028".encode(), b"1.5", b"text", b'{"src": "a", "tgt": "b"}', b"{", b'"',
     b"\xed\xa0\x80", b'{"src": "a", "tgt": "b", "score": 1}', b"src\ttgt\tscore\n", b"one\ttwo\n", b"en\tsw\n"]
)  # fmt: skip
BYTES = st.binary(max_size=200) | st.lists(_PIECES, max_size=60).map(b"".join)


def content(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


def attempt(format: str, path: Path, **options: Any) -> None:
    """Whatever the bytes: both read the same rows, or neither reads the file.

    But for two things that a whole table knows and a run does not: two columns of one name, and a column `score` of text.
    """
    try:
        expected: Any = in_a_run(format, path, **options)
    except InputError:
        with pytest.raises(InputError):
            in_a_command(path, read_as=format, **options)
        return
    try:
        found = in_a_command(path, read_as=format, **options)
    except InputError as error:
        twice = re.search(r"names the column '(.*)' twice", str(error))
        if twice is None or content(path).count(twice[1].encode()) < 2:
            raise
        return
    if format != "parquet" and b"score" in content(path):
        expected, found = ([each for each in rows if each[1] != "read.score"] for rows in (expected, found))
    assert found == expected


@FUZZ
@given(raw=BYTES, packed=st.booleans())
@pytest.mark.parametrize("format", ["tsv", "jsonl"])
def test_any_bytes(tmp_path: Path, format: str, raw: bytes, packed: bool) -> None:
    path = tmp_path / ("en-sw." + format + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(raw) if packed else raw)
    attempt(format, path)


@FUZZ
@given(places=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=3))
def test_any_parquet(tmp_path: Path, places: list[tuple[int, int]]) -> None:
    stream = io.BytesIO()
    table = pa.table({"src": ["one", "two"] * 50, "tgt": ["moja", "mbili"] * 50, "score": [1.0, 2.0] * 50})
    pq.write_table(table, stream, row_group_size=30)
    raw = bytearray(stream.getvalue())
    for place, byte in places:
        raw[place % len(raw)] = byte
    (tmp_path / "en-sw.parquet").write_bytes(raw)
    attempt("parquet", tmp_path / "en-sw.parquet")
    attempt("parquet", tmp_path / "en-sw.parquet", on_error="keep")


@FUZZ
@given(raw=BYTES)
@pytest.mark.parametrize("format", ["tsv", "jsonl"])
def test_whole_tables_have_the_rows_of_a_run(tmp_path: Path, format: str, raw: bytes) -> None:
    assume(b"score" not in raw)  # which may be text in a whole table
    path = tmp_path / f"en-sw.{format}"
    path.write_bytes(raw)
    try:
        expected = read_source(normal_source(format, path)).rows
    except InputError:
        return
    source = open_source(SourceSettings(format=format, path=str(path)), whole=True)  # type: ignore[arg-type]
    try:
        batches = [batch for shard in source.shards() for batch in source.read(shard, max_rows=4)]
    except InputError as error:
        if "twice" not in str(error):  # a header whose further names are not told apart
            raise
        return
    found = [row for batch in batches for row in batch.table.to_pylist()]
    pairs = ("src", "tgt", "src_lang", "tgt_lang")
    strip = "\r" if format == "tsv" else ""  # of lines that end so
    assert [tuple(row[name].rstrip(strip) for name in pairs) for row in found] == [
        tuple(row[name].rstrip(strip) for name in pairs) for row in expected
    ]
