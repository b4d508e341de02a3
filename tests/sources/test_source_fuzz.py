"""Any bytes at all: rows, rejects or an InputError, and never another error."""

from __future__ import annotations

import contextlib
import gzip
import io
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import read, source

from corpusprep.errors import InputError
from corpusprep.sources.texts import read_texts

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

_PIECES = st.sampled_from(
    [
        b"\n",
        b"\t",
        b"\r\n",
        b"\0",
        b"\xff",
        "é\u2028".encode(),
        b"1.5",
        b"text",
        b'{"src": "a", "tgt": "b"}',
        b"{",
        b'"',
        b"\xed\xa0\x80",
    ]
)
BYTES = st.binary(max_size=200) | st.lists(_PIECES, max_size=60).map(b"".join)


def attempt(format: str, path: Path, **more: Any) -> None:
    """Reads a source in both ways; strict and lenient agree where strict succeeds."""
    try:
        strict = read(source(format, path, **more), max_rows=3)
    except InputError:
        strict = None
    try:
        lenient = read(source(format, path, on_error="keep", **more), max_rows=5)
    except InputError:
        assert strict is None  # not a source at all
        return
    if strict is not None:
        assert (lenient.rows, lenient.rejects) == (strict.rows, strict.rejects)


def lines(raw: bytes) -> int:
    return raw.count(b"\n") + (not raw.endswith(b"\n") and raw != b"")


@FUZZ
@given(raw=BYTES, packed=st.booleans())
@pytest.mark.parametrize("format", ["nllb", "tsv", "jsonl"])
def test_lines(tmp_path: Path, format: str, raw: bytes, packed: bool) -> None:
    path = tmp_path / ("en-sw.tsv" + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(raw) if packed else raw)
    more: dict[str, Any] = {"src_lang": "en", "tgt_lang": "sw"} if format == "jsonl" else {}
    attempt(format, path, **more)
    reading = read(source(format, path, **more), max_rows=4)
    header = format == "tsv" and not reading.batches
    assert header or len(reading.rows) + len(reading.rejects) == lines(raw)


@FUZZ
@given(raw=BYTES)
@pytest.mark.parametrize("format", ["nllb", "tsv", "jsonl", "parquet"])
def test_bytes_as_they_are(tmp_path: Path, format: str, raw: bytes) -> None:
    for name in ("en-sw.gz", "en-sw.tsv.xz", "en-sw.bz2"):
        (tmp_path / name).write_bytes(raw)
        attempt(format, tmp_path / name)


@FUZZ
@given(first=BYTES, second=BYTES)
def test_two_sides(tmp_path: Path, first: bytes, second: bytes) -> None:
    (tmp_path / "c.en").write_bytes(first)
    (tmp_path / "c.sw").write_bytes(second)
    attempt("moses", tmp_path / "c")
    reading = read(source("moses", tmp_path / "c", on_error="keep"), max_rows=3)
    assert len(reading.rows) + len(reading.rejects) == max(lines(first), lines(second))
    sides = [raw.removesuffix(b"\n").split(b"\n") for raw in (first, second)]
    for row in reading.rows:
        assert row["src"].encode() == sides[0][row["row"]]
        assert row["tgt"].encode() == sides[1][row["row"]]


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README", "read me")
        archive.writestr("N.en-sw.en", "one\ntwo\n" * 20)
        archive.writestr("N.en-sw.sw", "moja\nmbili\n" * 20)
    return stream.getvalue()


def _parquet() -> bytes:
    stream = io.BytesIO()
    table = pa.table({"src": ["one", "two"] * 50, "tgt": ["moja", "mbili"] * 50, "score": [1.0, 2.0] * 50})
    pq.write_table(table, stream, row_group_size=30)
    return stream.getvalue()


ZIP, PARQUET = _zip(), _parquet()
GZIP = gzip.compress(b"one\tmoja\t1.25\ta\tb\tc\td\te\tf\n" * 40, mtime=0)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """A sound file with some of its bytes changed, and perhaps cut."""
    raw = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)) | st.just(len(raw)))])


@FUZZ
@given(raw=damaged(ZIP))
def test_damaged_zip(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "N.en-sw.zip").write_bytes(raw)
    attempt("moses", tmp_path / "N.en-sw.zip")


@FUZZ
@given(raw=damaged(GZIP))
def test_damaged_gzip(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "en-sw.gz").write_bytes(raw)
    attempt("nllb", tmp_path / "en-sw.gz")


@FUZZ
@given(raw=damaged(PARQUET))
def test_damaged_parquet(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "en-sw.parquet").write_bytes(raw)
    attempt("parquet", tmp_path / "en-sw.parquet")


@FUZZ
@given(raw=BYTES | damaged(PARQUET))
@pytest.mark.parametrize("name", ["x.tsv", "x.txt.gz", "x.jsonl", "x.parquet"])
def test_evaluation_text(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    with contextlib.suppress(InputError):
        read_texts([str(tmp_path / name)])
