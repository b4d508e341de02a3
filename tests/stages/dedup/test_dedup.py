"""The stage `dedup`: the normalised form, fingerprints, reasons of drops, and the protection of evaluation text."""

from __future__ import annotations

import functools
import gzip
import os
import pickle
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from corpusprep.arrow import string_buffers
from corpusprep.errors import InputError, SettingsError
from corpusprep.stages.dedup import (
    DedupSettings,
    EvaluationIndex,
    dedup,
    fingerprint,
    protect,
    reference_fingerprint,
)
from corpusprep.stages.dedup import text as _text

DATA = Path(os.environ.get("CORPUSPREP_TEST_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))

DEFAULT = DedupSettings()

# Text of any script, with marks, jamo and characters of every plane made likely.
MARKS = [chr(c) for c in range(0x300, 0x370)] + list(
    "\u0c56\u0c3c\u0bbe\u09bc\u09be\u093c\u0e38\u05bc\u064b\u3099\u309a"
)
JAMO = [chr(c) for c in (0x1100, 0x1112, 0x1161, 0x1175, 0x11A7, 0x11A8, 0x11C2, 0xAC00, 0xAC01, 0xD7A3)]
ODD = list(
    "ﬁ①ＡｱªºİıßẞςΣǅ\u0345\u1e9b\u0344\ufdfa\u2126\u00ad\u200d\ufe0f\u115f\U0002f800\U0001d400\U000e0100\U0010ffff"
)
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(MARKS), st.sampled_from(JAMO), st.sampled_from(ODD)
)
TEXT = st.text(CHARACTERS, max_size=40)

SENTENCES = [
    (
        "The ferry leaves the northern pier at a quarter past six.",
        "Die Fähre legt um Viertel nach sechs am Nordkai ab.",
    ),
    ("Grandmother keeps dried mushrooms in a tin above the stove.", "Oma hebt Pilze in einer Dose über dem Herd auf."),
    (
        "Nobody had told the new engineer where the fuses were.",
        "Niemand hatte der neuen Ingenieurin gesagt, wo was ist.",
    ),
    ("A kilo of plums costs less than half a kilo of cherries.", "Ein Kilo Pflaumen kostet weniger als Kirschen."),
]


def rows(pairs: Sequence[tuple[str | None, str | None]], tgt_lang: str = "de", **columns: Any) -> pa.Table:
    src, tgt = ([pair[i] for pair in pairs] for i in (0, 1))
    langs = {"src_lang": ["en"] * len(pairs), "tgt_lang": [tgt_lang] * len(pairs)}
    return pa.table({"src": pa.array(src, pa.string()), "tgt": pa.array(tgt, pa.string()), **langs, **columns})


def reasons(table: pa.Table, chosen: DedupSettings = DEFAULT, **more: Any) -> list[str]:
    """The reason of every row, "" for those kept, in the order of the table."""
    kept, dropped = dedup(table.append_column("at", pa.array(range(table.num_rows))), chosen, **more)
    found = dict.fromkeys(kept["at"].to_pylist(), "") | dict(
        zip(*(dropped[c].to_pylist() for c in ("at", "reason")), strict=True)
    )
    assert kept["at"].to_pylist() == sorted(kept["at"].to_pylist())
    return [found[i] for i in range(table.num_rows)]


def folded(text: str) -> str:
    """The normalised form as the kernel makes it."""
    data = np.frombuffer(text.encode() or b"\0", np.uint8)
    out = np.empty(6 * data.size + 8, np.uint32)
    size = _text.fold_text(data, 0, len(text.encode()), _text.tables(), out)
    return "".join(map(chr, out[:size]))


class TestNormalisedForm:
    @given(TEXT)
    @example("\u1100\u1161\u11a8\u11a8")
    @example("e\u0302\u0323\u0301")
    @example("a\u0315\u0300\u05ae\u0062")
    @settings(max_examples=500, deadline=None)
    def test_kernel_equals_plain_python(self, text: str) -> None:
        assert folded(text) == _text.normalise(text)

    def test_kernel_equals_plain_python_on_every_plane(self) -> None:
        for plane in range(17):
            for low in (0x20, 0x300, 0x1100, 0x2F00, 0xA000, 0xF900, 0xFF00, 0xFFFF):
                text = chr(plane << 16 | low) * 3 + "a"
                assert folded(text) == _text.normalise(text)

    @given(
        st.text(
            st.sampled_from("abcXYZäÖßéñçøåşığ ΑΒΓςσά Жёй 日本語ガｶ한국 हिन्दी বাংলা తెలుగు 0123456789.,!?-'\"«»（）"),
            max_size=60,
        )
    )
    @settings(max_examples=300, deadline=None)
    def test_it_is_nfkc_folded_and_bare_for_ordinary_text(self, text: str) -> None:
        whole = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        bare = "".join(c for c in whole if unicodedata.category(c)[0] not in "PSZC")
        assert folded(text) == (unicodedata.normalize("NFC", bare) or text)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("Hello, world!", "hello world"),
            ("HELLO\u00a0WORLD", "- Hello world..."),
            ("ＦＵＬＬ　ｗｉｄｔｈ １２", "full width 12"),
            ("caf\u00e9 na\u00efve", "cafe\u0301 nai\u0308ve"),
            ("Tiếng Việt", unicodedata.normalize("NFD", "tiếng việt")),
            ("한국어", unicodedata.normalize("NFD", "한국어")),
            ("ガラス", "ｶﾞﾗｽ"),
            ("Straße", "STRASSE"),
            ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
            ("য়", "\u09df"),
        ],
    )
    def test_case_spelling_and_spacing_do_not_count(self, one: str, other: str) -> None:
        assert folded(one) == folded(other)

    def test_what_remains_counts(self) -> None:
        assert folded("Room 12") != folded("Room 13")
        assert folded("è") != folded("e")
        assert folded("!!!") == "!!!"
        assert folded("?!") != folded("!?")
        assert folded("") == ""

    def test_two_megabytes(self) -> None:
        table = rows([("ab cd. " * 300_000, "Ä" * 1_000_000), ("AB CD " * 300_000, "ä" * 1_000_000)])
        assert reasons(table) == ["", "dedup.exact"]


class TestFingerprint:
    @given(TEXT, TEXT, st.integers(1, 6), st.sampled_from(["pair", "source", "target"]))
    @example("ab", "cd", 4, "pair")  # two features: every bit that they do not share is a tie
    @example("", "", 4, "pair")
    @example("!", "", 4, "target")
    @settings(max_examples=300, deadline=None)
    def test_equals_the_simhash_package(self, src: str, tgt: str, ngram: int, on: Any) -> None:
        chosen = DedupSettings(ngram=ngram, on=on)
        found = fingerprint(rows([(src, tgt)]), chosen)["fingerprint"][0].as_py()
        assert found == reference_fingerprint(src, tgt, chosen)

    @pytest.mark.parametrize("length", [7, 8, 9, 10, 11, 12, 255, 256, 257, 20_000])
    def test_equals_the_simhash_package_at_every_depth_of_the_counters(self, length: int) -> None:
        rng = np.random.default_rng(length)
        words = "".join(chr(97 + c) for c in rng.integers(0, 6, length))
        for src, tgt in ((words, ""), (words, words), ("a" * length, "b" * length)):
            found = fingerprint(rows([(src, tgt)]), DedupSettings())["fingerprint"][0].as_py()
            assert found == reference_fingerprint(src, tgt, DedupSettings())

    def test_sides_do_not_mix(self) -> None:
        table = fingerprint(rows([("left words", "right words"), ("right words", "left words")]), DedupSettings())
        for column in ("fingerprint", "text_hash"):
            a, b = table[column].to_pylist()
            assert (a ^ b).bit_count() > 8
        table = fingerprint(rows([("ab", "c"), ("a", "bc")]), DedupSettings())
        assert len(set(table["text_hash"].to_pylist())) == 2

    def test_the_text_hash_is_that_of_the_normalised_text(self) -> None:
        pairs = [("Hello, World", "Hallo, Welt!"), ("hello world", "HALLO WELT"), ("hello worlds", "hallo welt")]
        for on, same in (("pair", [True, False]), ("source", [True, False]), ("target", [True, True])):
            hashes = fingerprint(rows(pairs), DedupSettings(on=on))["text_hash"].to_pylist()
            assert [hashes[0] == hashes[1], hashes[0] == hashes[2]] == same

    def test_any_string_type_chunks_nulls_and_slices(self) -> None:
        pairs = [("skipped", "skipped"), ("One", None), (None, "zwei"), ("", ""), ("Three", "drei")]
        table = rows(pairs).slice(1)
        wanted = fingerprint(table, DedupSettings())
        for kind in (pa.large_string(), pa.string_view(), pa.string()):
            sides = {
                c: pa.chunked_array([table[c].combine_chunks()[i : i + 1].cast(kind) for i in range(4)])
                for c in ("src", "tgt")
            }
            other = pa.table({**sides, "src_lang": table["src_lang"], "tgt_lang": table["tgt_lang"]})
            for column in ("fingerprint", "text_hash"):
                assert fingerprint(other, DedupSettings())[column].to_pylist() == wanted[column].to_pylist()


class TestDedup:
    def test_reasons(self) -> None:
        a, b = SENTENCES[0]
        long = (a + " " + SENTENCES[1][0], b + " " + SENTENCES[1][1])
        table = rows(
            [
                (a, b),
                SENTENCES[1],
                ("- " + a.upper(), b.replace(" ", "  ")),
                (a, SENTENCES[2][1]),
                long,
                (long[0].replace("tin", "tins"), long[1]),
            ]
        )
        assert reasons(table, DedupSettings(ngram=2)) == ["", "", "dedup.exact", "", "", "dedup.near"]

    def test_short_rows_that_differ_stay(self) -> None:
        words = [
            a + b + c
            for a in "bdfgklmn"
            for b in ("a", "e", "i", "o", "u", "ai")
            for c in ("", "t", "s", "rm", "nd", "lk", "p")
        ]
        words += [
            *list("abcdefghijklmnopqrstuvwxyz0123456789一二三四五六七八九十百千"),
            "!",
            "?",
            "...",
            "--",
            "§",
            "1",
            "10",
        ]
        words = sorted(set(words))
        backwards = words[::-1]
        assert set(reasons(rows(list(zip(words, backwards, strict=True))))) == {""}
        assert set(reasons(rows([(word, word) for word in words]))) == {""}
        for on in ("source", "target"):
            assert set(reasons(rows(list(zip(words, backwards, strict=True))), DedupSettings(on=on))) == {""}

    def test_short_sentences_that_differ_in_a_number_or_a_word_stay(self) -> None:
        pairs = [(f"I have {n} apples.", f"Ich habe {n} Äpfel.") for n in range(2, 60)]
        pairs += [(f"{name} went home.", f"{name} ging heim.") for name in ("Tom", "Ann", "Sue", "Bob", "Ida", "Max")]
        assert set(reasons(rows(pairs))) == {""}

    def test_what_is_compared(self) -> None:
        (a, b), (c, d) = SENTENCES[:2]
        table = rows([(a, b), (a, d), (c, b), (a, b)])
        assert reasons(table) == ["", "", "", "dedup.exact"]
        assert reasons(table, DedupSettings(on="source")) == ["", "dedup.exact", "", "dedup.exact"]
        assert reasons(table, DedupSettings(on="target")) == ["", "", "dedup.exact", "dedup.exact"]

    def test_scope(self) -> None:
        (a, b), (c, d) = SENTENCES[:2]
        table = pa.concat_tables([rows([(a, b), (c, d)]), rows([(a, b)], "fr"), rows([(a, b)]), rows([(a, d)], "fr")])
        assert reasons(table) == ["", "", "", "dedup.exact", ""]
        assert reasons(table, DedupSettings(scope="all")) == ["", "", "dedup.exact", "dedup.exact", ""]
        assert reasons(table, DedupSettings(on="source")) == ["", "", "", "dedup.exact", "dedup.exact"]
        assert reasons(table, DedupSettings(on="source", scope="all")) == ["", "", *["dedup.exact"] * 3]

    def test_the_earliest_is_kept_by_source_shard_and_row_or_by_place(self) -> None:
        pair = SENTENCES[0]
        assert reasons(rows([pair] * 3)) == ["", "dedup.exact", "dedup.exact"]
        table = rows([pair] * 4, source=["b", "a", "a", "a"], shard=["x", "y", "x", "x"], row=[0, 1, 9, 8])
        assert reasons(table) == ["dedup.exact", "dedup.exact", "dedup.exact", ""]

    def test_the_best_by_score_is_kept(self) -> None:
        table = rows([SENTENCES[0]] * 5, score=pa.array([None, 0.5, float("nan"), 0.9, 0.9], pa.float32()))
        assert reasons(table, DedupSettings(keep="score")) == [*["dedup.exact"] * 3, "", "dedup.exact"]
        table = rows([SENTENCES[0]] * 2, score=pa.array([None, 0.1], pa.float32()))
        assert reasons(table, DedupSettings(keep="score")) == ["dedup.exact", ""]
        with pytest.raises(SettingsError, match="score"):
            dedup(rows(SENTENCES), DedupSettings(keep="score"))

    def test_clusters(self) -> None:
        table = rows([SENTENCES[0], SENTENCES[1], SENTENCES[1], SENTENCES[0], SENTENCES[2]])
        index = EvaluationIndex.from_texts([pa.array([SENTENCES[2][0]])], DedupSettings())
        kept, dropped = dedup(table, DedupSettings(clusters=True), index=index)
        assert kept["cluster"].to_pylist() == [0, 1]
        assert dropped["cluster"].to_pylist() == [1, 0, None]
        assert dropped["reason"].to_pylist() == ["dedup.exact", "dedup.exact", "dedup.evaluation"]

    def test_columns_pass_through(self) -> None:
        table = rows(SENTENCES[:1] * 2, note=["x", "y"])
        kept, dropped = dedup(table)
        assert kept.column_names == [*table.column_names, "fingerprint"]
        assert dropped.column_names == [*table.column_names, "fingerprint", "reason"]
        assert kept.schema.field("fingerprint").type == pa.uint64()
        assert kept["note"].to_pylist() == ["x"]
        assert dropped["note"].to_pylist() == ["y"]
        assert dedup(kept)[0].equals(kept)

    def test_no_rows_one_row_and_nulls(self) -> None:
        kept, dropped = dedup(rows([]))
        assert (kept.num_rows, dropped.num_rows) == (0, 0)
        assert {"fingerprint", "reason"} <= set(dropped.column_names)
        assert reasons(rows([SENTENCES[0]])) == [""]
        assert reasons(rows([(None, None), ("", ""), (None, "a"), ("a", None)])) == ["", "dedup.exact", "", ""]

    @given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["de", "sw"])), max_size=12))
    @settings(max_examples=60, deadline=None)
    def test_every_row_is_accounted_for_and_doing_it_again_changes_nothing(
        self, made: list[tuple[str, str, str]]
    ) -> None:
        table = rows([(src, tgt) for src, tgt, _ in made]).set_column(
            3, "tgt_lang", pa.array([x[2] for x in made], pa.string())
        )
        kept, dropped = dedup(table)
        assert kept.num_rows + dropped.num_rows == table.num_rows
        assert dedup(kept)[0].equals(kept)
        assert dedup(kept)[1].num_rows == 0


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_distance": -1},
            {"max_distance": 9},
            {"ngram": 0},
            {"on": "both"},
            {"scope": "file"},
            {"keep": "last"},
            {"evaluation_overlap": 0},
            {"evaluation_overlap": 1.5},
            {"evaluation_min_chars": 3},
            {"distance": 3},
        ],
    )
    def test_nonsense_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            DedupSettings(**wrong)

    def test_they_survive_a_round_trip(self) -> None:
        chosen = DedupSettings(max_distance=2, against=("a.tsv", "b"), keep="score")
        assert DedupSettings(**chosen.model_dump(mode="json")) == chosen


def leaks(
    texts: list[Any], pairs: Sequence[tuple[str | None, str | None]], chosen: DedupSettings = DEFAULT
) -> list[bool]:
    """Which of the rows are dropped for copying evaluation text."""
    table = rows(list(pairs), at=list(range(len(pairs))))
    kept, dropped = protect(table, EvaluationIndex.from_texts(texts, chosen), chosen)
    assert set(dropped["reason"].to_pylist()) <= {"dedup.evaluation"}
    assert kept.num_rows + dropped.num_rows == table.num_rows
    return [i in set(dropped["at"].to_pylist()) for i in range(len(pairs))]


class TestEvaluation:
    one = pa.array([src for src, _ in SENTENCES])
    two = (pa.array([src for src, _ in SENTENCES]), pa.array([tgt for _, tgt in SENTENCES]))

    def test_a_copy_is_found_however_it_is_dressed(self) -> None:
        src, tgt = SENTENCES[0]
        copies = [
            (src, "x"),
            ("x", src),
            (src.upper(), "x"),
            ("- " + src.replace(" ", "  ").rstrip(".") + "...", "x"),
            (src[: int(len(src) * 0.65)], "x"),
            (src.replace("northern", "southern"), "x"),
            ("They said this: " + src + " And then they left for good.", "x"),
            (unicodedata.normalize("NFD", src), "x"),
            ("x", tgt),
            ("x", unicodedata.normalize("NFD", tgt.upper())),
        ]
        assert leaks([self.two], copies) == [True] * len(copies)
        assert leaks([self.one], copies) == [True] * 8 + [False] * 2

    def test_other_rows_stay(self) -> None:
        others = [
            ("The train leaves the northern station at ten to seven.", "Der Zug fährt um zehn vor sieben."),
            ("A quarter past six is too early for me.", "Viertel nach sechs ist mir zu früh."),
            ("at a quarter past six", "um Viertel nach sechs"),
            ("", ""),
            ("?", "!"),
        ]
        assert leaks([self.two], others) == [False] * len(others)

    def test_short_sides_count_as_a_whole_pair_only(self) -> None:
        short = (
            pa.array(["Good morning!", "See you tomorrow evening", "Yes."]),
            pa.array(["Guten Morgen!", "Bis morgen Abend dann", "Ja."]),
        )
        pairs = [
            ("good morning", "GUTEN MORGEN"),
            ("guten morgen", "good morning"),
            ("Good morning!", "Guten Tag!"),
            ("See you tomorrow evening.", "Bis morgen Abend dann!"),
            ("Bis morgen Abend dann!", "See you tomorrow evening."),
            ("See you tomorrow evening.", "Auf Wiedersehen"),
            ("Yes", "Ja"),
            ("Yes", "Jo"),
            ("Yes", "Yes"),
            ("Ja", "Ja"),
        ]
        assert leaks([short], pairs) == [True, True, False, True, True, False, True, False, False, False]
        assert leaks([short[0], short[1]], pairs) == [False] * len(pairs)
        assert leaks([(pa.array(["Guardian"]), pa.array(["Guardian"]))], [("Television", "Television")]) == [False]

    def test_the_length_from_which_sides_count(self) -> None:
        text = pa.array(["twenty-five letters it has"])  # 22 letters
        assert leaks([text], [("twenty-five letters it has", "x")]) == [False]
        assert leaks([text], [("Twenty-five letters it has", "x")], DedupSettings(evaluation_min_chars=22)) == [True]

    def test_the_share_asked_for(self) -> None:
        src = SENTENCES[0][0]
        cut = [(src[: int(len(src) * part)], "x") for part in (0.95, 0.8, 0.65)]
        assert leaks([self.one], cut, DedupSettings(evaluation_overlap=0.95)) == [False, False, False]
        assert leaks([self.one], cut, DedupSettings(evaluation_overlap=0.7)) == [True, True, False]

    def test_scripts_without_spaces(self) -> None:
        text = "この船は毎朝六時十五分に北の桟橋から出港して島を一周してから戻ります。"
        pairs = [
            (text, "x"),
            ("「" + text[:-1] + "」", "x"),
            (text[:26], "x"),
            (text[:12], "x"),
            ("北の桟橋から毎朝六時に船が出ますので、お急ぎください。", "x"),
        ]
        assert leaks([pa.array([text])], pairs) == [True, True, True, False, False]

    def test_it_depends_on_the_text_alone(self) -> None:
        chosen = DedupSettings()
        a = EvaluationIndex.from_texts([self.two], chosen)
        swapped = (self.two[0].take(pa.array([2, 0, 1, 3])), self.two[1].take(pa.array([2, 0, 1, 3])))
        b = EvaluationIndex.from_texts([pa.chunked_array([self.one]), swapped, swapped[1]], chosen)
        assert (a.digest, a.texts) == (b.digest, b.texts)
        assert a.texts == 8
        for other in ([self.one], [self.two, pa.array(["One more sentence of some length."])]):
            assert EvaluationIndex.from_texts(other, chosen).digest != a.digest
        assert EvaluationIndex.from_texts([self.two], DedupSettings(evaluation_min_chars=30)).digest != a.digest
        again = pickle.loads(pickle.dumps(a))
        assert again.digest == a.digest
        table = rows(SENTENCES)
        assert again.shares(table, chosen).tolist() == a.shares(table, chosen).tolist() == [1.0] * 4

    def test_many_variants_of_one_sentence_are_all_found(self) -> None:
        texts = [f"Section {n} of the contract was amended by both parties." for n in range(300)]
        pairs = [(text, "x") for text in texts]
        assert leaks([pa.array(texts)], pairs) == [True] * 300

    def test_nothing_to_protect(self) -> None:
        for texts in (
            [],
            [pa.array([], pa.string())],
            [pa.array([None, ""], pa.string())],
            [(pa.array([""]), pa.array([""]))],
        ):
            index = EvaluationIndex.from_texts(texts, DedupSettings())
            assert index.texts == 0
            assert protect(rows(SENTENCES), index, DedupSettings()).kept.num_rows == 4
        index = EvaluationIndex.from_texts([self.two], DedupSettings())
        assert protect(rows([]), index, DedupSettings()).kept.num_rows == 0
        assert leaks([self.two], [(None, None)]) == [False]

    def test_columns_of_unequal_length_are_refused(self) -> None:
        with pytest.raises(SettingsError, match="length"):
            EvaluationIndex.from_texts([(pa.array(["a"]), pa.array(["a", "b"]))], DedupSettings())

    @given(st.lists(TEXT, max_size=6), st.lists(st.tuples(TEXT, TEXT), max_size=6))
    @settings(max_examples=60, deadline=None)
    def test_any_text_can_be_indexed_and_is_found(self, texts: list[str], pairs: list[tuple[str, str]]) -> None:
        found = leaks([pa.array(texts, pa.string())], [(text, "") for text in texts] + pairs)
        long = [len(_text.normalise(text)) >= 25 for text in texts]
        assert found[: len(texts)] == long

    def test_two_megabytes(self) -> None:
        src = SENTENCES[0][0]
        filler = "Lorem pluralis et cetera, nihil novi. " * 50_000
        assert leaks([self.one], [(filler + src + filler, "x"), (filler, filler)]) == [True, False]

    def test_dedup_reads_the_files(self, tmp_path: Path) -> None:
        (tmp_path / "evaluation").mkdir()
        (tmp_path / "evaluation" / "one.txt").write_text(SENTENCES[0][0] + "\n" + SENTENCES[1][0] + "\n", "utf-8")
        with gzip.open(tmp_path / "two.tsv.gz", "wt", encoding="utf-8") as stream:
            stream.write("\t".join(SENTENCES[2]) + "\n")
        table = rows([*SENTENCES, ("x", SENTENCES[2][1]), SENTENCES[0]])
        folder, file = str(tmp_path / "evaluation"), str(tmp_path / "two.tsv.gz")
        gone = "dedup.evaluation"
        assert reasons(table, DedupSettings(against=(folder,))) == [gone, gone, "", "", "", gone]
        assert reasons(table, DedupSettings(against=(folder, file))) == [gone, gone, gone, "", gone, gone]
        with pytest.raises(InputError, match="missing"):
            dedup(table, DedupSettings(against=(str(tmp_path / "missing.tsv"),)))


@functools.cache
def planted() -> pl.DataFrame:
    """The rows of `planted/` with their labels: file, row, pair, label, group, src, tgt."""
    folder = DATA / "planted"
    with gzip.open(folder / "truth.tsv.gz", "rb") as stream:
        truth = pl.read_csv(stream.read(), separator="\t", quote_char=None)
    tables = []
    for (file,), part in truth.group_by(["file"], maintain_order=True):
        place = folder / str(file)
        if place.name.endswith(".gz"):
            lines = [line.split("\t") for line in gzip.decompress(place.read_bytes()).decode().split("\n")]
            first = 1 if "ccmatrix" in str(file) else 0
            sides = [[line[first + k] if len(line) > first + k else "" for line in lines] for k in (0, 1)]
            flip = not place.name.startswith("en")
        else:
            other = next(p.suffix for p in place.parent.glob(place.name + ".*") if p.suffix != ".en")
            sides = [(place.parent / (place.name + side)).read_text("utf-8").split("\n") for side in (".en", other)]
            flip = False
        src, tgt = sides[::-1] if flip else sides
        at = part["row"].to_list()
        tables.append(part.with_columns(src=pl.Series([src[i] for i in at]), tgt=pl.Series([tgt[i] for i in at])))
    return pl.concat(tables)


@pytest.mark.skipif(not (DATA / "planted").is_dir(), reason=f"no test data at {DATA}")
class TestRealText:
    def test_planted_duplicates(self) -> None:
        frame = planted().filter(pl.col("label").is_in(["clean", "exact_duplicate", "near_duplicate"]))
        frame = frame.with_columns(
            src_lang=pl.lit("en"), tgt_lang=pl.col("pair").str.slice(3), at=pl.int_range(pl.len())
        )
        kept, dropped = dedup(frame.drop("file", "row").to_arrow())
        left = frame.filter(pl.col("at").is_in(kept["at"].to_pylist()))
        groups = left.group_by("pair", "group").len()
        copies = frame.filter(pl.col("label") != "clean")
        surplus = int(groups["len"].sum()) - len(groups)
        assert surplus <= 0.01 * len(copies)
        assert len(groups) >= 0.997 * frame.select("pair", "group").n_unique()
        assert set(dropped["reason"].to_pylist()) == {"dedup.exact", "dedup.near"}

    def test_planted_leaks(self) -> None:
        frame = planted().filter(pl.col("label").is_in(["clean", "evaluation_leak"]))
        index = EvaluationIndex.from_files([str(DATA / "planted" / "evaluation")], DedupSettings())
        share = index.shares(frame.select("src", "tgt").to_arrow(), DedupSettings())
        found = frame.select("label", found=pl.Series(share) >= 0.5).group_by("label").agg(pl.col("found").mean())
        rate = dict(found.iter_rows())
        assert rate["evaluation_leak"] >= 0.99
        assert rate["clean"] <= 0.001

    def test_fingerprints_equal_the_simhash_package(self) -> None:
        frame = planted().sample(150, seed=1)
        found = fingerprint(frame.select("src", "tgt").to_arrow(), DedupSettings())["fingerprint"].to_pylist()
        pairs = frame.select("src", "tgt").iter_rows()
        assert found == [reference_fingerprint(src, tgt, DedupSettings()) for src, tgt in pairs]

    def test_the_normalised_form_equals_plain_python(self) -> None:
        texts = planted().sample(1500, seed=2)["tgt"].to_list()
        tables, out = _text.tables(), np.empty(1 << 20, np.uint32)
        offsets, data = string_buffers(pa.array(texts))
        for i, text in enumerate(texts):
            size = _text.fold_text(data, offsets[i], offsets[i + 1], tables, out)
            assert "".join(map(chr, out[:size])) == _text.normalise(text)
