"""One canonical form for language codes; accepts ISO 639-1, ISO 639-3 and FLORES codes."""

from __future__ import annotations

import functools
import re

import langcodes

from corpusprep.errors import SettingsError

# Individual languages that corpora and models use in place of the macrolanguage of ISO 639-1, as FLORES-200 chooses
# them. Other members (arz, yue, ckb, azb, …) remain separate languages.
_STANDARD = {
    "als": "sq", "arb": "ar", "ayr": "ay", "azj": "az", "cmn": "zh", "dik": "din", "ekk": "et", "fil": "tl",
    "fuv": "ff", "gaz": "om", "gug": "gn", "khk": "mn", "kmr": "ku", "knc": "kr", "lvs": "lv", "npi": "ne",
    "ory": "or", "pbt": "ps", "pes": "fa", "plt": "mg", "quy": "qu", "swh": "sw", "uzn": "uz", "ydd": "yi",
    "zsm": "ms", "hbs": "sh", "scr": "hr", "scc": "sr", "iw": "he", "in": "id", "ji": "yi", "mo": "ro",
}  # fmt: skip
_TWO_SCRIPTS = frozenset("az bs ha kk ks ku ky mn pa sd sh sr tg tk tt ug uz zh".split())
_CODE = re.compile(r"^([A-Za-z]{2,3})(?:[_-]([A-Za-z]{4}))?(?:[_-]([A-Za-z]{2}|[0-9]{3}))?$")


@functools.cache
def default_script(language: str) -> str | None:
    """The script (ISO 15924) that a language is mostly written in, or None where CLDR does not know it."""
    script = langcodes.Language.get(language, normalize=False).maximize().script
    # Corpora label Korean text as Hangul; CLDR's Kore (Hangul and Han) means the same.
    return "Hang" if script == "Kore" else script


@functools.cache
def canonical(code: str) -> str:
    """The canonical form of a language code: the shortest ISO 639 code, with the script if it is not the usual one.

    `en`, `eng`, `eng_Latn` and `en-US` are `en`; `swh_Latn` is `sw`; `zho_Hant` is `zh_Hant`.

    Raises:
        SettingsError: the text is not a language code.
    """
    parts = _CODE.match(code.strip())
    if parts is None:
        raise SettingsError(
            f"{code!r} is not a language code. Use ISO 639-1 (sw), ISO 639-3 (swh) or FLORES (swh_Latn)."
        )
    language, script, region = parts[1].lower(), parts[2], parts[3]
    if language not in _STANDARD:
        found = langcodes.Language.get(langcodes.standardize_tag(language))
        if not found.is_valid():
            raise SettingsError(
                f"{code!r} is not a language of ISO 639. Use ISO 639-1 (sw), ISO 639-3 (swh) or FLORES (swh_Latn)."
            )
        if found.language is not None and language not in ("sh",):
            language = found.language
    language = _STANDARD.get(language, language)
    if script is None and language == "zh" and region is not None and region.upper() in ("TW", "HK", "MO"):
        script = "Hant"
    if script is None or script.title() in (default_script(language), "Kore"):
        return language
    return f"{language}_{script.title()}"


def explicit(code: str) -> str:
    """The canonical form, with a named script kept if the language has two: `srp_Cyrl` is `sr_Cyrl` (so not Serbian in
    Latin script), `sr` is `sr`, `eng_Latn` is `en`."""
    base = canonical(code)
    parts = _CODE.match(code.strip())
    if parts is not None and parts[2] is not None and language_of(base) in _TWO_SCRIPTS:
        return f"{language_of(base)}_{parts[2].title()}"
    return base


def language_of(code: str) -> str:
    """The language of a canonical code, without its script."""
    return code.partition("_")[0]


def script_of(code: str) -> str | None:
    """The script that a canonical code names, or None."""
    return code.partition("_")[2] or None


def matches(asked: str, found: str) -> bool:
    """Whether data labelled `found` matches the code `asked` in a recipe (any codes).

    A code without a script means the usual script; a recipe that names a script also accepts data that names none.
    """
    named = _CODE.match(found.strip())
    script = named[2].title() if named is not None and named[2] is not None else None
    asked, found = explicit(asked), canonical(found)
    if script_of(asked) is not None and script is not None:
        return language_of(asked) == language_of(found) and script_of(asked) == script
    return canonical(asked) == found or (script_of(asked) is not None and found == language_of(asked))


def order_pair(a: str, b: str) -> tuple[str, str]:
    """The two sides in canonical order: English first if it is one of them, else alphabetical."""
    if language_of(a) == "en":
        return (a, b)
    if language_of(b) == "en":
        return (b, a)
    return (a, b) if a <= b else (b, a)


def parse_pair(pair: str) -> tuple[str, str]:
    """Splits `"en-de"` (any codes, either order) into two codes in the order written, with named scripts kept.

    Raises:
        SettingsError: the text is not two codes joined by a hyphen.
    """
    for match in re.finditer("-", pair):
        left, right = pair[: match.start()], pair[match.end() :]
        try:
            return (explicit(left), explicit(right))
        except SettingsError:
            continue
    raise SettingsError(f'{pair!r} is not a language pair. Write two codes joined by a hyphen, as in "en-sw".')
