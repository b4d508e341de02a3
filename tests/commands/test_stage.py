"""One stage on one file: formats, columns, languages, rejects and errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage_files import PACKERS, ROWS, content, read, table, write

from corpusprep import CorpusprepError, InputError, SettingsError
from corpusprep.cli import cli
from corpusprep.commands.stage import STAGES, run_stage

KEPT = [ROWS[0], ROWS[1], ROWS[3]]
TEXT = ["tsv", "jsonl"]


@pytest.mark.parametrize(
    "source", ["in.parquet", *(f"in.{kind}{packed}" for kind in TEXT for packed in ("", *PACKERS))]
)
@pytest.mark.parametrize("target", ["out.parquet", "out.jsonl.bz2", "out.tsv.gz", "out.tsv.xz"])
def test_clean_from_and_to_every_format(tmp_path: Path, source: str, target: str) -> None:
    rejects = tmp_path / "lost.jsonl"
    report = run_stage("clean", write(tmp_path / source), tmp_path / target, rejects=rejects)
    kept = read(tmp_path / target)
    assert kept.columns == ["src", "tgt", "src_lang", "tgt_lang"]
    assert kept.select("src", "tgt").rows() == KEPT
    assert kept["tgt_lang"].to_list() == ["de"] * 3
    assert read(rejects).select("tgt", "reason").rows() == [(ROWS[2][1], "clean.empty")]
    assert "clean.empty" in report


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("out.tsv.gz", "out.jsonl.xz", "out.tsv.bz2", "out.parquet"):
        found = set()
        for source in ("in.parquet", "in.jsonl.gz", "in.tsv"):
            run_stage("clean", write(tmp_path / source), tmp_path / name)
            found.add((tmp_path / name).read_bytes())
        assert len(found) == 1, name


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


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_columns_of_stages_survive_text(tmp_path: Path, kind: str) -> None:
    """Their values, and in TSV their types, are those that Parquet carries."""
    ends = {}
    for between in (kind, "parquet"):
        step = tmp_path / f"a.{between}"
        run_stage("langid", write(tmp_path / "in.tsv"), step, overrides=["reject_below=0"])
        run_stage("dedup", step, tmp_path / f"b.{between}")
        run_stage("balance", tmp_path / f"b.{between}", tmp_path / f"c.{between}")
        options = ["scorer=column", "column=src_lid_prob"]
        run_stage("quality", tmp_path / f"c.{between}", tmp_path / f"{between}.end.parquet", overrides=options)
        ends[between] = read(tmp_path / f"{between}.end.parquet")
    assert ends[kind].columns == ends["parquet"].columns
    assert ends[kind].schema["fingerprint"] == pl.UInt64
    assert ends[kind]["fingerprint"].max() > 1 << 53
    if kind == "tsv":
        assert ends[kind].equals(ends["parquet"])
    for name in ends[kind].columns:
        if ends[kind].schema[name] != pl.Float64:
            assert ends[kind][name].to_list() == ends["parquet"][name].to_list(), name


def test_sides_and_other_columns_stay_as_they_are(tmp_path: Path) -> None:
    frame = table().select(
        pl.Series("id", [5, 6, 7, 8]),
        pl.col("tgt").alias("src"),
        pl.lit("deu_Latn").alias("src_lang"),
        pl.Series("note", ["a", None, "c", "1"]),
        pl.col("src").alias("tgt"),
        pl.lit("srp_Cyrl").alias("tgt_lang"),
        pl.Series("row", [9, 8, 7, 6]),
        pl.Series("source", ["web"] * 4),
    )
    for kind in ("parquet", "jsonl", "tsv"):
        run_stage("dedup", write(tmp_path / f"in.{kind}", frame), tmp_path / "out.parquet")
        found = read(tmp_path / "out.parquet")
        assert found.columns == [*frame.columns, "fingerprint"]
        assert found["src"].to_list() == [ROWS[1][1], ROWS[2][1], ROWS[3][1]], "the row that the file ranks first stays"
        assert found.select("src_lang", "tgt_lang").unique().rows() == [("de", "sr_Cyrl")]
        assert found["row"].to_list() == [8, 7, 6]
        assert [str(each) for each in found["id"]] == ["6", "7", "8"]
        assert found["note"].to_list() == ["" if kind == "tsv" else None, "c", "1"]


def test_languages_of_options_files_names_and_columns(tmp_path: Path) -> None:
    plain = "".join(f"{src}\t{tgt}\n" for src, tgt in ROWS)
    four = "".join(f"{src}\t{tgt}\teng_Latn\tdeu\n" for src, tgt in ROWS)
    one = "src\ttgt\ttgt_lang\n" + "".join(f"{src}\t{tgt}\tdeu\n" for src, tgt in ROWS)
    files: list[tuple[str, str, dict[str, Any]]] = [
        ("plain.tsv", plain, {"src_lang": "eng", "tgt_lang": "deu"}),
        ("corpus.en-de.tsv", plain, {}),
        ("four.tsv", four, {}),
        ("one.tsv", one, {"src_lang": "en"}),
        ("both.tsv", one, {"src_lang": "en", "tgt_lang": "fr"}),  # the column is the file's word
        ("en.json", "".join(json.dumps({"translation": {"en": a, "de": b}}) + "\n" for a, b in ROWS), {}),
    ]
    table().drop("src_lang").write_parquet(tmp_path / "one.parquet")
    table().select(translation=pl.struct(en="src", de="tgt")).write_parquet(tmp_path / "struct.parquet")
    for name, text, _ in files:
        (tmp_path / name).write_text(text)
    write(tmp_path / "one.jsonl", table().drop("src_lang"))
    sources = [*files, ("struct.parquet", "", {}), ("one.jsonl", "", {"src_lang": "en"})]
    sources.append(("one.parquet", "", {"src_lang": "en"}))
    for name, _, options in sources:
        run_stage("clean", tmp_path / name, tmp_path / "out.jsonl", **options)
        found = read(tmp_path / "out.jsonl")
        assert found.select("src", "tgt", "src_lang", "tgt_lang").rows() == [(*pair, "en", "de") for pair in KEPT], name
        assert set(found.columns) == {"src", "tgt", "src_lang", "tgt_lang"}, name
    for name in ("plain.tsv", "one.tsv", "one.jsonl", "one.parquet"):
        with pytest.raises(InputError, match=r"nothing tells its languages\. .* --src-lang en and --tgt-lang sw"):
            run_stage("clean", tmp_path / name, tmp_path / "out2.jsonl")


def test_columns_by_name_and_number(tmp_path: Path) -> None:
    frame = table().select(pl.col("tgt").alias("german"), pl.col("src").alias("english"), pl.Series("src", [*"abcd"]))
    options = {"src_lang": "en", "tgt_lang": "de"}
    for kind in ("parquet", "jsonl", "tsv"):
        said: list[str] = []
        run_stage(
            "clean", write(tmp_path / f"in.{kind}", frame), tmp_path / "out.tsv", say=said.append,
            columns={"src": "english", "tgt": "german"}, **options,
        )  # fmt: skip
        assert read(tmp_path / "out.tsv").columns == ["tgt", "src", "src_lang", "tgt_lang"]
        assert read(tmp_path / "out.tsv").select("src", "tgt").rows() == KEPT
        assert said == [f"{tmp_path / f'in.{kind}'}: its column 'src' is left out, as src is read from 'english'."]
        if kind != "jsonl":  # where each record is asked for itself
            with pytest.raises(InputError, match="'dutch'") as caught:
                run_stage("dedup", tmp_path / f"in.{kind}", tmp_path / "x.tsv", columns={"src": "dutch"}, **options)
            assert '= "' not in str(caught.value)
    (tmp_path / "in.tsv").write_text("".join(f"{i}\t{tgt}\tnote {i}\t{src}\n" for i, (src, tgt) in enumerate(ROWS)))
    run_stage("clean", tmp_path / "in.tsv", tmp_path / "out.tsv", columns={"src": 3, "tgt": 1}, **options)
    assert read(tmp_path / "out.tsv").columns == ["column_0", "tgt", "column_2", "src", "src_lang", "tgt_lang"]
    assert read(tmp_path / "out.tsv").select("src", "tgt").rows() == KEPT
    command = ["clean", str(tmp_path / "in.tsv"), str(tmp_path / "by.tsv"), "--src-lang", "en", "--tgt-lang", "de"]
    assert CliRunner().invoke(cli, [*command, "--column", "src=3", "--column", "tgt=1"]).exit_code == 0
    assert (tmp_path / "by.tsv").read_bytes() == (tmp_path / "out.tsv").read_bytes()
    for column, message in (("src", "write field=column"), ("source=3", "columns.source")):
        failed = CliRunner().invoke(cli, [*command, "--column", column])
        assert isinstance(failed.exception, SettingsError)
        assert message in str(failed.exception)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("\tcolumn_0\tsrc\ttgt", ["column_0_", "column_0", "src", "tgt"]),
        ("src\ttgt\tcolumn_3\t", ["src", "tgt", "column_3", "column_3_"]),
        ("\tsrc\ttgt\t", ["column_0", "src", "tgt", "column_3"]),
    ],
)
def test_a_column_without_a_name_gets_one_that_no_other_has(tmp_path: Path, header: str, expected: list[str]) -> None:
    path = tmp_path / "en-de.tsv"
    row = {"src": "A good morning to you.", "tgt": "Einen guten Morgen."}
    cells = [row.get(name, str(place)) for place, name in enumerate(header.split("\t"))]
    path.write_text(header + "\n" + "\t".join(cells) + "\n", encoding="utf-8")
    result = CliRunner().invoke(cli, ["clean", str(path), str(tmp_path / "out.tsv")])
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "out.tsv")
    assert found.columns[:4] == expected
    assert [str(value) for value in found.row(0)[:4]] == cells


def test_folders_globs_and_formats_by_option(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.tsv", table()[:2])
    write(folder / "b.tsv.xz", table()[2:].with_columns(note=pl.lit("x")))
    for source, options in ((folder, {"read_as": "tsv"}), (folder / "*.tsv*", {"read_as": "tsv"})):
        run_stage("clean", source, tmp_path / "out.parquet", **options)
        assert read(tmp_path / "out.parquet").select("src", "tgt", "note").rows() == [
            (*ROWS[0], None), (*ROWS[1], None), (*ROWS[3], "x"),
        ]  # fmt: skip
    (tmp_path / "x.en").write_text("".join(f"{src}\n" for src, _ in ROWS))
    (tmp_path / "x.de").write_text("".join(f"{tgt}\n" for _, tgt in ROWS))
    (tmp_path / "de-en").write_text("".join(f"{tgt}\t{src}\t1.2\t1\t1\ta\tb\tc\td\n" for src, tgt in ROWS))
    (tmp_path / "data.csv").write_bytes(gzip.compress(content("jsonl")))
    pair = {"src", "tgt", "src_lang", "tgt_lang"}
    for source, kind, columns in (
        ("x", "moses", pair),
        ("de-en", "nllb", pair | {"score"}),
        ("data.csv", "jsonl", pair),
    ):
        run_stage("clean", tmp_path / source, tmp_path / "out", read_as=kind, write_as="jsonl")
        found = read((tmp_path / "out").rename(tmp_path / "out.jsonl"))
        assert set(found.columns) == columns
        named = found.select("src", "tgt", "src_lang", "tgt_lang").rows()
        assert named == [(*pair, "en", "de") if kind != "nllb" else (*pair[::-1], "de", "en") for pair in KEPT]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"a,b", "suffix does not name a format"),
        ("in.parquet.gz", b"x", "suffix does not name a format"),
        ("in.parquet", b"not parquet", "not a Parquet file"),
        ("in.jsonl", b'{"src": "a", "tgt": "b"}\n', "--src-lang"),
        (
            "in.jsonl",
            b'{"src": "a", "tgt": "b", "x": 1}\n{"src": "a", "tgt": "b", "x": "y"}\n',
            "row 1: the type of its field 'x' changes",
        ),
        ("in.tsv.gz", b"no gzip", "not gzip, though its name says so"),
        ("in.tsv", b"src\ttgt\tx\tx\n", "names the column 'x' twice"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    options = {} if "--src" in message else {"src_lang": "en", "tgt_lang": "de"}
    with pytest.raises(CorpusprepError, match=message):
        run_stage("clean", tmp_path / name, tmp_path / "out.parquet", **options)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_columns_without_a_name_get_one(tmp_path: Path) -> None:
    """A header with tabs at its end, as spreadsheets write it."""
    (tmp_path / "en-de.tsv").write_text(
        "src\ttgt\t\t\nThe bridge is old.\tDie Brücke ist alt.\tx\t\n", encoding="utf-8"
    )
    run_stage("clean", tmp_path / "en-de.tsv", tmp_path / "out.tsv")
    row = ("The bridge is old.", "Die Brücke ist alt.", "x", "", "en", "de")
    assert read(tmp_path / "out.tsv").fill_null("").rows() == [row]
    assert read(tmp_path / "out.tsv").columns == ["src", "tgt", "column_2", "column_3", "src_lang", "tgt_lang"]


@pytest.mark.parametrize("name", list(STAGES))
@pytest.mark.parametrize("source", ["in.tsv", "in.jsonl", "header.tsv", "none.parquet", "none.tsv.gz"])
def test_nothing_gives_nothing_and_says_so(tmp_path: Path, name: str, source: str) -> None:
    write(tmp_path / source, table()[:0]) if source[0] in "hn" else (tmp_path / source).write_bytes(b"")
    for target in ("out.parquet", "out.jsonl", *(["out.tsv"] if name != "instruct" else [])):
        said: list[str] = []
        report = run_stage(name, tmp_path / source, tmp_path / target, say=said.append)
        assert report.endswith(" 0")
        assert len(said) == 1
        assert said[0].startswith(f"{tmp_path / source}: it ")
        assert (tmp_path / target).exists()
    wanted = ["src", "tgt", "src_lang", "tgt_lang"] if name != "instruct" else ["messages"]
    assert read(tmp_path / "out.parquet").columns[: len(wanted)] == wanted


def test_a_stage_that_keeps_nothing_writes_a_file(tmp_path: Path) -> None:
    for target in ("out.parquet", "out.tsv.gz", "out.jsonl"):
        run_stage("clean", write(tmp_path / "in.tsv", table()[2:3]), tmp_path / target, rejects=tmp_path / "lost.tsv")
        assert read(tmp_path / target).height == 0
        assert read(tmp_path / "lost.tsv")["reason"].to_list() == ["clean.empty"]


def test_damaged_files_give_what_can_be_read(tmp_path: Path) -> None:
    rows = [
        (f"Line {i} is about the bridge {i * 7919}.", f"Zeile {i} ist über Brücke {i * 7919}.") for i in range(4000)
    ]
    frame = pl.DataFrame(rows, schema=["src", "tgt"], orient="row")
    whole = gzip.compress(content("tsv", frame.with_columns(src_lang=pl.lit("en"), tgt_lang=pl.lit("de"))))
    (tmp_path / "in.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"row \d+: its gzip data breaks off before its end\. .* give --on-error keep"):
        run_stage("clean", tmp_path / "in.tsv.gz", tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tsv.gz"]
    said: list[str] = []
    run_stage("dedup", tmp_path / "in.tsv.gz", tmp_path / "out.parquet", on_error="keep", say=said.append,
              overrides=["near=false"])  # fmt: skip
    found = read(tmp_path / "out.parquet").select("src", "tgt").rows()
    assert 500 < len(found) < 3500
    assert found == rows[: len(found)]
    assert len(said) == 1
    assert "what follows is lost" in said[0]


def test_the_file_that_is_read_may_be_written(tmp_path: Path) -> None:
    for kind in ("tsv.gz", "jsonl", "parquet"):
        path = write(tmp_path / f"in.{kind}")
        run_stage("clean", path, path)
        assert read(path).select("src", "tgt").rows() == KEPT
        for target, rejects, message in (
            (path, path, "Name two files"),
            (tmp_path / "out.tsv", path, "Name another file"),
        ):
            with pytest.raises(SettingsError, match=message):
                run_stage("clean", path, target, rejects=rejects)
    assert {path.name for path in tmp_path.iterdir()} == {"in.tsv.gz", "in.jsonl", "in.parquet"}


def test_rejects_can_be_read_again(tmp_path: Path) -> None:
    run_stage("clean", write(tmp_path / "in.tsv"), tmp_path / "a.tsv", rejects=tmp_path / "lost.jsonl")
    said: list[str] = []
    run_stage("clean", tmp_path / "lost.jsonl", tmp_path / "b.jsonl", overrides=["empty=false", "min_chars=0",
              "length_ratio=false", "letters=false", "script=false"], rejects=tmp_path / "again.jsonl", say=said.append)  # fmt: skip
    assert read(tmp_path / "b.jsonl").select("src", "tgt").rows() == [ROWS[2]]
    assert "reason" not in read(tmp_path / "b.jsonl").columns
    assert "its column 'reason' is left out" in said[0]


def test_missing_file_unknown_setting_and_lists_in_tsv(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.parquet"):
        run_stage("clean", tmp_path / "missing.parquet", tmp_path / "out.parquet")
    source = write(tmp_path / "in.parquet")
    with pytest.raises(SettingsError, match="Did you mean 'max_chars'"):
        run_stage("clean", source, tmp_path / "out.parquet", overrides=["max_char=3"])
    with pytest.raises(SettingsError, match="holds lists"):
        run_stage("instruct", source, tmp_path / "out.tsv")
    with pytest.raises(SettingsError, match="is not a language code"):
        run_stage("clean", source, tmp_path / "out.tsv", src_lang="english")
    assert not (tmp_path / "out.tsv").exists()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), kind=st.sampled_from(["in.tsv", "in.jsonl", "in.parquet", "in.tsv.gz"]))
def test_no_bytes_make_a_stage_fall(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / kind).write_bytes(data)
    try:
        run_stage("clean", tmp_path / kind, tmp_path / "out.parquet", src_lang="en", tgt_lang="sw")
    except CorpusprepError as error:
        if kind not in str(error):
            raise


def test_evaluation_text_of_a_tree_is_left_out_and_said_so(tmp_path: Path) -> None:
    folder = tmp_path / "supervised" / "de-en"
    folder.mkdir(parents=True)
    for split, rows in (("train", ROWS[:2]), ("test", ROWS[3:])):
        for side, code in enumerate(("en", "de")):
            (folder / f"opus.de-en-{split}.{code}").write_text("".join(f"{row[side]}\n" for row in rows))
    said: list[str] = []
    run_stage("clean", tmp_path, tmp_path.parent / "out.jsonl", read_as="opus100", say=said.append)
    assert read(tmp_path.parent / "out.jsonl")["src"].to_list() == [ROWS[0][0], ROWS[1][0]]
    assert [line for line in said if "opus.de-en-test" in line and "are not read" in line]


def test_a_folder_with_a_file_of_unknown_languages_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.en-de.jsonl").write_text('{"src": "One line here", "tgt": "Eine Zeile hier"}\n')
    (folder / "b.jsonl").write_text('{"src": "One line here", "tgt": "Eine Zeile hier"}\n')
    with pytest.raises(InputError, match=r"b\.jsonl: nothing tells its languages"):
        run_stage("clean", folder, tmp_path / "out.jsonl", read_as="jsonl")
    (folder / "b.jsonl").unlink()
    (folder / "b.tsv").write_text("src\ttgt\tsrc_lang\nOne line here\tEine Zeile hier\ten\n")
    with pytest.raises(InputError, match=r"b\.tsv: nothing tells its languages"):
        run_stage("clean", folder, tmp_path / "out.jsonl", read_as="tsv")


def test_rejects_of_several_files_name_theirs_and_outputs_are_no_input(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.en-de.tsv").write_text("One line here\tEine Zeile hier\nbroken\n")
    run_stage("clean", folder, tmp_path / "out.jsonl", read_as="tsv", rejects=tmp_path / "lost.jsonl")
    assert read(tmp_path / "lost.jsonl").select("shard", "row").rows() == [("a.en-de.tsv", 1), ("b.en-de.tsv", 1)]
    with pytest.raises(SettingsError, match="is in the folder that is read"):
        run_stage("clean", folder, folder / "out.tsv", read_as="tsv")


def test_languages_that_are_given_must_be_those_of_the_file(tmp_path: Path) -> None:
    row = "Eine Zeile hier\tOne line here\n"
    (tmp_path / "x.de-en.tsv").write_text(row)
    with pytest.raises(InputError, match="its sides are de and en, not en"):
        run_stage("clean", tmp_path / "x.de-en.tsv", tmp_path / "out.jsonl", src_lang="en")
    run_stage("clean", tmp_path / "x.de-en.tsv", tmp_path / "out.jsonl", src_lang="deu")
    assert read(tmp_path / "out.jsonl").select("src_lang", "tgt_lang").rows() == [("de", "en")]
    (tmp_path / "c.en").write_text("One line here\n")
    (tmp_path / "c.de").write_text("Eine Zeile hier\n")
    run_stage("clean", tmp_path / "c", tmp_path / "out.jsonl", read_as="moses", src_lang="de")
    assert read(tmp_path / "out.jsonl").select("src", "src_lang", "tgt_lang").rows() == [
        ("Eine Zeile hier", "de", "en")
    ]
    with pytest.raises(InputError, match="where fr is asked for"):
        run_stage("clean", tmp_path / "c", tmp_path / "out.jsonl", read_as="moses", src_lang="fr")
    (tmp_path / "t.jsonl").write_text('{"translation": {"de": "Eine Zeile hier", "en": "One line here"}}\n')
    run_stage("clean", tmp_path / "t.jsonl", tmp_path / "out.jsonl", src_lang="en", tgt_lang="de")
    assert read(tmp_path / "out.jsonl").select("src", "src_lang").rows() == [("One line here", "en")]


def test_a_record_that_names_its_language_late_is_not_overwritten(tmp_path: Path) -> None:
    plain = '{"src": "One line here", "tgt": "Eine Zeile hier"}\n'
    late = '{"src": "One line here", "tgt": "Une ligne ici", "src_lang": "en", "tgt_lang": "fr"}\n'
    (tmp_path / "x.jsonl").write_text(plain * 120 + late)
    with pytest.raises(InputError, match=r"row 120: it names its language in 'src_lang'"):
        run_stage("clean", tmp_path / "x.jsonl", tmp_path / "out.jsonl", src_lang="en", tgt_lang="de")


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_a_score_that_is_text_is_a_column_like_others(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"in.{kind}", table().with_columns(score=pl.lit("good")))
    run_stage("clean", path, tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")["score"].to_list() == ["good"] * 3
