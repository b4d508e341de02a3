"""Codes of languages: many ways to write one, one canonical form."""

from __future__ import annotations

import pytest

from corpusprep.codes import canonical, explicit, language_of, matches, order_pair, parse_pair, script_of
from corpusprep.errors import SettingsError


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("en", "en"), ("eng", "en"), ("eng_Latn", "en"), ("en-US", "en"), ("ENG", "en"),
        ("swh_Latn", "sw"), ("swa", "sw"), ("sw", "sw"), ("arb_Arab", "ar"), ("arz_Arab", "arz"), ("ara", "ar"),
        ("zho_Hans", "zh"), ("zho_Hant", "zh_Hant"), ("zh-TW", "zh_Hant"), ("cmn", "zh"), ("yue_Hant", "yue"),
        ("kor_Hang", "ko"), ("ko", "ko"), ("jpn_Jpan", "ja"), ("srp_Cyrl", "sr"), ("sr_Latn", "sr_Latn"), ("hbs", "sh"),
        ("ckb_Arab", "ckb"), ("kmr_Latn", "ku"), ("tgl", "tl"), ("fil", "tl"), ("ben_Beng", "bn"), ("tel_Telu", "te"),
        ("ace_Arab", "ace_Arab"), ("ace_Latn", "ace"), ("twi_Latn", "tw"), ("nob_Latn", "nb"), ("bbj", "bbj"),
    ],
)  # fmt: skip
def test_canonical(code: str, expected: str) -> None:
    assert canonical(code) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize("code", ["", "e", "english", "xx", "12", "en_US_x_y", "<unk>"])
def test_what_is_no_language_is_an_error(code: str) -> None:
    with pytest.raises(SettingsError, match="ISO 639"):
        canonical(code)


def test_a_named_script_is_kept_where_a_language_has_two() -> None:
    assert explicit("srp_Cyrl") == "sr_Cyrl"
    assert explicit("sr") == "sr"
    assert explicit("eng_Latn") == "en"
    assert (language_of("sr_Latn"), script_of("sr_Latn"), script_of("sr")) == ("sr", "Latn", None)


@pytest.mark.parametrize(
    ("asked", "found", "answer"),
    [
        ("sw", "swh_Latn", True), ("sw", "en", False), ("sr_Latn", "sr", True), ("sr_Latn", "srp_Cyrl", False),
        ("sr", "srp_Cyrl", True), ("sr", "sr_Latn", False), ("zh", "zho_Hans", True), ("zh", "zho_Hant", False),
        ("zh_Hant", "zho_Hant", True), ("zho_Hans", "zh", True),
    ],
)  # fmt: skip
def test_matches(asked: str, found: str, answer: bool) -> None:
    assert matches(asked, found) is answer


def test_pairs() -> None:
    assert parse_pair("eng_Latn-swh_Latn") == ("en", "sw")
    assert parse_pair("de-en") == ("de", "en")
    assert parse_pair("en-sr_Latn") == ("en", "sr_Latn")
    assert order_pair("de", "en") == ("en", "de")
    assert order_pair("fr", "de") == ("de", "fr")
    with pytest.raises(SettingsError, match="language pair"):
        parse_pair("german")
