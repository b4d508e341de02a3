"""What every stage is made of: settings, an outcome, and a reason with every drop."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

PROVENANCE = ("source", "shard", "row")
PAIR_COLUMNS = ("src", "tgt", "src_lang", "tgt_lang")


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StageSettings(Settings):
    """Settings of one stage."""

    enabled: bool = True
    """false skips the stage."""


class Outcome(NamedTuple):
    """What a stage made of a table.

    Attributes:
        kept: the rows that go on, in their order.
        dropped: the rows that do not, in their order, with one more column `reason` (string,
            `stage.rule`, as in `clean.length_ratio`).
    """

    kept: pa.Table
    dropped: pa.Table


class Agreement(NamedTuple):
    """How far what was computed agrees with a reference package.

    Attributes:
        reference: the package and its version.
        compared: values compared.
        largest_difference: of two numbers that should be the same.
        disagreements: for each value that disagrees the row of the table, what was computed, and what the reference says.
    """

    reference: str
    compared: int
    largest_difference: float
    disagreements: list[tuple[int, str, str]]


def split(table: pa.Table, verdict: npt.NDArray[np.integer], reasons: list[str]) -> Outcome:
    """Parts a table by a verdict a row.

    Args:
        table: n rows.
        verdict: n integers; 0 keeps the row, k > 0 drops it for `reasons[k - 1]`.
        reasons: the reasons, `stage.rule` each.
    """
    verdict = np.asarray(verdict)
    table = table.cast(  # Arrow filters no string views
        pa.schema([f.with_type(pa.string()) if pa.types.is_string_view(f.type) else f for f in table.schema])
    )
    kept = table.filter(pa.array(verdict == 0))
    lost = verdict != 0
    dropped = table.filter(pa.array(lost))
    names = pa.array(reasons, type=pa.string()).take(pa.array(verdict[lost].astype(np.int64) - 1))
    return Outcome(kept, dropped.append_column("reason", names))
