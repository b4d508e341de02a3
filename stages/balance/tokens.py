"""Counts tokens of texts and examples: exactly with a tokenizer, or estimated from bytes."""

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
from corpusprep.stages.instruct.examples import Examples, all_halves, encoded, pairs_of

if TYPE_CHECKING:
    from corpusprep.stages.balance import BalanceSettings
    from corpusprep.stages.instruct import InstructSettings

Counts = npt.NDArray[np.int32]

# UTF-8 bytes per token with the vocabulary of Qwen3 (151,643 byte-level BPE tokens), measured on up to 4,000 lines per
# language of public test sets. On whole examples of news text the estimate is within a tenth for each of 15 languages.
_BYTES_PER_TOKEN = {
    "ar": 4.4, "bm": 2.3, "bn": 2.5, "cs": 2.5, "de": 3.7, "ee": 2.2, "en": 4.5, "es": 3.7, "fon": 2.0, "fr": 3.7,
    "gu": 1.8, "ha": 2.6, "he": 4.4, "hi": 2.8, "hu": 2.6, "id": 3.1, "ig": 2.5, "it": 3.1, "ja": 4.1, "kk": 2.9,
    "km": 2.4, "ko": 3.4, "lg": 2.5, "luo": 2.8, "ml": 2.1, "mos": 2.4, "mr": 2.7, "nl": 3.0, "pcm": 4.0, "pl": 2.9,
    "ps": 2.9, "pt": 3.4, "ru": 5.0, "sr": 3.4, "sw": 2.6, "ta": 2.5, "te": 1.8, "th": 5.1, "tn": 2.6, "tr": 3.0,
    "tw": 2.3, "uk": 3.4, "ur": 2.6, "vi": 4.6, "wo": 2.4, "yo": 2.2, "zh": 4.5, "zu": 2.5,
}  # fmt: skip
_BYTES_PER_TOKEN_BY_SCRIPT = {"Latn": 2.6, "Cyrl": 3.2, "Arab": 2.8, "Deva": 2.7, "Hebr": 4.0, "Hans": 4.5, "Hant": 4.0}
_BYTES_PER_TOKEN_ELSE = 2.2  # scripts with three bytes per character that are rare in vocabularies
_CHUNK_BYTES = 1 << 21  # text passed to the tokenizer at once: its output takes about 50 times the memory


class TokenCounter:
    """Counts tokens with the tokenizer of the settings, or estimates them.

    Args:
        settings: the tokenizer and the overhead per message.
        bytes_per_token: figures by language that replace the built-in ones. If given, tokens are estimated even if the
            settings name a tokenizer.

    Attributes:
        exact: whether a tokenizer counts the tokens.
        bytes_per_token: the given figures, empty if none.
    """

    def __init__(self, settings: BalanceSettings, bytes_per_token: Mapping[str, float] | None = None) -> None:
        self.exact = settings.tokenizer is not None and bytes_per_token is None
        self.bytes_per_token = dict(bytes_per_token or {})
        self._settings = settings

    def count(self, texts: text.Strings, language: str | None = None) -> Counts:
        """Tokens of n texts, without special tokens.

        Args:
            texts: n strings; null counts as empty.
            language: canonical code, used only for the estimate; None if unknown.

        Returns:
            int32 of shape (n,).

        Raises:
            RunError: the tokenizer cannot be loaded.
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
        """Tokens of n examples from `instruct.render`: prompt, completion, system prompt if any, and the overhead of
        each message; int32 of shape (n,)."""
        if not self.exact:
            pairs = pairs_of(rendered)
            labels = encoded(rendered["direction"])
            forward = [[label == f"{a}-{b}" for label in labels.values] for a, b in pairs.sides]
            known = np.array(forward, np.int64).reshape(len(pairs.sides), len(labels.values))
            backward = 1 - known[pairs.code, labels.code]
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

        Other copies of a row use other templates, so their counts can differ by a few tokens. Over many rows the
        differences are unbiased.
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
        """Bytes of each template without the text, indexed by pair, backward and template."""
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
        """Estimated tokens of n examples, from the bytes of the text, the answer, and the template without the text."""
        ratios = np.array([[self._ratio(a), self._ratio(b)] for a, b in pairs.sides]).reshape(-1, 2)
        prose = self.bytes_per_token.get("template") or self._ratio("en")
        tokens = _whole(asked / ratios[pairs.code, backward]) + _whole(answer / ratios[pairs.code, 1 - backward])
        system = len((instruct.system or "").encode()) / prose
        return tokens + _whole(affix / prose + system) + self._overhead(instruct)

    def _overhead(self, instruct: InstructSettings) -> int:
        return self._settings.message_overhead * (3 if instruct.system is not None else 2)


def _whole(tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The nearest whole number; at least 1 if the text is not empty."""
    return np.maximum(np.rint(tokens), tokens > 0).astype(np.int64)


def bytes_per_token(language: str) -> float:
    """The built-in figure for a canonical code: that of the language if listed, else that of its script."""
    if language in _BYTES_PER_TOKEN:
        return _BYTES_PER_TOKEN[language]
    script = codes.script_of(language) or codes.default_script(codes.language_of(language))
    return _BYTES_PER_TOKEN_BY_SCRIPT.get(script or "", _BYTES_PER_TOKEN_ELSE)


def tokenizer_file(name: str) -> Path:
    """The `tokenizer.json` that a setting names: a file, its folder, or a name on the Hugging Face hub, which is
    downloaded if it is not in the local cache.

    Raises:
        RunError: the file does not exist or cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise RunError(
                f"{name}: the folder has no tokenizer.json. Save the tokenizer there with "
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
    except Exception as error:  # the type depends on the client's version and on the network failure
        raise RunError(
            f"The tokenizer {name} cannot be downloaded from the Hugging Face hub ({type(error).__name__}). Check the "
            "name and the network. For a gated model, accept its terms on the hub and run `hf auth login`. Or set "
            "balance.tokenizer to the path of a local tokenizer.json. Without balance.tokenizer, tokens are estimated."
        ) from error


def load_tokenizer(name: str) -> Any:
    """The `tokenizers.Tokenizer` that a setting names, without truncation and padding. It is loaded once per process,
    and again if its file changes.

    Raises:
        RunError: the file cannot be found or downloaded, or is not a tokenizer.
    """
    path = tokenizer_file(name)
    return _load_tokenizer(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load_tokenizer(path: Path, _changed: int) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises bare Exception
        raise RunError(f"{path}: cannot be read as a tokenizer ({error}). Give a tokenizer.json.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
