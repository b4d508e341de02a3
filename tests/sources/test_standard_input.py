"""Standard input as a file, and files whose packing their names do not tell."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reading import read, source, texts

from corpusprep.errors import InputError
from corpusprep.sources import SourceSettings, open_source
from corpusprep.sources.files import BLOCK, blocks, open_binary, printable, read_head
from corpusprep.sources.standard_input import standard_input
from corpusprep.sources.unpack import packing

PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
TEXT = b"".join(b"line %d of a text that is longer than a block\n" % i for i in range(20_000))


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def put(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


@pytest.mark.parametrize("pack", [bytes, *PACK.values()])
def test_its_head_can_be_looked_at_and_is_read_again(
    stdin: Callable[[bytes], None], pack: Callable[..., bytes]
) -> None:
    assert len(TEXT) > 2 * BLOCK
    stdin(pack(TEXT))
    assert read_head("-", 100) == TEXT[:100]
    assert read_head("-", 3 * BLOCK) == TEXT[: 3 * BLOCK]
    assert read_head("-", 10) == TEXT[:10]
    look = blocks("-", look=True)
    next(look)
    look.close()  # type: ignore[attr-defined]
    assert b"".join(blocks("-")) == TEXT
    with pytest.raises(InputError, match=r"standard input: it can be read only once\. Write it to a file"):
        next(blocks("-"))


def test_in_a_temporary_file_it_is_read_like_any_file(
    stdin: Callable[[bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stdin(TEXT)
    assert read_head("-", 10) == TEXT[:10]
    with open_binary("-") as one, open_binary("-") as two:
        assert one.seek(-7, 2) == len(TEXT) - 7
        assert two.read(50) == TEXT[:50]
        assert one.read() == TEXT[-7:]
        assert two.seek(5, 1) == two.tell() == 55
        assert two.read(10) == TEXT[55:65]
    assert b"".join(blocks("-")) == b"".join(blocks("-")) == TEXT
    assert list(tmp_path.iterdir()) == [], "the file has no name that could stay behind"
    standard_input().close()
    with pytest.raises(InputError, match="only once"):
        next(blocks("-"))


def test_no_room_and_no_input(stdin: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(TEXT)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(InputError, match=r"cannot be kept in a temporary file in /nowhere .* set TMPDIR"):
        open_binary("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input: it is closed"):
        next(blocks("-"))
    assert printable("-") == "standard input"


def test_a_damaged_pipe(stdin: Callable[[bytes], None]) -> None:
    packed = gzip.compress(TEXT)
    stdin(packed[: len(packed) // 2])
    found: list[bytes] = []
    with pytest.raises(InputError, match=r"standard input.*breaks off"):
        found.extend(blocks("-", salvage=True))
    assert TEXT.startswith(b"".join(found))
    found = [b"".join(found)]
    assert len(found[0]) > len(TEXT) // 4


def test_a_run_does_not_read_it(stdin: Callable[[bytes], None]) -> None:
    stdin(b"one\tmoja\n")
    with pytest.raises(InputError, match="standard input: a run cannot read it"):
        source("tsv", "-", src_lang="en", tgt_lang="sw").shards()
    settings = SourceSettings(format="tsv", path="-", src_lang="en", tgt_lang="sw")
    whole = open_source(settings, whole=True)
    (shard,) = whole.shards()
    (batch,) = whole.read(shard)
    assert batch.table.to_pylist() == [{"src": "one", "tgt": "moja", "src_lang": "en", "tgt_lang": "sw"}]


@pytest.mark.parametrize("kind", list(PACK))
def test_packing_is_told_by_the_first_bytes(tmp_path: Path, kind: str) -> None:
    for text in (b"", b"one\tmoja\n", TEXT):
        packed = PACK[kind](text)
        assert packing(packed[:BLOCK]) == kind
        assert packing(packed[:9] + b"and then something else that no packer writes") is None
    (tmp_path / "en-sw.tsv").write_bytes(PACK[kind](b"one\tmoja\n"))
    assert texts(read(source("tsv", tmp_path / "en-sw.tsv"))) == [("one", "moja")]


def test_text_is_not_taken_for_packed(tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    for text in (b"BZh91 is a word\tmoja\n", b"\x1f\x8b\tmoja\n", b"\xfd7zXZ\tmoja\n", b"B", b""):
        assert packing(text) is None
        (tmp_path / "en-sw.tsv").write_bytes(text)
        reading = read(source("tsv", tmp_path / "en-sw.tsv"))
        assert len(reading.rows) + len(reading.rejects) == (1 if text else 0)
    stdin(b"\x28\xb5\x2f\xfd\x04\x00")
    with pytest.raises(InputError, match="standard input: it is packed with zstd, which is not read here"):
        next(blocks("-"))
