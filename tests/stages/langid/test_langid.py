"""Language identification: the predictor against fastText's own, damaged models, and the rule that drops rows."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from langid_models import HIERARCHICAL, NEGATIVE, ONE_VS_ALL, SOFTMAX, write_model, write_table
from pydantic import ValidationError

from corpusprep.arrow import string_buffers
from corpusprep.errors import InputError, SettingsError
from corpusprep.stages.langid import LangidSettings, langid, load_model, model_files
from corpusprep.stages.langid.kernel import predict_rows
from corpusprep.stages.langid.model import Model, read_model

DEFAULT = model_files(LangidSettings())[0]
LABELS = ["en", "sw", "de", "fr", "zh", "ru", "ar", "yo"]
# Written for this test.
TEXT = {
    "en": "The old ferry leaves the harbour every morning before the fog has lifted.",
    "de": "Die alte Fähre verlässt den Hafen jeden Morgen, noch bevor der Nebel sich hebt.",
    "fr": "Le vieux bac quitte le port chaque matin avant que le brouillard ne se lève.",
    "ru": "Старый паром покидает гавань каждое утро, ещё до того как рассеется туман.",
    "zh": "老渡轮每天早上在雾散之前离开港口。",
    "sw": "Kivuko cha zamani huondoka bandarini kila asubuhi kabla ya ukungu kuondoka.",
    "ar": "تغادر العبارة القديمة الميناء كل صباح قبل أن ينقشع الضباب.",
    "te": "పాత పడవ ప్రతి ఉదయం పొగమంచు తొలగక ముందే రేవును విడిచి వెళుతుంది.",
    "sr": "Stari trajekt svakog jutra napušta luku pre nego što se magla podigne.",
}


def predict(model: Model, lines: Sequence[str], sets: Sequence[Sequence[int]] = ((),)) -> dict[str, Any]:
    """Label and probability of each line, and the probability of each set of labels, all looked at in full."""
    offsets, data = string_buffers(pa.array(lines, pa.large_string()))
    n = len(lines)
    first = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.int64)
    members = np.array([i for s in sets for i in s], np.int32)
    clusters = np.arange(len(model.labels), dtype=np.int32)
    label, letters = np.empty(n, np.int32), np.zeros(n, np.int32)
    results = []
    for number in range(len(sets)):
        out = [np.empty(n, np.float32) for _ in range(4)]
        which = np.full(n, number, np.int32)
        below = np.full(n, 2, np.float32)
        predict_rows(model.arrays, offsets, data, which, which, first, members, clusters, below, label, *out, letters)
        results.append(out)
    return {
        "label": [model.labels[i] if i >= 0 else None for i in label],
        "probability": results[0][0],
        "sets": [out[1] for out in results],
    }


def assert_agrees(path: str, lines: Sequence[str], every_label: bool = True) -> None:
    """The kernel and fasttext-predict give the same first label and the same probabilities within 1e-5."""
    import fasttext

    reference = fasttext.load_model(path).f
    model = read_model(path)
    lines = [line.replace("\n", " ") for line in lines]
    full = [reference.predict(line + "\n", -1 if every_label else 1, 0.0, "strict") for line in lines]
    sets = [[i] for i in range(len(model.labels))] if every_label else [[]]
    found = predict(model, lines, sets)
    for i, answer in enumerate(full):
        if not answer:
            assert found["label"][i] is None
            continue
        # Of labels with one probability fastText's first depends on how many are asked for; its k = 1 is what counts.
        (best, name) = reference.predict(lines[i] + "\n", 1, 0.0, "strict")[0] if every_label else answer[0]
        assert found["label"][i] == name.removeprefix("__label__"), lines[i][:200]
        assert abs(found["probability"][i] - best) <= 1e-5, lines[i][:200]
        if every_label:
            for probability, name in answer:
                number = model.labels.index(name.removeprefix("__label__"))
                assert abs(found["sets"][number][i] - probability) <= 1e-5


def junk(seed: int = 0) -> list[str]:
    """Lines that no corpus should hold: empty, one character, every plane, spaces of all kinds, one word of 1 MB."""
    draw = random.Random(seed)
    planes = [chr(p * 0x10000 + draw.randrange(0x20, 0xD700)) for p in range(17) for _ in range(40)]
    lines = [
        "",
        " ",
        "\t \x0b\x0c\r\0",
        "a",
        "é",
        "語",
        "\U0010ffff",
        "</s>",
        "a </s> b",
        "__label__en",
        "__label__",
        "<",
        ">",
        "<>",
    ]
    lines += [
        "x\0y",
        "a\u00a0b\u2028c\u3000d",
        "�" * 9,
        "THE FOUR VESSELS",
        "ab" * 500_000,
        "a " * 300_000,
        "語" * 100_000,
    ]
    lines += ["".join(draw.choices(planes, k=draw.randrange(1, 40))) for _ in range(200)]
    lines += [bytes(draw.randrange(256) for _ in range(30)).decode("utf-8", "replace") for _ in range(200)]
    return lines


MODELS: dict[str, dict[str, Any]] = {
    "words": {},
    "hierarchical": {"loss": HIERARCHICAL, "bucket": 997, "minn": 2, "maxn": 4},
    "hierarchical, one label": {"loss": HIERARCHICAL, "labels": ["en"]},
    "softmax": {"loss": SOFTMAX, "bucket": 1000, "minn": 1, "maxn": 5, "dim": 16},
    "one-vs-all": {"loss": ONE_VS_ALL, "bucket": 512, "minn": 3, "maxn": 3},
    "negative sampling": {"loss": NEGATIVE, "bucket": 1, "minn": 0, "maxn": 2},
    "pairs of words": {"word_ngrams": 2, "bucket": 2_000_003},
    "n-grams of both kinds": {"word_ngrams": 4, "bucket": 777, "minn": 2, "maxn": 3, "loss": HIERARCHICAL},
    "quantised": {"quantised": True, "bucket": 300, "minn": 2, "maxn": 4},
    "quantised, odd width": {"quantised": True, "dim": 11, "part": 4, "norms": True, "loss": HIERARCHICAL},
    "pruned": {
        "quantised": True,
        "norms": True,
        "kept": 400,
        "bucket": 5000,
        "minn": 2,
        "maxn": 4,
        "loss": HIERARCHICAL,
    },
    "pruned, pairs of words": {"quantised": True, "kept": 40, "bucket": 64, "word_ngrams": 3},
    "pruned to words": {"quantised": True, "kept": 0, "bucket": 5000, "minn": 2, "maxn": 4},
}
WORDS = ["</s>", "the", "old", "ferry", "Fähre", "語", "a", "b", "ab", "voilà", "x", "туман"]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_agrees_with_fasttext(name: str, tmp_path: Path) -> None:
    options = {"words": WORDS, "labels": LABELS, **MODELS[name]}
    path = write_model(tmp_path / "model.bin", **options)
    draw = random.Random(name)
    lines = [
        " ".join(draw.choices([*WORDS, *" ".join(TEXT.values()).split(), "ÀÉ"], k=draw.randrange(40)))
        for _ in range(150)
    ]
    assert_agrees(path, [*lines, *TEXT.values(), *junk()[:16], *junk()[20:60], "語" * 9000, "ab" * 20_000])


def test_a_quantised_matrix_too_large_to_expand_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpusprep.stages.langid.model._EXPAND_BELOW", 0)
    for norms in (False, True):
        path = write_model(
            tmp_path / f"{norms}.ftz",
            WORDS,
            LABELS,
            dim=11,
            part=4,
            norms=norms,
            quantised=True,
            bucket=100,
            minn=2,
            maxn=3,
        )
        assert read_model(path).arrays.dense.size == 0
        assert_agrees(path, [*TEXT.values(), *junk()[:16]])


def test_without_an_end_of_line_in_the_dictionary_an_empty_line_has_no_label(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.bin", ["the", "ferry"], LABELS)
    assert_agrees(path, ["", "the", "nothing known", "the </s> ferry", "ferry the"])
    found = langid(pairs(("nothing known", "the")), LangidSettings(model=path, reject_below=0)).kept
    assert found["src_lid"].to_pylist() == [None]
    assert found["src_lid_prob"].to_pylist() == [None]


def test_the_default_model_agrees_on_junk() -> None:
    assert_agrees(DEFAULT, [*junk(), *TEXT.values()], every_label=False)


def test_words_of_every_length_agree() -> None:
    words = [w * n for n in range(1, 40) for w in ("a", "é", "語", "b\x01")] + ["q" * n + "\x05" for n in range(40)]
    assert_agrees(DEFAULT, [*words, *(f"{word} the  {word}\t{word[1:]}" for word in words)], every_label=False)


def test_the_lines_before_do_not_matter() -> None:
    """Many lines of one language, which are evaluated together along the path to its label, against each line alone."""
    lines = [" ".join(text.split()[:n]) for text in TEXT.values() for n in range(1, 9) for _ in range(9)]
    many = langid(pairs(*zip(lines, lines, strict=True), src="sw", tgt="de"), LangidSettings(reject_below=0)).kept
    for line in dict.fromkeys(lines):
        alone = langid(pairs((line, line), src="sw", tgt="de"), LangidSettings(reject_below=0)).kept
        for row in (i for i, other in enumerate(lines) if other == line):
            for name in ("src_lid", "src_lid_prob", "tgt_lid", "tgt_lid_prob"):
                assert many[name][row] == alone[name][0], line


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=30, max_size=30))
def test_the_default_model_agrees_on_any_text(lines: list[str]) -> None:
    assert_agrees(DEFAULT, lines, every_label=False)


def test_every_label_of_the_default_model_agrees() -> None:
    assert_agrees(DEFAULT, list(TEXT.values()))


def test_the_default_model_agrees_on_real_text(data: Path) -> None:
    lines: list[str] = []
    for file in sorted(file for file in data.rglob("*") if file.is_file() and "truth" not in file.name):
        raw = file.read_bytes()
        if file.suffix == ".zip":
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                raw = b"\n".join(archive.read(name) for name in archive.namelist())
        elif file.suffix == ".gz":
            raw = gzip.decompress(raw)
        some = raw.decode("utf-8", "replace").split("\n")[:: int(os.environ.get("CORPUSPREP_EVERY", "40"))]
        lines += [column for line in some for column in line.split("\t")]
    assert len(lines) > 10_000
    assert_agrees(DEFAULT, lines, every_label=False)


def test_threads_share_a_model() -> None:
    model = read_model(DEFAULT)
    lines = [" ".join(random.Random(i).choices(" ".join(TEXT.values()).split(), k=9)) for i in range(3000)]
    alone = predict(model, lines)["probability"].tobytes()
    with ThreadPoolExecutor(4) as pool:
        for probability in pool.map(lambda _: predict(model, lines)["probability"].tobytes(), range(8)):
            assert probability == alone


# --- files that are not models ---------------------------------------------------------------------------------------


def test_a_model_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    for name in ("softmax", "pruned", "quantised, odd width"):
        whole = Path(
            write_model(tmp_path / "whole.bin", **{"words": WORDS, "labels": LABELS, **MODELS[name]})
        ).read_bytes()
        places = {*range(0, 400, 7), *np.linspace(0, len(whole) - 1, 60).astype(int).tolist(), len(whole) - 1}
        for place in places:
            (tmp_path / "cut.bin").write_bytes(whole[:place])
            with pytest.raises(InputError, match=r"cut\.bin: .*(truncated|not a fastText model)"):
                read_model(str(tmp_path / "cut.bin"))


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["softmax", "pruned", "n-grams of both kinds"]),
    st.integers(0, 2**32),
    st.integers(1, 255),
    st.booleans(),
)
def test_a_damaged_model_is_refused_or_works(
    tmp_path_factory: Any, name: str, place: int, flip: int, head: bool
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "model.bin"
    options: dict[str, Any] = {"words": WORDS, "labels": LABELS, **MODELS[name]}
    raw = bytearray(Path(write_model(path, **options)).read_bytes())
    raw[place % (450 if head else len(raw))] ^= flip
    path.write_bytes(raw)
    try:
        model = read_model(str(path))
    except InputError:
        return
    found = predict(model, [*TEXT.values(), "", "ab" * 300])
    assert len(found["label"]) == len(TEXT) + 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a fastText model"),
        (b"PK\x03\x04 something else altogether", "not a fastText model"),
        (struct.pack("<2i", 793712314, 13) + bytes(100), "version 13"),
        (struct.pack("<2i", 793712314, 12), "truncated"),
    ],
)
def test_another_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "no.bin").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        langid(pairs(("a", "b")), LangidSettings(model=str(tmp_path / "no.bin")))
    assert "no.bin" in str(caught.value)


def test_word_vectors_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    vectors = write_model(tmp_path / "vectors.bin", WORDS, LABELS, kind=1)
    with pytest.raises(InputError, match="word vectors"):
        read_model(vectors)
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_model(LangidSettings(model=str(path)))
    model = write_model(tmp_path / "nan.bin", WORDS, LABELS, outputs=np.full((len(LABELS), 10), np.nan, np.float32))
    with pytest.raises(InputError, match="not finite"):
        read_model(model)


def test_a_model_changed_in_place_is_read_again(tmp_path: Path) -> None:
    settings = LangidSettings(reject_below=0, model=write_table(tmp_path / "m.bin", {"one": {"en": 0.9, "de": 0.1}}))
    assert load_model(settings) is load_model(settings)
    assert langid(pairs(("one", "one")), settings).kept["src_lid"].to_pylist() == ["en"]
    write_table(tmp_path / "m.bin", {"one": {"en": 0.1, "deu_Latn": 0.9}})
    assert langid(pairs(("one", "one")), settings).kept["src_lid"].to_pylist() == ["deu_Latn"]


# --- the rule ----------------------------------------------------------------------------------------------------------


def pairs(*rows: tuple[str | None, str | None], src: str = "en", tgt: str = "de") -> pa.Table:
    sides = list(zip(*rows, strict=True)) or [(), ()]
    return pa.table(
        {
            "src": pa.array(sides[0], pa.string()),
            "tgt": pa.array(sides[1], pa.string()),
            "src_lang": pa.array([src] * len(rows), pa.string()),
            "tgt_lang": pa.array([tgt] * len(rows), pa.string()),
        }
    )


def reasons(table: pa.Table, **options: Any) -> list[str | None]:
    """The reason of each row, None where it is kept."""
    table = table.append_column("id", pa.array(range(table.num_rows), pa.int64()))
    kept, dropped = langid(table, LangidSettings(**options))
    assert kept["id"].to_pylist() == sorted(kept["id"].to_pylist())
    found: dict[int, str | None] = dict.fromkeys(kept["id"].to_pylist())
    found.update(zip(dropped["id"].to_pylist(), dropped["reason"].to_pylist(), strict=True))
    return [found[i] for i in range(table.num_rows)]


def test_reasons_on_plain_sentences() -> None:
    table = pairs(
        (TEXT["en"], TEXT["de"]), (TEXT["de"], TEXT["en"]), (TEXT["fr"], TEXT["de"]), (TEXT["en"], TEXT["ru"]),
        (TEXT["fr"], TEXT["ru"]), (TEXT["en"], TEXT["en"]), (TEXT["de"], TEXT["de"]),
    )  # fmt: skip
    assert reasons(table) == [
        None, "langid.swapped", "langid.source", "langid.target", "langid.source", "langid.target", "langid.source",
    ]  # fmt: skip
    assert reasons(table, reject_below=0) == [None] * 7
    assert reasons(table, evidence=1) == [None] * 7


def test_every_language_is_kept_under_its_own_name_and_found_under_another() -> None:
    for code, text in TEXT.items():
        assert reasons(pairs((TEXT["en"], text), tgt=code)) == [None], code
        other = "ja" if code != "zh" else "ru"
        if code != "sw":  # of which lid.176.ftz knows too little for a verdict on one sentence
            assert reasons(pairs((TEXT["en"], text), tgt=other)) == ["langid.target"], code


def test_columns_are_added_to_kept_and_dropped() -> None:
    table = pairs((TEXT["en"], TEXT["de"]), (TEXT["en"], TEXT["ru"])).append_column("other", pa.array([7, 8]))
    kept, dropped = langid(table)
    added = ["src_lid", "src_lid_prob", "tgt_lid", "tgt_lid_prob"]
    assert kept.column_names == [*table.column_names, *added]
    assert dropped.column_names == [*table.column_names, *added, "reason"]
    assert kept["other"].to_pylist() == [7]
    assert kept.schema.field("src_lid").type == pa.string()
    assert kept.schema.field("src_lid_prob").type == pa.float32()
    assert dropped["tgt_lid"].to_pylist() == ["ru"]
    assert 0.9 < dropped["tgt_lid_prob"][0].as_py() <= 1
    again = langid(kept).kept  # columns that are there are written anew, not doubled
    assert again.equals(kept)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_any_string_column_null_text_chunks_and_mixed_pairs(kind: pa.DataType) -> None:
    table = pa.concat_tables(
        [
            pairs((None, TEXT["de"]), (TEXT["en"], None)),
            pairs((TEXT["en"], TEXT["fr"]), (TEXT["fr"], TEXT["en"]), tgt="fr"),
            pairs(tgt="te"),
            pairs((TEXT["zh"], TEXT["ru"]), (TEXT["ru"], TEXT["zh"]), src="ru", tgt="zh_Hant"),
        ]
    )
    table = pa.table({name: table[name].cast(kind) for name in table.column_names})
    assert reasons(table) == [None, None, None, "langid.swapped", "langid.swapped", None]
    whole = langid(table).kept
    assert whole.equals(pa.concat_tables([langid(table.slice(i, 1)).kept for i in range(table.num_rows)]))


def test_no_rows() -> None:
    kept, dropped = langid(pairs())
    assert (kept.num_rows, dropped.num_rows) == (0, 0)
    assert "tgt_lid_prob" in kept.column_names


def test_capitals_are_read_as_small_letters() -> None:
    capitals = pairs((TEXT["en"].upper(), TEXT["ru"].upper()), (TEXT["fr"].upper(), TEXT["ru"]), tgt="ru")
    assert reasons(capitals) == [None, "langid.source"]
    found = langid(capitals).kept
    assert found["src_lid"].to_pylist() == ["en"]
    assert found["src"].to_pylist() == [TEXT["en"].upper()]
    small = langid(pairs((TEXT["en"].lower(), TEXT["ru"].lower()), tgt="ru")).kept
    assert found["src_lid_prob"].equals(small["src_lid_prob"])
    assert found["tgt_lid_prob"].equals(small["tgt_lid_prob"])


def test_text_without_letters_is_no_evidence(tmp_path: Path) -> None:
    model = write_table(tmp_path / "m.bin", {"12": {"en": 0.01, "de": 0.99}, "ab": {"en": 0.01, "de": 0.99}})
    assert reasons(pairs(("12", "12"), ("ab", "ab")), model=model, evidence_length=0) == [None, "langid.source"]


def table_model(tmp_path: Path, counts: Sequence[int] | None = None) -> str:
    """A model of four words of sixty letters, which says them to be English, Swahili or Arabic in given shares."""
    return write_table(
        tmp_path / "table.bin",
        {
            "e" * 60: {"eng_Latn": 0.96, "swh_Latn": 0.02, "arb_Arab": 0.02},
            "s" * 60: {"eng_Latn": 0.02, "swh_Latn": 0.96, "arb_Arab": 0.02},
            "m" * 60: {"eng_Latn": 0.26, "swh_Latn": 0.04, "arb_Arab": 0.7},
            "e" * 15: {"eng_Latn": 0.46, "swh_Latn": 0.04, "arb_Arab": 0.5},
        },
        counts,
    )


def test_thresholds_are_what_they_say(tmp_path: Path) -> None:
    model = table_model(tmp_path)
    doubtful = pairs(("e" * 60, "m" * 60), tgt="sw")  # Swahili 0.04, Arabic 0.7
    for below, evidence, reason in [
        (0.05, 0.69, "langid.target"), (0.05, 0.71, None), (0.03, 0.69, None), (0.0, 0.0, None), (1.0, 0.1, "langid.target"),
    ]:  # fmt: skip
        assert reasons(doubtful, model=model, reject_below=below, evidence=evidence) == [reason], (below, evidence)
    assert reasons(doubtful, model=model, language={"swh_Latn": {"reject_below": 0}}) == [None]
    assert reasons(doubtful, model=model, language={"sw": {"evidence": 0.71}}) == [None]
    assert reasons(doubtful, model=model, language={"en": {"reject_below": 0}}) == ["langid.target"]
    assert reasons(doubtful, model=model, reject_below=0, language={"sw": {"reject_below": 0.05}}) == ["langid.target"]


def test_a_short_side_needs_more_evidence(tmp_path: Path) -> None:
    short = pairs(("e" * 60, "e" * 15), tgt="sw")  # Arabic 0.5; 15 letters double what is asked for
    model = table_model(tmp_path)
    assert reasons(short, model=model, evidence=0.24) == ["langid.target"]
    assert reasons(short, model=model, evidence=0.26) == [None]
    assert reasons(short, model=model, evidence=0.26, evidence_length=40) == ["langid.target"]
    assert reasons(short, model=model, evidence=0.49, evidence_length=0) == ["langid.target"]


def test_a_language_rare_in_training_is_not_held_to_the_same_probability(tmp_path: Path) -> None:
    doubtful = pairs(("e" * 60, "m" * 60), tgt="sw")
    assert reasons(doubtful, model=table_model(tmp_path, [9000, 9000, 9000])) == ["langid.target"]
    rare = table_model(tmp_path, [9000, 90, 9000])  # odds of 0.04 / 0.96, a hundredfold
    assert reasons(doubtful, model=rare) == [None]
    assert reasons(doubtful, model=rare, prior_correction=False) == ["langid.target"]
    assert reasons(doubtful, model=rare, reject_below=0.80) == [None]
    assert reasons(doubtful, model=rare, reject_below=0.81) == ["langid.target"]


def test_a_language_without_a_label_is_not_judged(tmp_path: Path) -> None:
    assert reasons(pairs((TEXT["en"], TEXT["fr"]), (TEXT["ru"], TEXT["fr"]), tgt="luo")) == [None, "langid.source"]
    table = pa.table({"src": [TEXT["en"]], "tgt": ["x"], "src_lang": ["en"], "tgt_lang": pa.array([None], pa.string())})
    assert reasons(table) == [None]
    with pytest.raises(SettingsError, match="klingonish"):
        langid(pairs(("a", "b"), tgt="klingonish"))


def test_scripts_of_labels_count_where_the_row_names_one(tmp_path: Path) -> None:
    word = "x" * 60
    model = write_table(
        tmp_path / "m.bin",
        {
            word: {"eng_Latn": 0.01, "srp_Cyrl": 0.9, "srp_Latn": 0.02, "hrv_Latn": 0.01, "zho_Hant": 0.06},
            "y" * 60: {"zho_Hans": 0.95, "zho_Hant": 0.02, "kor_Hang": 0.03},
            "z" * 60: {"kor_Hang": 0.95, "zho_Hant": 0.05},
        },
    )
    codes = {"sr": None, "sr_Cyrl": None, "sr_Latn": "langid.target", "hr": None, "bs": None, "zh": "langid.target"}
    for code, reason in codes.items():
        assert reasons(pairs(("", word), tgt=code), model=model) == [reason], code
    for code, reason in {"zh": None, "zh_Hans": None, "zh_Hant": "langid.target", "yue": None}.items():
        assert reasons(pairs(("", "y" * 60), tgt=code), model=model) == [reason], code
    assert reasons(pairs(("", "z" * 60), tgt="ko"), model=model) == [None]


def test_groups_count_as_one_and_can_be_joined_or_replaced() -> None:
    serbian = pairs((TEXT["en"], TEXT["sr"]), tgt="bs")
    off: dict[str, Any] = {"prior_correction": False}
    assert reasons(serbian, **off) == [None]
    assert reasons(serbian, **off, groups=[]) == ["langid.target"]
    assert reasons(serbian, **off, groups=[], extra_groups=[["srp", "x_Latn"[:0] + "mk"], ["mkd", "bos_Latn"]]) == [
        None
    ]


def test_other_labels_of_a_group_add_up_as_evidence(tmp_path: Path) -> None:
    model = write_table(tmp_path / "m.bin", {"x" * 60: {"en": 0.1, "hr": 0.3, "sr": 0.3, "bs": 0.3}})
    assert reasons(pairs(("x" * 60, "")), model=model, evidence=0.8) == ["langid.source"]
    assert reasons(pairs(("x" * 60, "")), model=model, evidence=0.8, groups=[]) == [None]


def test_labels_that_are_no_codes_stay_as_they_are(tmp_path: Path) -> None:
    model = write_table(
        tmp_path / "m.bin",
        {"x" * 60: {"en": 0.02, "eml": 0.5, "zh-min-nan": 0.48}, "y" * 60: {"sq": 0.03, "als": 0.97}},
    )
    kept, dropped = langid(pairs(("x" * 60, "")), LangidSettings(model=model))
    assert (kept.num_rows, dropped["src_lid"].to_pylist()) == (0, ["eml"])
    # Beside `sq`, `als` is Alemannic.
    assert reasons(pairs(("", "y" * 60), tgt="sq"), model=model) == ["langid.target"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"reject_below": -0.1}, {"evidence": 1.5}, {"evidence_length": -1}, {"groups": [["sr", "no such"]]}, {"groups": [[]]},
        {"language": {"xx-klingon": {}}}, {"language": {"sw": {"reject_under": 0.1}}}, {"models": "a.bin"},
    ],
)  # fmt: skip
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LangidSettings(**wrong)


def test_settings_survive_json() -> None:
    settings = LangidSettings(
        model="m.bin", language={"swh_Latn": {"reject_below": 0.01}}, extra_groups=[["da", "nob_Latn"]]
    )  # type: ignore[dict-item]
    again = LangidSettings.model_validate(settings.model_dump(mode="json"))
    assert again == settings
    assert list(again.language) == ["sw"]


def test_planted_rows_in_wrong_languages_are_found(data: Path) -> None:
    root = data / "planted"
    if not root.is_dir():
        pytest.skip(f"no planted set in {data}")
    truth = pl.read_csv(gzip.decompress((root / "truth.tsv.gz").read_bytes()), separator="\t", quote_char=None)
    truth = truth.filter(pl.col("file").str.contains("opus-100") & pl.col("file").str.contains("-(sr|th|fr|zh)-"))
    rows = []
    for (name,), part in truth.group_by(["file"], maintain_order=True):
        other = str(name).rsplit(".", 1)[1].removesuffix("-train").replace("en", "").strip("-")
        english, foreign = ((root / f"{name}.{code}").read_text("utf-8").split("\n") for code in ("en", other))
        for row, label in part.select("row", "label").rows():
            rows.append((english[row], foreign[row], "en", other, label))
    table = pl.DataFrame(rows, schema=["src", "tgt", "src_lang", "tgt_lang", "label"], orient="row").to_arrow()
    gone = pl.from_arrow(langid(table).dropped)
    assert isinstance(gone, pl.DataFrame)
    share = {
        label: (gone["label"] == label).sum() / count
        for label, count in pl.Series([row[-1] for row in rows]).value_counts().rows()
    }
    for label in ("wrong_source_language", "wrong_target_language", "swapped_sides"):
        assert share[label] >= 0.95, label
    assert share["clean"] <= 0.01
    wrong = gone.filter(pl.col("label") == "swapped_sides")
    assert (wrong["reason"] == "langid.swapped").mean() > 0.9  # type: ignore[operator]
