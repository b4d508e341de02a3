"""Files that are not what they should be: one message each, and what `on_error = "keep"` still reads."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import stat
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import Reading, read, reasons, source, texts

from corpusprep.errors import InputError
from corpusprep.sources import lines


def bitext(rows: int) -> list[tuple[str, str]]:
    draw = random.Random(rows)
    return [(f"one {draw.random()} {i}", f"moja {draw.random()} {i}") for i in range(rows)]


def nllb(rows: list[tuple[str, str]]) -> bytes:
    return "".join(f"{a}\t{b}\t1.25\t0.9\t0.8\tc\tu\tc\tu\n" for a, b in rows).encode()


def kept(format: str, path: Path, **settings: Any) -> Reading:
    return read(source(format, path, on_error="keep", **settings))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_members_follow_each_other(tmp_path: Path, pack: Any) -> None:
    rows = bitext(40)
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[pack]
    path = tmp_path / f"en-sw.tsv.{suffix}"
    middle = nllb(rows[10:20])
    path.write_bytes(pack(nllb(rows[:10]) + middle[:100]) + pack(middle[100:]) + pack(b"") + pack(nllb(rows[20:])))
    assert texts(read(source("nllb", path))) == rows
    path.write_bytes(path.read_bytes() + b"\0" * 1000)
    assert texts(read(source("nllb", path))) == rows
    path.write_bytes(path.read_bytes() + b"trailing")
    with pytest.raises(InputError, match=r"bytes that are not .* follow its end") as error:
        read(source("nllb", path))
    assert error.value.row == 40
    assert texts(kept("nllb", path)) == rows


@pytest.mark.parametrize("pack", ["gz", "bz2", "xz"])
def test_truncated(tmp_path: Path, pack: str) -> None:
    rows = bitext(3000)
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[pack](nllb(rows))
    path = tmp_path / f"en-sw.{pack}"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(
        InputError, match=r"en-sw\.\w+, row \d+: its \w+ data breaks off before its end\. Fetch it again"
    ):
        read(source("nllb", path))
    reading = kept("nllb", path)
    assert "breaks off" in reading.problems[0]
    if pack == "gz":
        assert 1500 < len(reading.rows) < 2500
    assert texts(reading) == rows[: len(reading.rows)]
    assert reasons(reading) in ([], [(len(reading.rows), "read.truncated")])


@pytest.mark.parametrize("format", ["nllb", "tsv", "jsonl"])
def test_gz_that_is_not_gzip(tmp_path: Path, format: str) -> None:
    name = "en-sw.jsonl.gz" if format == "jsonl" else "en-sw.tsv.gz"
    (tmp_path / name).write_bytes(b"plain\ttext\n")
    with pytest.raises(InputError, match="it is not gzip, though its name says so"):
        read(source(format, tmp_path / name))
    reading = read(source(format, tmp_path / name, on_error="keep"))
    assert (reading.rows, reading.rejects) == ([], [])
    assert "not gzip" in reading.problems[0]


def test_other_packing(tmp_path: Path) -> None:
    (tmp_path / "en-sw.tsv.zst").write_bytes(b"x")
    with pytest.raises(InputError, match="packed in a way that is not read here"):
        read(source("nllb", tmp_path / "en-sw.tsv.zst"))


def test_corrupted_gzip(tmp_path: Path) -> None:
    """Whatever bit is flipped: a message, and what stands before the place is read."""
    rows = bitext(400)
    good = gzip.compress(nllb(rows), mtime=0)
    path = tmp_path / "en-sw.gz"
    draw = random.Random(1)
    for _ in range(60):
        bad = bytearray(good)
        place = draw.randrange(len(bad))
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        reading = kept("nllb", path)
        try:
            strict = read(source("nllb", path))
        except InputError:
            assert reading.problems
        else:  # a bit of the header that says nothing of the content
            assert place < 10
            assert texts(strict) == rows
        if place > 10 and place < len(good) - 8:
            # Deflate decodes on over a flipped literal; the rows before it are sound.
            sound = max(0, place * 400 // len(good) - 60)
            assert texts(reading)[:sound] == rows[:sound]
        if place >= len(good) - 8:  # the checksum: all was read
            assert texts(reading) == rows


def test_damaged_side_keeps_the_common_rows(tmp_path: Path) -> None:
    rows = bitext(2000)
    packed = gzip.compress("".join(f"{a}\n" for a, _ in rows).encode())
    (tmp_path / "c.en.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "c.sw").write_text("".join(f"{b}\n" for _, b in rows))
    with pytest.raises(InputError, match="breaks off"):
        read(source("moses", tmp_path / "c"))
    reading = kept("moses", tmp_path / "c")
    assert 500 < len(reading.rows) < 1500
    assert texts(reading) == rows[: len(reading.rows)]
    assert len(reading.rows) + len(reading.rejects) == 2000
    found = dict(reasons(reading))
    assert found[1999] == "read.unpaired"
    assert set(found.values()) <= {"read.truncated", "read.unpaired"}
    assert len(reading.problems) == 2


def test_zip_damage(tmp_path: Path) -> None:
    rows = bitext(2000)
    path = tmp_path / "N.en-sw.zip"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("N.en-sw.en", "".join(f"{a}\n" for a, _ in rows))
            archive.writestr("N.en-sw.sw", "".join(f"{b}\n" for _, b in rows))
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 4] ^= 0xFF
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"member N\.en-sw\.en, row \d+: its .*data is damaged"):
            read(source("moses", path))
        reading = kept("moses", path)
        assert any("damaged" in problem for problem in reading.problems)
        if method != zipfile.ZIP_BZIP2:
            assert texts(reading)[:400] == rows[:400]
    path.write_bytes(bytes(raw[: len(raw) // 2]))
    with pytest.raises(InputError, match="it is not a zip file that can be read"):
        source("moses", path).shards()
    assert "not a zip" in read(source("moses", path, on_error="keep")).problems[0]


def test_encrypted_zip(tmp_path: Path) -> None:
    path = tmp_path / "N.en-sw.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("N.en-sw.en", "one\n")
        archive.writestr("N.en-sw.sw", "moja\n")
    raw = bytearray(path.read_bytes())
    for place in range(len(raw) - 4):
        if raw[place : place + 4] == b"PK\1\2":
            raw[place + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="it is encrypted"):
        read(source("moses", path))


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "english-swahili.tsv").write_text("a\tb\n")
    with pytest.raises(InputError, match=r"no such file or folder\. Did you mean english-swahili\.tsv"):
        source("tsv", tmp_path / "english-swahli.tsv").shards()
    with pytest.raises(InputError, match="no file matches"):
        source("nllb", tmp_path / "*.gz").shards()
    of = source("tsv", tmp_path / "english-swahili.tsv", src_lang="en", tgt_lang="sw")
    (shard,) = of.shards()
    (tmp_path / "english-swahili.tsv").unlink()
    with pytest.raises(InputError, match="no such file"):
        read(of, [shard])
    with pytest.raises(InputError, match="no such file"):
        of.identity(shard)


def test_folder_where_a_file_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "c.en").mkdir()
    (tmp_path / "c.sw").write_text("a\n")
    with pytest.raises(InputError):
        source("moses", tmp_path / "c").shards()
    of = source("nllb", tmp_path / "en-sw.gz")
    (tmp_path / "en-sw.gz").write_bytes(b"")
    (shard,) = of.shards()
    (tmp_path / "en-sw.gz").unlink()
    (tmp_path / "en-sw.gz").mkdir()
    with pytest.raises(InputError, match="it is a folder, where a file is wanted"):
        read(of, [shard])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "en-sw.tsv")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        source("tsv", tmp_path / "en-sw.tsv").shards()
    with pytest.raises(InputError, match="no tsv files are here"):
        source("tsv", tmp_path).shards()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "en-sw.gz"
    path.write_bytes(b"")
    path.chmod(0)
    try:
        with pytest.raises(InputError, match="it may not be read"):
            read(source("nllb", path))
    finally:
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_links_that_loop(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "en-sw.gz").write_bytes(gzip.compress(nllb(bitext(2))))
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "loop.gz").symlink_to(tmp_path / "loop.gz")
    assert len(read(source("nllb", tmp_path)).rows) == 2
    with pytest.raises(InputError, match="a link that leads to itself"):
        source("nllb", tmp_path / "loop.gz").shards()


@pytest.mark.parametrize("raw", [b"", gzip.compress(b"", mtime=0)], ids=["bare", "packed"])
def test_empty_files_warn(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "en-sw.gz").write_bytes(raw)
    reading = read(source("nllb", tmp_path / "en-sw.gz"))
    assert (reading.rows, reading.rejects, reading.batches) == ([], [], [0])
    assert "it is empty" in reading.problems[0]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/part\xff"
    os.mkdir(folder)
    with open(folder + b"/en-sw.gz", "wb") as file:
        file.write(gzip.compress(nllb(bitext(2))))
    of = source("nllb", tmp_path)
    assert [shard.shard for shard in of.shards()] == ["part\ufffd/en-sw.gz"]
    assert {row["shard"] for row in read(of).rows} == {"part\ufffd/en-sw.gz"}
    assert of.identity(of.shards()[0])


def test_very_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "x" * 9_000_000
    (tmp_path / "c.en").write_text(f"a\n{long}\nb\n")
    (tmp_path / "c.sw").write_text("1\n2\n3")
    assert [len(src) for src, _ in texts(read(source("moses", tmp_path / "c"), max_bytes=1000))] == [1, 9_000_000, 1]
    monkeypatch.setattr(lines, "MAX_LINE", 1_000_000)
    reading = read(source("moses", tmp_path / "c"))
    assert texts(reading) == [("a", "1"), ("b", "3")]
    assert reasons(reading) == [(1, "read.line_length")]
    assert reading.rejects[0]["src"] == "x" * 4096
    assert reading.rejects[0]["tgt"] == "2"
    (tmp_path / "en-sw.gz").write_bytes(gzip.compress(nllb([("a", "b")]) + long.encode()))
    reading = read(source("nllb", tmp_path / "en-sw.gz"))
    assert reasons(reading) == [(1, "read.line_length")]


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "en-sw.tsv"
    path.write_text("a\tb\n" * 100_000)
    os.utime(path, ns=(1, 1))
    of = source("tsv", path)
    (shard,) = of.shards()
    first = of.identity(shard)
    assert of.identity(shard) == first
    assert source("tsv", tmp_path).identity(shard) == first
    seen = {first}
    for place in (0, -3):
        raw = bytearray(path.read_bytes())
        raw[place] = ord("z")
        path.write_bytes(raw)
        os.utime(path, ns=(1, 1))
        seen.add(of.identity(shard))
    os.utime(path, ns=(2, 2))
    seen.add(of.identity(shard))
    assert len(seen) == 4


def test_damaged_parquet(tmp_path: Path) -> None:
    rows = bitext(4000)
    path = tmp_path / "en-sw.parquet"
    table = pa.table({"src": [a for a, _ in rows], "tgt": [b for _, b in rows]})
    pq.write_table(table, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    good = path.read_bytes()
    begin = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    bad = bytearray(good)
    bad[begin + 500 : begin + 900] = b"\xaa" * 400
    path.write_bytes(bad)
    with pytest.raises(InputError, match="its row group 1 is damaged") as error:
        read(source("parquet", path))
    assert error.value.row == 1000
    reading = kept("parquet", path)
    assert texts(reading) == rows[:1000] + rows[2000:]
    assert [row["row"] for row in reading.rows] == [*range(1000), *range(2000, 4000)]
    assert "1000 rows are lost" in reading.problems[0]
    path.write_bytes(good[:-20])
    with pytest.raises(InputError, match="it is not a Parquet file that can be read"):
        source("parquet", path).shards()
    assert "not a Parquet file" in kept("parquet", path).problems[0]


def test_files_elsewhere() -> None:
    """Other file systems, by URL, through fsspec."""
    import fsspec

    memory = fsspec.filesystem("memory")
    rows = bitext(30)
    memory.pipe("/corpora/nllb/en-sw.gz", gzip.compress(nllb(rows)))
    memory.pipe("/corpora/moses/C.en-sw.en", b"one\n")
    memory.pipe("/corpora/moses/C.en-sw.sw", b"moja\n")
    for path in ("memory://corpora/nllb/en-sw.gz", "memory://corpora/nllb", "memory://corpora/*/en-sw.gz"):
        of = source("nllb", path)
        assert texts(read(of)) == rows
        assert of.identity(of.shards()[0]) == of.identity(of.shards()[0])
    assert [shard.shard for shard in source("nllb", "memory://corpora").shards()] == ["nllb/en-sw.gz"]
    assert texts(read(source("moses", "memory://corpora/moses/C.en-sw"))) == [("one", "moja")]
    with pytest.raises(InputError, match="no file is there"):
        source("nllb", "memory://corpora/nothing").shards()
    with pytest.raises(InputError, match="cannot be read: Protocol not known"):
        source("nllb", "nosuch://corpora").shards()
