"""What every stage is made of: settings, an outcome, and a reason with every drop."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from corpusprep.errors import SettingsError

PROVENANCE = ("source", "shard", "row")
PAIR_COLUMNS = ("src", "tgt", "src_lang", "tgt_lang")


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def without(self, *names: str) -> Self:
        """These settings with some fields at their defaults: what is left decides a result, and its key."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].get_default(call_default_factory=True) for name in names})


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


def pairs_of(table: pa.Table) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names of the pairs in a table, sorted, and the place of each row's pair among them."""
    if table.num_rows == 0:
        return [], np.zeros(0, np.int64)
    sides: list[Any] = [table[name].cast(pa.string()).combine_chunks() for name in ("src_lang", "tgt_lang")]
    encoded: Any = pc.binary_join_element_wise(*(side.fill_null("") for side in sides), "-").dictionary_encode()
    found = encoded.dictionary.to_pylist()
    order = sorted(range(len(found)), key=found.__getitem__)
    place = np.empty(len(found), np.int64)
    place[order] = np.arange(len(found))
    return [found[k] for k in order], place[encoded.indices.to_numpy()]


def load_function(reference: str, setting: str) -> Callable[..., Any]:
    """The function that a user names as `module:function`.

    Args:
        reference: as the recipe has it.
        setting: the key that it stands under, for messages.

    Raises:
        SettingsError: it cannot be imported, or is no function.
    """
    module, _, name = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module does when it is imported
        raise SettingsError(
            f"{setting} = {reference!r}: cannot be imported ({type(error).__name__}: {error}). Name it module:function, with "
            "the module on PYTHONPATH."
        ) from error
    if not callable(found):
        raise SettingsError(f"{setting} = {reference!r}: is not a function.")
    return found  # type: ignore[no-any-return]
