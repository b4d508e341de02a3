"""What thresholds would leave of a run."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from runs import recipe

from corpusprep import InputError, RunError, load_recipe, run
from corpusprep.arrow import hash_strings
from corpusprep.cli import cli
from corpusprep.commands.thresholds import read_scores

Corpus = Callable[..., Path]
SCORER = "quality.scorer=test_thresholds:by_hash"


def by_hash(table: pa.Table) -> np.ndarray:
    """A score in [0, 1) that text alone decides, and length does not."""
    return (hash_strings(table["src"], 7) >> np.uint64(40)).astype(np.float64) / 2**24


def test_thresholds_show_what_is_left(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=700, shards=2), tmp_path / "out"
    run(recipe(data, SCORER, "quality.threshold=0.3"), out, until="quality")
    [found] = read_scores(out)
    assert found.pair == "en-de"
    assert found.cutoff == 0.3
    assert np.all(np.diff(found.scores) >= 0)
    rows, tokens = found.left(0.3)
    result = run(recipe(data, SCORER, "quality.threshold=0.3"), out)
    assert result.manifest is not None
    assert rows == result.manifest["mix"]["pairs"]["en-de"]["rows"]
    assert tokens == result.manifest["mix"]["tokens"]
    wanted = tokens // 2
    threshold = found.threshold_for(wanted)
    assert found.left(threshold)[1] >= wanted > found.left(np.nextafter(np.float32(threshold), np.float32(2)))[1]
    assert [len(found.above), len(found.below)] == [3, 3]
    assert max(row[0] for row in found.below) < 0.3 <= min(row[0] for row in found.above)
    shown = CliRunner().invoke(cli, ["thresholds", str(out), "--budget", str(wanted)])
    assert shown.exit_code == 0, shown.output
    assert "the run's" in shown.output
    alone = CliRunner().invoke(cli, ["thresholds", str(out), "--budget", str(wanted), "--pair", "en-de"])
    assert "leave out --pair" in alone.output
    assert "[quality.pair" not in alone.output
    suggested = re.search(r"\[quality\.pair\.en-de\]\nthreshold = (\S+)", shown.output)
    assert suggested is not None
    assert float(suggested[1]) == pytest.approx(threshold, abs=0.0011)
    again = run(recipe(data, SCORER, f"quality.threshold={suggested[1]}"), out)
    assert again.manifest is not None
    assert again.made.get("quality", 0) == 0
    assert again.manifest["mix"]["tokens"] >= wanted


def test_tokens_of_many_rows_are_those_of_a_sample(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corpusprep.commands import thresholds

    data, out = bitext(rows=900, shards=2), tmp_path / "out"
    run(recipe(data, SCORER), out, until="quality")
    [whole] = read_scores(out, examples=0)
    monkeypatch.setattr(thresholds, "_SAMPLE", 500)
    [part] = read_scores(out, examples=0)
    assert len(part.tokens) == len(whole.tokens)
    for threshold in (0, 0.5, 0.9):
        assert part.left(threshold)[0] == whole.left(threshold)[0]
        assert part.left(threshold)[1] == pytest.approx(whole.left(threshold)[1], rel=0.05)


def test_thresholds_of_no_run_say_so(bitext: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run that came to score rows"):
        list(read_scores(tmp_path))
    data, out = bitext(rows=60, shards=0), tmp_path / "out"
    (data / "nllb" / "deu_Latn-eng_Latn.gz").write_bytes(gzip.compress(b""))
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"], overrides=[SCORER])
    run(loaded, out, until="quality")
    with pytest.raises(InputError, match=r"has no scores of en-sw\. Name one of en-de"):
        list(read_scores(out, ["en-sw"]))
    for path in (out / "parts" / "quality").iterdir():
        path.unlink()
    with pytest.raises(RunError, match=r"is gone\. Start the run again"):
        list(read_scores(out))


def test_a_terminal_is_not_written_to_by_a_corpus(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=60, shards=0), tmp_path / "out"
    (data / "own.en-de.tsv").write_text("A house\x1b[2J and \u202ea garden.\tEin Haus\x1b[2J und ein Garten.\n" * 3)
    overrides = [SCORER, "clean.enabled=false", "langid.enabled=false", "dedup.enabled=false"]
    run(load_recipe(None, sources=[f"tsv={data / 'own.en-de.tsv'}"], overrides=overrides), out, until="quality")
    shown = CliRunner().invoke(cli, ["thresholds", str(out)])
    assert "A house" in shown.output
    assert not set("\x1b\u202e") & set(shown.output)


def test_thresholds_of_a_run_in_rounds_say_what_they_are_of(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=600, shards=2), tmp_path / "out"
    run(recipe(data, SCORER, "quality.threshold=0.6", "balance.budget=9000", 'quality.until="budget"'), out)
    shown = CliRunner().invoke(cli, ["thresholds", str(out)])
    assert "These are only the rows that were scored until the budget was filled" in shown.output
    assert "[quality.pair" not in shown.output
