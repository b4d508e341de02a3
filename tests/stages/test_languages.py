"""Facts about languages."""

from __future__ import annotations

import numpy as np
import pytest

from corpusprep.codes import canonical
from corpusprep.stages import languages

FLORES = (
    "arb_Arab amh_Ethi asm_Beng bak_Cyrl ben_Beng bod_Tibt bos_Latn bul_Cyrl ces_Latn ckb_Arab ell_Grek eng_Latn ewe_Latn guj_Gujr "
    "heb_Hebr hin_Deva hun_Latn hye_Armn jpn_Hira kan_Knda kas_Deva kas_Arab kat_Geor khm_Khmr kor_Hang lao_Laoo mal_Mlym mya_Mymr "
    "ory_Orya pan_Guru pes_Arab rus_Cyrl sat_Olck sin_Sinh srp_Cyrl swh_Latn tam_Taml taq_Tfng tel_Telu tha_Thai tir_Ethi twi_Latn "
    "tzm_Tfng ukr_Cyrl urd_Arab vie_Latn ydd_Hebr dik_Latn lus_Latn cjk_Latn ace_Arab knc_Arab min_Arab"
).split()


@pytest.mark.parametrize("code", FLORES)
def test_the_script_of_a_flores_code_is_expected(code: str) -> None:
    assert code[4:] in languages.scripts(canonical(code))
    assert languages.name(canonical(code)) != canonical(code)
    assert 0.2 < (languages.length_figure(canonical(code)) or 0) < 1.5


def test_names() -> None:
    assert languages.name("sw") == "Swahili"
    assert languages.name("zh_Hant") == "Chinese (Traditional)"
    assert languages.name("qqq") == "qqq"


def test_a_named_script_is_the_only_one() -> None:
    assert languages.scripts("sr") == ("Cyrl", "Latn")
    assert languages.scripts("sr_Latn") == ("Latn",)
    assert languages.scripts("ja") == ("Hani", "Hira", "Kana")
    assert languages.scripts("ko") == ("Hang", "Hani")
    assert "Hani" in languages.scripts("zh_Hant")


def test_an_unlisted_language_falls_back_to_its_script_or_to_nothing() -> None:
    assert languages.scripts("chr") == ("Cher",)
    assert languages.scripts("qqq") == ()
    assert languages.length_figure("qqq") is None
    assert languages.length_figure("pa_Arab") == languages.script_length("Arab")
    assert not languages.spaceless("qqq")


def test_spaceless() -> None:
    assert all(map(languages.spaceless, ("zh", "ja", "th", "lo", "km", "my", "bo", "yue")))
    assert not any(map(languages.spaceless, ("en", "ko", "vi", "hi", "am")))


def test_close_languages() -> None:
    assert languages.close("sr_Latn", "hr")
    assert languages.close("zh", "zh_Hant")
    assert not languages.close("en", "de")


@pytest.mark.parametrize(
    ("character", "kind", "script", "digit", "lower"),
    [
        ("A", languages.LETTER, "Latn", 255, "a"), ("Ж", languages.LETTER, "Cyrl", 255, "ж"),
        ("漢", languages.LETTER, "Hani", 255, "漢"), ("한", languages.LETTER, "Hang", 255, "한"),
        ("ー", languages.LETTER, "Kana", 255, "ー"), ("Ａ", languages.LETTER, "Latn", 255, "ａ"),
        ("\u094d", languages.MARK, "Deva", 255, "\u094d"), ("\u0301", languages.MARK, None, 255, "\u0301"),
        ("٣", languages.DIGIT, None, 3, "٣"), ("९", languages.DIGIT, None, 9, "९"), ("?", languages.PUNCTUATION, None, 255, "?"),
    ],
)  # fmt: skip
def test_the_character_table(character: str, kind: int, script: str | None, digit: int, lower: str) -> None:
    table = languages.character_table()
    point = ord(character)
    assert table.kind[point] == kind
    assert table.script[point] == (languages.script_number(script) if script else 0)
    assert table.digit[point] == digit
    assert table.fold[point] == ord(lower)
    assert table.kind.dtype == np.uint8
