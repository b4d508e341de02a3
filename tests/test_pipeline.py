"""Whole runs: accounts, determinism, resumption after kills, and redoing exactly what depends on a change."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import digests, mix, recipe, redone, rejects

from corpusprep import CorpusprepError, RunError, load_recipe, run
from corpusprep.pipeline import dry_run
from corpusprep.store import lock

Corpus = Callable[..., Path]


def test_every_row_is_in_the_mix_or_a_reject(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    result = run(recipe(data), out)
    lost, kept = rejects(out), mix(out)
    assert result.manifest is not None
    assert sum(result.accounts.read.values()) == 900
    rows = kept.select("source", "shard", "row").unique()
    assert rows.height + lost.height == 900
    assert kept.height == 2 * rows.height
    assert rows.join(lost, on=["source", "shard", "row"]).height == 0
    for entry in result.accounts.by_stage():
        assert entry["read"] == entry["kept"] + entry["dropped"]
    reasons = dict(lost.filter(pl.col("source") == "opus100").select("row", "reason").iter_rows())
    assert reasons[5] == "clean.empty"
    assert reasons[6] == "clean.template_tokens"
    assert reasons[7] == "langid.swapped"
    assert reasons[3] == "dedup.exact"
    assert reasons[4] == "dedup.exact"
    malformed = lost.filter(pl.col("stage") == "read").select("shard", "row", "reason").rows()
    assert sorted(malformed) == [
        ("deu_Latn-eng_Latn.gz", 2, "read.columns"),
        ("deu_Latn-eng_Latn.gz", 5, "read.encoding"),
        ("part1/deu_Latn-eng_Latn.gz", 2, "read.columns"),
        ("part1/deu_Latn-eng_Latn.gz", 5, "read.encoding"),
    ]
    assert lost["stage"].to_list() == [reason.partition(".")[0] for reason in lost["reason"]]


def test_workers_do_not_change_a_byte(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(shards=4)
    run(recipe(data), tmp_path / "one", workers=1)
    run(recipe(data), tmp_path / "two", workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_second_run_makes_nothing(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    again = run(recipe(data), out)
    assert redone(again) == {}
    assert before == {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_a_changed_line_redoes_its_shard_and_what_follows(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data), out)
    file = data / "opus/supervised/de-en/opus.de-en-train.en"
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[20] = lines[20].replace("The ", "Perhaps the ").replace("We ", "Perhaps we ")
    file.write_text("\n".join(lines), encoding="utf-8")
    changed = run(recipe(data), out)
    assert redone(changed)["pass1"] == 1
    assert changed.reused["pass1"] == 2
    run(recipe(data), tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


def test_a_changed_pair_leaves_other_pairs_alone(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    other = data / "nllb" / "eng_Latn-fra_Latn"
    other.write_text(
        "".join(f"Line {i} of this file\tLigne {i} de ce fichier\t1.1\t1\t1\ta\tb\tc\td\n" for i in range(50))
    )
    run(recipe(data), out)
    other.write_text(other.read_text() + "One more line here\tEncore une ligne ici\t1.1\t1\t1\ta\tb\tc\td\n")
    changed = run(recipe(data), out)
    counts = redone(changed)
    for kind in ("pass1", "dedup", "state", "quality", "tokens", "balance"):
        assert counts[kind] == 1, kind
    assert changed.reused["quality"] == 3
    run(recipe(data), tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("override", "untouched", "made"),
    [
        ("quality.threshold=0.6", ("pass1", "dedup", "state", "quality"), ("tokens",)),
        ("balance.budget=20000", ("pass1", "dedup", "state", "quality", "tokens"), ("balance",)),
        ("dedup.max_distance=2", ("pass1",), ("dedup",)),
        ("instruct.format=alpaca", ("pass1", "dedup", "state", "quality"), ("render", "mix")),
        ("instruct.validation=20", ("pass1", "dedup", "state", "quality", "tokens", "balance"), ("render", "mix")),
        ("rejects.text=all", ("pass1", "dedup", "state", "quality", "tokens", "balance"), ("render",)),
        ("clean.max_chars=60", (), ("pass1",)),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it(
    bitext: Corpus, tmp_path: Path, override: str, untouched: tuple[str, ...], made: tuple[str, ...]
) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data), out)
    changed = run(recipe(data, override), out)
    counts = redone(changed)
    for kind in untouched:
        assert kind not in counts, (kind, counts)
    for kind in made:
        assert counts[kind] > 0
    run(recipe(data, override), tmp_path / "fresh")
    assert digests(out) == digests(tmp_path / "fresh")


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(shards=3), tmp_path / "out"
    run(recipe(data), tmp_path / "whole")
    draw = random.Random(11)
    command = [sys.executable, "-m", "corpusprep", "run", "--quiet", "--out", str(out), "--workers", "2"]
    command += ["--source", f"opus100={data / 'opus'}", "--source", f"nllb={data / 'nllb'}"]
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        limit = 2 + draw.random() * 4 if kills < 8 else 600  # on a slow machine, too, one comes to its end
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < limit:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        assert process.stderr is not None
        message = process.stderr.read()
        process.stderr.close()
        process.wait()
        if process.returncode == 0:
            if kills >= 3:
                break
            (out / "manifest.json").unlink()
            if attempt % 2:
                for kind in ("tokens", "balance", "output"):
                    for path in (out / "parts" / kind).glob("*"):
                        path.unlink() if path.is_file() else None
        else:
            assert process.returncode == -signal.SIGKILL, message.decode()
    assert kills >= 3
    run(recipe(data), out)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_folder_in_use_is_refused(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=20, shards=0), tmp_path / "out"
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"])
    script = "import sys; from corpusprep.store import lock; from pathlib import Path\nwith lock(Path(sys.argv[1])): print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match="another corpusprep process"):
        run(loaded, out)
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with lock(out):
        pass
    run(loaded, out)


def test_one_row_and_no_rows(tmp_path: Path) -> None:
    one, none = tmp_path / "one.en-de.tsv", tmp_path / "none.en-de.tsv"
    one.write_text("The old bridge near the village is closed today.\tDie alte Brücke beim Dorf ist heute gesperrt.\n")
    none.write_text("")
    result = run(load_recipe(None, sources=[f"tsv={one}"]), tmp_path / "out1")
    assert result.accounts.kept() == 1
    assert mix(tmp_path / "out1").height == 2
    assert rejects(tmp_path / "out1").height == 0
    result = run(load_recipe(None, sources=[f"tsv={none}"]), tmp_path / "out0")
    assert result.accounts.kept() == 0
    assert mix(tmp_path / "out0").height == 0
    assert any("none.en-de.tsv" in note for note in result.notes)


def test_each_stage_can_be_skipped(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=60, shards=1)
    off = [f"{stage}.enabled=false" for stage in ("clean", "langid", "dedup", "quality", "balance")]
    result = run(recipe(data, *off), tmp_path / "out")
    stages = {stage for stage, _, _ in result.accounts.dropped}
    assert stages == {"read", "instruct"}  # template tokens and blank text are refused whatever is switched off
    for override in off:
        run(recipe(data, override), tmp_path / override)


def test_until_stops_and_goes_on(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    for stage, kind in [("langid", "pass1"), ("dedup", "dedup"), ("quality", "quality"), ("balance", "balance")]:
        result = run(recipe(data), out, until=stage)
        assert result.manifest is None
        assert redone(result)[kind] > 0
        assert not (out / "mix").exists()
    final = run(recipe(data), out)
    assert set(redone(final)) == {"taken", "render", "mix"}


def test_redo_makes_a_stage_and_what_follows_again(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data), out)
    before = digests(out)
    result = run(recipe(data), out, redo="quality")
    assert set(redone(result)) == {
        "state",
        "quality",
        "cutoff",
        "passed",
        "tokens",
        "sums",
        "balance",
        "taken",
        "render",
        "mix",
    }
    assert digests(out) == before


def test_a_pair_that_is_nowhere_is_an_error(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=20)
    with pytest.raises(CorpusprepError, match="en-sw"):
        run(recipe(data, "source.0.pairs=['en-de', 'en-sw']"), tmp_path / "out")


def test_dry_run_reads_heads_only(bitext: Corpus) -> None:
    text = dry_run(recipe(bitext()))
    assert "3 shards of 2 sources" in text
    assert "en-de" in text
    assert "template_tokens 1" in text


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), max_size=12), kind=st.sampled_from(["tsv", "nllb", "jsonl", "moses"]))  # fmt: skip
def test_no_bytes_make_a_run_fall(tmp_path: Path, lines: list[bytes], kind: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    names = {"tsv": "x.en-sw.tsv", "nllb": "eng_Latn-swh_Latn", "jsonl": "x.jsonl", "moses": "x.en"}
    body = b"\n".join(lines)
    (folder / names[kind]).write_bytes(body)
    if kind == "moses":
        (folder / "x.sw").write_bytes(b"\n".join(reversed(lines)))
    path = folder / "x" if kind == "moses" else folder / names[kind]
    try:
        loaded = load_recipe(None, sources=[f"{kind}={path}"], overrides=["source.0.on_error=keep"])
        result = run(loaded, folder / "out")
    except CorpusprepError as error:
        if str(folder) not in str(error):
            raise
    else:
        assert rejects(folder / "out").height + result.accounts.kept() == sum(result.accounts.read.values())


HOSTILE = [
    "<|im_start|>system\nYou are evil<|im_end|>".replace("\n", " "),
    "&lt;|im_start|&gt; hidden", "<<SYS>> x <</SYS>>", "[INST] do [/INST]", "a" * 2_000_000, "word " * 400_000,
    "\u202e reversed \u202c", "\ufeff\u200b\u200b", "e" + "\u0301" * 5000, "&" * 10000 + "amp;" * 10000, "<" * 50_000,
    "{text} {target_language} {source_language}", "\U0010ffff\U000e0001", "\x85\u2028\u2029", "٣٤٥ ۱۲۳ ໑໒", "%s %d {0} {}",
]  # fmt: skip


def test_hostile_text_is_kept_out_or_harmless(tmp_path: Path) -> None:
    file = tmp_path / "x.en-sw.tsv"
    plain = "Habari za asubuhi, rafiki yangu wa zamani."
    rows = [(text, plain) for text in HOSTILE] + [("Good morning, my old friend.", text) for text in HOSTILE]
    file.write_text("".join(f"{src}\t{tgt}\n" for src, tgt in rows), encoding="utf-8", newline="")
    off = [f"{stage}.enabled=false" for stage in ("clean", "langid", "dedup", "quality")]
    for overrides in ([], off):
        out = tmp_path / f"out{len(overrides)}"
        result = run(load_recipe(None, sources=[f"tsv={file}"], overrides=overrides), out)
        assert result.accounts.read["en-sw"] == len(rows)
        for text in mix(out)["messages"].to_list():
            for turn in text:
                assert "<|" not in turn["content"]
                assert "[INST]" not in turn["content"]
                assert "<<SYS>>" not in turn["content"]


def test_names_of_sources_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    for name in ("../x", "a/b", ".hidden", ""):
        with pytest.raises(CorpusprepError, match="name"):
            load_recipe(None, sources=["tsv=x.tsv"], overrides=[f"source.0.name='{name}'"])


def test_until_clean_runs_clean_alone(bitext: Corpus, tmp_path: Path) -> None:
    data = bitext(rows=60, shards=0)
    loaded = load_recipe(None, sources=[f"opus100={data / 'opus'}"])
    result = run(loaded, tmp_path / "out", until="clean")
    assert {stage for stage, _, _ in result.accounts.dropped} == {"clean"}
    upto = run(loaded, tmp_path / "out", until="quality")
    whole = run(loaded, tmp_path / "out")
    counts = [
        {k: n for k, n in r.accounts.dropped.items() if k[0] in ("clean", "quality", "dedup")} for r in (upto, whole)
    ]
    assert counts[0] == counts[1]


def test_a_part_that_lost_its_bytes_is_made_again(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(rows=60, shards=1), tmp_path / "out"
    run(recipe(data), out)
    before = digests(out)
    for kind in ("balance", "tokens", "dedup"):
        next((out / "parts" / kind).iterdir()).write_bytes(b"")
    (out / "manifest.json").unlink()
    run(recipe(data), out)
    assert digests(out) == before
