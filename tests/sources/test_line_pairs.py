"""OPUS-100 and Moses: line pairs in two files or a zip."""

from __future__ import annotations

import gzip
import pickle
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read, reasons, source, texts

from corpusprep.errors import InputError


def write_pair(stem: Path, sides: dict[str, str | bytes], pack: bool = False) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for language, text in sides.items():
        raw = text if isinstance(text, bytes) else text.encode()
        path = Path(f"{stem}.{language}" + (".gz" if pack else ""))
        path.write_bytes(gzip.compress(raw) if pack else raw)


@pytest.fixture
def opus(tmp_path: Path) -> Path:
    root = tmp_path / "opus-100-corpus"
    supervised = root / "v1.0" / "supervised"
    write_pair(supervised / "de-en" / "opus.de-en-train", {"de": "eins\nzwei\n", "en": "one\ntwo\n"})
    write_pair(supervised / "de-en" / "opus.de-en-dev", {"de": "drei\n", "en": "three\n"})
    write_pair(supervised / "de-en" / "opus.de-en-test", {"de": "vier\n", "en": "four\n"})
    write_pair(supervised / "en-sr" / "opus.en-sr-train", {"sr": "jedan\n", "en": "one\n"}, pack=True)
    write_pair(root / "v1.0" / "zero-shot" / "de-fr" / "opus.de-fr-test", {"de": "acht\n", "fr": "huit\n"})
    return root


@pytest.mark.parametrize("below", [".", "v1.0", "v1.0/supervised", "v1.0/supervised/de-en", "v1.0/*/de-en"])
def test_opus100_from_any_depth(opus: Path, below: str) -> None:
    of = source("opus100", opus / below, pairs=["en-de"])
    (shard,) = of.shards()
    assert shard.pair == ("en", "de")
    assert shard.shard.endswith("opus.de-en-train")
    reading = read(of)
    assert texts(reading) == [("one", "eins"), ("two", "zwei")]
    assert [row["row"] for row in reading.rows] == [0, 1]
    assert {(row["src_lang"], row["tgt_lang"], row["source"]) for row in reading.rows} == {("en", "de", "opus100")}


def test_opus100_shards_are_named_from_the_path(opus: Path) -> None:
    shards = source("opus100", opus).shards()
    assert [shard.shard for shard in shards] == [
        "v1.0/supervised/de-en/opus.de-en-train",
        "v1.0/supervised/en-sr/opus.en-sr-train",
    ]
    assert pickle.loads(pickle.dumps(shards)) == shards


def test_opus100_other_splits_are_evaluation(opus: Path) -> None:
    of = source("opus100", opus, pairs=["deu_Latn-eng_Latn"], limit=1)
    assert [shard.split for shard in of.evaluation()] == ["dev", "test"]
    assert texts(read(of, of.evaluation())) == [("three", "drei"), ("four", "vier")]
    assert len(read(of).rows) == 1
    assert source("opus100", opus, protect=False).evaluation() == []
    assert [shard.pair for shard in source("opus100", opus).evaluation()] == [("en", "de"), ("en", "de"), ("de", "fr")]
    assert [shard.split for shard in source("opus100", opus, splits=["test"]).shards()] == ["test", "test"]
    assert texts(read(source("opus100", opus, splits=["validation"]))) == [("three", "drei")]


def test_opus100_script_is_as_asked(opus: Path) -> None:
    reading = read(source("opus100", opus, pairs=["en-sr_Latn"], name="mine"))
    assert [(row["tgt_lang"], row["source"], row["tgt"]) for row in reading.rows] == [("sr_Latn", "mine", "jedan")]


def test_pairs_that_are_not_there(opus: Path) -> None:
    of = source("opus100", opus, pairs=["de-en", "en-sv"])
    assert of.missing() == ["en-sv"]
    assert of.available() == ["en-de", "en-sr"]
    with pytest.raises(InputError, match=r"no pair en-se is here, only en-de, en-sr\. Did you mean en-sr"):
        source("opus100", opus, pairs=["en-se"]).shards()
    with pytest.raises(InputError, match="no split dev is here, only test"):
        source("opus100", opus / "v1.0/zero-shot", splits=["dev"]).shards()
    with pytest.raises(InputError, match="no opus100 files are here"):
        source("opus100", opus.parent / "empty").shards() if (opus.parent / "empty").mkdir() is None else None


def test_opus100_side_missing(opus: Path) -> None:
    (opus / "v1.0/supervised/de-en/opus.de-en-train.de").unlink()
    with pytest.raises(InputError, match=r"opus.de-en-train.en: the other side .* is missing"):
        source("opus100", opus).shards()
    assert texts(read(source("opus100", opus, pairs=["en-sr"]))) == [("one", "jedan")]
    reading = read(source("opus100", opus, on_error="keep"))
    assert texts(reading) == [("one", "jedan")]
    assert len(reading.problems) == 1
    assert "the other side" in reading.problems[0]


def test_opus100_hub_layout(tmp_path: Path) -> None:
    for split, rows in {"train": 3, "validation": 1, "test": 2}.items():
        path = tmp_path / "opus-100" / "ar-en" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({"translation": [{"ar": f"{split} ar {i}", "en": f"{split} en {i}"} for i in range(rows)]}), path
        )
    of = source("opus100", tmp_path / "opus-100", pairs=["en-ar"])
    assert [(shard.shard, shard.pair) for shard in of.shards()] == [
        ("ar-en/train-00000-of-00001.parquet", ("en", "ar"))
    ]
    assert texts(read(of)) == [(f"train en {i}", f"train ar {i}") for i in range(3)]
    assert [shard.split for shard in of.evaluation()] == ["test", "dev"]
    assert len(read(of, of.evaluation()).rows) == 3
    assert texts(read(source("opus100", tmp_path / "opus-100" / "ar-en")))[0] == ("train en 0", "train ar 0")


def test_lines_are_cut_at_line_feeds_only(tmp_path: Path) -> None:
    odd = "a\u2028b\x0bc\x85d\r\n\nlast"
    write_pair(tmp_path / "corpus", {"en": odd, "sw": "x\r\n\u2029\nz"})
    assert texts(read(source("moses", tmp_path / "corpus"))) == [
        ("a\u2028b\x0bc\x85d\r", "x\r"),
        ("", "\u2029"),
        ("last", "z"),
    ]


def test_bad_lines_are_rejects_and_shift_nothing(tmp_path: Path) -> None:
    write_pair(tmp_path / "c", {"en": b"0\n\xff1\n2\n3\n", "sw": b"a\nb\nc\0\nd\n"})
    reading = read(source("moses", tmp_path / "c"))
    assert texts(reading) == [("0", "a"), ("3", "d")]
    assert [row["row"] for row in reading.rows] == [0, 3]
    assert reasons(reading) == [(1, "read.encoding"), (2, "read.nul")]
    assert (reading.rejects[0]["src"], reading.rejects[0]["tgt"]) == ("\ufffd1", "b")


@pytest.mark.parametrize("pack", [False, True])
def test_moses_prefix_folder_and_glob(tmp_path: Path, pack: bool) -> None:
    write_pair(tmp_path / "a" / "Books.en-sw", {"en": "one\n", "sw": "moja\n"}, pack)
    write_pair(tmp_path / "b" / "Books.en-sw", {"en": "two\n", "sw": "mbili\n"}, pack)
    (tmp_path / "a" / "README.txt").write_text("hello")
    both = [("one", "moja"), ("two", "mbili")]
    assert texts(read(source("moses", tmp_path / "a" / "Books.en-sw"))) == both[:1]
    assert source("moses", tmp_path / "a" / "Books.en-sw").shards()[0].shard == "Books.en-sw"
    assert texts(read(source("moses", tmp_path))) == both
    assert [shard.shard for shard in source("moses", tmp_path).shards()] == ["a/Books.en-sw", "b/Books.en-sw"]
    assert texts(read(source("moses", tmp_path / "*" / "Books.en-sw"))) == both
    assert texts(read(source("moses", f"file://{tmp_path}/b/Books.en-sw"))) == both[1:]


def test_moses_many_languages(tmp_path: Path) -> None:
    write_pair(tmp_path / "bible", {"eng_Latn": "one\n", "swh_Latn": "moja\n", "fra_Latn": "un\n", "txt": "x\n"})
    shards = source("moses", tmp_path / "bible").shards()
    assert [(shard.shard, shard.pair) for shard in shards] == [
        ("bible.eng_Latn-fra_Latn", ("en", "fr")),
        ("bible.eng_Latn-swh_Latn", ("en", "sw")),
        ("bible.fra_Latn-swh_Latn", ("fr", "sw")),
    ]
    assert texts(read(source("moses", tmp_path / "bible", pairs=["sw-en"]))) == [("one", "moja")]


def test_moses_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_pair(tmp_path / f"{split}.en-sw", {"en": f"{split}\n", "sw": f"{split}\n"})
    of = source("moses", tmp_path)
    assert texts(read(of)) == [("train", "train")]
    assert [shard.split for shard in of.evaluation()] == ["test", "dev"]
    assert texts(read(source("moses", tmp_path / "test.en-sw"))) == [("test", "test")]  # named, so wanted


def test_moses_names_what_is_missing(tmp_path: Path) -> None:
    write_pair(tmp_path / "corpus", {"en": "one\n"})
    with pytest.raises(InputError, match="one side of a line pair"):
        source("moses", tmp_path / "corpus").shards()
    with pytest.raises(InputError, match=r"no such file or folder\. Did you mean corpus\.en"):
        source("moses", tmp_path / "corpsu.e").shards()


@pytest.mark.parametrize("longer", ["en", "sw"])
@pytest.mark.parametrize("max_rows", [2, 65_536])
def test_unequal_sides(tmp_path: Path, longer: str, max_rows: int) -> None:
    sides = {"en": "1\n2\n3\n", "sw": "a\nb\nc\n"}
    sides[longer] += "4\n5\n6\n"
    write_pair(tmp_path / "c", sides)
    with pytest.raises(InputError, match=r"it has 6 lines and its other side, .* has 3") as error:
        read(source("moses", tmp_path / "c"), max_rows=max_rows)
    assert error.value.row == 3
    reading = read(source("moses", tmp_path / "c", on_error="keep"), max_rows=max_rows)
    assert texts(reading) == [("1", "a"), ("2", "b"), ("3", "c")]
    assert reasons(reading) == [(row, "read.unpaired") for row in (3, 4, 5)]
    side, other = ("src", "tgt") if longer == "en" else ("tgt", "src")
    assert [(row[side], row[other]) for row in reading.rejects] == [("4", None), ("5", None), ("6", None)]
    assert len(reading.problems) == 1
    assert "6 lines" in reading.problems[0]
    assert len(read(source("moses", tmp_path / "c", limit=3)).rows) == 3


def test_empty_shard_warns(tmp_path: Path) -> None:
    write_pair(tmp_path / "c", {"en": "", "sw": ""})
    reading = read(source("moses", tmp_path / "c"))
    assert (reading.rows, reading.rejects, len(reading.problems)) == ([], [], 1)
    assert "it is empty" in reading.problems[0]
    assert reading.batches == [0]


def test_batches_end_by_rows_and_bytes(tmp_path: Path) -> None:
    lines = ["x" * (i % 7) for i in range(500)] + ["y" * 3000] + ["z"] * 20
    write_pair(tmp_path / "c", {"en": "\n".join(lines), "sw": "\n".join(lines)})
    of = source("moses", tmp_path / "c")
    assert read(of, max_rows=100).batches == [100] * 5 + [21]
    small = read(of, max_bytes=1000)
    assert texts(small) == [(line, line) for line in lines]
    for rows in small.batches:
        assert rows >= 1
    assert 1 in small.batches  # the long line is alone
    first = 0
    for rows in small.batches:  # no batch could have taken the next row
        cost = [2 * (len(line) + 1) for line in lines[first : first + rows + 1]]
        assert sum(cost[:rows]) <= 1000 or rows == 1
        assert len(cost) == rows or sum(cost) > 1000
        first += rows
    write_pair(tmp_path / "p", {"en": "\n".join(lines), "sw": "\n".join(lines)}, pack=True)
    assert read(source("moses", tmp_path / "p"), max_bytes=1000).batches == small.batches


def test_limit(tmp_path: Path) -> None:
    write_pair(tmp_path / "c", {"en": "1\n\xff\n3\n4\n", "sw": "a\nb\nc\nd\n"})
    assert [row["row"] for row in read(source("moses", tmp_path / "c", limit=3), max_rows=2).rows] == [0, 1, 2]


def make_zip(path: Path, members: dict[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


MEMBERS = {
    "README": "read me",
    "LICENSE": "free",
    "NLLB.en-sw.en": "one\ntwo\n",
    "NLLB.en-sw.sw": "moja\nmbili\n",
    "NLLB.en-sw.xml": "<x/>",
    "__MACOSX/._NLLB.en-sw.en": "junk",
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_opus_zip(tmp_path: Path, method: int) -> None:
    make_zip(tmp_path / "NLLB.en-sw.txt.zip", MEMBERS, method)
    for path in (tmp_path / "NLLB.en-sw.txt.zip", tmp_path, tmp_path / "*.zip"):
        of = source("moses", path)
        assert [shard.shard for shard in of.shards()] == ["NLLB.en-sw.txt.zip"]
        assert texts(read(of)) == [("one", "moja"), ("two", "mbili")]


def test_zip_with_several_pairs(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "all.zip", {"A.de-en.de": "eins", "A.de-en.en": "one", "B.en": "1", "B.sw": "2"})
    of = source("moses", path)
    assert [(shard.shard, shard.pair) for shard in of.shards()] == [
        ("all.zip/A.de-en.de-en", ("en", "de")),
        ("all.zip/B.en-sw", ("en", "sw")),
    ]
    assert texts(read(of)) == [("one", "eins"), ("1", "2")]


@pytest.mark.parametrize("name", ["../evil.en", "/etc/evil.en", "a/../../evil.en", "C:/evil.en", "..\\evil.en"])
def test_zip_that_climbs_out(tmp_path: Path, name: str) -> None:
    path = make_zip(tmp_path / "x.zip", {**MEMBERS, name: "evil"})
    with pytest.raises(InputError, match=r"its member .* has (an absolute path|a path that climbs out of it)\."):
        source("moses", path).shards()
    reading = read(source("moses", path, on_error="keep"))
    assert texts(reading) == [("one", "moja"), ("two", "mbili")]
    assert len(reading.problems) == 1
    assert not list(tmp_path.glob("**/evil*"))


def test_zip_with_a_link(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", MEMBERS)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("NLLB.link.en")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="is a link"):
        source("moses", path).shards()


def test_zip_without_a_pair(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"README": "x", "a.en": "x"})
    with pytest.raises(InputError, match="holds no line pair"):
        source("moses", path).shards()
    assert "holds no line pair" in read(source("moses", path, on_error="keep", pairs=[])).problems[0]
