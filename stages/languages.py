"""Facts about languages: names, expected scripts, and text lengths.

All tables are keyed by canonical codes (see `corpusprep.codes`). A language that is not listed uses its script in CLDR,
and the figures of that script. A code without a known script has no expected values.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import NamedTuple

import langcodes
import numpy as np
import numpy.typing as npt
from langcodes.data_dicts import LIKELY_SUBTAGS

from corpusprep import codes
from corpusprep.kernels import kept

# ISO 15924 code of each script, and the first words of the Unicode names of its characters.
_NAME_PREFIXES: dict[str, tuple[str, ...]] = {
    "Latn": ("LATIN", "FEMININE ORDINAL", "MASCULINE ORDINAL"),
    "Cyrl": ("CYRILLIC",),
    "Grek": ("GREEK",),
    "Arab": ("ARABIC",),
    "Deva": ("DEVANAGARI",),
    "Hani": ("CJK", "IDEOGRAPHIC"),
    "Hira": ("HIRAGANA",),
    "Kana": ("KATAKANA", "KATAKANA-HIRAGANA"),
    "Hang": ("HANGUL",),
    "Hebr": ("HEBREW",),
    "Armn": ("ARMENIAN",),
    "Geor": ("GEORGIAN",),
    "Beng": ("BENGALI",),
    "Guru": ("GURMUKHI",),
    "Gujr": ("GUJARATI",),
    "Orya": ("ORIYA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Knda": ("KANNADA",),
    "Mlym": ("MALAYALAM",),
    "Sinh": ("SINHALA",),
    "Thai": ("THAI",),
    "Laoo": ("LAO",),
    "Tibt": ("TIBETAN",),
    "Mymr": ("MYANMAR",),
    "Khmr": ("KHMER",),
    "Ethi": ("ETHIOPIC",),
    "Olck": ("OL CHIKI",),
    "Tfng": ("TIFINAGH",),
    "Nkoo": ("NKO",),
    "Mong": ("MONGOLIAN",),
    "Thaa": ("THAANA",),
    "Syrc": ("SYRIAC",),
    "Mtei": ("MEETEI MAYEK",),
    "Cher": ("CHEROKEE",),
    "Cans": ("CANADIAN SYLLABICS",),
    "Bopo": ("BOPOMOFO",),
    "Yiii": ("YI",),
    "Java": ("JAVANESE",),
    "Sund": ("SUNDANESE",),
    "Bali": ("BALINESE",),
    "Adlm": ("ADLAM",),
    "Vaii": ("VAI",),
    "Copt": ("COPTIC",),
    "Tale": ("TAI LE",),
    "Talu": ("NEW TAI LUE",),
    "Lana": ("TAI THAM",),
    "Cakm": ("CHAKMA",),
    "Limb": ("LIMBU",),
    "Lepc": ("LEPCHA",),
    "Bugi": ("BUGINESE",),
}

SCRIPTS: tuple[str, ...] = tuple(_NAME_PREFIXES)
"""ISO 15924 codes; the position of a script, plus one, is its number in `script_table`."""

SPACELESS_SCRIPTS = frozenset("Hani Hira Kana Thai Laoo Khmr Mymr Tibt Bopo Yiii Java Bali Tale Talu Lana".split())
"""Scripts that are written without spaces between words."""

JOINER_SCRIPTS = frozenset(
    "Arab Syrc Nkoo Mong Adlm Deva Beng Guru Gujr Orya Taml Telu Knda Mlym Sinh Khmr Mymr Tibt Mtei Java Bali Cakm".split()
)
"""Scripts whose spelling needs the zero-width joiner and non-joiner."""

# Codes of ISO 15924 that name a style or a union of scripts.
_SCRIPT_UNIONS: dict[str, tuple[str, ...]] = {
    "Hans": ("Hani", "Bopo"),
    "Hant": ("Hani", "Bopo"),
    "Jpan": ("Hani", "Hira", "Kana"),
    "Kore": ("Hang", "Hani"),
    "Hrkt": ("Hira", "Kana"),
    "Aran": ("Arab",),
}

# Languages whose scripts are not only the one that CLDR lists as likely.
_SCRIPTS: dict[str, tuple[str, ...]] = {
    "sr": ("Cyrl", "Latn"), "sh": ("Latn", "Cyrl"), "bs": ("Latn", "Cyrl"), "cnr": ("Latn", "Cyrl"),
    "uz": ("Latn", "Cyrl"), "az": ("Latn", "Cyrl", "Arab"), "kk": ("Cyrl", "Latn", "Arab"), "tk": ("Latn", "Cyrl"),
    "ky": ("Cyrl", "Latn", "Arab"), "tg": ("Cyrl", "Latn"), "tt": ("Cyrl", "Latn"), "crh": ("Latn", "Cyrl"),
    "mn": ("Cyrl", "Mong"), "ku": ("Latn", "Arab"), "ckb": ("Arab", "Latn"), "pa": ("Guru", "Arab"),
    "sd": ("Arab", "Deva"), "ks": ("Arab", "Deva"), "ug": ("Arab", "Cyrl", "Latn"), "ha": ("Latn", "Arab"),
    "ber": ("Latn", "Tfng", "Arab"), "kab": ("Latn", "Tfng"), "taq": ("Latn", "Tfng"), "tzm": ("Latn", "Tfng", "Arab"),
    "zgh": ("Tfng", "Latn"), "shi": ("Tfng", "Latn"), "mni": ("Beng", "Mtei"), "sat": ("Olck", "Deva", "Beng", "Latn"),
    "kok": ("Deva", "Latn"), "jv": ("Latn", "Java"), "su": ("Latn", "Sund"), "ban": ("Latn", "Bali"),
    "bug": ("Latn", "Bugi"), "ff": ("Latn", "Adlm"), "bm": ("Latn", "Nkoo"), "ace": ("Latn", "Arab"), "bjn": ("Latn", "Arab"),
    "ms": ("Latn", "Arab"), "kr": ("Latn", "Arab"), "wo": ("Latn", "Arab"), "so": ("Latn", "Arab"), "ro": ("Latn", "Cyrl"),
    "iu": ("Cans", "Latn"), "yi": ("Hebr",), "lad": ("Latn", "Hebr"), "sa": ("Deva", "Latn"), "pi": ("Deva", "Latn"),
    "nan": ("Hani", "Latn"), "cdo": ("Hani", "Latn"), "hak": ("Hani", "Latn"), "za": ("Latn", "Hani"),
    "ja": ("Hani", "Hira", "Kana"), "ko": ("Hang", "Hani"), "zh": ("Hani", "Bopo"), "yue": ("Hani", "Bopo"),
    "cjk": ("Latn",), "din": ("Latn",), "lus": ("Latn",), "tw": ("Latn",), "tlh": ("Latn",), "jbo": ("Latn",), "ia": ("Latn",), "ie": ("Latn",), "io": ("Latn",), "vo": ("Latn",),
}  # fmt: skip

# Characters (code points) of a text per character of the same text in English.
_LENGTHS: dict[str, float] = {
    "en": 1.0, "af": 1.04, "sq": 1.11, "am": 0.64, "ar": 0.87, "arz": 0.84, "hy": 1.08, "as": 0.98, "ast": 1.06,
    "az": 1.06, "eu": 1.06, "be": 1.05, "bn": 0.97, "bs": 1.0, "bg": 1.06, "my": 1.16, "ca": 1.09, "ceb": 1.18, "zh": 0.3,
    "hr": 1.0, "cs": 0.96, "da": 1.02, "nl": 1.07, "et": 0.99, "fi": 1.03, "fr": 1.15, "gl": 1.09, "ka": 1.06, "de": 1.13,
    "el": 1.16, "gu": 0.97, "ht": 0.97, "ha": 1.12, "he": 0.77, "hi": 0.99, "hu": 1.05, "is": 1.02, "ig": 0.97, "id": 1.07,
    "ga": 1.13, "it": 1.13, "ja": 0.42, "jv": 1.03, "kn": 1.05, "kk": 1.01, "km": 1.05, "rw": 1.09, "ko": 0.5, "ku": 1.04,
    "ckb": 1.0, "ky": 1.03, "lo": 1.0, "lv": 1.03, "lt": 1.02, "lg": 1.06, "lb": 1.1, "mk": 1.06, "mg": 1.18, "ms": 1.09,
    "ml": 1.13, "mt": 1.12, "mi": 1.1, "mr": 0.99, "mn": 1.04, "ne": 0.97, "no": 1.0, "nb": 1.0, "nn": 1.0, "ny": 1.11,
    "oc": 1.1, "or": 1.0, "om": 1.14, "ps": 0.95, "fa": 0.93, "pl": 1.03, "pt": 1.06, "pa": 0.98, "ro": 1.11, "ru": 1.04,
    "gd": 1.18, "sr": 0.98, "sh": 1.0, "sn": 1.09, "sd": 0.9, "si": 1.0, "sk": 0.99, "sl": 1.0, "so": 1.08, "st": 1.14,
    "es": 1.1, "su": 1.04, "sw": 1.08, "sv": 1.0, "tg": 1.07, "ta": 1.15, "tt": 1.02, "te": 1.02, "th": 0.93, "ti": 0.65,
    "tr": 1.01, "tk": 1.06, "uk": 1.02, "ur": 0.97, "ug": 1.07, "uz": 1.08, "vi": 1.04, "cy": 1.06, "wo": 0.95, "xh": 1.05,
    "yi": 1.05, "yo": 1.03, "yue": 0.29, "zu": 1.09, "bo": 1.08, "dz": 1.1, "tl": 1.15, "eo": 1.02, "la": 1.0, "pcm": 0.97,
    "tw": 0.95, "ak": 0.95, "tn": 1.15, "fon": 1.2, "bbj": 1.35, "mos": 0.92, "luo": 1.01,
}  # fmt: skip

# The same ratio by script, for languages that are not listed.
_SCRIPT_LENGTHS: dict[str, float] = {
    "Latn": 1.05, "Cyrl": 1.04, "Grek": 1.15, "Arab": 0.9, "Deva": 0.99, "Hani": 0.31, "Hira": 0.45, "Kana": 0.45,
    "Hang": 0.5, "Hebr": 0.8, "Armn": 1.08, "Geor": 1.06, "Beng": 0.97, "Guru": 0.98, "Gujr": 0.97, "Orya": 1.0, "Taml": 1.15,
    "Telu": 1.02, "Knda": 1.05, "Mlym": 1.13, "Sinh": 1.0, "Thai": 0.94, "Laoo": 1.0, "Tibt": 1.08, "Mymr": 1.16,
    "Khmr": 1.12, "Ethi": 0.65, "Bopo": 0.8, "Yiii": 0.35, "Cans": 0.8, "Vaii": 0.6,
}  # fmt: skip


# Languages so close that a translation can be identical or nearly identical.
_CLOSE = (
    "sr hr bs sh cnr", "nb nn no da", "id ms", "en pcm sco jam", "cs sk", "gl pt", "zh yue wuu lzh", "ar arz ary apc arb acm ajp ars aeb",
    "fa prs tg", "hi ur", "zu xh ss nr", "ru uk be", "tw ak fat", "bm dyu", "rn rw", "ace bjn ms min", "mk bg", "es ast", "az tr",
)  # fmt: skip
_GROUPS = tuple(frozenset(group.split()) for group in _CLOSE)


@functools.cache
def close(a: str, b: str) -> bool:
    """Whether two languages are so close that a translation can be a copy."""
    one, other = codes.language_of(a), codes.language_of(b)
    return one == other or any(one in group and other in group for group in _GROUPS)


@functools.cache
def name(code: str) -> str:
    """The language's English name: `Swahili` for `sw`, `Chinese (Traditional)` for `zh_Hant`; the code itself if it has
    no name."""
    try:
        shown = langcodes.Language.get(code.replace("_", "-"), normalize=False).display_name("en")
    except (ValueError, LookupError):
        return code
    return code if shown.startswith("Unknown language") else str(shown)


@functools.cache
def scripts(code: str) -> tuple[str, ...]:
    """The scripts (ISO 15924) that a language may be written in; empty if unknown.

    If the code names a script, only that script is returned: `sr` is Cyrillic or Latin, `sr_Latn` is Latin.
    """
    named = codes.script_of(code)
    if named is None:
        listed = _SCRIPTS.get(codes.language_of(code))
        if listed is not None:
            return listed
        # For a language that CLDR does not know, its rules fall back to "Latin", which is only a guess.
        known = codes.language_of(code) in LIKELY_SUBTAGS
        named = codes.default_script(codes.language_of(code)) if known else None
    if named is None:
        return ()
    return tuple(script for script in _SCRIPT_UNIONS.get(named, (named,)) if script in _NAME_PREFIXES)


def spaceless(code: str) -> bool:
    """Whether the language is written without spaces between words."""
    expected = scripts(code)
    return bool(expected) and expected[0] in SPACELESS_SCRIPTS


def length_figure(code: str) -> float | None:
    """Characters of a text in the language per character of the same text in English; None if unknown."""
    figure = _LENGTHS.get(codes.language_of(code))
    expected = scripts(code)
    if codes.script_of(code) is not None or figure is None:
        usual = codes.default_script(codes.language_of(code))
        if figure is None or (expected and expected[0] not in _SCRIPT_UNIONS.get(usual or "", (usual,))):
            figure = script_length(expected[0]) if expected else None
    return figure


def script_length(script: str) -> float:
    """`length_figure` if only the script of a text is known."""
    return _SCRIPT_LENGTHS.get(script, 1.0)


def script_number(script: str) -> int:
    """The number of a script in `character_table`, from 1.

    Raises:
        ValueError: the script is not in `SCRIPTS`.
    """
    return SCRIPTS.index(script) + 1


class CharacterTable(NamedTuple):
    """Character properties for the kernels, indexed by code point below `SIZE`.

    Attributes:
        kind: uint8 of shape (SIZE,), one of the kinds below.
        script: uint8 of shape (SIZE,), the script's number for letters and marks, else 0.
        digit: uint8 of shape (SIZE,), the value of a decimal digit; 255 for other characters.
        fold: uint32 of shape (SIZE,), the lower-case letter.
    """

    kind: npt.NDArray[np.uint8]
    script: npt.NDArray[np.uint8]
    digit: npt.NDArray[np.uint8]
    fold: npt.NDArray[np.uint32]


SIZE = 0x20000
OTHER, LETTER, MARK, DIGIT, SPACE, PUNCTUATION, SYMBOL = range(7)
_KINDS = {"L": LETTER, "M": MARK, "N": SYMBOL, "Z": SPACE, "P": PUNCTUATION, "S": SYMBOL}


def _script_of_name(character: str) -> int:
    words = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    first, _, rest = words.partition(" ")
    return _number_of_prefix().get(first) or _number_of_prefix().get(f"{first} {rest.partition(' ')[0]}") or 0


@functools.cache
def _number_of_prefix() -> dict[str, int]:
    return {prefix: i + 1 for i, prefixes in enumerate(_NAME_PREFIXES.values()) for prefix in prefixes}


@kept(CharacterTable)
def character_table() -> CharacterTable:
    """The character table for Python's version of Unicode."""
    kind = np.zeros(SIZE, np.uint8)
    script = np.zeros(SIZE, np.uint8)
    digit = np.full(SIZE, 255, np.uint8)
    fold = np.arange(SIZE, dtype=np.uint32)
    bulk = ((0x3400, 0x4DC0, "Hani"), (0x4E00, 0xA000, "Hani"), (0xAC00, 0xD7A4, "Hang"))
    skip = np.zeros(SIZE, bool)
    for first, end, code in bulk:
        kind[first:end], script[first:end], skip[first:end] = LETTER, script_number(code), True
    skip[0xD800:0xF900] = True  # surrogates and private use
    for point in np.flatnonzero(~skip).tolist():
        character = chr(point)
        category = unicodedata.category(character)
        if category[0] == "C":
            continue
        if category == "Nd":
            kind[point], digit[point] = DIGIT, unicodedata.decimal(character)
            continue
        kind[point] = _KINDS[category[0]]
        if category[0] in "LM":
            script[point] = _script_of_name(character)
            lower = character.lower()
            if len(lower) == 1:
                fold[point] = ord(lower)
    return CharacterTable(kind, script, digit, fold)
