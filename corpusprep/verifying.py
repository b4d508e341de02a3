"""Trust: a sample of the first pass is computed again with the packages that the kernels stand in for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.arrow import row_keys
from corpusprep.context import Context, dump
from corpusprep.errors import RunError
from corpusprep.passes import Unit
from corpusprep.recipe import Recipe
from corpusprep.stage import Agreement
from corpusprep.stages import dedup, langid
from corpusprep.store import code_version, digest, file_digest, ready, versions, writing

_UNITS = 16  # whose rows make the sample; more where there are more pairs
_IDENTIFIED = ["src", "tgt", "source", "shard", "row", "src_lid", "src_lid_prob", "tgt_lid", "tgt_lid_prob"]
_FINGERPRINTED = ["src", "tgt", "source", "shard", "row", "fingerprint"]


@dataclass(frozen=True)
class VerifyTask:
    """The units whose rows of lowest key are verified, and how many of each."""

    units: tuple[Unit, ...]
    rows: int
    recipe: Recipe
    output: str


def verify(run: Context, units: Sequence[Unit]) -> None:
    """Verifies a sample of the rows that the first pass made, and notes the outcome in the run's result.

    Raises:
        RunError: a value differs from what the reference package computes.
    """
    recipe = run.recipe
    chosen = _choose(units, recipe.seed)
    if not (chosen and recipe.verify and (recipe.langid.enabled or recipe.dedup.enabled)):
        return
    key = digest(
        code_version("langid", "dedup"), Path(__file__).read_text(encoding="utf-8"), versions(), recipe.seed,
        recipe.verify, [part.identity for unit in chosen for part in unit.parts], [unit.name for unit in chosen],
        dump(recipe.langid) if recipe.langid.enabled else None,
        [file_digest(file) for file in langid.model_files(recipe.langid)] if recipe.langid.enabled else None,
        dump(recipe.dedup) if recipe.dedup.enabled else None,
    )  # fmt: skip
    path = run.store.path("verify", "sample", key)
    if ready(path):
        run.reuse("verify", 1)
    else:
        task = VerifyTask(tuple(chosen), -(-recipe.verify // len(chosen)), recipe, str(path))
        for _ in run.map("verify a sample", run_verify, [(task, recipe.verify)], made="verify"):
            pass
    run.result.verified = json.loads(path.read_text(encoding="utf-8"))


def _choose(units: Sequence[Unit], seed: int) -> list[Unit]:
    """Some units, drawn by the seed, among them one of every pair."""
    drawn = sorted((unit for unit in units if unit.read), key=lambda unit: digest(seed, unit.name))
    pairs: set[str] = set()
    chosen = []
    for unit in drawn:
        if not pairs.issuperset(part.pair for part in unit.parts):
            pairs.update(part.pair for part in unit.parts)
            chosen.append(unit)
    chosen += [unit for unit in drawn if unit not in chosen][: max(0, _UNITS - len(chosen))]
    return chosen


def run_verify(task: VerifyTask) -> str:
    """Computes the sample again; writes what was compared.

    Raises:
        RunError: a value differs.
    """
    recipe = task.recipe
    kept: list[pa.Table] = []
    lost: list[pa.Table] = []
    for unit in task.units:
        tables = [_lowest(pq.read_table(part.path), task.rows, recipe.seed) for part in unit.parts]
        rejects = pq.read_table(Path(unit.folder) / "rejects.parquet")
        judged: Any = pc.starts_with(rejects["reason"], "langid.")
        tables.append(_lowest(rejects.filter(judged), task.rows, recipe.seed))
        sample = _lowest(pa.concat_tables(tables, promote_options="default"), task.rows, recipe.seed)
        rejected = sample["reason"].is_valid() if "reason" in sample.column_names else pa.array([False] * len(sample))
        kept += [table for table in [sample.filter(pc.invert(rejected))] if table.num_rows]
        lost += [table for table in [sample.filter(rejected)] if table.num_rows]
    result: dict[str, Any] = {}
    if recipe.langid.enabled and (kept or lost):
        table = pa.concat_tables(kept + lost, promote_options="default")
        if any(stage.after == "langid" for stage in recipe.stage):  # its text may be another by now
            table = table.select([name for name in table.column_names if name != "reason"])
            table = pa.concat_tables(list(langid.langid(table, recipe.langid)), promote_options="default")
        table = table.select(_IDENTIFIED)
        result["langid"] = _summary("langid", table, langid.compare_with_reference(table, recipe.langid))
    if recipe.dedup.enabled and kept:
        table = pa.concat_tables(kept, promote_options="default").select(_FINGERPRINTED)
        result["dedup"] = _summary("dedup", table, dedup.compare_with_reference(table, recipe.dedup))
    with writing(task.output) as scratch:
        scratch.write_text(json.dumps(result, sort_keys=True), encoding="utf-8")
    return task.output


def _lowest(table: pa.Table, rows: int, seed: int) -> pa.Table:
    """The rows of lowest key, in their order."""
    keys = table["key"].to_numpy() if "key" in table.column_names else row_keys(table, seed)
    if "key" not in table.column_names:
        table = table.append_column("key", pa.array(keys, pa.uint64()))
    if table.num_rows <= rows:
        return table
    return table.filter(pa.array(keys <= np.partition(keys, rows - 1)[rows - 1]))


def _summary(stage: str, table: pa.Table, found: Agreement) -> dict[str, Any]:
    if found.disagreements:
        row, ours, theirs = found.disagreements[0]
        where = {name: table[name][row].as_py() for name in ("source", "shard", "row")}
        raise RunError(
            f"{stage}: {len(found.disagreements)} of {found.compared} values that were computed again with "
            f"{found.reference} differ. The first is of {where['source']}: {where['shard']}, row {where['row']}: {ours} was "
            f"computed, {theirs} is right. This is a fault of the program: please report it with that row. Set verify = 0 to "
            "go on all the same, after --redo clean if the installation has changed."
        )
    return {
        "reference": found.reference,
        "rows": table.num_rows,
        "compared": found.compared,
        "agree": found.compared,
        "largest_difference": found.largest_difference,
    }
