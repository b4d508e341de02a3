"""How much of each part goes into the mix, and which rows are the validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import combine
from corpusprep.parts import Column, Part, Work, by_pair
from corpusprep.stages import instruct

if TYPE_CHECKING:
    from corpusprep.derive import Run


@dataclass(frozen=True)
class Selection:
    """How much goes into the mix.

    Attributes:
        copies: identity of a part -> copies of its rows.
        validation: the validation hash up to which rows are the validation split.
    """

    copies: Mapping[str, int]
    validation: int | None


def find_selection(run: Run, parts: Sequence[Part], outcome: Column) -> Selection:
    """How much of each part goes into the mix, by the column of final verdicts and copies."""
    settings = run.recipe.instruct
    taken = run.derive(
        "taken", "", summarise, by_pair(parts), (settings.validation, run.recipe.seed),
        of={"outcome": outcome}, whole=True,
    )  # fmt: skip
    values = [taken.value(pair) for pair in taken.groups]
    hashes = sorted(value for each in values for value in each["validation"])[: settings.validation]
    copies = {identity: count for each in values for identity, count in each["copies"].items()}
    return Selection(copies, hashes[-1] if hashes else None)


def summarise(work: Work) -> None:
    """Counts the copies of each part's rows, and finds the lowest of the pair's validation hashes."""
    count, seed = work.settings
    outcome = work.columns["outcome"]
    copies: dict[str, int] = {}
    lowest = np.empty(0, np.uint64)
    for part in work.parts:
        copies[part.identity] = int(outcome.array(part, "copies").sum(dtype=np.int64))
        if count:
            keys = part.read("key")["key"].to_numpy()[outcome.kept(part)]
            lowest = np.concatenate([lowest, validation_hashes(keys, seed)])
            if lowest.size > count:
                lowest = np.partition(lowest, count - 1)[:count]
    work.write_value({"copies": copies, "validation": sorted(lowest.tolist())})


def validation_hashes(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """The order in which rows are taken for validation, by their keys; see `instruct.validation_mask`."""
    return combine(keys, seed + instruct.VALIDATION_SALT)
