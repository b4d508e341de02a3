"""What a scorer is worth on given languages."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import sentences

from corpusprep import InputError, SettingsError
from corpusprep.arrow import hash_strings
from corpusprep.cli import cli, main
from corpusprep.commands.agree import agree, describe
from corpusprep.stages.quality import QualitySettings, quality


def by_hash(table: pa.Table) -> np.ndarray:
    """A score in [0, 1) that text alone decides, and length does not."""
    return (hash_strings(table["src"], 7) >> np.uint64(40)).astype(np.float64) / 2**24


def with_human_scores(path: Path, rows: int = 400, header: str = "") -> Path:
    """Pairs of which a third is mismatched, with scores that say so."""
    draw = random.Random(3)
    pairs = sentences(rows, 11)
    lines = []
    for number, (english, german) in enumerate(pairs):
        wrong = number % 3 == 0
        other = pairs[(number + 7) % rows][1] if wrong else german
        lines.append(f"{english}\t{other}\t{draw.gauss(20 if wrong else 80, 5):.2f}\t{draw.random()}")
    content = (header + "\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_agreement_with_human_scores(tmp_path: Path) -> None:
    found = agree(with_human_scores(tmp_path / "en-de.tsv.gz"), QualitySettings())
    assert (found.pair, found.rows, found.unjudged) == ("en-de", 400, 0)
    assert found.spearman is not None
    assert found.pearson is not None
    assert found.spearman > 0.6
    assert found.pearson > 0.8
    assert found.auc is not None
    noise = agree(tmp_path / "en-de.tsv.gz", QualitySettings(), human=3, shuffled=0)
    assert noise.spearman is not None
    assert noise.margin is not None
    assert abs(noise.spearman) < 2 * noise.margin
    assert noise.auc is None
    table = describe([found, noise])
    assert "mean" in table.split("\n")[-1]


def test_correlations_are_those_of_their_definition(tmp_path: Path) -> None:
    path = with_human_scores(tmp_path / "a.tsv", header="src\tmt\tda_mean\tnoise\n")
    settings = QualitySettings(scorer="test_agree:by_hash")
    found = agree(path, settings, src_lang="eng_Latn", tgt_lang="de", shuffled=0.3)
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    ours = by_hash(pa.table({"src": [row[0] for row in rows]})).astype(np.float32)
    human = np.array([float(row[2]) for row in rows])
    ranks = [values.argsort().argsort().astype(float) for values in (ours, human)]
    assert found.pearson == pytest.approx(np.corrcoef(ours, human)[0, 1], abs=1e-6)
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-3)
    assert found.auc == pytest.approx(0.5, abs=0.08)  # the scorer looks at one side alone


def test_true_pairs_are_told_from_shuffled_ones(tmp_path: Path) -> None:
    path = tmp_path / "de-en.tsv"
    path.write_text("".join(f"{german}\t{english}\n" for english, german in sentences(1500, 12)))
    found = agree(path, QualitySettings())
    assert found.pair == "de-en"
    assert found.spearman is None
    assert found.auc is not None
    assert found.auc > 0.95


def test_the_lexical_score_orders_machine_translations_as_people_do(data: Path) -> None:
    """Weakly, as it sees words and no sense; the bound is half of what was measured."""
    file = data / "qe" / "qe_mlqe-pe_train" / "ro-en.tsv.gz"
    found = agree(file, QualitySettings(), human=3, shuffled=0)
    assert found.spearman is not None
    assert found.spearman > 0.16


def test_good_rows_are_told_apart_by_the_lexical_score() -> None:
    rows = sentences(1500, 12)
    table = pa.table(
        {"src": [a for a, _ in rows], "tgt": [b for _, b in rows], "src_lang": ["en"] * 1500, "tgt_lang": ["de"] * 1500}
    )
    scores = quality(table).kept["quality"].to_numpy()
    assert (scores < 1).all()
    assert len(np.unique(scores)) > 0.9 * len(scores)


def test_files_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    for content, problem in (
        (b"", "it is empty"),
        (b"one column\n", "its first line has one column"),
        (b"a\tb\tc\n" * 30, "has 0 rows that can be compared"),
        (b"a\tb\n", "has 1 rows that can be compared"),
    ):
        (tmp_path / "en-de.tsv").write_bytes(content)
        with pytest.raises(InputError, match=problem):
            agree(tmp_path / "en-de.tsv", QualitySettings())
    (tmp_path / "en-de.tsv.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(InputError, match=r"its gzip data is damaged .*Fetch it again\.$"):
        agree(tmp_path / "en-de.tsv.gz", QualitySettings())
    with pytest.raises(InputError, match="there is no such file"):
        agree(tmp_path / "en-fr.tsv", QualitySettings())
    with pytest.raises(SettingsError, match="nothing tells its languages"):
        agree(tmp_path / "scores.tsv", QualitySettings())
    (tmp_path / "en-de.tsv").write_text("a\tb\t1\n" * 30)
    with pytest.raises(InputError, match="names no column 'da'"):
        agree(tmp_path / "en-de.tsv", QualitySettings(), human="da")


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    path = with_human_scores(tmp_path / "en-de.tsv")
    shown = CliRunner().invoke(cli, ["agree", str(path), str(path), "--set", "sample=5000", "--human", "2"])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"^en-de +400 +0\.\d{3} +0\.\d{3} +±0\.\d{3} +0\.\d{3}$", shown.output, re.MULTILINE)


def test_a_file_that_cannot_be_read_hides_nothing_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_human_scores(tmp_path / "en-de.tsv")
    missing = [str(tmp_path / name) for name in ("en-fr.tsv", "en-cs.tsv")]
    with pytest.raises(SystemExit) as ended:
        main(["agree", missing[0], str(path), missing[1], "--scorer", "test_agree:by_hash"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert re.search(r"^en-de +400 ", printed.out, re.MULTILINE)
    assert all(f"error: {file}: there is no such file" in printed.err for file in missing)


def test_packed_files_say_the_same_as_plain_ones(tmp_path: Path) -> None:
    plain = with_human_scores(tmp_path / "en-de.tsv")
    settings = QualitySettings(scorer="test_agree:by_hash")
    expected = agree(plain, settings)
    content = plain.read_bytes()
    for name, data in (
        ("en-de.tsv.gz", gzip.compress(content)),
        ("en-de.tsv.bz2", bz2.compress(content)),
        ("en-de.tsv.xz", lzma.compress(content)),
        ("en-de.copy.tsv", gzip.compress(content)),  # packed, and its name does not say so
        ("en-de.crlf.tsv", content.replace(b"\n", b"\r\n")),
    ):
        (tmp_path / name).write_bytes(data)
        assert agree(tmp_path / name, settings) == expected, name


def test_rows_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    rows = [f"{english}\t{german}\t{number}" for number, (english, german) in enumerate(sentences(30, 4))]
    odd = ["one column", "a\tb\thigh", "a\tb\tinf", "a\tb\tnan", "a\tb\t", " \tb\t1", "a\t\t1", "a\tb\t1\tmore"]
    (tmp_path / "en-de.tsv").write_bytes("\n".join(["SRC\tMT\tda_mean", *rows, *odd]).encode() + b"\na\xff\tb\t1\n")
    found = agree(tmp_path / "en-de.tsv", QualitySettings(scorer="test_agree:by_hash"))
    assert found.rows == 30
    by_name = agree(tmp_path / "en-de.tsv", QualitySettings(scorer="test_agree:by_hash"), human="DA_mean")
    by_number = agree(tmp_path / "en-de.tsv", QualitySettings(scorer="test_agree:by_hash"), human=2)
    assert found == by_name == by_number
