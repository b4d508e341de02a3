"""Parts that all stages share: settings, outcomes, and a reason for every dropped row."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from corpusprep.arrow import let_pandas_in
from corpusprep.errors import SettingsError

PROVENANCE = ("source", "shard", "row")
PAIR_COLUMNS = ("src", "tgt", "src_lang", "tgt_lang")


class Settings(BaseModel):
    """Base of all settings: frozen; unknown keys are an error. The text below a field says what it means: `corpusprep settings`
    shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def without(self, *names: str) -> Self:
        """These settings with some fields at their defaults, so that a key depends only on the others."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].get_default(call_default_factory=True) for name in names})


class StageSettings(Settings):
    """Settings of one stage."""

    enabled: bool = True
    """false skips the stage."""


class Outcome(NamedTuple):
    """The result of a stage.

    Attributes:
        kept: the rows that are kept, in their order.
        dropped: the rows that are dropped, in their order, with an additional column `reason` (string,
            `stage.rule`, as in `clean.length_ratio`).
    """

    kept: pa.Table
    dropped: pa.Table


class Agreement(NamedTuple):
    """A comparison of computed values with a reference package.

    Attributes:
        reference: the package and its version.
        compared: number of values compared.
        largest_difference: largest difference of two numbers that should be the same.
        disagreements: for each value that differs, the row of the table, the computed value and the reference's value.
    """

    reference: str
    compared: int
    largest_difference: float
    disagreements: list[tuple[int, str, str]]


def split(table: pa.Table, verdict: npt.NDArray[np.integer], reasons: list[str]) -> Outcome:
    """Splits a table by one verdict per row.

    Args:
        table: n rows.
        verdict: n integers; 0 keeps the row, k > 0 drops it for `reasons[k - 1]`.
        reasons: the reasons, each as `stage.rule`.
    """
    verdict = np.asarray(verdict)
    table = table.cast(  # Arrow cannot filter string views
        pa.schema([f.with_type(pa.string()) if pa.types.is_string_view(f.type) else f for f in table.schema])
    )
    kept = table.filter(pa.array(verdict == 0))
    lost = verdict != 0
    dropped = table.filter(pa.array(lost))
    names = pa.array(reasons, type=pa.string()).take(pa.array(verdict[lost].astype(np.int64) - 1))
    return Outcome(kept, dropped.append_column("reason", names))


def pairs_of(table: pa.Table) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names of the pairs in a table, sorted, and the index of each row's pair among them."""
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
    """Imports the function that a user names as `module:function`.

    Args:
        reference: the name, as in the recipe.
        setting: the key that has it as its value, for error messages.

    Raises:
        SettingsError: the function cannot be imported, or is not a function.
    """
    module, _, name = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing the module can fail in any way
        raise SettingsError(
            f"{setting} = {reference!r}: cannot be imported ({type(error).__name__}: {error}). Write it as "
            "module:function, and put the module on PYTHONPATH."
        ) from error
    let_pandas_in()
    if not callable(found):
        raise SettingsError(f"{setting} = {reference!r}: is not a function. Name one as module:function.")
    return found  # type: ignore[no-any-return]
