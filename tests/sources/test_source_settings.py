"""Settings of a source: what is refused, and how languages are matched."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from corpusprep.sources import SourceSettings
from corpusprep.sources.base import label, named_pair, pair_in_path
from corpusprep.sources.settings import split_in_path


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"format": "opus"}, "Input should be"),
        ({"pairs": ["en"]}, "not a language pair"),
        ({"pairs": ["en-german"]}, "not a language pair"),
        ({"src_lang": "en"}, "give both or neither"),
        ({"src_lang": "english", "tgt_lang": "sw"}, "not a language code"),
        ({"limit": 0}, "greater than 0"),
        ({"splits": []}, "at least 1"),
        ({"columns": {"source": 1}}, "Input should be"),
        ({"format": "tsv", "columns": {"src": -1}}, "greater than or equal to 0"),
        ({"format": "jsonl", "columns": {"src": 1}}, "columns by number are for tsv"),
        ({"format": "nllb", "columns": {"src": "a"}}, "columns has no meaning"),
        ({"format": "tsv", "config": "a"}, "config is for the format hub"),
        ({"path": ""}, "at least 1 character"),
        ({"paht": "x"}, "Extra inputs"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        SourceSettings.model_validate({"format": "tsv", "path": "x", **settings})


def test_settings_round_trip() -> None:
    settings = SourceSettings(
        format="tsv", path="x", pairs=("en-srp_Cyrl",), splits=("validation", "valid"), columns={"src": 0, "tgt": "b"}
    )
    assert settings.splits == ("dev",)
    assert SourceSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("languages", "wanted", "labels"),
    [
        (("eng_Latn", "swh_Latn"), [], ("en", "sw")),
        (("ar", "en"), [("en", "ar")], ("ar", "en")),
        (("en", "sr"), [("en", "sr_Latn")], ("en", "sr_Latn")),
        (("eng_Latn", "srp_Cyrl"), [("en", "sr_Latn")], None),
        (("eng_Latn", "srp_Cyrl"), [("en", "sr_Cyrl")], ("en", "sr_Cyrl")),
        (("en", "sr"), [("en", "sr_Latn"), ("en", "sr")], ("en", "sr")),
        (("eng_Latn", "zho_Hant"), [("en", "zh")], None),
        (("eng_Latn", "zho_Hans"), [("en", "zh")], ("en", "zh")),
        (("en", "de"), [("en", "fr")], None),
        (("fr", "de"), [("de", "fr")], ("fr", "de")),
    ],
)
def test_labels(languages: tuple[str, str], wanted: list[tuple[str, str]], labels: tuple[str, str] | None) -> None:
    assert label(languages, wanted) == labels


def test_names_tell_pairs_and_splits() -> None:
    assert named_pair("eng_Latn-swh_Latn") == ("eng_Latn", "swh_Latn")
    assert named_pair("zh-TW-en") in {("zh-TW", "en"), ("zh", "TW-en")}
    assert named_pair("newstest-enough") is None
    assert pair_in_path("a/ntrex128.en-ar.tsv") == ("en", "ar")
    assert pair_in_path("a/de-en/part1.tsv.gz") == ("de", "en")
    assert pair_in_path("a/part1.tsv") is None
    assert split_in_path("data/validation-00000-of-00001.parquet") == "dev"
    assert split_in_path("test/en-de.tsv") == "test"
    assert split_in_path("tatoeba_tests/en-de.tsv") == "train"
