"""JSON lines, Parquet and data sets of the hub's kind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read, reasons, source, texts

from corpusprep.errors import InputError
from corpusprep.sources import _json_kernel, jsonl
from corpusprep.sources.jsonl import Fields, JsonlSource


def save(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    data = raw.encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def row(src: Any, tgt: Any, **more: Any) -> dict[str, Any]:
    return {"src": src, "tgt": tgt, **more}


def test_jsonl_flat(tmp_path: Path) -> None:
    lines = [
        row("one", "moja", score=1.5, meta={"a": [1, {"b": None}], "c": "}"}),
        {"id": 3, "tgt": 'tatu "\\\n\t\u00e9\U0001f600', "src": "three"},
        row("two", None, score=None),
    ]
    path = save(tmp_path / "en-sw.jsonl.gz", lines)
    reading = read(source("jsonl", path))
    assert texts(reading) == [("one", "moja"), ("three", 'tatu "\\\n\té😀'), ("two", "")]
    assert [each["score"] for each in reading.rows] == [1.5, None, None]


def test_jsonl_bad_lines(tmp_path: Path) -> None:
    lines = [
        row("a", "b"),
        "",
        "{broken",
        "[1]",
        {"src": "a"},
        row(1, "b"),
        '{"src": "a\udcff", "tgt": "b"}',
        '{"src": "a\\u0000", "tgt": "b"}',
        '{"src": "a\\ud800", "tgt": "b"}',
        '{"src": "x", "tgt": "b", "src": "a"}',
        '{"src": "a", "tgt": "b", "score": "high"}',
        '{"s\\u0072c": "a", "tgt": "b"}',
        '{"src": "a", "tgt": "b"} {"src": "a", "tgt": "b"}',
        "[" * 100_000,
        '{"src": "a", "tgt": "b", "score": 1e999}',
        '{"src": "a", "tgt": "b", "x": NaN}',
    ]
    path = save(tmp_path / "x.jsonl", lines)
    reading = read(source("jsonl", path, src_lang="en", tgt_lang="sw"), max_rows=5)
    assert [each["row"] for each in reading.rows] == [0, 9, 11, 15]
    assert texts(reading) == [("a", "b")] * 4
    assert reasons(reading) == [
        (1, "read.json"),
        (2, "read.json"),
        (3, "read.json"),
        (4, "read.columns"),
        (5, "read.columns"),
        (6, "read.encoding"),
        (7, "read.nul"),
        (8, "read.encoding"),
        (10, "read.score"),
        (12, "read.json"),
        (13, "read.json"),
        (14, "read.score"),
    ]
    assert reading.rejects[0]["src"] == ""
    assert reading.rejects[5]["src"].startswith('{"src": "a\ufffd')


def test_jsonl_translation(tmp_path: Path) -> None:
    lines = [
        {"translation": {"de": "eins", "en": "one"}, "id": 1},
        {"translation": {"de": "zwei"}},
        {"translation": {"en": "three", "x": [1], "de": "drei"}},
        {"translation": "none"},
    ]
    of = source("jsonl", save(tmp_path / "x.jsonl", lines))
    assert of.shards()[0].pair == ("en", "de")
    reading = read(of)
    assert texts(reading) == [("one", "eins"), ("three", "drei")]
    assert reasons(reading) == [(1, "read.columns"), (3, "read.columns")]


def test_jsonl_translation_of_many_languages(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jsonl", [{"translation": {"de": "eins", "en": "one", "fr": "un"}}])
    assert [shard.shard for shard in source("jsonl", path).shards()] == [
        "x.jsonl.de-en",
        "x.jsonl.de-fr",
        "x.jsonl.en-fr",
    ]
    assert texts(read(source("jsonl", path, pairs=["fr-en"]))) == [("one", "un")]


def test_jsonl_rows_name_their_languages(tmp_path: Path) -> None:
    lines = [
        row("one", "moja", src_lang="en", tgt_lang="swh_Latn"),
        row("eins", "one", src_lang="deu", tgt_lang="eng"),
        row("a", "b", src_lang="en", tgt_lang="xx-yy-zz"),
        row("a", "b", src_lang="en", tgt_lang=None),
        row("a", "b", src_lang="en"),
    ]
    of = source("jsonl", save(tmp_path / "x.jsonl", lines))
    assert of.shards()[0].pair is None
    reading = read(of)
    assert [(each["src"], each["tgt"], each["src_lang"], each["tgt_lang"]) for each in reading.rows] == [
        ("one", "moja", "en", "sw"),
        ("one", "eins", "en", "de"),
    ]
    assert reasons(reading) == [(2, "read.language"), (3, "read.language"), (4, "read.language")]
    assert [each["row"] for each in read(source("jsonl", tmp_path / "x.jsonl", pairs=["en-de"])).rows] == [1]


def test_jsonl_columns_and_languages(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jsonl", [{"a": "one", "b": "moja", "q": 2}])
    with pytest.raises(InputError, match="nothing tells its languages"):
        source("jsonl", path).shards()
    columns = {"src": "a", "tgt": "b", "score": "q"}
    reading = read(source("jsonl", path, columns=columns, src_lang="en", tgt_lang="sw"))
    assert texts(reading) == [("one", "moja")]
    assert reading.rows[0]["score"] == 2.0


def _slowly(line: bytes, fields: Fields) -> tuple[Any, ...]:
    slow = jsonl._slow(line, fields)
    return slow.texts, slow.codes, slow.score, slow.verdict


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["src", "a", 'é"\\']), inner, max_size=3)
    ),
    max_leaves=6,
)
_RECORDS = st.dictionaries(st.sampled_from(["src", "tgt", "score", "x", "translation"]), _VALUES, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(
        st.tuples(_RECORDS, st.booleans(), st.integers(0, 60), st.sampled_from(["", "}", ",", '"', "\\", " "]))
    )
)
def test_the_kernel_reads_as_python_does(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[dict[str, Any], bool, int, str]]
) -> None:
    """Where the kernel is sure of a line, Python's json reads the same; damaged lines too."""
    lines = []
    for record, ascii_only, place, insert in records:
        line = json.dumps(record, ensure_ascii=ascii_only)
        lines.append((line[:place] + insert + line[place:]).replace("\n", " "))
    path = tmp_path_factory.mktemp("json") / "x.jsonl"
    path.write_bytes(b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines))
    of = JsonlSource(source("jsonl", path, src_lang="en", tgt_lang="sw").settings)
    try:
        shards = of.shards()
    except InputError:  # a translation whose keys happen to be languages that were not asked for
        return
    if shards[0].members:
        return
    reading = read(of, shards)
    found = {
        each["row"]: ((each["src"], each["tgt"]), each.get("reason"), each["score"])
        for each in reading.rows + reading.rejects
    }
    assert sorted(found) == list(range(len(lines)))
    fields = Fields("src", "tgt", None, "score", None)
    for i, line in enumerate(lines):
        raw = line.encode("utf-8", "surrogatepass")
        try:
            raw.decode()
        except UnicodeDecodeError:
            assert found[i][1] == "read.encoding"
            continue
        expected, _, score, verdict = _slowly(raw, fields)
        assert (verdict != 0) == (found[i][1] is not None), line
        if verdict == 0:
            assert found[i][0] == expected
            assert found[i][2] == (None if score is None else pytest.approx(score, rel=1e-6, abs=1e-30))


def test_the_kernel_is_used() -> None:
    """Plain records are not left to Python."""
    from corpusprep.sources.lines import LineCutter, head

    lines = [
        b'{"src":"a","tgt":"b"}',
        b' { "id" : -1.5e3 , "src" : "\\u00e9\\ud83d\\ude00" , "tgt" : "b" , "x" : [ {} , [ ] , { "a" : null } ] } ',
        b'{"src":"a","tgt":"b","score":1.25,"ok":true,"no":false}',
    ]
    cutter = LineCutter(iter([b"\n".join(lines)]), keep=False, problems=[])
    *_, kinds, sure = jsonl._scan(head(cutter), Fields("src", "tgt", None, "score", None))
    assert sure.all()
    assert kinds[:, 0].tolist() == [_json_kernel.PLAIN, _json_kernel.ESCAPED, _json_kernel.PLAIN]
    assert kinds[:, 2].tolist() == [_json_kernel.ABSENT, _json_kernel.ABSENT, _json_kernel.NUMBER]


def parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_types(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["one", None, "three", "three"]).cast(kind)
    table = pa.table({"src": values, "tgt": values, "score": [1, 2, None, 4], "other": [1, 2, 3, 4]})
    reading = read(source("parquet", parquet(tmp_path / "en-sw.parquet", table)))
    assert texts(reading) == [("one", "one"), ("", ""), ("three", "three"), ("three", "three")]
    assert [each["score"] for each in reading.rows] == [1.0, 2.0, None, 4.0]


def test_parquet_rows_and_bounds(tmp_path: Path) -> None:
    rows = [("x" * (i % 50), "y" * (i % 30)) for i in range(12_000)]
    table = pa.table({"src": [a for a, _ in rows], "tgt": [b for _, b in rows]})
    one = parquet(tmp_path / "en-sw.parquet", table)
    many = parquet(tmp_path / "en-fr.parquet", table, row_group_size=777)
    for bounds in ({"max_rows": 1000}, {"max_bytes": 5000}, {}, {"max_rows": 5000, "max_bytes": 300_000}):
        reading = read(source("parquet", one), **bounds)
        assert texts(reading) == rows
        assert [each["row"] for each in reading.rows] == list(range(len(rows)))
        assert read(source("parquet", many), **bounds).batches == reading.batches
        assert max(reading.batches) <= bounds.get("max_rows", 65_536)
    assert len(read(source("parquet", one, limit=10_001)).rows) == 10_001


def test_parquet_bad_text(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", b"n\0l", b"\xc3", b"\xa9"], pa.binary())
    table = pa.table({"src": raw, "tgt": ["a", "b", "c", "d", "e"]})
    reading = read(source("parquet", parquet(tmp_path / "en-sw.parquet", table)))
    assert texts(reading) == [("good", "a")]
    assert reasons(reading) == [(1, "read.encoding"), (2, "read.nul"), (3, "read.encoding"), (4, "read.encoding")]


def test_parquet_translation_and_languages(tmp_path: Path) -> None:
    parquet(tmp_path / "t" / "train.parquet", pa.table({"translation": [{"sw": "moja", "en": "one"}, None]}))
    assert texts(read(source("parquet", tmp_path / "t"))) == [("one", "moja"), ("", "")]
    table = pa.table({"src": ["moja", "x"], "tgt": ["one", "y"], "src_lang": ["swh", "??"], "tgt_lang": ["eng", "en"]})
    reading = read(source("parquet", parquet(tmp_path / "own.parquet", table)))
    assert [(each["src"], each["tgt_lang"]) for each in reading.rows] == [("one", "sw")]
    assert reasons(reading) == [(1, "read.language")]


def test_parquet_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", pa.table({"translation": [{"sw": split, "en": split}]}))
    of = source("parquet", tmp_path)
    assert texts(read(of)) == [("train", "train")]
    assert [shard.split for shard in of.evaluation()] == ["test", "dev"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"a": ["x"], "tgt": ["y"]}, "has no column 'src'; it has 'a', 'tgt'"),
        ({"src": [1], "tgt": ["y"]}, "'src' is int64, not text"),
        ({"src": ["x"], "tgt": ["y"], "score": ["z"]}, "'score' is string, not a number"),
        ({"src": ["x"], "tgt": ["y"]}, "nothing tells its languages"),
        ({"translation": ["x"]}, "a struct of two languages is wanted"),
        ({"translation": [{"en": 1, "sw": "x"}]}, "is int64, not text"),
    ],
)
def test_parquet_columns_that_are_not_there(tmp_path: Path, table: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read(source("parquet", parquet(tmp_path / "x.parquet", pa.table(table))))


def test_hub_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    for split, rows in {"train": 3, "test": 1}.items():
        table = pa.table({"translation": [{"ar": f"ar {split} {i}", "en": f"en {split} {i}"} for i in range(rows)]})
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", table)
    of = source("hub", folder)
    (shard,) = of.shards()
    assert (shard.shard, shard.pair, shard.split) == ("train", ("en", "ar"), "train")
    reading = read(of)
    assert texts(reading) == [(f"en train {i}", f"ar train {i}") for i in range(3)]
    assert [each["row"] for each in reading.rows] == [0, 1, 2]
    assert texts(read(of, of.evaluation())) == [("en test 0", "ar test 0")]
    assert len(read(source("hub", folder, limit=2)).rows) == 2
    before = of.identity(shard)
    parquet(folder / "data" / "train-00000-of-00001.parquet", pa.table({"translation": [{"ar": "x", "en": "y"}]}))
    assert of.identity(shard) != before


def test_hub_jsonl_and_languages_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lines = [row("moja", "one", src_lang="swh", tgt_lang="en"), row("un", "one", src_lang="fr", tgt_lang="en")]
    save(tmp_path / "set" / "train.jsonl", lines)
    reading = read(source("hub", tmp_path / "set", pairs=["en-sw"]))
    assert [(each["src"], each["tgt"], each["tgt_lang"]) for each in reading.rows] == [("one", "moja", "sw")]


def test_hub_refuses_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"no such data set|cannot be reached|cannot be read"):
        source("hub", tmp_path / "nowhere").shards()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match="cannot be read"):
        source("hub", tmp_path / "bad").shards()
