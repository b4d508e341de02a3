"""One stage on one file: formats, columns, languages, rejects and errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpusprep import CorpusprepError, InputError, SettingsError
from corpusprep.cli import cli
from corpusprep.commands.stage import STAGES, describe_settings, run_stage

ROWS = [
    ("The bridge near the old village is closed today.", "Die Brücke bei dem alten Dorf ist heute gesperrt."),
    ("The bridge near the old village is closed today.", "Die Brücke bei dem alten Dorf ist heute gesperrt."),
    ("", "Niemand weiß, was hier steht."),
    ("We bought bread and water in the morning.", "Am Morgen kauften wir Brot und Wasser."),
]


def table() -> pl.DataFrame:
    return pl.DataFrame(ROWS, schema=["src", "tgt"], orient="row").with_columns(
        src_lang=pl.lit("en"), tgt_lang=pl.lit("deu_Latn")
    )


def write(path: Path) -> Path:
    frame = table()
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif ".jsonl" in path.name:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in frame.iter_rows(named=True))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    else:
        lines = "\n".join("\t".join(row) for row in [tuple(frame.columns), *frame.rows()]) + "\n"
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def read(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if ".jsonl" in path.name:
        return pl.DataFrame([json.loads(line) for line in data.splitlines()])
    return pl.read_csv(data, separator="\t", quote_char=None)


@pytest.mark.parametrize("source", ["in.parquet", "in.jsonl", "in.jsonl.gz", "in.tsv", "in.tsv.gz"])
@pytest.mark.parametrize("target", ["out.parquet", "out.jsonl", "out.tsv.gz"])
def test_clean_from_and_to_every_format(tmp_path: Path, source: str, target: str) -> None:
    rejects = tmp_path / "lost.jsonl"
    report = run_stage("clean", write(tmp_path / source), tmp_path / target, rejects=rejects)
    kept = read(tmp_path / target)
    assert kept["src"].to_list() == [ROWS[0][0], ROWS[1][0], ROWS[3][0]]
    assert kept["tgt_lang"].to_list() == ["de"] * 3
    assert read(rejects).select("tgt", "reason").rows() == [(ROWS[2][1], "clean.empty")]
    assert "clean.empty" in report


def test_stages_follow_each_other_and_columns_travel(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.parquet" for name in STAGES}
    previous = write(tmp_path / "in.parquet")
    for name, file in files.items():
        run_stage(name, previous, file, rejects=tmp_path / f"{name}.lost.parquet")
        previous = file
    assert read(files["langid"])["src_lid"].to_list() == ["en"] * 3
    assert read(files["dedup"]).height == 2
    assert read(tmp_path / "dedup.lost.parquet")["reason"].to_list() == ["dedup.exact"]
    quality = read(files["quality"])
    assert quality.schema["quality"] == pl.Float32
    assert quality.schema["fingerprint"] == pl.UInt64
    assert read(files["balance"]).schema["tokens"] == pl.Int32
    messages = read(files["instruct"])
    assert messages.height == 4
    assert {turn["role"] for turn in messages["messages"][0]} == {"user", "assistant"}


def test_columns_of_stages_survive_tsv(tmp_path: Path) -> None:
    run_stage("langid", write(tmp_path / "in.tsv"), tmp_path / "a.tsv", overrides=["reject_below=0"])
    run_stage("dedup", tmp_path / "a.tsv", tmp_path / "b.tsv")
    run_stage("quality", tmp_path / "b.tsv", tmp_path / "c.parquet", overrides=["scorer=column", "column=src_lid_prob"])
    frame = read(tmp_path / "c.parquet")
    assert frame.schema["quality"] == pl.Float32
    assert frame["quality"].null_count() == 0


def test_two_columns_with_languages_given(tmp_path: Path) -> None:
    path = tmp_path / "plain.tsv"
    path.write_text("".join(f"{src}\t{tgt}\n" for src, tgt in ROWS))
    run_stage("clean", path, tmp_path / "out.jsonl", src_lang="eng", tgt_lang="deu")
    assert read(tmp_path / "out.jsonl").select("src_lang", "tgt_lang").unique().rows() == [("en", "de")]
    with pytest.raises(InputError, match="--src-lang"):
        run_stage("clean", path, tmp_path / "out2.jsonl")


def test_malformed_rows_are_rejects_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "in.tsv"
    path.write_bytes(
        b"src\ttgt\tsrc_lang\ttgt_lang\nThe first line is here.\tDie erste Zeile ist hier.\ten\tde\n"
        b"too few\nBroken \xff bytes\tx\ten\tde\nA NUL \x00 here\tx\ten\tde\n"
    )
    run_stage("clean", path, tmp_path / "out.parquet", rejects=tmp_path / "lost.parquet")
    assert read(tmp_path / "lost.parquet").select("row", "reason").rows() == [
        (2, "read.columns"), (3, "read.encoding"), (4, "read.nul"),
    ]  # fmt: skip
    lines = tmp_path / "in.jsonl"
    lines.write_bytes(
        b'{"src": "a b c d", "tgt": "a b e f", "src_lang": "en", "tgt_lang": "de"}\n{"src": 1\n[1, 2]\n\n'
        b'{"src": "\\ud800", "tgt": "x", "src_lang": "en", "tgt_lang": "de"}\n'
    )
    run_stage("dedup", lines, tmp_path / "out2.parquet", rejects=tmp_path / "lost2.jsonl")
    assert read(tmp_path / "out2.parquet").height == 1
    assert [(r["row"], r["reason"]) for r in read(tmp_path / "lost2.jsonl").to_dicts()] == [
        (1, "read.json"), (2, "read.json"), (3, "read.json"), (4, "read.encoding"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"a,b", "suffix tells the format"),
        ("in.parquet.gz", b"x", "suffix tells the format"),
        ("in.parquet", b"not parquet", "not whole Parquet"),
        ("in.tsv", b"", "is empty"),
        ("in.jsonl", b'{"src": "a", "tgt": "b"}\n', "--src-lang"),
        ("in.jsonl", b'{"src": 5, "tgt": "b", "src_lang": "en", "tgt_lang": "de"}\n', "not text"),
        ("in.jsonl", b'{"src": "a", "tgt": "b", "src_lang": "english", "tgt_lang": "de"}\n', "not a language code"),
        ("in.jsonl", b'{"src": "a", "tgt": "b", "src_lang": null, "tgt_lang": "de"}\n', "src_lang"),
        ("in.tsv.gz", b"no gzip", "gzip"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusprepError, match=message):
        run_stage("clean", tmp_path / name, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_file_unknown_setting_and_lists_in_tsv(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.parquet"):
        run_stage("clean", tmp_path / "missing.parquet", tmp_path / "out.parquet")
    source = write(tmp_path / "in.parquet")
    with pytest.raises(SettingsError, match="Did you mean 'max_chars'"):
        run_stage("clean", source, tmp_path / "out.parquet", overrides=["max_char=3"])
    with pytest.raises(SettingsError, match="holds lists"):
        run_stage("instruct", source, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), kind=st.sampled_from(["in.tsv", "in.jsonl", "in.parquet", "in.tsv.gz"]))
def test_no_bytes_make_a_stage_fall(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / kind).write_bytes(content)
    try:
        run_stage("clean", tmp_path / kind, tmp_path / "out.parquet", src_lang="en", tgt_lang="sw")
    except CorpusprepError as error:
        if kind not in str(error):
            raise


def test_settings_are_described() -> None:
    text = describe_settings(None)
    for name in STAGES:
        assert f"[{name}]" in text
    assert "max_distance = 3" in describe_settings("dedup")
    for name, setting in (("source", "path ="), ("stage", "function ="), ("rejects", "text ="), ("train", "model =")):
        assert setting in describe_settings(name)
        assert CliRunner().invoke(cli, ["settings", name]).output.strip() == describe_settings(name)
    for line, following in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if " = " in line and line.startswith("  ") and not line.startswith("      "):
            assert following.strip(), line
