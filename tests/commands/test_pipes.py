"""Stages that are joined in a shell: what comes through a pipe, what goes into one, and what is left behind."""

from __future__ import annotations

import gzip
import io
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from conftest import sentences
from stage_files import PACKERS, ROWS, content, read, table, write

from corpusprep import InputError, SettingsError
from corpusprep.commands.agree import agree
from corpusprep.commands.stage import run_stage
from corpusprep.sources import standard_input
from corpusprep.stages.quality import QualitySettings

COMMAND = f"{shlex.quote(sys.executable)} -m corpusprep"
KEPT = [ROWS[0], ROWS[1], ROWS[3]]


def shell(line: str, folder: Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs a line in which `corpusprep` is the command; temporary files go to a folder that must be empty afterwards."""
    (folder / "tmp").mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("corpusprep", COMMAND)],
        input=data, capture_output=True, timeout=120, cwd=folder, env={**os.environ, "TMPDIR": str(folder / "tmp")},
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert list((folder / "tmp").iterdir()) == []
    return done


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def put(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


def test_joined_stages_give_what_two_steps_give(tmp_path: Path) -> None:
    write(tmp_path / "in.tsv", table().with_columns(id=pl.Series([3, 2, 1, 0])))
    run_stage("clean", tmp_path / "in.tsv", tmp_path / "clean.tsv")
    run_stage("langid", tmp_path / "clean.tsv", tmp_path / "langid.jsonl")
    joined = shell(
        "corpusprep clean - - --from tsv --to tsv --rejects lost.jsonl | corpusprep langid - - --from tsv --to jsonl",
        tmp_path,
        (tmp_path / "in.tsv").read_bytes(),
    )
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout == (tmp_path / "langid.jsonl").read_bytes()
    assert joined.stderr.count(b"kept (rows)") == 2, "the report is not among the rows"
    assert read(tmp_path / "lost.jsonl")["reason"].to_list() == ["clean.empty"]


def test_parquet_goes_through_pipes(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl")
    line = "corpusprep clean in.jsonl - --to parquet | corpusprep dedup - out.parquet --from parquet --on-error keep"
    done = shell(line, tmp_path)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out.parquet")
    assert found.height == 2
    assert found.schema["fingerprint"] == pl.UInt64


def test_a_reader_that_leaves_early_ends_the_command_quietly(tmp_path: Path) -> None:
    noise = pl.Series("id", [random.Random(i).randbytes(20).hex() for i in range(20_000)])  # more than a pipe holds
    rows = pl.DataFrame(sentences(20_000, 5), schema=["src", "tgt"], orient="row").with_columns(noise)
    write(tmp_path / "in.tsv", rows.with_columns(src_lang=pl.lit("en"), tgt_lang=pl.lit("de")))
    for kind, unbuffered in (("jsonl", "1"), ("parquet", "")):
        done = shell(f"PYTHONUNBUFFERED={unbuffered} corpusprep clean in.tsv - --to {kind} | head -c 3", tmp_path)
        assert (done.returncode, len(done.stdout)) == (141, 3)
        assert done.stderr == b""


@pytest.mark.parametrize(
    ("kind", "packed"), [("parquet", ""), *((kind, packed) for kind in ("tsv", "jsonl") for packed in ("", *PACKERS))]
)
@pytest.mark.parametrize("target", ["out.jsonl", "out.parquet"])
def test_packed_pipes(tmp_path: Path, stdin: Callable[[bytes], None], packed: str, kind: str, target: str) -> None:
    data = content(kind)
    stdin(PACKERS[packed].compress(data) if packed else data)
    run_stage("clean", "-", tmp_path / target, read_as=kind)
    assert read(tmp_path / target).select("src", "tgt").rows() == KEPT


def test_a_pipe_is_kept_in_a_file_only_where_it_must_be(
    tmp_path: Path, stdin: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    spooled = []
    spool = standard_input.StandardInput.spool
    monkeypatch.setattr(standard_input.StandardInput, "spool", lambda self: (spooled.append(self), spool(self)))
    for name, kind, target, rejects, expected in (
        ("clean", "tsv", "out.parquet", "lost.tsv", False),
        ("dedup", "jsonl", "out.parquet", "lost.tsv", False),
        ("clean", "jsonl", "out.jsonl", "lost.jsonl", False),
        ("clean", "jsonl", "out.jsonl", "lost.tsv", True),
        ("clean", "jsonl", "out.tsv", None, True),
        ("clean", "parquet", "out.tsv", None, True),
    ):
        spooled.clear()
        stdin(content(kind))
        run_stage(name, "-", tmp_path / target, rejects=rejects and tmp_path / rejects, read_as=kind)
        assert bool(spooled) == expected, (name, kind, target, rejects)
        assert standard_input.standard_input()._file is None


def test_fields_that_come_late_are_found_before_columns_are_fixed(
    tmp_path: Path, stdin: Callable[[bytes], None]
) -> None:  # fmt: skip
    rows = [
        b'{"src": "The bridge is %d.", "tgt": "Die Br\xc3\xbccke ist %d.", "id": %d}' % (i, i, i) for i in range(70_000)
    ]
    rows[-1] = (
        b'{"src": "The end.", "tgt": "Das Ende.", "id": 18446744073709551615, "late": [1.5], "when": "2020-01-01"}'
    )
    stdin(b"\n".join(rows))
    options = {"read_as": "jsonl", "src_lang": "en", "tgt_lang": "de", "overrides": ["enabled=false"]}
    run_stage("langid", "-", tmp_path / "out.parquet", **options)
    found = read(tmp_path / "out.parquet")
    assert found.select("late", "when", "id").rows()[-1] == ([1.5], "2020-01-01", 18446744073709551615)
    assert found.height - 1 == found["late"].null_count() == found["when"].null_count()
    assert found["id"].to_list()[:-1] == list(range(69_999))
    stdin(b"\n".join([b'{"src": "a", "tgt": "b", "id": "none"}', *rows[2:], rows[1]]))
    with pytest.raises(InputError, match="row 1: the type of its field 'id' changes here"):
        run_stage("langid", "-", tmp_path / "out2.parquet", **options)
    stdin(b"\n".join([b'{"src": "a", "tgt": "b", "late": 1}', *rows[1:]]))
    with pytest.raises(InputError, match=r"row 65536: the type of a field changes from here on .*Field late"):
        run_stage("langid", "-", tmp_path / "out2.parquet", **options)
    stdin(b"\n".join([b'{"src": "a", "tgt": "b", "late": 1}', *rows[1:]]))
    run_stage("langid", "-", tmp_path / "out2.jsonl", **options)
    assert (tmp_path / "out2.jsonl").read_bytes().count(b"\n") == 70_000, "lines of JSON need no one type"
    stdin(b"\n".join([b'{"src": "a", "tgt": "b", "late": 1}', *rows[1:]]))
    with pytest.raises(InputError, match="standard input: a field does not have the same type in all rows"):
        run_stage("dedup", "-", tmp_path / "out3.jsonl", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"out.parquet", "out2.jsonl"}


def test_an_empty_pipe(tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    done = shell("corpusprep clean - - --from tsv --to tsv --rejects lost.tsv", tmp_path)
    assert (done.returncode, done.stdout) == (0, b"src\ttgt\tsrc_lang\ttgt_lang\n")
    assert b"warning: standard input: it is empty." in done.stderr
    assert (tmp_path / "lost.tsv").read_bytes().startswith(b"src\ttgt\tsrc_lang\ttgt_lang\treason")
    stdin(b"")
    with pytest.raises(InputError, match="standard input: it is not a Parquet file"):
        run_stage("clean", "-", tmp_path / "out.tsv", read_as="parquet")


def test_what_a_pipe_must_be_told(tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    stdin(content("tsv"))
    for source, target, options, message in (
        ("-", "out.tsv", {}, "standard input: its format is not known. Give --from"),
        (write(tmp_path / "in.tsv"), "-", {}, "standard output: its format is not known. Give --to"),
        ("-", "out.tsv", {"read_as": "moses"}, "standard input: moses is read from files"),
        ("-", "out.tsv", {"read_as": "tsv", "rejects": "-"}, "--rejects -"),
    ):
        with pytest.raises(SettingsError, match=message):
            run_stage("clean", source, target if target == "-" else tmp_path / target, **options)
    stdin(b"one\ttwo\n")
    with pytest.raises(InputError, match=r"standard input: nothing tells its languages\. .*--src-lang en"):
        run_stage("clean", "-", tmp_path / "out.tsv", read_as="tsv")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tsv"]


def test_nothing_is_left_of_a_command_that_fails(tmp_path: Path) -> None:
    whole = gzip.compress(content("jsonl", pl.DataFrame(sentences(3000, 1), schema=["src", "tgt"], orient="row")))
    line = "corpusprep clean - out.parquet --from jsonl --src-lang en --tgt-lang de --rejects folder/lost.tsv.gz"
    done = shell(line, tmp_path, whole[: len(whole) // 2])
    assert done.returncode == 2
    assert b"error: standard input, row" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_standard_output_gets_all_of_a_large_table(tmp_path: Path) -> None:
    """Writes to a pipe are partial where Python does not buffer them."""
    frame = table().select(pl.col("src").repeat_by(20_000).list.join(" ").alias("src"), "tgt", "src_lang", "tgt_lang")
    write(tmp_path / "in.tsv", frame)
    command = "corpusprep dedup in.tsv - --to jsonl --set near=false"
    done = shell(f"PYTHONUNBUFFERED=1 {command} | (sleep 0.3; cat)", tmp_path)
    run_stage("dedup", tmp_path / "in.tsv", tmp_path / "out.jsonl", overrides=["near=false"])
    assert done.stdout == (tmp_path / "out.jsonl").read_bytes()
    assert len(done.stdout) > 1_500_000


def test_devices_and_named_pipes_are_written_to_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "in.tsv")
    os.mkfifo(tmp_path / "pipe.tsv")
    done = shell("corpusprep clean in.tsv pipe.tsv >&2 & cat pipe.tsv; wait $!", tmp_path)
    assert done.returncode == 0, done.stderr
    assert pl.read_csv(done.stdout, separator="\t").select("src", "tgt").rows() == KEPT
    run_stage("clean", tmp_path / "in.tsv", "/dev/null", write_as="parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"in.tsv", "pipe.tsv", "tmp"}


def test_agree_reads_a_pipe(tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    text = "".join(f"{english}\t{german}\t{i}\n" for i, (english, german) in enumerate(sentences(40, 2)))
    (tmp_path / "en-de.tsv").write_text(text)
    settings = QualitySettings(scorer="test_agree:by_hash")
    stdin(gzip.compress(text.encode()))
    assert agree("-", settings, src_lang="en", tgt_lang="de") == agree(tmp_path / "en-de.tsv", settings)
