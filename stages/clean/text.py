"""Text normalisation for the `clean` stage.

One kernel reads each byte and notes which steps a row may need. Most rows need none and are not changed. The other rows
repeat the steps (mojibake, entities, markup, NFC, characters) until nothing changes. So normalisation is idempotent,
and it finds markup that is hidden in entities or behind invisible characters.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from html.entities import html5
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.arrow import string_buffers
from corpusprep.kernels import kept, kernel
from corpusprep.stages import languages
from corpusprep.stages.bits import ONES, TOPS, bytes_equal, load64, trailing_zeros

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

# Steps that a row may need, as bits.
CHARACTERS, COMPOSE, ENTITY, MARKUP, MOJIBAKE, TEMPLATE, REPLACEMENT = (1 << i for i in range(7))
MAX_ROUNDS = 8
"""Maximum number of rounds for a row; real text stops changing after two or three."""

# ---------------------------------------------------------------------------------------------------------------------
# Classes of characters
# ---------------------------------------------------------------------------------------------------------------------

_SIZE = languages.SIZE
_PLAIN, _BLANK, _DELETE, _JOINER, _SELECTOR, _HOLDER, _PICTURE = range(7)
_JOINERS = (0x200C, 0x200D)
_SELECTORS = (*range(0x180B, 0x180E), 0x180F, *range(0xFE00, 0xFE10))
_LOOKS_BLANK = (0x115F, 0x1160, 0x3164, 0xFFA0, 0x2800, 0x2028, 0x2029, 0x85, *range(0x09, 0x0E), *range(0x1C, 0x20))
_MORE_INVISIBLE = (0x034F, 0x17B4, 0x17B5, 0xFFFC)
# Visible characters of the category Cf: Arabic number and verse signs, Syriac abbreviation, Kaithi number.
_VISIBLE_FORMATS = (*range(0x0600, 0x0606), 0x06DD, 0x070F, 0x0890, 0x0891, 0x08E2, 0x110BD, 0x110CD)
# Code pages that UTF-8 is most often misread as.
_CODE_PAGES = ("latin-1", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1257", "iso8859-2", "cp437")
# In this code page the misread first bytes are letters that often precede the other ones. Only these bytes (of Cyrillic
# and of punctuation) are evidence.
_TELLING_BYTES = {"cp1251": (0xD0, 0xD1, 0xE2)}


class _Tables(NamedTuple):
    role: U8
    """How the character pass treats a code point below _SIZE."""
    facts: npt.NDArray[np.uint64]
    """What the scan has to know of a code point below _SIZE, in one number."""


# Parts of `facts`, from the lowest bit: the steps that the character needs wherever it is (8 bits); whether it may stand only
# after a character that holds it, and whether it holds such a character; the canonical combining class (8 bits). Then, as one
# bit for each code page, whether the code page gives this character if it misreads the first byte of a UTF-8 sequence of two
# bytes, or of three, or a later byte. Last, as first and as second character, the pairs in `_TRACES`.
_HELD, _HOLDS = 1 << 8, 1 << 9
_ORDER, _LEAD2, _LEAD3, _FOLLOWING, _FIRST, _SECOND = 10, 18, 27, 36, 45, 48
_PAGES_MASK = (1 << len(_CODE_PAGES)) - 1
# Pairs of characters that are not ASCII, maybe with ASCII between them, as in wrongly decoded text: a quotation mark that lost
# its last byte; traces of Mac Roman in accents and, with any second character, in punctuation. Other pairs of Mac Roman are
# ordinary French ("l'été").
_TRACES = ((0xE2, 0x20AC), (0x201A, 0xC4), (0x221A, None))


@kept(_Tables)
def _tables() -> _Tables:
    role = np.full(_SIZE, _PLAIN, np.uint8)
    compose = np.zeros(_SIZE, np.uint8)
    order = np.zeros(_SIZE, np.uint8)
    scripts = languages.character_table().script
    joining = np.zeros(256, bool)
    joining[[languages.script_number(code) for code in languages.JOINER_SCRIPTS]] = True
    role[joining[scripts]] = _HOLDER
    plain = np.ones(_SIZE, bool)  # Han and Hangul syllables need no test
    plain[0x3400:0x4DC0] = plain[0x4E00:0xA000] = plain[0xAC00:0xD7A4] = False
    plain[0xD800:0xE000] = False
    for point in np.flatnonzero(plain).tolist():
        character = chr(point)
        category = unicodedata.category(character)
        noncharacter = point & 0xFFFE == 0xFFFE or 0xFDD0 <= point <= 0xFDEF
        if category in ("Cc", "Co") or noncharacter or (category == "Cf" and point not in _VISIBLE_FORMATS):
            role[point] = _DELETE
        elif category in ("Zs", "Zl", "Zp"):
            role[point] = _BLANK
        elif category == "So" or 0x1F3FB <= point <= 0x1F3FF:
            role[point] = _PICTURE
        decomposed = unicodedata.normalize("NFD", character)
        order[point] = unicodedata.combining(character)
        if unicodedata.normalize("NFC", character) != character:
            compose[point] = 1
        elif decomposed != character:
            # The later parts of a composed character can join a base before them.
            for part in unicodedata.decomposition(character).split()[1:]:
                compose[int(part, 16)] = 1
    compose[0x1161:0x1176] = compose[0x11A8:0x11C3] = 1  # vowels and final consonants of Hangul
    role[0xE000:0xF900] = _DELETE
    role[list(_MORE_INVISIBLE)] = _DELETE
    role[list(_LOOKS_BLANK)] = _BLANK
    role[list(_JOINERS)] = _JOINER
    role[list(_SELECTORS)] = _SELECTOR
    role[0x20] = _BLANK

    lead2, lead3, following = (np.zeros(_SIZE, np.uint64) for _ in range(3))
    for bit, page in enumerate(_CODE_PAGES):
        for byte in range(0x80, 0xF5):
            # If a code page has no character for a byte, programs decode the byte as a control character.
            read = bytes([byte]).decode(page, "ignore") or chr(byte)
            table = following if byte < 0xC0 else lead2 if 0xC2 <= byte < 0xE0 else lead3
            if byte not in (0xC0, 0xC1) and (byte < 0xC0 or byte in _TELLING_BYTES.get(page, (byte,))):
                table[ord(read)] |= np.uint64(1 << bit)
    facts = np.where((role == _BLANK) | (role == _DELETE), CHARACTERS, 0).astype(np.uint64)
    facts[compose != 0] |= np.uint64(COMPOSE)
    facts[0xFFFD] |= np.uint64(REPLACEMENT)
    facts[(role == _JOINER) | (role == _SELECTOR)] |= np.uint64(_HELD)
    facts[(role == _HOLDER) | (role == _PICTURE)] |= np.uint64(_HOLDS)
    for values, place in ((order, _ORDER), (lead2, _LEAD2), (lead3, _LEAD3), (following, _FOLLOWING)):
        facts |= values.astype(np.uint64) << np.uint64(place)
    for bit, (first, second) in enumerate(_TRACES):
        facts[first] |= np.uint64(1 << (_FIRST + bit))
        facts[slice(None) if second is None else second] |= np.uint64(1 << (_SECOND + bit))
    return _Tables(role, facts)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@kernel(inline="always")
def decode(data: U8, i: int, end: int) -> tuple[Any, int]:
    """The code point at `data[i]` and the index of the next one; U+FFFD if the byte does not start a code point."""
    byte = np.int64(data[i])
    if byte < 0x80:
        return byte, i + 1
    if 0xC2 <= byte < 0xE0 and i + 1 < end:
        return ((byte & 0x1F) << 6) | (np.int64(data[i + 1]) & 0x3F), i + 2
    if 0xE0 <= byte < 0xF0 and i + 2 < end:
        return ((byte & 0xF) << 12) | ((np.int64(data[i + 1]) & 0x3F) << 6) | (np.int64(data[i + 2]) & 0x3F), i + 3
    if 0xF0 <= byte < 0xF5 and i + 3 < end:
        point = ((byte & 7) << 18) | ((np.int64(data[i + 1]) & 0x3F) << 12)
        return point | ((np.int64(data[i + 2]) & 0x3F) << 6) | (np.int64(data[i + 3]) & 0x3F), i + 4
    return np.int64(0xFFFD), i + 1


@kernel(inline="always")
def _is_letter(byte: int) -> bool:
    return (65 <= byte <= 90) or (97 <= byte <= 122)


@kernel(leaf=True)
def _ascii_needs(data: U8, i: int, end: int) -> int:
    """The steps that the ASCII character at i, other than a space, may need."""
    byte = data[i]
    if byte < 0x20 or byte == 0x7F:
        return CHARACTERS
    if byte == 38:  # &
        stop = min(end, i + 48)
        for k in range(i + 1, stop):
            if data[k] == 59:
                return ENTITY
    elif byte == 60:  # <
        if i + 1 < end:
            after = data[i + 1]
            if after == 124 or after == 60 or after == 0xEF:
                return TEMPLATE
            if _is_letter(after) or after == 47 or after == 33 or after == 63 or after == 32:
                return MARKUP | TEMPLATE
    elif byte == 91:  # [
        if i + 1 < end and (data[i + 1] == 47 or 65 <= data[i + 1] <= 90):
            return TEMPLATE
    elif byte == 123 and i + 1 < end and (data[i + 1] == 92 or (i + 2 < end and data[i + 2] == 58)):  # {
        return MARKUP
    return 0


@kernel(inline="always", leaf=True)
def _remarkable(before: np.uint64, word: np.uint64) -> np.uint64:
    """The highest bit of each byte of the word that needs a look: not ASCII, a control character, `&`, `<`, `[`, `{`, or a
    space after a space. Some other bytes may be marked too.

    Args:
        before: the eight bytes that begin one byte earlier.
        word: eight bytes.
    """
    found = word | (word + np.uint64(ONES)) | (word - np.uint64(0x20 * ONES))
    found |= bytes_equal(word, 38) | bytes_equal(word, 60) | bytes_equal(word, 91) | bytes_equal(word, 123)
    found |= bytes_equal(word, 32) & bytes_equal(before, 32)
    return found & np.uint64(TOPS)


@kernel(leaf=True)
def _scan(offsets: I64, data: U8, facts: npt.NDArray[np.uint64], out: U8) -> None:
    zero = np.uint64(0)
    last_word = data.size - 8
    for row in range(out.size):
        start, end = offsets[row], offsets[row + 1]
        i = start
        needs = zero
        before = facing = traces = zero  # facts of the character before, and what it lets the next one be
        while i < end:
            byte = data[i]
            if byte < 0x80:
                if byte == 0x20:
                    if i == start or data[i - 1] == 0x20:
                        needs |= np.uint64(CHARACTERS)
                elif byte < 0x40 or byte > 0x5A:
                    needs |= np.uint64(_ascii_needs(data, i, end))
                before = facing = zero
                i += 1
                # The words may extend into the next row: what is found there ends the loop.
                while i < end and i <= last_word:
                    found = _remarkable(load64(data, i - 1), load64(data, i))
                    if found != 0:
                        i += trailing_zeros(found) >> 3
                        break
                    i += 8
                continue
            point, i = decode(data, i, end)
            if point >= _SIZE:
                if point >= 0xE0000:
                    needs |= np.uint64(CHARACTERS)
                before = facing = zero
                continue
            fact = facts[point]
            needs |= fact & np.uint64(0xFF)
            if (fact & np.uint64(_HELD)) != 0 and (before & np.uint64(_HOLDS)) == 0:
                needs |= np.uint64(CHARACTERS)
            order = (fact >> np.uint64(_ORDER)) & np.uint64(0xFF)
            if order != 0 and order < (before >> np.uint64(_ORDER)) & np.uint64(0xFF):
                needs |= np.uint64(COMPOSE)
            tail = (fact >> np.uint64(_FOLLOWING)) & np.uint64(_PAGES_MASK)
            if ((before >> np.uint64(_LEAD2)) | facing) & tail != 0 or traces & (fact >> np.uint64(_SECOND)) != 0:
                needs |= np.uint64(MOJIBAKE)
            traces = (fact >> np.uint64(_FIRST)) & np.uint64(7)
            facing = (before >> np.uint64(_LEAD3)) & tail
            before = fact
        if end > start and data[end - 1] == 0x20:
            needs |= np.uint64(CHARACTERS)
        out[row] = needs


@kernel(inline="always", leaf=True)
def _copy(data: U8, start: int, end: int, out: U8, at: int) -> int:
    for k in range(start, end):
        out[at] = data[k]
        at += 1
    return at


@kernel(leaf=True)
def _tidy(offsets: I64, data: U8, role: U8, out_offsets: I64, out: U8) -> None:
    """The character pass: replaces white space of all kinds with single spaces and removes invisible characters.

    Joiners and variation selectors are kept after a letter of a script that needs joiners, and within an emoji.
    """
    at = 0
    out_offsets[0] = 0
    for row in range(offsets.size - 1):
        i, end = offsets[row], offsets[row + 1]
        begin = at
        pending = False
        before = _PLAIN  # role of the last character written
        while i < end:
            point, after = decode(data, i, end)
            what = _PLAIN
            if point < _SIZE:
                what = role[point]
            elif point >= 0xE0000:
                what = _DELETE
            if what == _BLANK:
                pending = at > begin
                before = _PLAIN if pending else before
            elif what != _DELETE and (
                what not in (_JOINER, _SELECTOR) or (not pending and before in (_HOLDER, _PICTURE))
            ):
                if pending:
                    out[at] = 0x20
                    at += 1
                    pending = False
                at = _copy(data, i, after, out, at)
                # An emoji keeps its joiner after a selector (heart, selector, joiner, fire).
                before = _PICTURE if what == _SELECTOR and before == _PICTURE else what
            i = after
        out_offsets[row + 1] = at


def _tidy_characters(column: pa.Array[Any]) -> pa.Array[Any]:
    offsets, data = string_buffers(column)
    out_offsets = np.empty(offsets.size, np.int64)
    out = np.empty(int(offsets[-1] - offsets[0]), np.uint8)
    _tidy(offsets, data, _tables().role, out_offsets, out)
    written: tuple[Any, Any] = (out_offsets, out[: out_offsets[-1]])
    buffers = [None, *map(pa.py_buffer, written)]
    return pa.Array.from_buffers(pa.large_string(), offsets.size - 1, buffers)


def scan(column: pa.Array[Any] | pa.ChunkedArray[Any]) -> U8:
    """The steps that each of n texts may need, as bits, uint8 of shape (n,); 0 if the text is already normalised."""
    offsets, data = string_buffers(column)
    out = np.zeros(offsets.size - 1, np.uint8)
    _scan(offsets, data, _tables().facts, out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Steps on single texts: only for rows that the scan has selected
# ---------------------------------------------------------------------------------------------------------------------

_ENTITY = re.compile(
    r"&(?:[ ]?amp[ ]?;)*"  # escaped any number of times
    r"(?:[ ]?(?P<tight>amp|lt|gt|quot|apos|nbsp)[ ]?|(?P<name>[A-Za-z][A-Za-z0-9]{1,31})"
    r"|[ ]?\#[ ]?(?P<decimal>[0-9]{1,7})[ ]?|[ ]?\#[ ]?[xX](?P<hexadecimal>[0-9A-Fa-f]{1,6})[ ]?);"
)
_SURROGATES = re.compile(
    r"&#(?:(5[5-7][0-9]{3})|[xX]([dD][89a-fA-F][0-9A-Fa-f]{2}));&#(?:(5[5-7][0-9]{3})|[xX]([dD][89a-fA-F][0-9A-Fa-f]{2}));"
)


def _join_surrogates(match: re.Match[str]) -> str:
    high = int(match[1]) if match[1] else int(match[2], 16)
    low = int(match[3]) if match[3] else int(match[4], 16)
    if 0xD800 <= high < 0xDC00 <= low < 0xE000:
        return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))
    return match[0]


def _entity(match: re.Match[str]) -> str:
    name = match["tight"] or match["name"]
    if name is not None:
        return html5.get(f"{name};", f"&{name};")
    number = int(match["decimal"]) if match["decimal"] else int(match["hexadecimal"], 16)
    return html.unescape(f"&#{number};")


def unescape(text: str) -> str:
    """The text with HTML entities resolved if they end in a semicolon: `AT&T` and `?a=1&copy=2` are ordinary text."""
    return _ENTITY.sub(_entity, _SURROGATES.sub(_join_surrogates, text))


TEMPLATE_TOKENS = re.compile(
    r"<\|[^<>|]{1,100}\|>|<｜[^<>｜]{1,100}｜>"
    r"|\[/?INST\]|<</?SYS>>|</?s>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT|IMG|BOS|EOS|PAD)\]"
    r"|</?(?:bos|eos|pad|unk|mask|sep|cls|think|tool_call|tool_response|tools|image|im_start|im_end|start_of_turn|end_of_turn"
    r"|start_of_image|end_of_image|start_header_id|end_header_id|eot_id|endoftext|BOS_TOKEN|EOS_TOKEN|unused[0-9]{1,4}"
    r"|extra_id_[0-9]{1,4}|reserved_[0-9]{1,4}|fim_prefix|fim_middle|fim_suffix)>"
)
"""Control tokens of common chat templates and vocabularies."""

# Names that are always HTML in angle brackets. Other names (`<title>`, `<name>`) can be a writer's placeholder, so they
# need more evidence of a tag: an attribute, a closing slash, or a closing tag in the same text.
_INLINE = frozenset(
    "a abbr acronym b bdo big cite del em font i img ins kbd nobr samp small span strike strong sub sup tt u wbr".split()
)
_BLOCK = frozenset(
    "blockquote body br center dd div dl dt h1 h2 h3 h4 h5 h6 head hr html iframe li ol p pre script style table tbody td tfoot "
    "th thead tr ul".split()
)
# A comment must not extend into the next one: each attempt ends where the next one begins, so the search stays linear.
_TAG = re.compile(
    r"<!--(?:[^<-]|-(?!->)|<(?!!--))*+-->|<!(?:DOCTYPE|doctype)[^<>]{0,300}>|<\?[A-Za-z][^<>]{0,300}\?>|<!\[CDATA\[|\]\]>"
    r"|<[ ]?(?P<close>/)?[ ]?(?P<name>[A-Za-z][A-Za-z0-9:_-]{0,30})(?P<rest>(?:[\s/][^<>]{0,2000})?)>"
    r"|\{\\[A-Za-z0-9*][^{}]{0,200}\}|\{[yYcCfFsSpP]:[^{}\s]{1,50}\}"
)
_CLOSING = re.compile(r"</[ ]?([A-Za-z][A-Za-z0-9:_-]{0,30})[ ]?>")
_ATTRIBUTE = re.compile(r"\s[A-Za-z_:][A-Za-z0-9_:.-]{0,40}\s?=")
# A tag that is cut off by the end of the row.
_CUT_TAG = re.compile(r"</?(?:a|p|div|span|img|font|br|td|li|table|iframe)\s+[A-Za-z_:-]{1,30}\s?=", re.IGNORECASE)


def strip_markup(text: str) -> str:
    """The text without tags of HTML, XML and subtitles; `a < b`, `x<y>z` and chat-template tokens are kept."""
    closed: set[str] | None = None

    def tag(match: re.Match[str]) -> str:
        nonlocal closed
        name = match["name"]
        if name is None:
            return " "
        if TEMPLATE_TOKENS.fullmatch(match[0]):
            return match[0]
        rest = match["rest"].strip()
        lower = name.lower()
        if lower in _BLOCK or lower in _INLINE:
            spaced = match[0][1] == " " and not match["close"]
            if (spaced and len(name) == 1) or (rest not in ("", "/") and "=" not in rest):
                return match[0]  # `a < b > c`, `a <b and c> d`
            return " " if lower in _BLOCK else ""
        if rest != "/" and _ATTRIBUTE.match(match["rest"]) is None:
            if closed is None:
                closed = {found.lower() for found in _CLOSING.findall(text)}
            if rest or lower not in closed:
                return match[0]
        return ""

    text = _TAG.sub(tag, text)
    cut = text.rfind("<")
    if cut >= 0 and len(text) - cut < 2000 and text.find(">", cut) < 0 and _CUT_TAG.match(text, cut):
        text = text[:cut]
    return text


@functools.cache
def _repair_settings() -> Any:
    from ftfy import TextFixerConfig

    return TextFixerConfig(unescape_html=False, replace_lossy_sequences=False, fix_surrogates=False)


# Traces of wrong decoding that occur in no language. The heuristic alone would reject unusual spellings of small
# languages (such as Ewe text that uses the florin sign as a letter).
_BROKEN = re.compile(
    r"[\x80-\x9f]|[\u251c\u252c]\S|\u00e2\u20ac|\u00ef\u00bf\u00bd|\u00c3[\xa0-\xbf\u0152-\u0192\u02c6-\u2122]|\u00c2[\xa0-\xbf]"
    r"|(?:[\u00d0\u00d1\u00d8-\u00db][\xa1-\xbf\u0152-\u0192\u02c6-\u2122 ]?){3}"
    r"|(?:[\u0420\u0421][\u0402-\u040f\u0452-\u045f\xa0-\xbb\u2013-\u2122\u0490\u0491 ]){3}"
)


def repair(text: str) -> tuple[str, bool]:
    """The text with wrong decoding repaired, and whether it still looks wrongly decoded."""
    from ftfy import fix_encoding_and_explain
    from ftfy.badness import is_bad

    if not is_bad(text):
        return text, False
    repaired, plan = fix_encoding_and_explain(text, _repair_settings())
    if (
        any(step == ("encode", "macroman") for step in plan or ())
        and "\u201a\u00c4" not in text
        and "\u221a" not in text
    ):
        repaired = text  # in Mac Roman almost any two letters are valid
    if "\ufffd" in repaired and "\ufffd" not in text:
        repaired = text
    return repaired, is_bad(repaired) and _BROKEN.search(repaired) is not None


# ---------------------------------------------------------------------------------------------------------------------
# All together
# ---------------------------------------------------------------------------------------------------------------------


class Normalised(NamedTuple):
    """n normalised texts.

    Attributes:
        text: strings; valid UTF-8 without tab, newline or carriage return.
        mojibake: bool of shape (n,): wrongly decoded text that cannot be repaired without loss.
        restless: bool of shape (n,): markup nested so deep that the text still changes after the last round.
        template: bool of shape (n,): contains a chat-template token.
    """

    text: pa.Array[Any]
    mojibake: npt.NDArray[np.bool_]
    restless: npt.NDArray[np.bool_]
    template: npt.NDArray[np.bool_]


class Steps(NamedTuple):
    """Which steps are enabled."""

    entities: bool = True
    markup: bool = True
    mojibake: bool = True


def _map(texts: list[Any], chosen: npt.NDArray[np.bool_], function: Any) -> None:
    for i in np.flatnonzero(chosen).tolist():
        texts[i] = function(texts[i])


def _round(column: pa.Array[Any], needs: U8, steps: Steps) -> tuple[pa.Array[Any], npt.NDArray[np.bool_]]:
    """Runs one round of all steps. Returns the new texts, and which of them still look wrongly decoded."""
    broken = (needs & REPLACEMENT) != 0
    single = ENTITY * steps.entities | MARKUP * steps.markup | MOJIBAKE * steps.mojibake
    hand = np.flatnonzero(needs & single)
    if hand.size:
        texts: list[Any] = column.take(pa.array(hand, pa.int64())).to_pylist()
        bits = needs[hand]
        if steps.mojibake:
            for i in np.flatnonzero(bits & MOJIBAKE).tolist():
                texts[i], bad = repair(texts[i])
                broken[hand[i]] |= bad
        if steps.entities:
            _map(texts, (bits & ENTITY) != 0, unescape)
        if steps.markup:
            # An entity may have hidden a tag.
            _map(texts, (bits & (MARKUP | ENTITY)) != 0, strip_markup)
        mask = np.zeros(len(column), bool)
        mask[hand] = True
        column = pc.replace_with_mask(column, pa.array(mask), pa.array(texts, pa.large_string()))
    if np.any(needs & COMPOSE) or hand.size:
        column = pl.Series(column).str.normalize("NFC").to_arrow().cast(pa.large_string())
    return _tidy_characters(column), broken


def normalise(column: pa.Array[Any], steps: Steps) -> Normalised:
    """Normalises n texts (no nulls) until nothing changes."""
    n = len(column)
    mojibake, restless, template = (np.zeros(n, bool) for _ in range(3))
    needs = scan(column)
    at_work = np.flatnonzero(needs & ~np.uint8(TEMPLATE))
    looked = np.flatnonzero(needs & TEMPLATE)
    if at_work.size:
        work = column.take(pa.array(at_work, pa.int64())).cast(pa.large_string())
        final = work
        alive = np.arange(at_work.size)
        bits = needs[at_work]
        for _ in range(MAX_ROUNDS):
            new, broken = _round(work, bits, steps)
            changed = pc.not_equal(new, work).to_numpy(zero_copy_only=False)
            mojibake[at_work[alive]] |= broken  # a text that a step cannot repair stays marked as broken
            mask = np.zeros(at_work.size, bool)
            mask[alive] = True
            final = pc.replace_with_mask(final, pa.array(mask), new)
            alive, work = alive[changed], new.filter(pa.array(changed))
            if not alive.size:
                break
            bits = scan(work)
        restless[at_work[alive]] = True
        mask = np.zeros(n, bool)
        mask[at_work] = True
        column = pc.replace_with_mask(column.cast(pa.large_string()), pa.array(mask), final)
        looked = np.union1d(looked, at_work[(scan(final) & TEMPLATE) != 0])
    for i, text in zip(looked.tolist(), column.take(pa.array(looked, pa.int64())).to_pylist(), strict=True):
        template[i] = TEMPLATE_TOKENS.search(text or "") is not None
    return Normalised(column, mojibake, restless, template)
