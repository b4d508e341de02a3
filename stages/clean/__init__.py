"""Stage 1, clean: normalises text, then drops pairs that fail a rule, each with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator, Field, field_validator, model_validator

from corpusprep import codes
from corpusprep.errors import SettingsError
from corpusprep.stage import Outcome, Settings, StageSettings, load_function, split
from corpusprep.stages import languages
from corpusprep.stages.clean import features
from corpusprep.stages.clean import text as _text

# `false` disables a threshold. None, which TOML does not have, does the same.
_OFF = BeforeValidator(lambda value: False if value is None else value)
_Count = Annotated[int, Field(ge=0, strict=True)]
_Share = Annotated[float, Field(ge=0, le=1, strict=True)]
_HalfShare = Annotated[float, Field(ge=0.5, le=1, strict=True)]
_Ratio = Annotated[float, Field(gt=1, strict=True)]
_Off = Literal[False]


class LanguageSettings(Settings):
    """Overrides for one language: thresholds with the same names, and facts about the language.

    A threshold for one text applies to the side in that language. A threshold for the pair (`length_ratio`, `copied`,
    `numbers`, `url`) applies if either side is in the language; if both sides have one, the more lenient one applies.
    """

    min_chars: _Count | _Off | None = None
    """See `min_chars` of `[clean]`. Any threshold that is not set here is taken from `[clean]`."""
    max_chars: _Count | _Off | None = None
    """See `max_chars` of `[clean]`."""
    longest_word: _Count | _Off | None = None
    """See `longest_word` of `[clean]`."""
    letters: _Share | _Off | None = None
    """See `letters` of `[clean]`."""
    script: _Share | _Off | None = None
    """See `script` of `[clean]`."""
    repetition: _Share | _Off | None = None
    """See `repetition` of `[clean]`."""
    url_only: _Share | _Off | None = None
    """See `url_only` of `[clean]`."""
    length_ratio: _Ratio | _Off | None = None
    """See `length_ratio` of `[clean]`."""
    copied: _HalfShare | _Off | None = None
    """See `copied` of `[clean]`."""
    numbers: _Share | _Off | None = None
    """See `numbers` of `[clean]`."""
    url: bool | None = None
    """See `url` of `[clean]`."""
    scripts: tuple[str, ...] | None = None
    """Expected scripts, as ISO 15924 codes (`["Cyrl", "Latn"]`). If not set, the built-in table is used."""
    length: Annotated[float, Field(gt=0)] | None = None
    """Characters of a text per character of the same text in English. If not set, the built-in table is used."""

    @field_validator("scripts")
    @classmethod
    def _known_scripts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for script in value or ():
            if script not in languages.SCRIPTS:
                raise ValueError(f"{script!r} is not one of the scripts {', '.join(languages.SCRIPTS)}")
        return value


class CleanSettings(StageSettings):
    """Settings of `clean`. The rules are tried in this order, with `markup` after `template_tokens`; the first rule
    that a row fails is the reason.

    `false` disables a rule.
    """

    entities: bool = True
    """Resolve HTML entities (`&quot;`, `&#39;`, `&amp;lt;`)."""
    markup: bool = True
    """Remove tags of HTML, XML and subtitles; rows whose tags are nested too deep are dropped as `clean.markup`."""
    empty: bool = True
    """Drop rows with an empty side."""
    template_tokens: bool = True
    """Drop rows with a control token of a chat template (`<|im_start|>`, `[INST]`, `</s>`), even if it is hidden."""
    mojibake: bool = True
    """Repair wrongly decoded text if the repair is lossless; drop rows that cannot be repaired."""
    min_chars: Annotated[_Count | _Off, _OFF] = 1
    """Minimum characters of each side (`clean.too_short`)."""
    max_chars: Annotated[_Count | _Off, _OFF] = 2000
    """Maximum characters of each side (`clean.too_long`)."""
    repetition: Annotated[_Share | _Off, _OFF] = 0.6
    """Maximum share of a side's phrases (8 consecutive characters) that occur earlier in the same text. Applies from 60
    characters on, scaled by the language's `length`."""
    url_only: Annotated[_Share | _Off, _OFF] = 0.9
    """Maximum share of a side's characters, without spaces, that belong to URLs."""
    letters: Annotated[_Share | _Off, _OFF] = 0.2
    """Minimum share of letters among each side's characters, without spaces."""
    script: Annotated[_Share | _Off, _OFF] = 0.5
    """Minimum share of each side's letters that are in a script of its language."""
    copied: Annotated[_HalfShare | _Off, _OFF] = 0.9
    """Similarity of the letters and digits of both sides from which the target counts as a copy of the source. Case and
    punctuation are ignored. With 1, only exact copies count."""
    copied_letters: _Count = 10
    """Copies with fewer letters are kept, because languages share words. Copied names (all words begin with a capital)
    and copies between close languages, such as Croatian and Serbian, are also kept."""
    longest_word: Annotated[_Count | _Off, _OFF] = 60
    """Maximum characters of a word. Letters of scripts without spaces between words are ignored."""
    length_ratio: Annotated[_Ratio | _Off, _OFF] = 2.5
    """Maximum ratio of the lengths of the two sides, each relative to the expected length in its language."""
    numbers: Annotated[_Share | _Off, _OFF] = 0.5
    """Maximum share of numbers, of both sides, without a counterpart. Checked only if each side has such a number."""
    url: bool = True
    """Drop rows whose sides do not have equally many URLs of the same sites."""
    rules: tuple[str, ...] = ()
    """Custom rules, as `module:function`: a function of a pyarrow table that returns a Boolean array, true to keep."""
    language: dict[str, LanguageSettings] = Field(default_factory=dict)
    """Overrides by language, as in `[clean.language.sw]`."""

    @field_validator("rules")
    @classmethod
    def _rules_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for rule in value:
            module, _, function = rule.partition(":")
            if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
                raise ValueError(f"{rule!r} is not of the form module:function")
        return value

    @field_validator("language")
    @classmethod
    def _canonical_languages(cls, value: dict[str, LanguageSettings]) -> dict[str, LanguageSettings]:
        try:
            return {codes.explicit(code): settings for code, settings in value.items()}
        except SettingsError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _ordered(self) -> CleanSettings:
        places: list[tuple[str, CleanSettings | LanguageSettings]] = [("", self)]
        places += [(f" of {code}", own) for code, own in self.language.items()]
        for where, own in places:
            low = self.min_chars if own.min_chars is None else own.min_chars
            high = self.max_chars if own.max_chars is None else own.max_chars
            if low is not False and high is not False and low > high:
                raise ValueError(f"min_chars{where} ({low}) is above max_chars ({high})")
        return self


REASONS = (
    "clean.empty", "clean.template_tokens", "clean.markup", "clean.mojibake", "clean.too_short", "clean.too_long",
    "clean.repetition", "clean.url_only", "clean.letters", "clean.script", "clean.copied", "clean.long_word",
    "clean.length_ratio", "clean.numbers", "clean.url",
)  # fmt: skip
"""Reasons of the built-in rules, in the order of the rules."""

# Maximum number of words of a name.
_NAME_WORDS = 6
# In texts with fewer characters (of English), phrases often repeat: "no, no, no".
_REPETITION_FROM = 60
# Added to the lengths of both sides, in English characters, because short texts vary more. With it, the ratio of true
# pairs has the same spread from 8 to 120 characters (measured on 450,000 pairs of 45 languages; 99.8 % within a factor
# of 2.3).
_LENGTH_SLACK = 5.0


def clean(table: pa.Table, settings: CleanSettings = CleanSettings()) -> Outcome:
    """Normalises both sides of each pair and drops the pairs that fail a rule.

    Args:
        table: pairs, with columns `src tgt src_lang tgt_lang`; other columns pass through.
        settings: thresholds.

    Returns:
        kept and dropped rows, both with normalised text: Unicode NFC, single spaces, no control characters, entities or
        tags. Another `clean` of the kept rows changes nothing.

    Raises:
        SettingsError: a custom rule cannot be imported, fails, or does not return a mask of the table's length.

    Examples:
        >>> table = pa.table({"src": ["Salt &amp; bread", ""], "tgt": ["Salz &amp; Brot", "Wasser"], "src_lang": ["en"] * 2, "tgt_lang": ["de"] * 2})
        >>> kept, dropped = clean(table)
        >>> kept["src"].to_pylist(), dropped["reason"].to_pylist()
        (['Salt & bread'], ['clean.empty'])
    """
    if not settings.enabled:
        return split(table, np.zeros(table.num_rows, np.int8), [])
    sides = [_normalise(table[name], settings) for name in ("src", "tgt")]
    for name, side in zip(("src", "tgt"), sides, strict=True):
        table = table.set_column(table.schema.get_field_index(name), name, side.text)
    verdict = _judge(table, sides, settings)
    reasons = list(REASONS)
    for rule in settings.rules:
        reasons.append(f"clean.{rule.partition(':')[2]}")
        left = np.flatnonzero(verdict == 0)
        keep = _own_rule(rule, table.take(pa.array(left, pa.int64())))
        verdict[left[~keep]] = len(reasons)
    return split(table, verdict, reasons)


def _one_array(column: pa.ChunkedArray[Any], kind: Any) -> Any:
    """A text column as one array of the given type; null becomes empty text."""
    filled: Any = pc.fill_null(column.cast(kind), pa.scalar("", kind))
    chunks = filled.chunks if isinstance(filled, pa.ChunkedArray) else [filled]
    return pa.concat_arrays(chunks) if chunks else pa.array([], kind)


def _normalise(column: pa.ChunkedArray[Any], settings: CleanSettings) -> _text.Normalised:
    text = _one_array(column, pa.large_string())
    steps = _text.Steps(settings.entities, settings.markup, settings.mojibake)
    found = _text.normalise(text, steps)
    return found._replace(text=found.text.cast(pa.string()))


def _judge(table: pa.Table, sides: list[_text.Normalised], settings: CleanSettings) -> npt.NDArray[np.int32]:
    """For each row, the number of the first rule that it fails, from 1; 0 if it fails none."""
    limits = _Languages(table, settings)
    src, tgt = limits.src, limits.tgt
    copied = limits.limit("copied")
    repetition = min(np.min(side.limit("repetition"), initial=1.0) for side in (src, tgt))
    found = features.examine(
        sides[0].text, sides[1].text, src.scripts, tgt.scripts, float(max(np.min(copied, initial=1.0), 0.5)),
        float(repetition),
    )  # fmt: skip
    both = ((found.src, src), (found.tgt, tgt))

    def either(test: Callable[[features.Side, _Side], npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
        return test(*both[0]) | test(*both[1])

    def count(which: int) -> Callable[[features.Side], npt.NDArray[np.int32]]:
        return lambda side: side.counts[:, which]

    chars, solid, letters = count(features.CHARS), count(features.SOLID), count(features.LETTERS)
    foreign = count(features.FOREIGN)
    lengths = [(chars(side) - foreign(side)) / of.length + foreign(side) + _LENGTH_SLACK for side, of in both]
    ratio = np.maximum(lengths[0] / lengths[1], lengths[1] / lengths[0])
    plain, words = count(features.PLAIN_WORDS)(found.src), count(features.WORDS)(found.src)
    translatable = letters(found.src) + letters(found.tgt) >= 2 * settings.copied_letters
    translatable &= ((plain > 0) | (words > _NAME_WORDS)) & ~limits.close()
    failed = {
        "empty": settings.empty & either(lambda side, of: chars(side) == 0),
        "template_tokens": settings.template_tokens & (sides[0].template | sides[1].template),
        "markup": sides[0].restless | sides[1].restless,
        "mojibake": settings.mojibake
        & (
            sides[0].mojibake | sides[1].mojibake | either(lambda side, of: side.counts[:, features.QUESTION_MARKS] > 2)
        ),
        "too_short": either(lambda side, of: chars(side) < of.limit("min_chars")),
        "too_long": either(lambda side, of: chars(side) > of.limit("max_chars")),
        "repetition": either(
            lambda side, of: (
                (side.repeated > of.limit("repetition"))
                & (chars(side) >= _REPETITION_FROM * np.nan_to_num(of.length, nan=1.0))
            )
        ),
        "url_only": either(lambda side, of: side.counts[:, features.URL_CHARS] > of.limit("url_only") * solid(side)),
        "letters": either(lambda side, of: letters(side) < of.limit("letters") * solid(side)),
        "script": either(lambda side, of: side.script < of.limit("script")),
        "copied": (found.same >= copied) & (found.same > 0) & translatable,
        "long_word": either(lambda side, of: side.counts[:, features.LONGEST_WORD] > of.limit("longest_word")),
        "length_ratio": ratio > limits.limit("length_ratio"),
        "numbers": found.numbers > limits.limit("numbers"),
        "url": found.url_mismatch & (limits.limit("url") > 0),
    }
    verdict = np.zeros(table.num_rows, np.int32)
    for number, reason in reversed(list(enumerate(REASONS, start=1))):
        verdict[failed[reason.removeprefix("clean.")]] = number
    return verdict


_SWITCHES = {name for name, field in CleanSettings.model_fields.items() if field.annotation is bool}
# Values of disabled thresholds that no row fails. Those that are not listed use infinity, which suits a maximum; one that is
# multiplied needs a number.
_OFF_VALUES = {"min_chars": -1.0, "letters": 0.0, "script": -1.0, "url_only": 2.0}


class _Side(NamedTuple):
    """Expected values for one side of n rows: limits, script mask, length figure (NaN if unknown)."""

    limits: dict[str, npt.NDArray[np.float64] | float]
    scripts: npt.NDArray[np.uint64]
    length: npt.NDArray[np.float64]

    def limit(self, name: str) -> npt.NDArray[np.float64] | float:
        return self.limits[name]


class _Languages:
    """Limits and facts for each row of a table, by its languages."""

    _PER_SIDE = ("min_chars", "max_chars", "repetition", "url_only", "letters", "script", "longest_word")

    def __init__(self, table: pa.Table, settings: CleanSettings) -> None:
        self._settings = settings
        self._codes: list[list[str]] = []
        self._index: list[npt.NDArray[np.int64]] = []
        for name in ("src_lang", "tgt_lang"):
            encoded = _one_array(table[name], pa.string()).dictionary_encode()
            self._codes.append(encoded.dictionary.to_pylist())
            self._index.append(encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64))
        self.src, self.tgt = self._side(0), self._side(1)

    def _own(self, code: str) -> LanguageSettings | None:
        own = self._settings.language
        return own.get(code) or own.get(codes.language_of(code))

    def _value(self, name: str, own: LanguageSettings | None) -> float:
        value = getattr(own, name) if own is not None else None
        if value is None:
            value = getattr(self._settings, name)
        if name in _SWITCHES:
            return float(bool(value))
        return _OFF_VALUES.get(name, np.inf) if value is False else float(value)

    def _side(self, side: int) -> _Side:
        owns = [self._own(code) for code in self._codes[side]]
        limits: dict[str, npt.NDArray[np.float64] | float] = {}
        for name in self._PER_SIDE:
            if any(owns):
                limits[name] = np.array([self._value(name, own) for own in owns], np.float64)[self._index[side]]
            else:
                limits[name] = self._value(name, None)
        scripts, lengths = [], []
        for code, own in zip(self._codes[side], owns, strict=True):
            expected = own.scripts if own is not None and own.scripts is not None else languages.scripts(code)
            length = own.length if own is not None and own.length is not None else languages.length_figure(code)
            scripts.append(features.script_mask(expected))
            lengths.append(np.nan if length is None else length)
        index = self._index[side]
        return _Side(limits, np.array(scripts, np.uint64)[index], np.array(lengths, np.float64)[index])

    def limit(self, name: str) -> npt.NDArray[np.float64] | float:
        """A limit for the pair: that of the sides' languages if set (the more lenient of two), else the general one."""
        general = self._value(name, None)
        own = np.full((2, max(map(len, self._codes), default=0)), np.nan)
        for side in (0, 1):
            for i, code in enumerate(self._codes[side]):
                found = self._own(code)
                if found is not None and getattr(found, name) is not None:
                    own[side, i] = self._value(name, found)
        if np.isnan(own).all():
            return general
        rows = own[0, self._index[0]], own[1, self._index[1]]
        lenient = np.fmin(*rows) if name in _SWITCHES else np.fmax(*rows)
        return np.where(np.isnan(lenient), general, lenient)

    def close(self) -> npt.NDArray[np.bool_]:
        """Rows whose two languages are so close that a translation can be the same text."""
        table = np.array(
            [[languages.close(a, b) for b in self._codes[1]] or [False] for a in self._codes[0]] or [[False]]
        )
        return table[self._index[0], self._index[1]]


def _own_rule(rule: str, table: pa.Table) -> npt.NDArray[np.bool_]:
    """The mask of a custom rule; null counts as false."""
    function = load_function(rule, "clean.rules")
    try:
        mask = function(table)
    except Exception as error:
        raise SettingsError(f"clean.rules: {rule!r} failed with {type(error).__name__}: {error}.") from error
    try:
        array: Any = mask if isinstance(mask, pa.Array | pa.ChunkedArray) else pa.array(mask)
        filled: Any = pc.fill_null(array.cast(pa.bool_()), False)
        keep = np.asarray(filled, bool)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as error:
        raise SettingsError(f"clean.rules: {rule!r} must return a Boolean array, true for the rows to keep.") from error
    if len(keep) != table.num_rows:
        raise SettingsError(f"clean.rules: {rule!r} returned {len(keep)} values for {table.num_rows} rows.")
    return np.asarray(keep, bool)
