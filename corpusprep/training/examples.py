"""Turns examples of a mix into tokens with the model's chat template. Only the answer has a loss."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from corpusprep.errors import InputError, RunError
from corpusprep.keys import digest, large_file_digest

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_BATCH = 1024
_PORTION_ROWS = 10_000
_PORTION_BYTES = 8 << 20
_COLUMNS = {"messages", "conversations", "system", "prompt", "completion", "instruction", "input", "output"}
_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IGNORED = -100
"""Label of a token without a loss."""


@dataclass(frozen=True)
class Mix:
    """A mix written by `corpusprep run`.

    Attributes:
        train, validation: files, in order.
        checksum: digest of all training files.
    """

    folder: Path
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    checksum: str


@dataclass(frozen=True)
class Portion:
    """A contiguous portion of a file.

    Attributes:
        begin, end: range of row groups (Parquet) or of bytes (JSON lines).
        row: row number of the portion's first example.
        rows: number of examples to take, from the first.
    """

    file: Path
    begin: int
    end: int
    row: int
    rows: int


def find_mix(folder: str | Path) -> Mix:
    """Finds the files of a mix.

    Raises:
        InputError: the folder has no mix.
    """
    folder = Path(folder)
    train = _shards(folder)
    if not train and (folder / "mix").is_dir():
        folder = folder / "mix"
        train = _shards(folder)
    if not train:
        raise InputError(
            str(folder), "has no train-*.parquet or train-*.jsonl", "Give the mix folder of a run: --mix out/run/mix"
        )
    return Mix(folder, train, _shards(folder / "validation"), digest([large_file_digest(file) for file in train]))


def _shards(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for kind in ("parquet", "jsonl") for file in folder.glob(f"*.{kind}")))


def portions(files: Sequence[Path], limit: int | None = None) -> Iterator[Portion]:
    """Splits files into portions of a few thousand examples.

    Args:
        limit: number of examples to take, from the first.

    Raises:
        InputError: a file cannot be read.
    """
    for file in files:
        try:
            for portion in _groups(file) if file.suffix == ".parquet" else _lines(file):
                rows = portion.rows if limit is None else min(portion.rows, limit)
                if rows:
                    yield replace(portion, rows=rows)
                if limit is not None:
                    limit -= rows
                    if not limit:
                        return
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file, error) from None


def _groups(file: Path) -> Iterator[Portion]:
    about = pq.read_metadata(file)
    begin = row = rows = 0
    for group in range(about.num_row_groups):
        rows += about.row_group(group).num_rows
        if rows >= _PORTION_ROWS or group + 1 == about.num_row_groups:
            yield Portion(file, begin, group + 1, row, rows)
            begin, row, rows = group + 1, row + rows, 0


def _lines(file: Path) -> Iterator[Portion]:
    with open(file, "rb") as opened:
        begin = row = 0
        while chunk := opened.read(_PORTION_BYTES):
            chunk += opened.readline()
            rows = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
            yield Portion(file, begin, begin + len(chunk), row, rows)
            begin, row = begin + len(chunk), row + rows


def count(files: Sequence[Path]) -> int:
    """Number of examples in all files."""
    return sum(portion.rows for portion in portions(files))


def conversations(stretches: Iterable[Portion]) -> Iterator[tuple[str, list[list[dict[str, str]]]]]:
    """Reads examples in any format of the instruct stage, in batches, as lists of turns with `role` and `content`.

    Yields:
        The position of the batch for error messages (`file, row N`), and its conversations.

    Raises:
        InputError: a file cannot be read, or a row is not an example.
    """
    for portion in stretches:
        file, row, end = portion.file, portion.row, portion.row + portion.rows
        for rows in _rows(portion):
            rows = rows[: end - row]
            yield f"{file}, row {row}", [_conversation(example, file, row + k) for k, example in enumerate(rows)]
            row += len(rows)
            if row == end:
                break


def _rows(portion: Portion) -> Iterator[list[Any]]:
    file = portion.file
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                columns = [name for name in opened.schema_arrow.names if name in _COLUMNS]
                groups = list(range(portion.begin, portion.end))
                for batch in opened.iter_batches(_BATCH, row_groups=groups, columns=columns):
                    yield batch.to_pylist()
        else:
            with open(file, "rb") as opened_lines:
                opened_lines.seek(portion.begin)
                numbered = enumerate(itertools.islice(opened_lines, portion.rows), portion.row)
                while rows := [_parsed(line, file, row) for row, line in itertools.islice(numbered, _BATCH)]:
                    yield rows
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(file, error) from None


def _parsed(line: bytes, file: Path, row: int) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise InputError(str(file), "is not JSON", "Make the mix again", row) from None


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(str(file), f"cannot be read ({error})", "Make the mix again")


def _conversation(example: Any, file: Path, row: int) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    try:
        if not isinstance(example, dict):
            raise TypeError
        if "messages" in example:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in example["messages"]]
        elif "conversations" in example:
            turns = [{"role": _SHAREGPT[turn["from"]], "content": turn["value"]} for turn in example["conversations"]]
        else:
            if example.get("system"):
                turns.append({"role": "system", "content": example["system"]})
            if "instruction" in example:
                asked = example["instruction"] + (f"\n{example['input']}" if example.get("input") else "")
                answer = example["output"]
            else:
                asked, answer = example["prompt"], example["completion"]
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    except (KeyError, TypeError):
        raise InputError(
            str(file), "is not an example in the format messages, sharegpt, prompt_completion or alpaca",
            "Make the mix with corpusprep run", row,
        ) from None  # fmt: skip
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not all(isinstance(t["content"], str) for t in turns):
        raise InputError(str(file), "does not end with an answer to a prompt", "Make the mix again", row)
    try:
        for turn in turns:
            turn["content"].encode()
    except UnicodeEncodeError:
        raise InputError(
            str(file), "has an unpaired surrogate, which is not valid text", "Make the mix again", row
        ) from None
    return turns


class Encoder:
    """Renders conversations with a chat template and tokenises them.

    Args:
        tokenizer: a fast tokenizer of transformers.
        arguments: arguments of the chat template.

    Raises:
        RunError: the tokenizer has no chat template, or is not a fast one.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise RunError(
                f"{name}: the tokenizer has no chat template, so this is not an instruct model. Choose an instruct "
                "model, or add a chat_template.jinja to the model's folder."
            )
        if not tokenizer.is_fast:
            raise RunError(f"{name}: the tokenizer is not a fast one. Save it with AutoTokenizer(..., use_fast=True).")
        self._backend = tokenizer.backend_tokenizer
        self._marks = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        self._tails: dict[str, list[int]] = {}
        # With trim_offsets, offsets leave out the white space before a word, so they do not show where a token begins.
        self._trims = '"trim_offsets":true' in json.dumps(
            json.loads(self._backend.to_str())["post_processor"], separators=(",", ":")
        )

    def encode(self, chats: list[list[dict[str, str]]], where: str) -> list[tuple[I32, I32]]:
        """Tokens and labels of conversations. All tokens after the prompt have a loss, except white space at the end.

        Args:
            where: position of the first conversation, for error messages.

        Raises:
            RunError: the template fails, or renders the prompt differently when an answer follows; or a prompt ends
                inside a token.
        """
        import jinja2

        try:
            asked = self._render([chat[:-1] for chat in chats], True)
            full = self._render(chats, False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            if len(chats) > 1:  # to name the example
                for k, chat in enumerate(chats):
                    self.encode([chat], f"{where} (example {k} of the batch, from 0)")
            raise RunError(
                f"{where}: the chat template of {self._tokenizer.name_or_path} fails: {error}. If it does not accept a "
                "system prompt, leave out instruct.system."
            ) from None
        wrong = next((k for k, (a, f) in enumerate(zip(asked, full, strict=True)) if not f.startswith(a)), None)
        if wrong is not None:
            raise RunError(
                f"{where} (example {wrong} of the batch, from 0): the chat template of {self._tokenizer.name_or_path} "
                f"renders the prompt differently when an answer follows: the full text does not begin with the prompt, "
                f"which ends in {asked[wrong][-60:]!r}. Training would not match later use of the model. Set "
                "train.template_arguments so that both agree (for a thinking model, enable_thinking = false)."
            )
        self._backend.no_padding()
        self._backend.no_truncation()
        found = self._backend.encode_batch(full, add_special_tokens=False)
        out = []
        for k, (prompt, text, encoded) in enumerate(zip(asked, full, found, strict=True)):
            tokens = np.array(encoded.ids, np.int32)
            labels = tokens.copy()
            labels[: self._begin(encoded, prompt, f"{where} (example {k} of the batch, from 0)")] = IGNORED
            labels[self._end(encoded, text) :] = IGNORED
            out.append((tokens, labels))
        return out

    def _begin(self, encoded: Any, prompt: str, where: str) -> int:
        """Index of the answer's first token."""
        at = None if self._trims else encoded.char_to_token(len(prompt))
        if at is not None and encoded.token_to_chars(at)[0] == len(prompt):
            # Text before a special token does not change the tokens after it: compare from the last special token on.
            last = max((prompt.rfind(mark) for mark in self._marks), default=-1)
            tail = self._alone(prompt[last:]) if last >= 0 else None
            if tail is not None and encoded.ids[at - len(tail) : at] == tail:
                return int(at)
        alone = self._backend.encode(prompt, add_special_tokens=False).ids
        if encoded.ids[: len(alone)] != alone:
            raise RunError(
                f"{where}: the tokenizer of {self._tokenizer.name_or_path} merges the end of the prompt, "
                f"{prompt[-20:]!r}, and the beginning of the answer into one token. Training would not match later use "
                "of the model. Change the chat template so that a prompt ends where a token ends."
            )
        return len(alone)

    def _alone(self, text: str) -> list[int]:
        """The tokens of a text, from a cache: most prompts end alike."""
        if len(self._tails) > 1000:
            self._tails.clear()
        if text not in self._tails:
            self._tails[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._tails[text]

    def _end(self, encoded: Any, text: str) -> int:
        """Index after the answer's last token. White space that the template adds there is not learned."""
        end = len(text.rstrip())
        if self._trims:
            return sum(begin < end for begin, _ in encoded.offsets)
        at = encoded.char_to_token(end) if end < len(text) else None
        if at is None:
            return len(encoded.ids)
        return int(at) + int(encoded.token_to_chars(at)[0] < end)

    def _render(self, chats: list[list[dict[str, str]]], prompt: bool) -> list[str]:
        rendered: list[str] = self._tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=prompt, **self._arguments
        )
        return rendered
