"""Step 2: a sample of what the first step made is computed again with the packages that the kernels stand in for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.arrow import count_values, row_keys, shaped, string_buffers
from corpusprep.errors import RunError
from corpusprep.keys import digest, file_digest
from corpusprep.parts import Batch, Group, Unit, Work, pair_column
from corpusprep.stage import Agreement
from corpusprep.stages import langid
from corpusprep.stages.dedup import rows as dedup_rows

if TYPE_CHECKING:
    from corpusprep.derive import Run

_BATCHES = 16  # whose rows make the sample; more where there are more pairs
_BYTES = 2 << 20  # of text, above which the sample is smaller: the references take a second for half a megabyte
_PLACE = ["src", "tgt", "src_lang", "tgt_lang", "source", "shard", "row"]
_IDENTIFIED = [*_PLACE, "src_lid", "src_lid_prob", "tgt_lid", "tgt_lid_prob"]
_FINGERPRINTED = [*_PLACE, "fingerprint"]


class Limits(NamedTuple):
    """What is taken of one pair in one batch."""

    rows: int
    bytes: int


def verify(run: Run, units: Sequence[Unit]) -> None:
    """Computes a sample of the first step's values again, and writes the outcome to the run's result.

    Raises:
        RunError: a value differs from what the reference package computes.
    """
    recipe = run.recipe
    chosen = _choose(units, recipe.seed)
    if not (chosen and recipe.verify and (recipe.langid.enabled or recipe.dedup.enabled)):
        return
    samples = sum(len(pairs) for _, pairs in chosen)
    limits = Limits(-(-recipe.verify // samples), _BYTES // samples)
    models = langid.model_files(recipe.langid) if recipe.langid.enabled else []
    of = {batch.name: unit for unit in units for batch in unit.batches}
    sample = Group("sample", tuple(dict.fromkeys(part for batch, _ in chosen for part in of[batch.name].parts)))
    changed = any(stage.after == "langid" for stage in recipe.stage)
    report = run.derive(
        "verify", "verify a sample", compare, [sample],
        ([(batch.name, pairs) for batch, pairs in chosen], limits, recipe.langid, recipe.dedup.without("against"), recipe.seed, changed),
        depends=[langid.reference(), dedup_rows.reference(), [file_digest(file) for file in models],
                 [_state(batch) for batch, _ in chosen]],
        hints={"batches": {batch.name: batch for batch, _ in chosen}}, whole=True, rows=lambda _: recipe.verify,
    )  # fmt: skip
    run.result.verified = report.value("sample")


def _choose(units: Sequence[Unit], seed: int) -> list[tuple[Batch, tuple[str, ...]]]:
    """Some batches, drawn by the seed, and the pairs of each that are sampled. Each pair is sampled in the same number of batches."""
    drawn = sorted((batch for unit in units for batch in unit.batches), key=lambda batch: digest(seed, batch.name))
    pairs = sorted({pair for batch in drawn for pair in batch.read})
    each = max(1, _BATCHES // max(1, len(pairs)))
    chosen: dict[str, list[str]] = {}
    for pair in pairs:
        for batch in itertools.islice((batch for batch in drawn if pair in batch.read), each):
            chosen.setdefault(batch.name, []).append(pair)
    return [(batch, tuple(chosen[batch.name])) for batch in drawn if batch.name in chosen]


def _state(batch: Batch) -> list[tuple[int, int]]:
    """Sizes and times of a batch's files: a batch that was made again is verified again, even if its key is the same."""
    files = [*(batch.file(pair) for pair in batch.kept), batch.rejects]
    return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]


def compare(work: Work) -> None:
    """Computes the sample again; writes how many values were compared.

    Raises:
        RunError: a value differs.
    """
    chosen, limits, language, duplicates, seed, changed = work.settings
    identified, fingerprinted = [], []
    for name, pairs in chosen:
        batch: Batch = work.hints["batches"][name]
        rejects = _read(batch.rejects, [*_IDENTIFIED, "reason"])
        judged: Any = pc.starts_with(rejects["reason"], "langid.")
        rejects = rejects.filter(judged)
        of = pair_column(rejects)
        for pair in pairs:
            lost = rejects.filter(pc.equal(of, pa.scalar(pair))).select(_IDENTIFIED)
            columns = [*_IDENTIFIED, "fingerprint"]
            kept = _read(batch.file(pair), columns) if pair in batch.kept else _empty(columns)
            # In proportion to what language identification kept and dropped, but some of both.
            share = kept.num_rows / max(1, kept.num_rows + lost.num_rows)
            kept = _lowest(kept, max(1, round(share * limits.rows)), limits.bytes, seed)
            lost = _lowest(lost, max(1, round((1 - share) * limits.rows)), limits.bytes, seed)
            identified += [kept.select(_IDENTIFIED), lost]
            fingerprinted.append(kept.select(_FINGERPRINTED))
    result: dict[str, Any] = {}
    table = pa.concat_tables(identified)
    if language.enabled and table.num_rows:
        if changed:
            table = pa.concat_tables(list(langid.langid(table, language)), promote_options="default")
        found = langid.compare_with_reference(table, language)
        result["langid"] = _summary("langid", table, found) | {"of": "recomputed" if changed else "stored"}
    table = pa.concat_tables(fingerprinted)
    if duplicates.enabled and table.num_rows:
        found = dedup_rows.compare_with_reference(table, duplicates)
        result["dedup"] = _summary("dedup", table, found) | {"of": "stored"}
    work.write_value(result)


_TYPES: dict[str, Any] = {
    "row": pa.int64(), "src_lid_prob": pa.float32(), "tgt_lid_prob": pa.float32(), "fingerprint": pa.uint64()
}  # fmt: skip


def _empty(columns: Sequence[str]) -> pa.Table:
    return pa.schema([(name, _TYPES.get(name, pa.string())) for name in columns]).empty_table()


def _read(path: str | Path, columns: list[str]) -> pa.Table:
    """Some columns of a file, null where it lacks one: a disabled stage writes none."""
    there = set(pq.read_schema(path).names)
    return shaped(pq.read_table(path, columns=[name for name in columns if name in there]), _empty(columns).schema)


def _lowest(table: pa.Table, rows: int, limit: int, seed: int) -> pa.Table:
    """The rows of lowest key, at most so many, and no more bytes of text than the limit, but one row at least."""
    if not table.num_rows:
        return table
    keys = row_keys(table, seed)
    order = np.argsort(keys, kind="stable")[:rows]
    size = sum(np.diff(string_buffers(table[side])[0])[order] for side in ("src", "tgt"))
    order = order[: max(1, int(np.searchsorted(np.cumsum(size), limit, side="right")))]
    return table.take(np.sort(order))


def _summary(stage: str, table: pa.Table, found: Agreement) -> dict[str, Any]:
    if found.disagreements:
        row, ours, theirs = found.disagreements[0]
        where = {name: table[name][row].as_py() for name in ("source", "shard", "row")}
        raise RunError(
            f"{stage}: {len(found.disagreements)} of {found.compared} values that were computed again with "
            f"{found.reference} differ. The first is of {where['source']}: {where['shard']}, row {where['row']}: {ours} was "
            f"computed, {theirs} is right. This is a bug in corpusprep: please report it with that row. If the installation has "
            "changed, try --redo clean. verify = 0 turns the check off."
        )
    return {
        "reference": found.reference,
        "rows": table.num_rows,
        "rows_by_pair": dict(sorted(count_values(pair_column(table)).items())),
        "compared": found.compared,
        "agree": found.compared,
        "largest_difference": found.largest_difference,
    }
