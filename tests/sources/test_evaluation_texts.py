"""Evaluation files: all of their text or an error, never a part."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpusprep.errors import InputError
from corpusprep.sources.texts import read_texts, texts_identity


def plain(found: Any) -> Any:
    return [[side.to_pylist() for side in each] if isinstance(each, tuple) else each.to_pylist() for each in found]


def test_all_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes("one\tmoja\u2028\ntwo\tmbili".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    (tmp_path / "c.jsonl").write_text(json.dumps({"translation": {"en": "one", "sw": "moja"}}) + "\n\n")
    pq.write_table(pa.table({"id": [1], "src": ["one"], "tgt": ["moja"], "url": ["u"]}), tmp_path / "d.parquet")
    (tmp_path / "e.devtest").write_text("one\n")
    (tmp_path / "f.sw").write_text("moja\n")
    (tmp_path / "README.md").write_text("not\tevaluation\ttext")
    (tmp_path / ".hidden.tsv").write_text("no")
    expected = [
        [["one", "two"], ["moja\u2028", "mbili"]],
        ["one", "", "two"],
        [["one"], ["moja"]],
        [["one"], ["moja"]],
        ["one"],
        ["moja"],
    ]
    assert plain(read_texts([str(tmp_path)])) == expected
    assert plain(read_texts([str(tmp_path / "*"), str(tmp_path / "a.tsv")])) == expected
    assert plain(read_texts([str(tmp_path / "a.tsv")])) == expected[:1]
    assert read_texts([]) == []


def test_parquet_kinds(tmp_path: Path) -> None:
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"translation": [{"en": "one", "sw": "moja"}]}), path)
    assert plain(read_texts([path])) == [[["one"], ["moja"]]]
    pq.write_table(pa.table({"id": [1], "text": ["one"]}), path)
    assert plain(read_texts([path])) == [["one"]]
    pq.write_table(pa.table({"url": ["u"], "domain": ["d"], "sentence_eng_Latn": ["one"]}), path)
    assert plain(read_texts([path])) == [["one"]]
    pq.write_table(pa.table({"url": ["u"], "domain": ["d"], "topic": ["t"]}), path)
    with pytest.raises(InputError, match="it has the text columns url, domain, topic"):
        read_texts([path])


def test_empty_file_and_blank_last_line(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("")
    (tmp_path / "b.tsv").write_text("one\tmoja\n\n")
    assert plain(read_texts([str(tmp_path)])) == [[], [["one", ""], ["moja", ""]]]


@pytest.mark.parametrize(
    ("name", "raw", "complaint", "row"),
    [
        ("x.tsv", b"a\tb\nc\td\ne\n", "a line has 1 columns and the others 2", 2),
        ("x.tsv", b"a\tb\tc\n", "it has 3 columns", None),
        ("x.txt", b"a\n\xff\n", "a line is not UTF-8", 1),
        ("x.jsonl", b'{"src": "a", "tgt": "b"}\nno\n', "a line is not a JSON object", 1),
        ("x.jsonl", b'{"n": 1}\n', "it has no column of text", None),
        ("x.jsonl", b'{"text": "a"}\n\n{"txt": "a"}\n', "a record has no text 'text'", 2),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "holds half a character", 1),
        ("x.parquet", b"PAR1", "not a Parquet file", None),
        ("x.tsv.gz", b"plain", "it is not gzip", None),
    ],
)
def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, raw: bytes, complaint: str, row: int | None
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=complaint) as error:
        read_texts([str(tmp_path / name)])
    assert error.value.row == row


def test_missing(tmp_path: Path) -> None:
    for path in ("flores.tsv", "*.tsv"):
        with pytest.raises(InputError):
            read_texts([str(tmp_path / path)])
        with pytest.raises(InputError):
            texts_identity([str(tmp_path / path)])
    with pytest.raises(InputError, match="holds no evaluation files"):
        read_texts([str(tmp_path)])


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a\tb\n" * 100_000)
    first = texts_identity([str(tmp_path)])
    raw = bytearray((tmp_path / "a.tsv").read_bytes())
    raw[200_000] = ord("x")  # in the middle, where no head or tail would see it
    (tmp_path / "b.tsv").write_bytes(raw)
    assert texts_identity([str(tmp_path / "b.tsv")]) != first
    (tmp_path / "b.tsv").unlink()
    (tmp_path / "a.tsv").rename(tmp_path / "c.tsv")
    assert texts_identity([str(tmp_path)]) == first
