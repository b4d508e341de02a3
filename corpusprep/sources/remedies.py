"""Remedies that name settings of a source, for a recipe and for a command."""

from __future__ import annotations

from corpusprep.errors import Wording

LANGUAGES = Wording('src_lang = "en" and tgt_lang = "sw"', "--src-lang en and --tgt-lang sw")


def columns(**names: str) -> Wording:
    """`columns = {src = "a"}`, with a column's name for each field."""
    places = ", ".join(f'{field} = "{name}"' for field, name in names.items())
    return Wording(f"columns = {{{places}}}", " ".join(f"--column {field}={name}" for field, name in names.items()))


NAME_SIDES = ("Name the columns, as in ", columns(src="a", tgt="b"))
OR_NAME_LANGUAGES = (
    ", or name the columns that hold the languages, as in ",
    columns(src_lang="from", tgt_lang="to"),
)


def or_keep(gain: str, joint: str = ", or ") -> Wording:
    """`, or set on_error = "keep" to …`; empty for a command that always stops."""
    return Wording(f'{joint}set on_error = "keep" {gain}', f"{joint}give --on-error keep {gain}", "")
