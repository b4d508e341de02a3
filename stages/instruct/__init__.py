"""Stage `instruct`: renders rows as instruction examples in the chosen directions and format, and shuffles them.

Rows whose text can be read as control tokens of a chat template are always dropped, even if earlier stages kept them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from corpusprep import codes
from corpusprep.arrow import U64, combine
from corpusprep.errors import SettingsError
from corpusprep.stage import Outcome, StageSettings, split
from corpusprep.stages.instruct import formats as _format
from corpusprep.stages.instruct import templates as _templates
from corpusprep.stages.instruct import text as _text
from corpusprep.stages.instruct import tokens as _tokens
from corpusprep.stages.instruct.dataset_card import CardFacts, PairFacts, card
from corpusprep.stages.instruct.examples import VALIDATION_SALT, Direction, Examples, keys_of_rows
from corpusprep.stages.instruct.templates import DEFAULT_TEMPLATES
from corpusprep.stages.instruct.tokens import special_tokens

__all__ = [
    "DEFAULT_TEMPLATES",
    "REASONS",
    "VALIDATION_SALT",
    "CardFacts",
    "InstructSettings",
    "PairFacts",
    "card",
    "format_examples",
    "instruct",
    "invert",
    "render",
    "screen",
    "special_tokens",
    "validation_mask",
    "write",
]

REASONS = ("instruct.template_tokens", "instruct.empty")


class InstructSettings(StageSettings):
    """Settings of the stage `instruct`."""

    format: Literal["messages", "prompt_completion", "alpaca", "sharegpt"] = "messages"
    """Fields of an example: `messages` (turns of `role` and `content`), `prompt_completion` (`prompt`, `completion`),
    `alpaca` (`instruction`, `input`, `output`) or `sharegpt` (`conversations` of `from` and `value`)."""

    directions: Direction | dict[str, Direction] = "both"
    """Translation directions: `both`, `forward` (from src to tgt: out of English) or `backward`. Or a table by pair:
    `forward` then follows the order of languages in the key, and the key `default` stands for all other pairs."""

    templates: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_TEMPLATES
    """Prompts. A seeded hash of the row selects one. Each must contain `{text}` once and `{target_language}`;
    `{source_language}` is optional."""

    system: Annotated[str, Field(min_length=1)] | None = None
    """System prompt of each example; it may contain `{source_language}` and `{target_language}`."""

    validation: Annotated[int, Field(ge=0)] = 0
    """Number of rows for the validation split, with all their examples, selected by a seeded hash."""

    container: Literal["parquet", "jsonl"] = "parquet"
    """File format of the mix."""

    shard_rows: Annotated[int, Field(ge=1)] = 250_000
    """Examples per file of the mix."""

    forbidden: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """More text that no row may contain, such as the special tokens of a tokenizer (see `special_tokens`). Rows with
    tokens of published chat templates are always dropped."""

    carry: tuple[str, ...] = ("quality",)
    """More columns of the rows that are copied to the examples, if present."""

    @field_validator("directions")
    @classmethod
    def _known_pairs(cls, value: str | dict[str, Direction]) -> str | dict[str, Direction]:
        if isinstance(value, dict):
            for pair in value:
                if pair != "default":
                    try:
                        codes.parse_pair(pair)
                    except SettingsError as error:
                        raise ValueError(f"{error} The key default stands for all pairs that are not named.") from error
        return value

    @model_validator(mode="after")
    def _sound_prompts(self) -> InstructSettings:
        for template in self.templates:
            _templates.check_template(template)
        _templates.check_slots(self.system or "")
        for text in (*self.templates, self.system or ""):
            if _tokens.token_mask(pa.array([text], pa.string()), self.forbidden)[0]:
                raise ValueError(f"{text!r} contains a control token of a chat template")
        return self


def instruct(table: pa.Table, settings: InstructSettings = InstructSettings(), seed: int = 1) -> Outcome:
    """Converts a table of rows to shuffled examples.

    Args:
        table: n rows `src tgt src_lang tgt_lang`, with `source shard row` if known; `copies` (integer) is the number of
            times that a row is used, 1 if the column is missing.
        settings: the stage's settings.
        seed: determines templates, order and validation rows, together with each row's provenance (its position if that
            is unknown).

    Returns:
        kept: one row per example, as from `format_examples`, in order of the seeded hash of row, direction and copy;
        with `validation` also `split` (`train` or `validation`). dropped: rows with a reason of `REASONS`.

    Examples:
        >>> table = pa.table({"src": ["bread"], "tgt": ["Brot"], "src_lang": ["en"], "tgt_lang": ["de"]})
        >>> settings = InstructSettings(templates=("Translate into {target_language}: {text}",), format="prompt_completion")
        >>> examples = instruct(table, settings).kept
        >>> sorted(zip(examples["prompt"].to_pylist(), examples["completion"].to_pylist()))
        [('Translate into English: Brot', 'bread'), ('Translate into German: bread', 'Brot')]
    """
    table = _text.plain(table)
    rows, dropped = split(table, screen(table, settings), list(REASONS))
    examples = Examples(rows, settings, seed)
    order = examples.shuffled()
    kept = pa.concat_tables([format_examples(piece, settings) for piece in examples.rendered(order)])
    if settings.validation:
        held = validation_mask(rows, settings.validation, seed)[examples.row[order]]
        names = pa.array(["train", "validation"], pa.string())
        kept = kept.append_column("split", names.take(held.astype(np.int8)))
    return Outcome(kept, dropped)


def screen(table: pa.Table, settings: InstructSettings) -> npt.NDArray[np.uint8]:
    """Verdict on n rows, shape (n,): 0 if the row is kept, k > 0 if it is dropped for `REASONS[k - 1]`.

    A row is dropped if a side contains a control token of a chat template or a `forbidden` string, if such a token
    would form between the text and a template, or if a side is blank.
    """
    tokens = np.zeros(table.num_rows, np.bool_)
    blank = np.zeros(table.num_rows, np.bool_)
    halves = [_templates.halves(template) for template in settings.templates]
    borders = [both for both in halves if _tokens.risky(*both, settings.forbidden)]
    for side in ("src", "tgt"):
        tokens |= _tokens.token_mask(table[side], settings.forbidden)
        for before, after in borders:
            tokens |= _tokens.border_mask(table[side], before, after, settings.forbidden)
        blank |= (_text.series(table[side]).str.strip_chars().str.len_bytes() == 0).to_numpy()
    return np.where(tokens, 1, np.where(blank, 2, 0)).astype(np.uint8)


def validation_mask(keys: U64 | pa.Table, n: int, seed: int) -> npt.NDArray[np.bool_]:
    """Selects n rows for validation: those with the lowest seeded hash, or all rows if there are at most n.

    Args:
        keys: a key for each of m rows (from `corpusprep.arrow.row_keys`), or the table of the rows.
        n: number of rows to select.
        seed: makes the selection independent of the keys' own order, by which rows may have been selected before.

    Returns:
        bool of shape (m,), min(n, m) of them true.
    """
    hashes = combine(keys_of_rows(keys, seed) if isinstance(keys, pa.Table) else keys, seed + VALIDATION_SALT)
    mask = np.zeros(hashes.size, np.bool_)
    if 0 < n < hashes.size:
        border = np.partition(hashes, n - 1)[n - 1]
        mask = hashes < border
        mask[np.flatnonzero(hashes == border)[: n - int(mask.sum())]] = True
    elif n:
        mask[:] = True
    return mask


def render(table: pa.Table, settings: InstructSettings, seed: int) -> pa.Table:
    """The examples of a table, in order of row, direction and copy.

    Args:
        table: n rows, as for `instruct`; each row is rendered, even if `screen` would drop it.
        settings: the stage's settings.
        seed: determines templates and keys.

    Returns:
        One row per example: `prompt` (the user's message), `completion` (the answer), `system` if there is one,
        `src_lang` and `tgt_lang` of the row, `direction` (`en-sw`), `template` (int32, index into the setting), `copy`
        (int32, from 0), `key` (uint64, the order of the shuffle). If the row has them, also `source shard row tokens`
        and the columns of `carry`.
    """
    examples = Examples(table, settings, seed)
    return pa.concat_tables(examples.rendered(np.arange(examples.row.size)))


def format_examples(
    rendered: pa.Table, settings: InstructSettings, order: npt.NDArray[np.int64] | None = None
) -> pa.Table:
    """Converts examples from `render` to the columns of the chosen format.

    Args:
        rendered: n examples.
        settings: the stage's settings.
        order: indices of the examples to convert, in this order; if it is not given, all as they are.

    Returns:
        The format's columns, then `src_lang tgt_lang direction template copy` and, if present, `source shard row` and
        the columns of `carry`. `prompt_completion` and `alpaca` have a column `system` if there is a system prompt.
    """
    texts = {name: _text.large(rendered[name]) for name in _format.TEXTS if name in rendered.column_names}
    rest = rendered.drop_columns(list(texts))
    sizes = np.sum([_text.byte_lengths(column) for column in texts.values()], axis=0)
    order = np.arange(rendered.num_rows) if order is None else order
    pieces = _text.slices(sizes[order] + 32)  # of a chat, the speakers are text too
    return pa.concat_tables([_format.format_rows(texts, rest, settings, order[start:stop]) for start, stop in pieces])


def invert(examples: pa.Table, settings: InstructSettings) -> pa.Table:
    """Recovers the source row of each example exactly.

    Args:
        examples: n examples that `instruct` made with the format and the templates of `settings`.
        settings: the settings that made them.

    Returns:
        n rows `src tgt src_lang tgt_lang`, then the examples' other columns.

    Raises:
        RunError: an example was not made with these settings.
    """
    rows = max(1, examples.num_rows * _text.PIECE_BYTES // max(examples.nbytes, 1))
    starts = range(0, max(examples.num_rows, 1), rows)
    return pa.concat_tables(
        [_format.invert_batch(examples.slice(at, rows).combine_chunks(), settings) for at in starts]
    )


def write(table: pa.Table, path: str | Path, container: Literal["parquet", "jsonl"]) -> None:
    """Writes one file of the mix; the same table gives the same bytes."""
    if container == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, os.fspath(path), compression="zstd", row_group_size=25_000)
    else:
        pl.DataFrame(pl.from_arrow(table)).write_ndjson(os.fspath(path))
