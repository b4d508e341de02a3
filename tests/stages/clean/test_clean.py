"""The clean stage: what it repairs, what it drops and why, and what it must leave alone."""

from __future__ import annotations

import gzip
import sys
import types
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from corpusprep.codes import canonical
from corpusprep.errors import SettingsError
from corpusprep.stages.clean import REASONS, CleanSettings, clean

EN = "The old ferry crosses the bay twice a day."
DE = "Die alte Fähre überquert die Bucht zweimal am Tag."


def pairs(*rows: tuple[str | None, str | None], src: str = "en", tgt: str = "de") -> pa.Table:
    return pa.table(
        {
            "src": pa.array([row[0] for row in rows], pa.string()),
            "tgt": pa.array([row[1] for row in rows], pa.string()),
            "src_lang": [src] * len(rows),
            "tgt_lang": [tgt] * len(rows),
            "id": pa.array(range(len(rows)), pa.int64()),
        }
    )


def verdict(source: str | None, target: str | None, src: str = "en", tgt: str = "de", **chosen: Any) -> str | None:
    """The reason for which a pair is dropped; None if it is kept."""
    outcome = clean(pairs((source, target), src=src, tgt=tgt), CleanSettings(**chosen))
    assert outcome.kept.num_rows + outcome.dropped.num_rows == 1
    return outcome.dropped["reason"][0].as_py() if outcome.dropped.num_rows else None


def normal(text: str, lang: str = "en", **chosen: Any) -> str:
    """The normalised form of a text, whatever the rules say."""
    outcome = clean(pairs((text, DE), src=lang), CleanSettings(**chosen))
    one = outcome.kept if outcome.kept.num_rows else outcome.dropped
    return str(one["src"][0].as_py())


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  two\t words \u00a0here\u3000 ", "two words here"),
        ("line\r\nbreak\u2028and\u2029more\x85yes\x0bno", "line break and more yes no"),
        ("\ufeffmark\u200b of\u200e or\u00adder\u202a", "mark of order"),
        ("be\x00ll\x07 a\x7fnd\ue000", "bell and"),
        ("cafe\u0301", "caf\u00e9"),
        ("Tom &amp; Ann &quot;ate&quot; &#39;n&apos; &#x2019;ran", "Tom & Ann \"ate\" 'n' \u2019ran"),
        ("&amp;amp;lt; and & quot ; and & # 39 ;", "< and \" and '"),
        ("AT&T and ?a=1&copy=2 and R&D; &T;", "AT&T and ?a=1&copy=2 and R&D; &T;"),
        ("&#55357;&#56832; smile", "\U0001f600 smile"),
        ('<p class="c2">One day.</p><br/>', "One day."),
        ('<a href="/x?id=7">One day.</a>', "One day."),
        ("w<b>or</b>d<br>next", "word next"),
        ("{\\an8}<i>Listen</i>", "Listen"),
        ("{y:i}Listen{\\pos(192,235)}", "Listen"),
        ("&lt;p&gt;hidden&lt;/p&gt;", "hidden"),
        ("<!-- a -- <b> --> text <!DOCTYPE html>", "text"),
        ('<seg id="1">words</seg> <g id="2">more</g>', "words more"),
        ("<foo>pairs</foo> of <any/> name", "pairs of name"),
        ('cut off <a href="http://example.org/long', "cut off"),
        ("if a < b and c > d, I <3 x<y>z", "if a < b and c > d, I <3 x<y>z"),
        ("a <b and c> d", "a <b and c> d"),
        ("enter <name> and <title>", "enter <name> and <title>"),
        ("1 <2> 3 <= 4 >= 5 <> 6 <-- 7", "1 <2> 3 <= 4 >= 5 <> 6 <-- 7"),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\u200d\U0001f525", "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\u200d\U0001f525"),
    ],
)  # fmt: skip
def test_text_is_normalised(raw: str, expected: str) -> None:
    assert normal(raw) == expected
    assert normal(normal(raw)) == expected


def test_joiners_stay_where_a_script_needs_them() -> None:
    persian, sinhala, hindi = "می\u200cخواهم", "ශ්\u200dරී", "क्\u200dष"
    for text in (persian, sinhala, hindi):
        assert normal(text) == text
    assert normal("zero\u200cwidth\u200d \u200dtext") == "zerowidth text"
    assert normal("می\u200c\u200c\u200dخواهم") == persian


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("Příliš žluťoučký kůň", ("latin-1", "cp1252")),
        ("Ça c’est déjà vu à Montréal", ("latin-1", "cp1252")),
        ("Привет, мир", ("latin-1", "cp1252", "cp1251")),
        ("こんにちは世界", ("latin-1", "cp1252")),
        ("naïve", ("latin-1", "cp1252")),
    ],
)
def test_wrong_decoding_is_undone(text: str, pages: tuple[str, ...]) -> None:
    # As programs do it: what the page does not know passes as a control character.
    for page in pages:
        broken = "".join(bytes([byte]).decode(page, "ignore") or chr(byte) for byte in text.encode())
        assert normal(broken) == text


def test_wrong_decoding_that_lost_bytes_is_dropped() -> None:
    assert verdict("He said â€œyesâ€, and went home early.", DE) == "clean.mojibake"
    assert verdict(EN, "Die alte F\ufffdhre überquert die Bucht zweimal am Tag.") == "clean.mojibake"
    assert verdict(EN, "Za?to ni?ta ne ka?ete o tome, pitao je.", tgt="sr") == "clean.mojibake"
    assert verdict("He said â€œyesâ€, and went home early.", DE, mojibake=False) is None


@pytest.mark.parametrize(
    "text",
    ["Le ƒè 2016 lia me la", "l’été « là » déjà", "SÃO PAULO É GRANDE", "Він сказав: «Сіль»", "Voilà…”", "Ääni €5"],
)
def test_right_decoding_is_left_alone(text: str) -> None:
    assert normal(text, "fr") == text


def test_steps_can_be_switched_off() -> None:
    assert normal("a &lt;b&gt; c", entities=False) == "a &lt;b&gt; c"
    assert normal("a <b>c</b>", markup=False) == "a <b>c</b>"
    assert normal("naÃ¯ve idea", mojibake=False) == "naÃ¯ve idea"


def test_markup_without_end_is_dropped() -> None:
    nested = "<" * 40 + "b>" * 40
    assert verdict(f"A sentence {nested}", DE) == "clean.markup"


# ---------------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------------

WORD = "".join(chr(97 + i * i % 23) + chr(97 + i % 19) for i in range(40))
LONG = " ".join(f"word{i} stands" for i in range(300))


@pytest.mark.parametrize(
    ("source", "target", "tgt", "reason"),
    [
        (EN, DE, "de", None),
        (None, DE, "de", "clean.empty"),
        ("  \u200b<br/> ", DE, "de", "clean.empty"),
        ("Say <|im_start|>user now.", DE, "de", "clean.template_tokens"),
        ("Say &lt;|im_start|&gt;user now.", DE, "de", "clean.template_tokens"),
        ("Say <|im_\u200bst<b></b>art|>user now.", DE, "de", "clean.template_tokens"),
        ("[INST] Say it now, please [/INST]", DE, "de", "clean.template_tokens"),
        ("<s>The old ferry crosses the bay.</s>", DE, "de", "clean.template_tokens"),
        (EN, f"&amp;lt;think&amp;gt;{DE}", "de", "clean.template_tokens"),
        ("<start_of_turn>The old ferry crosses.", DE, "de", "clean.template_tokens"),
        ("<｜User｜>The old ferry crosses.", DE, "de", "clean.template_tokens"),
        (LONG, LONG, "de", "clean.too_long"),
        ("Come in and sit. " * 12, "Komm rein und setz dich. " * 12, "de", "clean.repetition"),
        ("「何も知らない」" * 9, EN, "de", "clean.repetition"),
        ("No, no, no, no, no!", "Nein, nein, nein, nein!", "de", None),
        ("http://example.org/1/index.html", "http://example.org/1/", "de", "clean.url_only"),
        ("www.example.org", "Siehe unten auf der Seite", "de", "clean.url_only"),
        ("5171 3148/2760 ### === 1175", "|| 391 :: 181 >> ***", "de", "clean.letters"),
        (EN, "The old ferry crosses the bay.", "ru", "clean.script"),
        (EN, "Ez a régi komp naponta kétszer kel át.", "zh", "clean.script"),
        (EN, "Stari trajekt prelazi zaliv dva puta dnevno.", "sr", None),
        (EN, "Стари трајект прелази залив два пута дневно.", "sr", None),
        (EN, "Стари трајект прелази залив два пута дневно.", "sr_Latn", "clean.script"),
        (EN, "古いフェリーは一日二回、湾を渡ります。", "ja", None),
        (EN, "오래된 페리는 하루에 두 번 만을 건넌다.", "ko", None),
        ("I bought an iPhone 15 Pro Max.", "我买了一部 iPhone 15 Pro Max 手机。", "zh", None),
        (EN, EN.upper().replace(" ", "  ").rstrip(".") + "!", "de", "clean.copied"),
        (EN, EN.replace("ferry", "fery"), "de", "clean.copied"),
        ("Anna Maria Schmidt", "Anna Maria Schmidt", "de", None),
        ("Hotel", "Hotel.", "de", None),
        (EN, EN, "pcm", None),
        ("This is " + WORD, "Das hier ist ein sehr langes Wort, und es steht da ganz ohne einen Sinn und Verstand.", "de", "clean.long_word"),
        ("I consider Tom my friend.", "Я с", "ru", "clean.length_ratio"),
        ("Yes.", "Ja, das stimmt.", "de", None),
        ("It cost 219 dollars in 1974.", "Es war teuer. (8334, 1375)", "de", "clean.numbers"),
        ("In 2010 he paid 1,234.50 dollars.", "2010 zahlte er 1.234,50 Dollar.", "de", None),
        ("They sold 1,500,000 books in 1974.", "Sie verkauften 1,5 Millionen Bücher im Jahr 74.", "de", None),
        ("The train leaves at 22:15 from platform 12.", "Der Zug fährt um 10:15 Uhr von Gleis 12.", "de", None),
        ("I've lived here since 2013.", "ฉันอยู่ที่นี่มาตั้งแต่ปี ๒๕๕๖", "th", None),
        ("The war ended in 1945.", "القائد مات عام ١٩٤٥ في بيته", "ar", None),
        ("There are twelve of 30 left.", "Es sind noch 12 von dreißig da.", "de", "clean.numbers"),
        ("12) The old ferry crosses in 30 minutes.", "Die alte Fähre quert in 30 Minuten.", "de", None),
        ("See www.example.org for the old ferry.", "Siehe die Seite der alten Fähre dort.", "de", "clean.url"),
        ("More on http://en.wikipedia.org/wiki/Ferry today.", "Mehr auf https://de.wikipedia.org/wiki/Fähre heute.", "de", None),
    ],
)  # fmt: skip
def test_rules(source: str | None, target: str, tgt: str, reason: str | None) -> None:
    if source is not None and source.startswith("「"):
        assert verdict(target, source, tgt="ja") == reason
    else:
        assert verdict(source, target, tgt=tgt) == reason


def test_the_first_rule_that_fails_gives_the_reason() -> None:
    assert REASONS.index("clean.letters") < REASONS.index("clean.length_ratio")
    assert verdict("12", "3456 7890 1234 5678 9012 3456", tgt="de") == "clean.letters"
    assert verdict("12", "3456 7890 1234 5678 9012 3456", tgt="de", letters=False) == "clean.length_ratio"


@pytest.mark.parametrize("off", [False, None])
def test_thresholds_can_be_moved_and_switched_off(off: bool | None) -> None:
    assert verdict("Hello there", "Hallo du", min_chars=9) == "clean.too_short"
    assert verdict(EN, DE, max_chars=45) == "clean.too_long"
    assert verdict(EN, "Hallo", length_ratio=off) is None
    assert verdict(EN, EN, copied=off) is None
    assert verdict(EN, "Да, это так и есть на самом деле.", script=off) is None
    assert verdict("It cost 219 dollars.", "Es kostete 35 Dollar.", numbers=off) is None
    assert verdict(EN, "", empty=False, min_chars=0, length_ratio=off) is None
    assert verdict("Say <|im_start|>user now, please.", DE, template_tokens=False) is None
    assert verdict("Come in and sit. " * 12, "Komm rein und setz dich. " * 12, repetition=off) is None


def test_a_language_can_differ() -> None:
    table = pa.concat_tables([pairs((EN, DE)), pairs((EN, "Mashua ya zamani huvuka ghuba mara mbili."), tgt="sw")])
    for code in ("sw", "swh_Latn", "swa"):
        outcome = clean(table, CleanSettings(language={code: {"max_chars": 20}}))
        assert outcome.kept["tgt_lang"].to_pylist() == ["de"]
        assert outcome.dropped["reason"].to_pylist() == ["clean.too_long"]
    outcome = clean(table, CleanSettings(max_chars=20, language={"sw": {"max_chars": False}, "en": {"max_chars": 100}}))
    assert outcome.kept["tgt_lang"].to_pylist() == ["sw"]
    # A rule of the pair: either side's own threshold counts, the more lenient of two.
    short = "Mashua"
    assert verdict(EN, short, tgt="sw") == "clean.length_ratio"
    assert verdict(EN, short, tgt="sw", language={"sw": {"length_ratio": 20.0}}) is None
    assert verdict(EN, short, tgt="sw", language={"sw": {"length_ratio": 20.0}, "en": {"length_ratio": 2.0}}) is None
    assert verdict(EN, short, tgt="sw", language={"de": {"length_ratio": 20.0}}) == "clean.length_ratio"
    # Facts.
    assert verdict(EN, DE, language={"de": {"scripts": ["Cyrl"]}}) == "clean.script"
    assert verdict(EN, DE, language={"de": {"length": 0.2}}) == "clean.length_ratio"


def test_a_language_without_facts_is_not_judged_by_them() -> None:
    assert verdict(EN, "ああああああああああ", tgt="qab") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"letters": 1.5}, {"min_chars": -1}, {"length_ratio": 0.5}, {"max_chars": True}, {"min_chars": 9, "max_chars": 3},
        {"rules": ["no colon"]}, {"language": {"notalanguage": {}}}, {"language": {"sw": {"max_char": 3}}}, {"copied": 0.1},
        {"language": {"sw": {"scripts": ["Xxxx"]}}}, {"repetitions": 3},
    ],
)  # fmt: skip
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CleanSettings(**wrong)


def test_settings_round_trip() -> None:
    one = CleanSettings(
        max_chars=False, language={"swh": {"length_ratio": False, "scripts": ["Latn"]}}, rules=["a.b:c"]
    )
    assert CleanSettings(**one.model_dump(mode="json")) == one
    assert list(one.language) == ["sw"]


# ---------------------------------------------------------------------------------------------------------------------
# The user's own rules
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("own_rules_of_a_test")
    module.no_ferry = lambda table: pc.invert(pc.match_substring(table["src"], "ferry"))  # type: ignore[attr-defined]
    module.numpy_mask = lambda table: np.ones(table.num_rows, bool)  # type: ignore[attr-defined]
    module.too_few = lambda table: pa.array([True])  # type: ignore[attr-defined]
    module.words = lambda table: ["yes"] * table.num_rows  # type: ignore[attr-defined]
    module.fails = lambda table: table["no such column"]  # type: ignore[attr-defined]
    module.value = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_own_rules(own_rules: str) -> None:
    table = pairs((EN, DE), ("", DE), ("The boat is late again.", "Das Boot hat wieder Verspätung."))
    outcome = clean(table, CleanSettings(rules=(f"{own_rules}:numpy_mask", f"{own_rules}:no_ferry")))
    assert outcome.kept["id"].to_pylist() == [2]
    assert outcome.dropped["reason"].to_pylist() == ["clean.no_ferry", "clean.empty"]


@pytest.mark.parametrize("name", ["too_few", "words", "fails", "value", "missing"])
def test_wrong_own_rules_are_explained(own_rules: str, name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        clean(pairs((EN, DE), (EN, DE)), CleanSettings(rules=(f"{own_rules}:{name}",)))
    with pytest.raises(SettingsError, match="cannot be imported"):
        clean(pairs((EN, DE)), CleanSettings(rules=("no_such_module.at_all:rule",)))


# ---------------------------------------------------------------------------------------------------------------------
# Tables of all shapes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_any_string_type_and_chunking(kind: Any) -> None:
    rows = [(EN, DE), ("", DE), (f"<p>{EN}</p>", DE)]
    whole = pairs(*rows)
    typed = pa.table(
        {
            name: pa.chunked_array(
                [whole[name].combine_chunks()[:1].cast(kind), whole[name].combine_chunks()[1:].cast(kind)]
            )
            if name != "id"
            else whole[name]
            for name in whole.column_names
        }
    )
    outcome = clean(typed)
    assert outcome.kept["src"].type == pa.string()
    assert outcome.kept["src"].to_pylist() == [EN, EN]
    assert outcome.kept["id"].to_pylist() == [0, 2]
    assert outcome.kept.column_names == typed.column_names


@pytest.mark.parametrize("chosen", [{}, {"language": {"sw": {"copied": 0.7, "max_chars": 9}}}])
def test_no_rows_and_disabled(chosen: dict[str, Any]) -> None:
    outcome = clean(pairs(), CleanSettings(**chosen))
    assert outcome.kept.num_rows == outcome.dropped.num_rows == 0
    assert outcome.dropped.column_names == [*outcome.kept.column_names, "reason"]
    table = pairs(("  ", DE))
    assert clean(table, CleanSettings(enabled=False)).kept.equals(table)


def test_a_row_fares_the_same_wherever_it_stands() -> None:
    rows = [
        (EN, DE),
        ("Come in and sit. " * 12, "Komm rein. " * 12),
        ("&lt;b&gt;x", DE),
        ("7 + 8", "7 + 8"),
        (EN * 9, DE * 9),
    ] * 7
    together = clean(pairs(*rows))
    reasons = dict(zip(together.dropped["id"].to_pylist(), together.dropped["reason"].to_pylist(), strict=True))
    assert reasons
    for i, row in enumerate(rows[:5]):
        assert verdict(*row) == reasons.get(i) == reasons.get(i + 30)


SEEDS = st.sampled_from(
    "&amp; &lt; &gt; &quot; &#x26; &#0; < > <b> </b> <br/> <p </ {\\an8} {y: <| |> &amp;amp;lt; \u200d \u200c \u200b \u00a0 \u0301 \u093c"
    " \u1100 \u1161 \u11a8 \ufeff \ufffd Ã © â€™ â€ Ð¿ Â \x9d \x00 \t \n \r \u2028 http:// www.a.b 12,5 ١٢ 漢字 かな ab Ab é е क् ශ් می ❤ \ufe0f 👩 \U000e0041".split(" ")
)  # fmt: skip
TEXT = st.lists(st.one_of(SEEDS, st.text(max_size=6), st.just(" ")), max_size=12).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
def test_cleaning_twice_is_cleaning_once(rows: list[tuple[str, str]]) -> None:
    rows = [(a.encode("utf-8", "replace").decode(), b.encode("utf-8", "replace").decode()) for a, b in rows]
    off = dict.fromkeys(("letters", "script", "length_ratio", "copied", "numbers", "repetition"), False)
    for chosen in (CleanSettings(), CleanSettings(**off, url=False)):
        once = clean(pairs(*rows), chosen)
        assert once.kept.num_rows + once.dropped.num_rows == len(rows)
        twice = clean(once.kept, chosen)
        assert twice.kept.equals(once.kept)
        for text in once.kept["src"].to_pylist() + once.kept["tgt"].to_pylist():
            assert unicodedata.is_normalized("NFC", text)
            assert text == " ".join(text.split())
            assert not any(unicodedata.category(character) == "Cc" for character in text)
            text.encode()


@pytest.mark.parametrize(
    "unit",
    ["&", "&amp;", "&#", "& amp ", "<", "<a ", "<a b=", "<!--", "<!-- a ", "</", "<|", "<|a", "[", "[/", "{\\", "{y:", "Ã", "Ã©", "â€",
     "&amp;lt;", "a", "a ", "1", "1 2", "é\u0301", "\u200d", " ", "\x00", "http://", "www.", "&lt;b&gt;", "<<b>b>", "漢", "\U0001f600", "=", "<?x"],
)  # fmt: skip
def test_endless_lines_end_soon(unit: str) -> None:
    size = 2_000_000 if unit in ("&amp;", "<!-- a ", "a", "Ã") else 200_000  # quadratic time would not end soon
    text = unit * (size // len(unit.encode()) + 1) + " The end."
    outcome = clean(pairs((text, DE), (DE, text), (EN, DE)), CleanSettings(max_chars=False, repetition=False))
    assert outcome.kept.num_rows + outcome.dropped.num_rows == 3
    assert 2 in outcome.kept["id"].to_pylist()


def test_curated_text_is_kept(data: Path) -> None:
    """A good rule drops less than 2 % of any curated file."""
    names = (
        "multi30k_train/en-de",
        "newstest2020/en-ja",
        "newstest2019/zh-en",
        "tatoeba_test_v2021-08-07/ara-eng",
        "iwslt15_dev2012/en-vi",
    )
    for name in names:
        a, b = name.rpartition("/")[2].split("-")
        packed = (data / "bitext" / f"{name}.tsv.gz").read_bytes()
        lines = gzip.decompress(packed).decode().split("\n")[:4000]
        rows = [tuple(line.split("\t")) for line in lines if line.count("\t") == 1]
        outcome = clean(pairs(*rows, src=canonical(a), tgt=canonical(b)))  # type: ignore[arg-type]
        counts = pc.value_counts(outcome.dropped["reason"]).to_pylist()
        assert all(one["counts"] < 0.02 * len(rows) for one in counts), (name, counts)
        assert outcome.dropped.num_rows < 0.01 * len(rows), (name, counts)
