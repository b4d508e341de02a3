"""Finds text that a tokenizer would read as control tokens of a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from corpusprep.errors import InputError

if TYPE_CHECKING:
    Mask: TypeAlias = npt.NDArray[np.bool_]
    Strings: TypeAlias = pa.Array[Any] | pa.ChunkedArray[Any]

# Any `<|…|>`, also with the full-width characters of DeepSeek's tokens, which NFKC folds to ASCII, and the halves
# `<|name>` and `<name|>`. The other patterns are tokens of published chat templates and tokenizers. Case is ignored in
# angle brackets, but not in square brackets, because prose has square brackets too.
_PATTERNS = (
    r"[<＜][|｜][^\n]*?[|｜][>＞]",
    r"[<＜][|｜]/?[A-Za-z_]+[>＞]",
    r"[<＜]/?[A-Za-z_]+[|｜][>＞]",
    r"[<＜][<＜]/?SYS[>＞][>＞]",
    r"(?i:[<＜]/?(?:s|bos|eos|pad|unk|cls|sep|mask|bos_token|eos_token|pad_token|unk_token|sop|eop|eoh|eoa|eot|eod|eot_id"
    r"|image|start_of_turn|end_of_turn|start_of_image|end_of_image|start_header_id|end_header_id|end_of_text|endoftext"
    r"|begin_of_text|im_start|im_end|think|thinking|tool|tools|tool_call|tool_calls|tool_response|tool_result|function"
    r"|function_call|function_calls|arg_key|arg_value|answer|unused_?\d+|reserved_?\d+|extra_id_\d+|special_?\d+"
    r"|fim_prefix|fim_middle|fim_suffix"
    r"|seed:[a-z_]+)[>＞])",
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|CLS|SEP|MASK|PAD|UNK|BOS|EOS|gMASK|sMASK"
    r"|THINK|IMG|IMG_BREAK|IMG_END|REFERENCE_DOC_\d+)\]",
    r"\][~!]+b?\[|\]~b\]|\[e~\[",
    r"###[ \t]*(?:Instruction|Input|Response|Human|Assistant|System|User):",
)
_TOKEN = "|".join(_PATTERNS)
_STARTS = ["<", "＜", "[", "]~", "]!", "###"]  # each pattern begins with one: most text has none
# A token is within one line, and begins and ends with one of these. If a half of a template has none of them in the
# line next to the text, it cannot be part of a token.
_FIRST, _LAST = frozenset("<＜[]#"), frozenset(">＞[]:")


def token_mask(column: Strings, forbidden: Sequence[str] = ()) -> Mask:
    """Which texts contain a token.

    Args:
        column: n strings; null counts as empty.
        forbidden: more strings, matched literally.

    Returns:
        bool of shape (n,).
    """
    return _token_mask(_series(column), [word for word in forbidden if word])


def border_mask(column: Strings, before: str, after: str, forbidden: Sequence[str] = ()) -> Mask:
    """Which of n texts contain a token when placed between the two halves of a template, shape (n,)."""
    frame = pl.DataFrame({"text": _series(column)})
    joined = frame.select(text=pl.concat_str(pl.lit(before), pl.col("text"), pl.lit(after)))["text"]
    return _token_mask(joined, [word for word in forbidden if word])


def risky(before: str, after: str, forbidden: Sequence[str] = ()) -> bool:
    """Whether some text between these two halves could complete a token that begins or ends in them."""
    if _FIRST & set(before.rpartition("\n")[2]) or _LAST & set(after.partition("\n")[0]):
        return True
    cuts = ((word[:cut], word[cut:]) for word in forbidden for cut in range(1, len(word)))
    return any(before.endswith(head) or after.startswith(tail) for head, tail in cuts)


def _series(column: Strings) -> pl.Series:
    return pl.Series("text", pl.from_arrow(column)).cast(pl.String).fill_null("")


def _token_mask(texts: pl.Series, forbidden: list[str]) -> Mask:
    suspects = texts.str.contains_any(_STARTS)
    mask: Mask = suspects.to_numpy().copy()
    if mask.any():
        mask[mask] = texts.filter(suspects).str.contains(_TOKEN).to_numpy()
    if forbidden:
        mask |= texts.str.contains_any(forbidden).to_numpy()
    return mask


def special_tokens(file: str | Path) -> tuple[str, ...]:
    """The control tokens of a tokenizer, for the setting `forbidden`, in order.

    These are its added tokens that are special or in brackets, such as `<think>`. Added tokens that are blank, or that
    consist of letters and digits only, are left out: they are ordinary text.

    Args:
        file: a `tokenizer.json`, or its folder.

    Raises:
        InputError: the file is missing or is not a tokenizer.
    """
    path = Path(file)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
        tokens = {str(token["content"]) for token in added if token.get("special") or _bracketed(str(token["content"]))}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            str(path), f"not a readable tokenizer.json ({error})", "Give the file that tokenizers or transformers saved"
        ) from error
    return tuple(sorted(token for token in tokens if len(token.strip()) > 2 and not token.strip().isalnum()))


def _bracketed(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in {("<", ">"), ("[", "]")}
