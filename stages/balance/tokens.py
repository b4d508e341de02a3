"""Tokens of text and of examples: exact with a tokenizer, else estimated from bytes."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep import codes
from corpusprep.arrow import string_buffers
from corpusprep.errors import RunError
from corpusprep.stages.instruct import text
from corpusprep.stages.instruct.examples import Examples, all_halves, pairs_of

if TYPE_CHECKING:
    from corpusprep.stages.balance import BalanceSettings
    from corpusprep.stages.instruct import InstructSettings

Counts = npt.NDArray[np.int32]

# Bytes of UTF-8 a token with the vocabulary of Qwen3 (151,643 byte-level BPE tokens), measured on up to 4,000 lines a
# language of public test sets: on whole examples of news text the estimate is within a tenth for each of 15 languages.
_BYTES_PER_TOKEN = {
    "ar": 4.4, "bm": 2.3, "bn": 2.5, "cs": 2.5, "de": 3.7, "ee": 2.2, "en": 4.5, "es": 3.7, "fon": 2.0, "fr": 3.7,
    "gu": 1.8, "ha": 2.6, "he": 4.4, "hi": 2.8, "hu": 2.6, "id": 3.1, "ig": 2.5, "it": 3.1, "ja": 4.1, "kk": 2.9,
    "km": 2.4, "ko": 3.4, "lg": 2.5, "luo": 2.8, "ml": 2.1, "mos": 2.4, "mr": 2.7, "nl": 3.0, "pcm": 4.0, "pl": 2.9,
    "ps": 2.9, "pt": 3.4, "ru": 5.0, "sr": 3.4, "sw": 2.6, "ta": 2.5, "te": 1.8, "th": 5.1, "tn": 2.6, "tr": 3.0,
    "tw": 2.3, "uk": 3.4, "ur": 2.6, "vi": 4.6, "wo": 2.4, "yo": 2.2, "zh": 4.5, "zu": 2.5,
}  # fmt: skip
_BYTES_PER_TOKEN_BY_SCRIPT = {"Latn": 2.6, "Cyrl": 3.2, "Arab": 2.8, "Deva": 2.7, "Hebr": 4.0, "Hans": 4.5, "Hant": 4.0}
_BYTES_PER_TOKEN_ELSE = 2.2  # scripts of three bytes a character that vocabularies hardly know
_CHUNK_BYTES = 1 << 21  # text given to the tokenizer at once: what it returns takes some 50 times the room


class TokenCounter:
    """Counts tokens, with the tokenizer of the settings or by estimate.

    Args:
        settings: names the tokenizer and the overhead of a message.
        bytes_per_token: figures by language that replace the shipped ones; giving them asks for the estimate, whatever
            tokenizer the settings name.

    Attributes:
        exact: whether counts are those of a tokenizer.
        bytes_per_token: the figures that were given, empty if none were.
    """

    def __init__(self, settings: BalanceSettings, bytes_per_token: Mapping[str, float] | None = None) -> None:
        self.exact = settings.tokenizer is not None and bytes_per_token is None
        self.bytes_per_token = dict(bytes_per_token or {})
        self._settings = settings

    def count(self, texts: text.Strings, language: str | None = None) -> Counts:
        """Tokens of n texts, special tokens not included.

        Args:
            texts: n strings; null counts as empty.
            language: canonical code, used by the estimate alone; unknown if None.

        Returns:
            int32 of shape (n,).

        Raises:
            RunError: the tokenizer cannot be had.
        """
        if not self.exact:
            lengths = np.diff(string_buffers(texts)[0])
            return _whole(lengths / self._ratio(language)).astype(np.int32)
        tokenizer = load_tokenizer(str(self._settings.tokenizer))
        column = text.large(texts)
        counts = np.empty(len(column), np.int32)
        for start, stop in text.slices(text.byte_lengths(column), _CHUNK_BYTES):
            batch = column.slice(start, stop - start).to_pylist()
            counts[start:stop] = [len(code) for code in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
        return counts

    def count_examples(self, rendered: pa.Table, instruct: InstructSettings) -> Counts:
        """Tokens of n examples as `instruct.render` gives them: prompt, completion, system prompt if any, and the
        overhead of each message; int32 of shape (n,)."""
        if not self.exact:
            pairs = pairs_of(rendered)
            labels = text.series(rendered["direction"])
            forward = labels == text.series(rendered["src_lang"]) + "-" + text.series(rendered["tgt_lang"])
            backward = (~forward).to_numpy().astype(np.int64)
            template = text.integers(rendered["template"])
            affix = self._affix_bytes(pairs.sides, instruct)[pairs.code, backward, template]
            prompt = np.diff(string_buffers(rendered["prompt"])[0])
            answer = np.diff(string_buffers(rendered["completion"])[0])
            return self._estimate(pairs, backward, prompt - affix, answer, affix, instruct).astype(np.int32)
        counts = self.count(rendered["prompt"]) + self.count(rendered["completion"])
        if "system" in rendered.column_names:
            system = rendered["system"].combine_chunks().dictionary_encode()
            counts += self.count(system.dictionary)[system.indices.to_numpy()]
        return (counts + np.int32(self._overhead(instruct))).astype(np.int32)

    def count_rows(self, table: pa.Table, instruct: InstructSettings, seed: int) -> Counts:
        """Tokens of all examples of one copy of each of n rows; int32 of shape (n,).

        Further copies of a row meet other templates, so that theirs may differ by a few tokens; over many rows the
        difference has no direction.
        """
        if "copies" in table.column_names:
            table = table.drop_columns(["copies"])
        examples = Examples(table, instruct, seed)
        if self.exact:
            counts = np.empty(examples.row.size, np.int64)
            done = 0
            for piece in examples.rendered(np.arange(examples.row.size), _CHUNK_BYTES * 8):
                counts[done : done + piece.num_rows] = self.count_examples(piece, instruct)
                done += piece.num_rows
        else:
            sides = [np.diff(string_buffers(table[side])[0])[examples.row] for side in ("src", "tgt")]
            forward = examples.backward == 0
            pairs = examples.pairs._replace(code=examples.pairs.code[examples.row])
            affix = self._affix_bytes(pairs.sides, instruct)[pairs.code, examples.backward, examples.template]
            asked, answer = np.where(forward, *sides), np.where(forward, *sides[::-1])
            counts = self._estimate(pairs, examples.backward, asked, answer, affix, instruct)
        return np.bincount(examples.row, weights=counts, minlength=table.num_rows).astype(np.int32)

    def _ratio(self, language: str | None) -> float:
        if language is None:
            return _BYTES_PER_TOKEN_BY_SCRIPT["Latn"]
        return self.bytes_per_token.get(language) or bytes_per_token(language)

    def _affix_bytes(self, sides: list[tuple[str, str]], instruct: InstructSettings) -> npt.NDArray[np.int64]:
        """Bytes of each template around the text, by pair, backward and template."""
        before, after = all_halves(sides, instruct)
        lengths = text.byte_lengths(before) + text.byte_lengths(after)
        return lengths.reshape(len(sides), 2, len(instruct.templates))

    def _estimate(
        self,
        pairs: Any,
        backward: npt.NDArray[Any],
        asked: npt.NDArray[np.int64],
        answer: npt.NDArray[np.int64],
        affix: npt.NDArray[np.int64],
        instruct: InstructSettings,
    ) -> npt.NDArray[np.int64]:
        """Tokens of n examples from the bytes of the text, of the answer, and of the template around the text."""
        ratios = np.array([[self._ratio(a), self._ratio(b)] for a, b in pairs.sides]).reshape(-1, 2)
        prose = self.bytes_per_token.get("template") or self._ratio("en")
        tokens = _whole(asked / ratios[pairs.code, backward]) + _whole(answer / ratios[pairs.code, 1 - backward])
        system = len((instruct.system or "").encode()) / prose
        return tokens + _whole(affix / prose + system) + self._overhead(instruct)

    def _overhead(self, instruct: InstructSettings) -> int:
        return self._settings.message_overhead * (3 if instruct.system is not None else 2)


def _whole(tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The nearest whole number; text that is not empty has a token."""
    return np.maximum(np.rint(tokens), tokens > 0).astype(np.int64)


def bytes_per_token(language: str) -> float:
    """The shipped figure for a canonical code: its own, else its script's."""
    if language in _BYTES_PER_TOKEN:
        return _BYTES_PER_TOKEN[language]
    script = codes.script_of(language) or codes.default_script(codes.language_of(language))
    return _BYTES_PER_TOKEN_BY_SCRIPT.get(script or "", _BYTES_PER_TOKEN_ELSE)


def tokenizer_file(name: str) -> Path:
    """The `tokenizer.json` that a setting names: a file, a folder that holds one, or a name on the Hugging Face hub,
    which is fetched into the local cache if it is not there.

    Raises:
        RunError: there is none, or it cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise RunError(
                f"{name}: the folder holds no tokenizer.json. Save the tokenizer there with "
                'transformers\' AutoTokenizer.from_pretrained(…).save_pretrained("…").'
            )
        return path / "tokenizer.json"
    if path.is_file():
        return path
    if path.suffix == ".json" or path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise RunError(f"{name}: no such tokenizer file. Give a tokenizer.json, its folder, or a name on the hub.")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # what it raises depends on the client's version and on how the network fails
        raise RunError(
            f"The tokenizer {name} cannot be fetched from the Hugging Face hub ({type(error).__name__}). Check the "
            "name and the network; for a gated one accept its terms on the hub and run `hf auth login`. Or copy its "
            'tokenizer.json here and give its path as "balance.tokenizer"; without that setting tokens are estimated.'
        ) from error


def load_tokenizer(name: str) -> Any:
    """The `tokenizers.Tokenizer` that a setting names, without truncation and padding; loaded once a process, and again
    where its file has changed.

    Raises:
        RunError: it cannot be had or is not a tokenizer.
    """
    path = tokenizer_file(name)
    return _load_tokenizer(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load_tokenizer(path: Path, _changed: int) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises bare Exception
        raise RunError(f"{path}: not a tokenizer that can be read ({error}). Give a tokenizer.json.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
