"""Step 3: which rows are duplicates. It reads fingerprints, not text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.parts import Column, Group, Part, Work, by_pair
from corpusprep.stages import dedup

if TYPE_CHECKING:
    from corpusprep.derive import Run

_PREFERENCE = {"form": ["flaws"], "score": ["score"], "first": []}  # columns of a part by which its rows are ranked


def find_duplicates(run: Run, parts: Sequence[Part]) -> Column:
    """The column of verdicts: 0, `dedup.exact` or `dedup.near`; with `dedup.clusters` also the row that is kept instead.

    Rows are compared within their language pair, or all with each other (`dedup.scope`).
    """
    settings = run.recipe.dedup
    groups = by_pair(parts)
    if settings.scope == "all" and parts:
        groups = [Group("all", tuple(sorted(parts, key=lambda part: (part.rank, part.pair))))]
    return run.derive("dedup", "find duplicates", mark_duplicates, groups, settings)


def mark_duplicates(work: Work) -> None:
    """Decides which rows of a group are duplicates; writes `verdict` (uint8), aligned to each part."""
    settings: dedup.DedupSettings = work.settings
    if not settings.enabled:
        for part in work.parts:
            work.write(part, {"verdict": np.zeros(part.rows, np.uint8)})
        return
    columns = ["fingerprint", "text_hash", "row", *_PREFERENCE[settings.keep]]
    rows = pa.concat_tables([part.read(*columns) for part in work.parts])
    sizes = [part.rows for part in work.parts]
    part_of = np.repeat(np.arange(len(sizes)), sizes)
    order = _order(work.parts, rows, part_of, settings)
    fingerprints, hashes = rows["fingerprint"].to_numpy(), rows["text_hash"].to_numpy()
    if order is not None:
        fingerprints, hashes = fingerprints[order], hashes[order]
    verdict, keeper = dedup.decide(fingerprints, hashes, settings, min(work.threads, os.cpu_count() or 1))
    if order is not None:
        unordered, keepers = np.empty_like(verdict), np.empty_like(keeper)
        unordered[order], keepers[order] = verdict, order[keeper]
        verdict, keeper = unordered, keepers
    start = 0
    for part in work.parts:
        mine = slice(start, start + part.rows)
        found: dict[str, Any] = {"verdict": verdict[mine]}
        if settings.clusters:
            found |= _provenance(work.parts, rows, part_of, keeper[mine])
        work.write(part, found)
        start += part.rows


def _order(
    parts: Sequence[Part], rows: pa.Table, part_of: npt.NDArray[np.int64], settings: dedup.DedupSettings
) -> npt.NDArray[np.int64] | None:
    """The rows with the best first; None where they stand in that order already."""
    keys: list[npt.NDArray[Any]] = []
    if len({part.pair for part in parts}) > 1:  # else parts and their rows are in rank order, and sorting is stable
        ranks = np.array([part.rank for part in parts], np.int64).reshape(-1, 3)
        keys = [rows["row"].to_numpy(), ranks[part_of, 1], ranks[part_of, 0]]
    if settings.keep == "score":
        score = np.asarray(rows["score"].to_numpy(zero_copy_only=False), np.float32)
        keys.append(-np.where(np.isnan(score), -np.inf, score))
    elif settings.keep == "form":
        keys.append(rows["flaws"].to_numpy())
    return np.lexsort(keys) if keys else None


def _provenance(
    parts: Sequence[Part], rows: pa.Table, part_of: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Source, shard and row of rows of the group."""
    sources = pa.array([part.source for part in parts], pa.string())
    shards = pa.array([part.shard for part in parts], pa.string())
    at = part_of[chosen]
    return {
        "keeper_source": sources.take(at),
        "keeper_shard": shards.take(at),
        "keeper_row": rows["row"].to_numpy()[chosen],
    }
