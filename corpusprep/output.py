"""The last tasks of a run: kept rows become examples, dropped rows rejects, examples the files of the mix."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpusprep.arrow import combine, shaped
from corpusprep.passes import VERDICTS, Dropped, Unit, count_values, pairs_of, token_counter
from corpusprep.recipe import Recipe
from corpusprep.stages import instruct
from corpusprep.store import ready, write_table, writing


@dataclass(frozen=True)
class RenderTask:
    """One unit: its kept rows become examples, its dropped rows a file of rejects."""

    unit: Unit
    outcomes: tuple[str, ...]
    """Files with `verdict` and `copies`, one a part."""
    decisions: tuple[str, ...]
    tokens: tuple[str, ...]
    scores: tuple[str | None, ...]
    files: int
    """Number of files of the mix."""
    validation: int | None
    """Rows whose validation hash is not above this are the validation split."""
    examples: str
    rejects: str
    done: str
    """The file that says so."""
    recipe: Recipe


@dataclass(frozen=True)
class Rendered:
    """What came of a unit."""

    name: str
    examples: str | None
    groups: Sequence[tuple[int, int]]
    """File of the mix (-1: validation) -> row group in `examples`."""
    rejects: int
    rejects_path: str | None
    dropped: Sequence[tuple[str, str, str, int]]
    """(stage, pair, reason, rows) of the drops that follow the first pass."""
    kept: Sequence[tuple[str, int, int]]
    """(pair, rows, examples)"""


_REJECT_FIELDS: list[tuple[str, pa.DataType]] = [
        ("source", pa.string()), ("shard", pa.string()), ("row", pa.int64()),
        ("src_lang", pa.string()), ("tgt_lang", pa.string()), ("src", pa.string()), ("tgt", pa.string()),
        ("stage", pa.string()), ("reason", pa.string()),
        ("src_lid", pa.string()), ("src_lid_prob", pa.float32()), ("tgt_lid", pa.string()), ("tgt_lid_prob", pa.float32()),
        ("fingerprint", pa.uint64()), ("quality", pa.float32()), ("tokens", pa.int32()), ("score", pa.float32()),
        ("keeper_source", pa.string()), ("keeper_shard", pa.string()), ("keeper_row", pa.int64()),
]  # fmt: skip
REJECT_COLUMNS = pa.schema(_REJECT_FIELDS)
_WITHOUT_TEXT = {"judged": ("dedup.exact", "quality.not_needed", "balance.quota"), "all": (), "none": None}


def run_render(task: RenderTask) -> Rendered:
    """Writes a unit's examples, sorted into row groups by their file of the mix, and its rejects."""
    recipe = task.recipe
    first = pq.read_table(Path(task.unit.folder) / "rejects.parquet")
    if "stage" in first.column_names:
        first = first.drop_columns(["stage"])
    rejects = [shaped(first, REJECT_COLUMNS)]
    dropped: Dropped = Counter()
    rendered = []
    kept: dict[str, tuple[int, int]] = {}
    lines = zip(task.unit.parts, task.outcomes, task.decisions, task.tokens, task.scores, strict=True)
    for part, outcome, decision, tokens, scores in lines:
        table = pq.read_table(part.path)
        fate = pq.read_table(outcome)
        verdict = fate["verdict"].to_numpy()
        if scores is not None:
            table = table.append_column("quality", pq.read_table(scores)["quality"])
        counts = pq.read_table(tokens, columns=["tokens"])["tokens"].to_numpy()
        table = table.append_column("tokens", pa.array(counts, pa.int32(), mask=counts == 0))
        lost = table.filter(pa.array(verdict != 0))
        names = pa.array(VERDICTS, pa.string()).take(pa.array(verdict[verdict != 0].astype(np.int64)))
        lost = lost.append_column("reason", names)
        if recipe.dedup.clusters:
            keepers = pq.read_table(decision).drop_columns(["verdict"]).filter(pa.array(verdict != 0))
            duplicate = pc.starts_with(names, "dedup.")
            for name in keepers.column_names:
                column = keepers[name].combine_chunks()
                lost = lost.append_column(name, pc.if_else(duplicate, column, pa.scalar(None, column.type)))
        for reason, count in count_values(names).items():
            dropped[reason.partition(".")[0], part.pair, reason] += count
        rejects.append(shaped(lost, REJECT_COLUMNS))
        table = table.filter(pa.array(verdict == 0))
        copies = fate["copies"].to_numpy()[verdict == 0]
        if not table.num_rows:
            continue
        table = table.append_column("copies", pa.array(copies, pa.int32()))
        held_out = np.zeros(table.num_rows, np.bool_)
        if task.validation is not None:
            held_out = validation_hashes(table["key"].to_numpy(), recipe.seed) <= np.uint64(task.validation)
        for held, mask in ((False, ~held_out), (True, held_out)):
            chosen = table.filter(pa.array(mask))
            if not chosen.num_rows:
                continue
            # A row of the validation split is there once, whatever the epochs.
            if held:
                chosen = chosen.set_column(
                    chosen.column_names.index("copies"), "copies", pa.array(np.ones(chosen.num_rows, np.int32))
                )
            examples = instruct.render(chosen, recipe.instruct, recipe.seed)
            files = (
                np.full(examples.num_rows, -1, np.int64) if held else file_of(examples["key"].to_numpy(), task.files)
            )
            rendered.append(examples.append_column("_file", pa.array(files)))
            rows, count = kept.get(part.pair, (0, 0))
            kept[part.pair] = (rows + chosen.num_rows, count + examples.num_rows)
    groups: dict[int, int] = {}
    if rendered:
        examples = pa.concat_tables(rendered, promote_options="default")
        files = examples["_file"].to_numpy()
        order = np.argsort(files, kind="stable")
        examples = examples.take(order).drop_columns(["_file"])
        values, starts = np.unique(files[order], return_index=True)
        with (
            writing(task.examples) as scratch,
            pq.ParquetWriter(scratch, examples.schema, compression="zstd") as writer,
        ):
            for group, (value, start) in enumerate(zip(values, starts, strict=True)):
                end = starts[group + 1] if group + 1 < len(starts) else examples.num_rows
                writer.write_table(examples.slice(start, end - start), row_group_size=max(1, int(end - start)))
                groups[int(value)] = group
    count = _write_rejects(rejects, task)
    result = Rendered(
        task.unit.name, task.examples if rendered else None, sorted(groups.items()), count, task.rejects if count else None,
        [(*names, n) for names, n in sorted(dropped.items())], [(pair, *numbers) for pair, numbers in sorted(kept.items())],
    )  # fmt: skip
    remember(result, task.done)
    return result


def remember(result: Rendered | MixFile, marker: str) -> None:
    """Writes a task's result beside its files, last: an interrupted run finds there what is done."""
    with writing(marker) as scratch:
        scratch.write_text(json.dumps(asdict(result)), encoding="utf-8")


def recall_rendered(marker: Path) -> Rendered | None:
    """The result of a unit that is done, if its files are there."""
    if not ready(marker):
        return None
    result = Rendered(**json.loads(marker.read_text(encoding="utf-8")))
    paths = [path for path in (result.examples, result.rejects_path) if path is not None]
    return result if all(ready(path) for path in paths) else None


def recall_mix(marker: Path, output: Path) -> MixFile | None:
    """The result of a file of the mix that is done, if it is there."""
    return MixFile(**json.loads(marker.read_text(encoding="utf-8"))) if ready(marker) and ready(output) else None


def validation_hashes(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """The order in which rows are taken for validation, by their keys; see `instruct.validation_mask`."""
    return combine(keys, seed + instruct.VALIDATION_SALT)


def file_of(keys: npt.NDArray[np.uint64], files: int) -> npt.NDArray[np.int64]:
    """The file of the mix that a key falls into: equal ranges of the keys, in order, up to 2^32 files."""
    return ((keys >> np.uint64(32)) * np.uint64(files) >> np.uint64(32)).astype(np.int64)


def _write_rejects(tables: list[pa.Table], task: RenderTask) -> int:
    table = pa.concat_tables(tables)
    table = table.take(pc.sort_indices(table, [("row", "ascending")]))
    stage = pc.replace_substring_regex(table["reason"], pattern=r"\..*", replacement="")
    table = table.set_column(REJECT_COLUMNS.get_field_index("stage"), "stage", stage)
    silent = _WITHOUT_TEXT[task.recipe.rejects.text]
    if silent is None or silent:
        hide: Any = True if silent is None else pc.is_in(table["reason"], value_set=pa.array(silent))
        for name in ("src", "tgt"):
            column = pc.if_else(hide, pa.scalar(None, pa.string()), table[name])
            if isinstance(column, pa.Scalar):
                column = pa.nulls(table.num_rows, pa.string())
            table = table.set_column(table.column_names.index(name), name, column)
    if not task.recipe.dedup.clusters:
        table = table.drop_columns(["keeper_source", "keeper_shard", "keeper_row"])
    if table.num_rows:
        with writing(task.rejects) as scratch:
            write_table(table, scratch)
    return table.num_rows


@dataclass(frozen=True)
class MixTask:
    """One file of the mix: the row groups that fall into it."""

    name: str
    pieces: tuple[tuple[str, int], ...]
    output: str
    done: str
    recipe: Recipe


@dataclass(frozen=True)
class MixFile:
    """A file of the mix: its examples, and their tokens by pair."""

    name: str
    rows: int
    tokens: Mapping[str, int]


def run_mix(task: MixTask) -> MixFile:
    """Sorts the examples of one file by their key, brings them into the format asked for and writes them."""
    groups = [pq.ParquetFile(path).read_row_group(group) for path, group in task.pieces]
    table = pa.concat_tables(groups, promote_options="default")
    order = pc.sort_indices(
        table, [(name, "ascending") for name in ("key", "source", "shard", "row", "direction", "copy")]
    )
    table = table.take(order)
    settings = task.recipe.instruct
    counts = pa.array(token_counter(task.recipe.balance.model_dump_json()).count_examples(table, settings), pa.int64())
    sums: Any = pa.table({"pair": pairs_of(table), "tokens": counts}).group_by("pair").aggregate([("tokens", "sum")])
    tokens: dict[str, int] = dict(sorted(zip(sums["pair"].to_pylist(), sums["tokens_sum"].to_pylist(), strict=True)))
    with writing(task.output) as scratch:
        instruct.write(instruct.format_examples(table, settings), scratch, settings.container)
    result = MixFile(task.name, table.num_rows, tokens)
    remember(result, task.done)
    return result


def lowest(keys: Iterable[npt.NDArray[np.uint64]], n: int) -> int | None:
    """The n-th lowest of keys that come in pieces; None where n is 0, the highest where there are fewer."""
    if n <= 0:
        return None
    best = np.empty(0, np.uint64)
    for piece in keys:
        best = np.concatenate([best, piece])
        if best.size > n:
            best = np.partition(best, n - 1)[:n]
    return int(best.max()) if best.size else None
