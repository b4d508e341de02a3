"""From the mix to tokens: conversations through the model's chat template, with the loss on the answer alone."""

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
"""Label of a token that bears no loss."""


@dataclass(frozen=True)
class Mix:
    """A mix as `corpusprep run` leaves it.

    Attributes:
        train, validation: files, in order.
        checksum: of the content of all training files.
    """

    folder: Path
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    checksum: str


@dataclass(frozen=True)
class Portion:
    """A stretch of a file.

    Attributes:
        begin, end: row groups of Parquet, or bytes of JSON lines.
        row: number of the first example in the file.
        rows: examples that are taken, from the first.
    """

    file: Path
    begin: int
    end: int
    row: int
    rows: int


def find_mix(folder: str | Path) -> Mix:
    """The files of a mix.

    Raises:
        InputError: there is none.
    """
    folder = Path(folder)
    train = _shards(folder)
    if not train and (folder / "mix").is_dir():
        folder = folder / "mix"
        train = _shards(folder)
    if not train:
        raise InputError(
            str(folder), "holds no train-*.parquet or train-*.jsonl", "Name the folder mix of a run: --mix out/run/mix"
        )
    return Mix(folder, train, _shards(folder / "validation"), digest([large_file_digest(file) for file in train]))


def _shards(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for kind in ("parquet", "jsonl") for file in folder.glob(f"*.{kind}")))


def portions(files: Sequence[Path], limit: int | None = None) -> Iterator[Portion]:
    """Cuts files into stretches of some thousands of examples.

    Args:
        limit: examples to take, from the first.

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
    """Examples of all files."""
    return sum(portion.rows for portion in portions(files))


def conversations(stretches: Iterable[Portion]) -> Iterator[tuple[str, list[list[dict[str, str]]]]]:
    """The examples of files in any format of the instruct stage, as lists of turns of `role` and `content`, by batches.

    Yields:
        Where the batch begins, for messages (`file, row N`), and the conversations.

    Raises:
        InputError: a file is not to be read, or holds a row that is no example.
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
            str(file), "is no example of the formats messages, sharegpt, prompt_completion and alpaca",
            "Make the mix with corpusprep run", row,
        ) from None  # fmt: skip
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not all(isinstance(t["content"], str) for t in turns):
        raise InputError(str(file), "does not end with an answer to a prompt", "Make the mix again", row)
    try:
        for turn in turns:
            turn["content"].encode()
    except UnicodeEncodeError:
        raise InputError(
            str(file), "holds half a surrogate pair, which is no text", "Make the mix again", row
        ) from None
    return turns


class Encoder:
    """A chat template and a tokenizer.

    Args:
        tokenizer: of transformers, fast.
        arguments: of the template.

    Raises:
        RunError: there is no template, or the tokenizer does not tell where its tokens lie.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise RunError(
                f"{name}: its tokenizer has no chat template, so it is no instruct model. Name one that is, or add a "
                "chat_template.jinja to its folder."
            )
        if not tokenizer.is_fast:
            raise RunError(f"{name}: its tokenizer is a slow one. Save it once with AutoTokenizer(..., use_fast=True).")
        self._backend = tokenizer.backend_tokenizer
        self._marks = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        self._tails: dict[str, list[int]] = {}
        # Whether white space before a word counts as the word's: then a token does not say where it begins.
        self._trims = '"trim_offsets":true' in json.dumps(
            json.loads(self._backend.to_str())["post_processor"], separators=(",", ":")
        )

    def encode(self, chats: list[list[dict[str, str]]], where: str) -> list[tuple[I32, I32]]:
        """Tokens and labels of conversations: what follows the prompt bears loss, but for white space behind the answer's end.

        Args:
            where: the first one's place, for messages.

        Raises:
            RunError: the template renders the prompt alone in another way than before an answer, or fails; or a prompt ends
                within a token.
        """
        import jinja2

        try:
            asked = self._render([chat[:-1] for chat in chats], True)
            full = self._render(chats, False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            if len(chats) > 1:  # to name the example
                for k, chat in enumerate(chats):
                    self.encode([chat], f"{where} (example {k} from there)")
            raise RunError(
                f"{where}: the chat template of {self._tokenizer.name_or_path} fails: {error}. Where it refuses a system "
                "prompt, leave out instruct.system."
            ) from None
        wrong = next((k for k, (a, f) in enumerate(zip(asked, full, strict=True)) if not f.startswith(a)), None)
        if wrong is not None:
            raise RunError(
                f"{where} (example {wrong} from there): the chat template of {self._tokenizer.name_or_path} renders a prompt "
                f"that awaits its answer in another way than one that has it: {asked[wrong][-60:]!r} is not how the latter "
                "goes on. So what is learned would not be what is asked later. Set train.template_arguments as the template "
                "wants them (for a model that thinks, enable_thinking = false)."
            )
        self._backend.no_padding()
        self._backend.no_truncation()
        found = self._backend.encode_batch(full, add_special_tokens=False)
        out = []
        for k, (prompt, text, encoded) in enumerate(zip(asked, full, found, strict=True)):
            tokens = np.array(encoded.ids, np.int32)
            labels = tokens.copy()
            labels[: self._begin(encoded, prompt, f"{where} (example {k} from there)")] = IGNORED
            labels[self._end(encoded, text) :] = IGNORED
            out.append((tokens, labels))
        return out

    def _begin(self, encoded: Any, prompt: str, where: str) -> int:
        """The first token of the answer."""
        at = None if self._trims else encoded.char_to_token(len(prompt))
        if at is not None and encoded.token_to_chars(at)[0] == len(prompt):
            # A special token parts what is before it from what is behind: the tokens from the last one on are looked at.
            last = max((prompt.rfind(mark) for mark in self._marks), default=-1)
            tail = self._alone(prompt[last:]) if last >= 0 else None
            if tail is not None and encoded.ids[at - len(tail) : at] == tail:
                return int(at)
        alone = self._backend.encode(prompt, add_special_tokens=False).ids
        if encoded.ids[: len(alone)] != alone:
            raise RunError(
                f"{where}: the tokenizer of {self._tokenizer.name_or_path} makes one token of the end of the prompt, "
                f"{prompt[-20:]!r}, and the beginning of the answer. So what is learned would not be what is asked later. A chat "
                "template must end a prompt where a token ends."
            )
        return len(alone)

    def _alone(self, text: str) -> list[int]:
        """The tokens of a text, which is most often one that was asked for before."""
        if len(self._tails) > 1000:
            self._tails.clear()
        if text not in self._tails:
            self._tails[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._tails[text]

    def _end(self, encoded: Any, text: str) -> int:
        """The token behind the answer's last one: white space that the template puts there is not learned."""
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
