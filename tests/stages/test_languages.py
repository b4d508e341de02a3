"""Facts about languages."""

from __future__ import annotations

import numpy as np
import pytest

from corpusprep.codes import canonical
from corpusprep.stages import _languages

FLORES = (
    "arb_Arab amh_Ethi asm_Beng bak_Cyrl ben_Beng bod_Tibt bos_Latn bul_Cyrl ces_Latn ckb_Arab ell_Grek eng_Latn ewe_Latn guj_Gujr "
    "heb_Hebr hin_Deva hun_Latn hye_Armn jpn_Hira kan_Knda kas_Deva kas_Arab kat_Geor khm_Khmr kor_Hang lao_Laoo mal_Mlym mya_Mymr "
    "ory_Orya pan_Guru pes_Arab rus_Cyrl sat_Olck sin_Sinh srp_Cyrl swh_Latn tam_Taml taq_Tfng tel_Telu tha_Thai tir_Ethi twi_Latn "
    "tzm_Tfng ukr_Cyrl urd_Arab vie_Latn ydd_Hebr dik_Latn lus_Latn cjk_Latn ace_Arab knc_Arab min_Arab"
).split()


@pytest.mark.parametrize("code", FLORES)
def test_the_script_of_a_flores_code_is_expected(code: str) -> None:
    assert code[4:] in _languages.scripts(canonical(code))
    assert _languages.name(canonical(code)) != canonical(code)
    assert 0.2 < (_languages.length_figure(canonical(code)) or 0) < 1.5


def test_names() -> None:
    assert _languages.name("sw") == "Swahili"
    assert _languages.name("zh_Hant") == "Chinese (Traditional)"
    assert _languages.name("qqq") == "qqq"


def test_a_named_script_is_the_only_one() -> None:
    assert _languages.scripts("sr") == ("Cyrl", "Latn")
    assert _languages.scripts("sr_Latn") == ("Latn",)
    assert _languages.scripts("ja") == ("Hani", "Hira", "Kana")
    assert _languages.scripts("ko") == ("Hang", "Hani")
    assert "Hani" in _languages.scripts("zh_Hant")


def test_an_unlisted_language_falls_back_to_its_script_or_to_nothing() -> None:
    assert _languages.scripts("chr") == ("Cher",)
    assert _languages.scripts("qqq") == ()
    assert _languages.length_figure("qqq") is None
    assert _languages.length_figure("pa_Arab") == _languages.script_length("Arab")
    assert not _languages.spaceless("qqq")


def test_spaceless() -> None:
    assert all(map(_languages.spaceless, ("zh", "ja", "th", "lo", "km", "my", "bo", "yue")))
    assert not any(map(_languages.spaceless, ("en", "ko", "vi", "hi", "am")))


def test_close_languages() -> None:
    assert _languages.close("sr_Latn", "hr")
    assert _languages.close("zh", "zh_Hant")
    assert not _languages.close("en", "de")


@pytest.mark.parametrize(
    ("character", "kind", "script", "digit", "lower"),
    [
        ("A", _languages.LETTER, "Latn", 255, "a"), ("Ж", _languages.LETTER, "Cyrl", 255, "ж"),
        ("漢", _languages.LETTER, "Hani", 255, "漢"), ("한", _languages.LETTER, "Hang", 255, "한"),
        ("ー", _languages.LETTER, "Kana", 255, "ー"), ("Ａ", _languages.LETTER, "Latn", 255, "ａ"),
        ("\u094d", _languages.MARK, "Deva", 255, "\u094d"), ("\u0301", _languages.MARK, None, 255, "\u0301"),
        ("٣", _languages.DIGIT, None, 3, "٣"), ("९", _languages.DIGIT, None, 9, "९"), ("?", _languages.PUNCTUATION, None, 255, "?"),
    ],
)  # fmt: skip
def test_the_character_table(character: str, kind: int, script: str | None, digit: int, lower: str) -> None:
    table = _languages.character_table()
    point = ord(character)
    assert table.kind[point] == kind
    assert table.script[point] == (_languages.script_number(script) if script else 0)
    assert table.digit[point] == digit
    assert table.fold[point] == ord(lower)
    assert table.kind.dtype == np.uint8
