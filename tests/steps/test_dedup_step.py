"""The step dedup: what it drops of many parts is what the stage drops of one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import sentences
from runs import recipe, rejects
from stepping import begin, read_parts, with_column, write_jsonl

from corpusprep import Recipe, load_recipe, run
from corpusprep.engines.local import LocalEngine
from corpusprep.stages.dedup import dedup
from corpusprep.steps.dedup import find_duplicates
from corpusprep.steps.verdicts import VERDICTS

Corpus = Callable[..., Path]
OTHERS_OFF = [f"{stage}.enabled=false" for stage in ("clean", "langid", "quality")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of two pairs, whose rows alternate; with exact and near duplicates within a file, a pair, and across both."""
    draw = np.random.default_rng(3)
    pairs = sentences(120, 8)
    rows: list[dict[str, Any]] = []
    for k in range(400):
        src, tgt = pairs[int(draw.integers(len(pairs)))]
        change = k % 4
        src = (src, src.upper(), src.replace("the ", "thee ", 1), src.replace(".", " ..!"))[change]
        score = None if k % 7 == 0 else float(draw.integers(5))
        rows.append(
            {"src": src, "tgt": tgt, "src_lang": "en", "tgt_lang": ("de", "nl")[int(draw.integers(2))], "score": score}
        )
    for number in range(2):
        write_jsonl(tmp_path / "data" / f"{number}.jsonl", rows[number::2])
    return tmp_path / "data"


def of(corpus: Path, *overrides: str) -> Recipe:
    return load_recipe(None, sources=[f"jsonl={corpus}"], overrides=[*OTHERS_OFF, "dedup.clusters=true", *overrides])


@pytest.mark.parametrize("memory", [1 << 30, 1])  # with one byte, all is decided on disk
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("dedup.keep=first",),
        ("dedup.keep=score",),
        ("dedup.scope=all",),
        ("dedup.scope=all", "dedup.keep=first"),
        ("dedup.scope=all", "dedup.keep=score", "dedup.max_distance=6"),
        ("dedup.near=false",),
        ("dedup.exact=false",),
        ("dedup.on=source", "dedup.scope=all"),
    ],
)
def test_what_goes_is_what_the_stage_drops_of_the_whole_table(
    corpus: Path, tmp_path: Path, overrides: tuple[str, ...], memory: int
) -> None:
    step = begin(of(corpus, *overrides), tmp_path / "out", memory=memory)
    parts = read_parts(step)
    assert len(parts) == 4
    column = find_duplicates(step, parts)
    assert not list((tmp_path / "out" / "parts" / "tmp").glob("*/*"))
    table = with_column(parts, column)
    found = [VERDICTS[code] for code in table["verdict"].to_pylist()]
    keepers = list(zip(*(table[f"keeper_{name}"].to_pylist() for name in ("source", "shard", "row")), strict=True))

    names = ["src", "tgt", "src_lang", "tgt_lang", "source", "shard", "row", "score"]
    whole = table.select(names)
    kept, dropped = dedup(whole, step.recipe.dedup)
    where = list(zip(*(whole[name].to_pylist() for name in ("source", "shard", "row")), strict=True))
    expected = dict.fromkeys(where, "")
    cluster = {}
    for each in (*kept.to_pylist(), *dropped.to_pylist()):
        place = each["source"], each["shard"], each["row"]
        expected[place] = each.get("reason", "")
        cluster[place] = where[each["cluster"]]
    assert found == [expected[place] for place in where]
    assert keepers == [cluster[place] for place in where]
    assert 0 < kept.num_rows < 350
    reasons = {"dedup.exact", "dedup.near"} - ({"dedup.near"} if "dedup.near=false" in overrides else set())
    assert set(found) == {"", *(reasons - ({"dedup.exact"} if "dedup.exact=false" in overrides else set()))}


def test_one_worker_with_many_threads_and_many_workers_agree(corpus: Path, tmp_path: Path) -> None:
    columns = []
    for workers in (1, 3):
        with LocalEngine(workers) as engine:
            step = begin(of(corpus, "dedup.scope=all"), tmp_path / str(workers), engine)
            parts = read_parts(step)
            columns.append(with_column(parts, find_duplicates(step, parts)))
    assert columns[0].equals(columns[1])


def test_rows_of_different_pairs_are_duplicates_if_the_scope_is_all(corpus: Path, tmp_path: Path) -> None:
    lost = {}
    for scope in ("pair", "all"):
        step = begin(of(corpus, f"dedup.scope={scope}", "dedup.on=source"), tmp_path / scope)
        parts = read_parts(step)
        lost[scope] = int(np.count_nonzero(with_column(parts, find_duplicates(step, parts))["verdict"].to_numpy()))
    assert lost["pair"] + 50 < lost["all"]


def test_nothing_is_dropped_where_the_stage_is_off(corpus: Path, tmp_path: Path) -> None:
    step = begin(of(corpus, "dedup.enabled=false"), tmp_path / "out")
    parts = read_parts(step)
    column = find_duplicates(step, parts)
    assert [column.array(part, "verdict").any() for part in parts] == [False] * 4


def test_no_parts(corpus: Path, tmp_path: Path) -> None:
    for scope in ("pair", "all"):
        step = begin(of(corpus, f"dedup.scope={scope}"), tmp_path / scope)
        assert find_duplicates(step, []).files == {}


def test_clusters_name_the_row_that_is_kept(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(), tmp_path / "out"
    run(recipe(data, "dedup.clusters=true"), out)
    lost = rejects(out).filter(pl.col("row") == 3, pl.col("source") == "opus100")
    assert lost.select("reason", "keeper_source", "keeper_row").rows() == [("dedup.exact", "opus100", 0)]
