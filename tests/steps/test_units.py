"""What is read as one and taken as one: batches of a large shard, small shards together, and shards that workers read."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from runs import digests, mix, recipe, redone, rejects

from corpusprep import InputError, RunError, RunResult, load_recipe, run
from corpusprep.cli import cli
from corpusprep.engines.local import LocalEngine
from corpusprep.report.progress import Progress
from corpusprep.sources import Shard, open_source
from corpusprep.steps import quality, read, readings

Corpus = Callable[..., Path]
CONSTANT = "corpusprep.steps.readings.{}"
FILES = 90


@pytest.fixture(autouse=True)
def short_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONSTANT.format("_GROUP_SHARDS"), 16)


class Watching(Progress):
    """Notes rows as they are shown in the first pass, and from which thread."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, bool]] = []
        self.reading = False

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        self.reading = title.startswith("read,")

    def advance(self, amount: int, note: str = "") -> None:
        if self.reading:
            self.shown.append((amount, threading.current_thread() is threading.main_thread()))

    def rows(self) -> int:
        return sum(amount for amount, _ in self.shown)


def many_files(folder: Path) -> Path:
    """Small files of two pairs, among them copies of rows of other files, one that is empty, and a large one in between."""
    folder.mkdir()
    for k in range(FILES):
        pair, tgt = ("en-de", "de") if k % 3 else ("en-nl", "nl")
        text = (
            "Das ist die Zeile Nummer {} des ganzen Korpus." if tgt == "de" else "Dit is regel nummer {} van de tekst."
        )
        numbers = [] if k == 7 else [k, k + 1000, k // 2]
        rows = [f"This is line number {n} of the whole corpus.\t{text.format(n)}\n" for n in numbers]
        (folder / f"f{k:03d}.{pair}.tsv").write_text("".join(rows), encoding="utf-8")
    rows = [f"This is line number {n} of the big file.\tDies ist Zeile Nummer {n} der Datei.\n" for n in range(20_000)]
    (folder / "f060large.en-de.tsv").write_text("".join(rows), encoding="utf-8")
    return folder


def named_rows(folder: Path) -> Path:
    """The same of rows that name their languages, so that parts of a unit are of several pairs."""
    folder.mkdir()
    for k in range(FILES):
        rows = [
            {"src": f"Line number {n} stands in the corpus.", "tgt": f"{word} Nummer {n} im Korpus.", "src_lang": "en", "tgt_lang": code}
            for n, (word, code) in enumerate([("Zeile", "de"), ("Regel", "nl"), ("Zeile", "de")] * 2, start=k // 2)
        ]  # fmt: skip
        (folder / f"f{k:03d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def all_rows(table: pl.DataFrame) -> pl.DataFrame:
    """Rows in one order; which file they lie in does not count."""
    return table.sort("source", "shard", "row")


def settings(data: Path, kind: str, *overrides: str) -> Any:
    return load_recipe(
        None,
        sources=[f"{kind}={data}"],
        overrides=["langid.enabled=false", "quality.enabled=false", "verify=0", "dedup.clusters=true", *overrides],
    )


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    "overrides",
    [[], ["dedup.scope=all", "dedup.keep=form"], ["balance.budget=3000", "instruct.validation=20"]],
)
@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_small_files_read_together_give_what_they_give_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, overrides: list[str], where: str
) -> None:
    data = {"tsv": many_files, "jsonl": named_rows}[kind](tmp_path / "data")
    if where == "disk":
        monkeypatch.setattr("corpusprep.steps.dedup._BYTES", 1 << 50)
    loaded = settings(data, kind, *overrides)
    together = run(loaded, tmp_path / "together", workers=1)
    monkeypatch.setattr(CONSTANT.format("_MANY_SMALL"), 1 << 50)
    alone = run(loaded, tmp_path / "alone", workers=1)
    assert redone(together)["pass1"] < 20 < FILES <= redone(alone)["pass1"]
    assert mixes(tmp_path / "together") == mixes(tmp_path / "alone")
    one, other = (all_rows(rejects(tmp_path / name)) for name in ("together", "alone"))
    assert one.equals(other)
    assert one.filter(pl.col("reason").is_in(["dedup.exact", "dedup.near"])).height > 50
    assert together.accounts.by_pair() == alone.accounts.by_pair()


def mixes(out: Path) -> dict[str, str]:
    return {name: value for name, value in digests(out).items() if name.startswith("mix/")}


def test_of_small_files_only_the_group_of_a_changed_one_is_read_again(tmp_path: Path) -> None:
    data, out = many_files(tmp_path / "data"), tmp_path / "out"
    loaded = settings(data, "tsv")
    first = run(loaded, out)
    groups = redone(first)["pass1"]
    assert 3 <= groups < 20
    again = run(loaded, out)
    assert "pass1" not in redone(again)
    (data / "f003.en-nl.tsv").write_text(
        "A line that is new in here.\tEen regel die hier nieuw is.\n", encoding="utf-8"
    )
    assert redone(run(loaded, out))["pass1"] == 1
    (data / "f080more.en-nl.tsv").write_text(
        "One more line in the corpus.\tNog een regel in de tekst.\n", encoding="utf-8"
    )
    assert 1 <= redone(run(loaded, out))["pass1"] <= 2
    os.remove(data / "f003.en-nl.tsv")
    run(loaded, out)
    run(loaded, tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


def test_a_damaged_one_of_many_small_files_is_named(tmp_path: Path) -> None:
    data = many_files(tmp_path / "data")
    (data / "f050.en-de.tsv.gz").write_bytes(b"\x1f\x8b\x08\x00 this is no gzip")
    with pytest.raises(InputError, match=r"f050\.en-de\.tsv\.gz"):
        run(settings(data, "tsv"), tmp_path / "out")
    kept = run(settings(data, "tsv", "source.0.on_error=keep"), tmp_path / "out")
    assert any("f050.en-de.tsv.gz" in note for note in kept.notes)
    assert any("f007.en-de.tsv" in note and "empty" in note for note in kept.notes)


def test_a_users_stage_on_small_files_that_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dropping.py").write_text(
        "import pyarrow.compute as pc, pyarrow as pa\n"
        "def even(table, options):\n"
        "    bad = pc.match_substring_regex(table['src'], 'number [0-9]*[13579] ')\n"
        "    lost = table.filter(bad)\n"
        "    return table.filter(pc.invert(bad)), lost.append_column('reason', pa.repeat('odd', lost.num_rows))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = settings(many_files(tmp_path / "data"), "tsv", "stage=[{function='dropping:even'}]", "dedup.enabled=false")
    result = run(loaded, tmp_path / "out", workers=1)
    assert sum(count for (stage, *_), count in result.accounts.dropped.items() if stage == "even") > 10_000
    lost = rejects(tmp_path / "out").filter(pl.col("reason") == "even.odd")
    assert lost.filter(pl.col("src").str.contains("number [0-9]*[02468] ")).height == 0


def test_a_task_whose_worker_was_lost_is_done_again(bitext: Corpus, tmp_path: Path) -> None:
    """Whatever the lost one left: a folder half written, or all but its answer."""
    loaded = recipe(bitext(rows=30, shards=1))
    source = open_source(loaded.source[1])
    (shard,) = source.shards()
    reading = readings.Reading(source.settings, (shard,), "key", "name", (0, 0), 100, 1)
    stages = read.open_stages(loaded, None)
    task = read.ReadTask(reading, str(tmp_path / "pass1"), str(tmp_path / "tmp" / "scratch"))
    (tmp_path / "tmp" / "scratch-0").mkdir(parents=True)
    first, again = read.run_task(stages, task), read.run_task(stages, task)
    assert [made for _, made in first.batches] == [True]
    assert [made for _, made in again.batches] == [False]
    assert first.batches[0][0] == again.batches[0][0]
    alone = read.BatchTask(
        "name-00000", str(tmp_path / "pass1" / "name-00000.key"), "", (), str(tmp_path / "gone.arrow")
    )
    assert read.run_task(stages, alone).batches[0][0] == first.batches[0][0]


def test_sources_say_how_large_their_shards_are(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=30, shards=1)
    table = pa.table({"translation": [{"de": f"Zeile {k} ist hier.", "en": f"Line {k} is here."} for k in range(40)]})
    (tmp_path / "hub" / "de-en").mkdir(parents=True)
    pq.write_table(table, tmp_path / "hub" / "de-en" / "train-00000-of-00001.parquet")
    with zipfile.ZipFile(tmp_path / "en-de.txt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for code in ("en", "de"):
            archive.writestr(f"News.de-en.{code}", f"One line of {code}.\n" * 1000)
    found = {}
    for given in (
        f"opus100={data / 'opus'}",
        f"nllb={data / 'nllb'}",
        f"opus100={tmp_path / 'hub'}",
        f"moses={tmp_path / 'en-de.txt.zip'}",
    ):
        source = open_source(load_recipe(None, sources=[given]).source[0])
        (shard,) = source.shards()
        found[given.partition("=")[2]] = source.size(shard)
        assert sum(batch.table.num_rows for batch in source.read(shard)) > 25
    opus, nllb, hub, packed = found.values()
    assert opus == sum(path.stat().st_size for path in (data / "opus").rglob("*train*"))
    assert nllb == (data / "nllb" / "deu_Latn-eng_Latn.gz").stat().st_size
    assert hub == (tmp_path / "hub" / "de-en" / "train-00000-of-00001.parquet").stat().st_size
    assert packed is not None
    assert 20 < packed < (tmp_path / "en-de.txt.zip").stat().st_size


def test_an_interrupted_scoring_goes_on_within_a_unit(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONSTANT.format("MAX_ROWS"), 40)
    monkeypatch.setattr(CONSTANT.format("_BYTES_A_BATCH"), 1)
    overrides, out = ["quality.scorer=scorers:by_hash", "quality.threshold=0.3"], tmp_path / "out"
    loaded = load_recipe(None, sources=[f"opus100={bitext(shards=0) / 'opus'}"], overrides=overrides)
    calls: list[int] = []
    score = quality._score_rows

    def stopping(rows: pa.Table, work: Any) -> Any:
        calls.append(rows.num_rows)
        if len(calls) == 4:
            raise RunError("stopped")
        return score(rows, work)

    monkeypatch.setattr(quality, "_score_rows", stopping)
    with pytest.raises(RunError, match="stopped"):
        run(loaded, out, workers=1)
    result = run(loaded, out, workers=1)
    assert calls[3] == calls[4]
    assert len(calls) == 8 + 1
    assert result.scored == {"computed": sum(calls) - calls[3], "reused": 0}
    assert not list((out / "parts" / "quality").glob("*.piece"))
    run(loaded, tmp_path / "fresh", workers=1)
    assert digests(out) == digests(tmp_path / "fresh")


def test_where_groups_of_small_shards_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONSTANT.format("_GROUP_SHARDS"), 128)
    shards = [Shard("s", f"f{k:05d}", (), ("en", "de"), "train") for k in range(3000)]
    groups = readings._together(shards, [10] * 3000)
    assert [k for group in groups for k in group] == list(range(3000))
    assert 10 < len(groups) < 60
    names = [[shards[k].shard for k in group] for group in groups]
    # A file more, or one less, changes the group that it lies in.
    less = shards[:700] + shards[701:]
    others = [[less[k].shard for k in group] for group in readings._together(less, [10] * 2999)]
    assert sum(group not in names for group in others) == 1
    # Where files are larger, fewer are read together, and the names still decide.
    ends = [
        {
            names[-1]
            for names in ([shards[k].shard for k in group] for group in readings._together(shards, [size] * 3000))
        }
        for size in (200_000, 260_000)
    ]
    assert len(ends[0] & ends[1]) > 0.8 * len(ends[0])
    # So much text, and no large shard; nothing where there are few; names in ascending order.
    assert all(len(group) <= 16 for group in readings._together(shards, [1 << 19] * 3000))
    assert [len(group) for group in readings._together(shards[:70], [10] * 30 + [1 << 30, None] + [10] * 38)][-3:] != [
        70
    ]
    assert [30] in readings._together(shards[:70], [10] * 30 + [1 << 30, None] + [10] * 38)
    assert [31] in readings._together(shards[:70], [10] * 30 + [1 << 30, None] + [10] * 38)
    assert readings._together(shards[:60], [10] * 60) == [[k] for k in range(60)]
    twice = [dataclasses.replace(shard, shard="same") for shard in shards[:70]]
    assert readings._together(twice, [10] * 70) == [[k] for k in range(70)]


@pytest.mark.parametrize(
    "overrides",
    [
        ["dedup.clusters=true"],
        ["dedup.scope=all", "dedup.keep=form", "instruct.validation=20", "balance.budget=9000"],
        ["quality.scorer=scorers:by_hash", "quality.threshold=0.3", "rejects.text=all"],
        ["quality.scorer=scorers:by_hash", "quality.prior=lexical", "quality.until=budget", "quality.threshold=0.5", "balance.budget=4000"],
    ],
)  # fmt: skip
def test_batches_taken_together_give_what_they_give_alone(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    data = bitext()
    monkeypatch.setattr(CONSTANT.format("MAX_ROWS"), 40)
    monkeypatch.setattr("corpusprep.steps.render._HELD", 70)
    alone = run(recipe(data, *overrides), tmp_path / "alone", workers=1)
    monkeypatch.setattr(CONSTANT.format("_BYTES_A_BATCH"), 1)
    monkeypatch.setattr(CONSTANT.format("_MOST_TOGETHER"), 3)
    together = run(recipe(data, *overrides), tmp_path / "together", workers=1)
    assert redone(alone)["pass1"] == redone(together)["pass1"] == 24
    units = [len(list((tmp_path / name / "parts" / "balance").iterdir())) for name in ("alone", "together")]
    assert units == [24, 9]
    assert mixes(tmp_path / "together") == mixes(tmp_path / "alone")
    assert all_rows(rejects(tmp_path / "together")).equals(all_rows(rejects(tmp_path / "alone")))
    assert together.accounts.by_pair() == alone.accounts.by_pair()
    assert mix(tmp_path / "together").height > 50
    shown = [CliRunner().invoke(cli, ["thresholds", str(tmp_path / name)]) for name in ("alone", "together")]
    assert shown[0].output == shown[1].output


def test_files_of_batches_that_are_taken_together(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = bitext(), tmp_path / "out"
    monkeypatch.setattr(CONSTANT.format("MAX_ROWS"), 40)
    monkeypatch.setattr(CONSTANT.format("_BYTES_A_BATCH"), 1)
    run(recipe(data), out, workers=1)
    folders = [path for path in (out / "parts" / "pass1").iterdir() if path.is_dir()]
    assert len(folders) == 24
    assert len(list((out / "parts" / "dedup").iterdir())) == 3
    for path in (out / "rejects").iterdir():
        table = pl.read_parquet(path)
        assert table.height > 0
        assert table["row"].is_sorted()
    before = digests(out)
    (folders[5] / "batch.json").write_bytes(b"")  # as a power failure leaves it
    again = run(recipe(data), out, workers=1)
    assert redone(again)["pass1"] == 1
    assert digests(out) == before


def test_shards_are_read_by_workers_or_by_one_reader(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bitext(rows=60, shards=12)
    loaded = recipe(data)

    def taken(out: Path) -> RunResult:
        with LocalEngine(2) as engine:
            return run(loaded, out, engine=engine)

    seen: list[set[str]] = []
    chosen = read.for_workers

    def watched(*given: Any) -> set[str]:
        seen.append(chosen(*given))
        return seen[-1]

    monkeypatch.setattr(read, "for_workers", watched)
    taken(tmp_path / "workers")
    assert len(seen[-1]) == 12
    monkeypatch.setattr(CONSTANT.format("_SHARES"), 1 << 50)
    taken(tmp_path / "reader")
    assert seen[-1] == set()
    assert digests(tmp_path / "workers") == digests(tmp_path / "reader")
    (
        tmp_path
        / "workers"
        / "parts"
        / "pass1"
        / next(name for name in os.listdir(tmp_path / "workers/parts/pass1") if ".shard." in name)
    ).unlink()
    monkeypatch.setattr(CONSTANT.format("_SHARES"), 0.01)
    assert redone(taken(tmp_path / "workers")) == {}


def test_batches_of_a_shard_that_a_worker_reads_are_shown_as_they_are_done(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe(bitext(rows=60, shards=3))
    monkeypatch.setattr(CONSTANT.format("MAX_ROWS"), 10)
    monkeypatch.setattr(CONSTANT.format("_SHARES"), 0.01)
    monkeypatch.setattr(read, "_LOOK", 0.01)
    judge = read.run_batch

    def slow(*given: Any) -> Any:
        done = judge(*given)
        time.sleep(0.1)
        return done

    monkeypatch.setattr(read, "run_batch", slow)
    watching = Watching()
    result = run(loaded, tmp_path / "out", workers=1, progress=watching)
    assert watching.rows() == sum(result.accounts.read.values())
    assert sum(not main for _, main in watching.shown) > 5
    # A run that is interrupted goes on, and shows what is new.
    out, batches = tmp_path / "stopped", 0

    def stopping(*given: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 10:
            raise RunError("stopped")
        return slow(*given)

    monkeypatch.setattr(read, "run_batch", stopping)
    first, second = Watching(), Watching()
    with pytest.raises(RunError, match="stopped"):
        run(loaded, out, workers=1, progress=first)
    monkeypatch.setattr(read, "run_batch", slow)
    assert run(loaded, out, workers=1, progress=second).accounts.read == result.accounts.read
    assert 0 < second.rows() < watching.rows()
    assert digests(out) == digests(tmp_path / "out")


def test_what_a_progress_raises_while_a_worker_reads_ends_the_run(
    bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Watching):
        def advance(self, amount: int, note: str = "") -> None:
            super().advance(amount, note)
            if self.reading and not self.shown[-1][1]:
                raise RuntimeError("the window was closed")

    monkeypatch.setattr(CONSTANT.format("MAX_ROWS"), 10)
    monkeypatch.setattr(CONSTANT.format("_SHARES"), 0.01)
    monkeypatch.setattr(read, "_LOOK", 0.01)
    judge = read.run_batch
    monkeypatch.setattr(read, "run_batch", lambda *given: [judge(*given), time.sleep(0.1)][0])
    with pytest.raises(RuntimeError, match="the window was closed"):
        run(recipe(bitext(rows=60, shards=1)), tmp_path / "out", workers=1, progress=Failing())
