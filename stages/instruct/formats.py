"""Converts examples to the fields of each format, and back to their source rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from corpusprep.errors import RunError
from corpusprep.stage import PROVENANCE
from corpusprep.stages.instruct import text
from corpusprep.stages.instruct.examples import all_halves, pairs_of

if TYPE_CHECKING:
    from corpusprep.stages.instruct import InstructSettings

# The column of each chat format, the fields of a turn, and the speakers.
_CHATS = {
    "messages": ("messages", "role", "content", ("system", "user", "assistant")),
    "sharegpt": ("conversations", "from", "value", ("system", "human", "gpt")),
}
_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
}


TEXTS = ("system", "prompt", "completion")
"""Columns of `render` that have the text of an example; the first only if there is a system prompt."""


def format_rows(
    texts: Mapping[str, pa.Array[Any]], rest: pa.Table, settings: InstructSettings, rows: npt.NDArray[np.int64]
) -> pa.Table:
    """Converts examples from `render`, with these indices, to the columns of the format.

    Args:
        texts: those of `TEXTS` that there are, as `large_string`.
        rest: the other columns.
    """
    rest = rest.take(rows)
    if settings.format in _CHATS:
        field, speaker, content, speakers = _CHATS[settings.format]
        columns: dict[str, Any] = {field: _chat(list(texts.values()), rows, speakers, (speaker, content))}
    else:
        columns = {name: text.narrow(text.weave([(column, rows)], 1)) for name, column in texts.items()}
        if settings.format == "alpaca":
            instruction, asked = _alpaca(columns.pop("prompt"), rest, settings)
            columns.update(instruction=instruction, input=asked, output=columns.pop("completion"))
    names = ("src_lang", "tgt_lang", "direction", "template", "copy", *PROVENANCE, *settings.carry)
    for name in dict.fromkeys(names):
        if name in rest.column_names and name not in columns:
            columns[name] = rest[name]
    return pa.table(columns)


def invert_batch(examples: pa.Table, settings: InstructSettings) -> pa.Table:
    """Recovers the source row of each example; see `instruct.invert`."""
    fields = _FIELDS[settings.format]
    missing = sorted({*fields, "src_lang", "tgt_lang", "direction", "template"} - set(examples.column_names))
    if missing:
        raise RunError(
            f"The examples have no column {', '.join(missing)}. Give examples in the format {settings.format}."
        )
    frame = _halves(examples, settings)
    if settings.format in _CHATS:
        turns = pl.DataFrame({"turn": pl.Series(pl.from_arrow(examples[fields[0]]))})
        content = _CHATS[settings.format][2]
        contents = [
            pl.col("turn").list.get(at, null_on_oob=True).struct.field(content).fill_null("").alias(name)
            for at, name in ((-2, "prompt"), (-1, "completion"))
        ]
        frame = frame.hstack(turns.select(contents))
    else:
        frame = frame.with_columns(text.series(examples[name]).alias(name) for name in fields)
    if settings.format == "alpaca":
        apart = (pl.col("after") == "") & (pl.col("instruction") == pl.col("before").str.strip_chars_end())
        prompt = pl.when(apart).then(pl.concat_str("before", "input")).otherwise("instruction")
        frame = frame.with_columns(prompt=prompt, completion=pl.col("output"))
    frame = frame.with_columns(text=_between())
    exact = frame.select(pl.concat_str("before", "text", "after") == pl.col("prompt")).to_series().fill_null(False)
    if not exact.all():
        row = exact.arg_min()
        raise RunError(f"Example {row} was not made with these templates. Give the settings that made the examples.")
    rows = frame.select(
        src=pl.when("forward").then("text").otherwise("completion"),
        tgt=pl.when("forward").then("completion").otherwise("text"),
    )
    columns: dict[str, Any] = {"src": text.arrow(rows["src"]), "tgt": text.arrow(rows["tgt"])}
    columns.update((name, examples[name]) for name in examples.column_names if name not in (*fields, "system"))
    return pa.table(columns)


def _chat(
    contents: Sequence[pa.Array[Any]], rows: npt.NDArray[np.int64], speakers: tuple[str, ...], fields: tuple[str, str]
) -> pa.Array[Any]:
    """One list of turns for each of these rows, from one column per turn, the last turns' speakers of these."""
    content = text.weave([(column, rows) for column in contents], 1).cast(pa.string())
    speaker = text.repeated(speakers[-len(contents) :], rows.size)
    turns = pa.StructArray.from_arrays([speaker, content], names=list(fields))
    return pa.ListArray.from_arrays(pa.array(np.arange(rows.size + 1) * len(contents), pa.int32()), turns)


def _alpaca(prompt: text.Strings, rest: pa.Table, settings: InstructSettings) -> tuple[text.Strings, text.Strings]:
    """Instruction and input: if the prompt ends with the text, the text is the input, else it is in the instruction."""
    frame = _halves(rest, settings).with_columns(prompt=text.series(prompt))
    apart = pl.col("after") == ""
    parts = frame.select(
        instruction=pl.when(apart).then(pl.col("before").str.strip_chars_end()).otherwise("prompt"),
        input=pl.when(apart).then(_between()).otherwise(pl.lit("")),
    )
    return text.arrow(parts["instruction"]), text.arrow(parts["input"])


def _between() -> pl.Expr:
    """`prompt` without its first and last characters, as many as `before` and `after` have."""
    before, after = pl.col("before").str.len_chars().cast(pl.Int64), pl.col("after").str.len_chars().cast(pl.Int64)
    length = pl.col("prompt").str.len_chars().cast(pl.Int64) - before - after
    return pl.col("prompt").str.slice(before, pl.max_horizontal(length, 0))


def _halves(examples: pa.Table, settings: InstructSettings) -> pl.DataFrame:
    """For each example, the halves of its template, `before` and `after`, and whether its direction is `forward`."""
    pairs = pairs_of(examples)
    straight = text.series(examples["src_lang"]) + "-" + text.series(examples["tgt_lang"])
    forward = text.series(examples["direction"]) == straight
    template = examples["template"].to_numpy().astype(np.int64)
    count = len(settings.templates)
    if template.size and not 0 <= template.min() <= template.max() < count:
        raise RunError(
            f"The examples use more templates than the {count} of the settings. Give the settings that made them."
        )
    which = (pairs.code.astype(np.int64) * 2 + ~forward.to_numpy()) * count + template
    before, after = (text.series(half.take(which)) for half in all_halves(pairs.sides, settings))
    return pl.DataFrame({"before": before, "after": after, "forward": forward})
