from __future__ import annotations

import functools
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpusprep.arrow import string_buffers
from corpusprep.errors import RunError
from corpusprep.stages import quality
from corpusprep.stages.quality import QualitySettings, lexical
from corpusprep.stages.quality.lexical import features as evidence
from corpusprep.stages.quality.lexical import model1, text, words

SETTINGS = QualitySettings()


def invented(rows: int, seed: int, target: str = "abcdefghijklmnopqrstuvwxyz") -> tuple[list[str], list[str]]:
    """Sentences of an invented language and their translations into another, word by word in another order."""
    rng = np.random.default_rng(7)  # the languages are always the same; the sentences are not
    syllables = [c + v for c in "bdfgklmnprstv" for v in "aeiou"]
    others = ["".join(rng.choice(list(target), 2)) for _ in range(60)]
    vocabulary = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(900)]
    twins = ["".join(rng.choice(others, rng.integers(1, 4))) for _ in range(900)]
    chance = 1 / np.arange(3.0, 903.0)
    rng = np.random.default_rng(seed)
    src, tgt = [], []
    for _ in range(rows):
        which = rng.choice(900, rng.integers(4, 14), p=chance / chance.sum())
        src.append(" ".join(vocabulary[k] for k in which) + ".")
        tgt.append(" ".join(twins[k] for k in rng.permutation(which)) + ".")
    return src, tgt


def table(src: list[str], tgt: list[str], pair: str = "en-de") -> pa.Table:
    left, right = pair.split("-")
    return pa.table({"src": src, "tgt": tgt, "src_lang": [left] * len(src), "tgt_lang": [right] * len(src)})


@functools.cache
def state(rows: int = 1500) -> bytes:
    return quality.prepare(table(*invented(rows, 1)), SETTINGS, 1)


def score(src: list[str], tgt: list[str], rows: int = 1500) -> np.ndarray:
    return quality.open_scorer(SETTINGS, {"en-de": state(rows)}).score(table(src, tgt))


# ------------------------------------------------------------------------------------------------------------ the whole


def test_misaligned_and_truncated_rows_are_found_among_clean_ones() -> None:
    src, tgt = invented(1600, 3)
    wrong = {k: tgt[(k + 16) % 1600] for k in range(0, 1600, 16)}
    short = {k: tgt[k][: len(tgt[k]) // 3] for k in range(5, 1600, 32)}
    given = table(src, [wrong.get(k, short.get(k, text)) for k, text in enumerate(tgt)])
    kept, dropped = quality.quality(given.append_column("at", pa.array(range(1600))))
    gone = set(dropped["at"].to_pylist())
    assert set(dropped["reason"].to_pylist()) == {"quality.score"}
    assert len(gone & set(wrong)) >= 0.9 * len(wrong)
    assert len(gone & set(short)) >= 0.9 * len(short)
    assert len(gone - set(wrong) - set(short)) <= 0.02 * 1600
    assert kept["at"].to_pylist() == sorted(kept["at"].to_pylist())


def test_scripts_without_spaces() -> None:
    src, tgt = invented(1200, 4, "天地人山水火木金土日月星雨雪")
    tgt = [text.replace(" ", "") for text in tgt]
    judged = quality.open_scorer(SETTINGS, {"en-zh": quality.prepare(table(src, tgt, "en-zh"), SETTINGS, 1)})
    src, tgt = invented(300, 5, "天地人山水火木金土日月星雨雪")
    tgt = [text.replace(" ", "") for text in tgt]
    right = judged.score(table(src, tgt, "en-zh"))
    wrong = judged.score(table(src, tgt[1:] + tgt[:1], "en-zh"))
    assert _auc(right, wrong) > 0.97


@pytest.mark.parametrize(("many", "folds"), [(8000, 5), (500, 3)])
def test_a_row_is_not_judged_by_what_it_taught(many: int, folds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a corpus without any translations, the rows learned from must look no better than others."""
    monkeypatch.setattr(lexical, "_MANY", many)
    src, _ = invented(1000, 6)
    _, tgt = invented(1000, 7)
    learned = quality.prepare(table(src, tgt), SETTINGS, 1)
    assert lexical.unpack(learned).values.shape[1] == folds
    scorer = quality.open_scorer(SETTINGS, {"en-de": learned})
    seen = scorer.score(table(src, tgt))
    unseen = scorer.score(table(src, tgt[1:] + tgt[:1]))
    assert 0.45 < _auc(seen, unseen) < 0.55


def test_the_more_a_target_has_to_do_with_the_source_the_better() -> None:
    src, tgt = invented(200, 8)
    half = [f"{a[: len(a) // 2]} {b[len(b) // 2 :]}" for a, b in zip(tgt, tgt[1:] + tgt[:1], strict=True)]
    whole, mixed, wrong = score(src, tgt), score(src, half), score(src, tgt[1:] + tgt[:1])
    assert whole.mean() > mixed.mean() + 0.1 > wrong.mean() + 0.2


def _auc(good: np.ndarray, bad: np.ndarray) -> float:
    return float((good[:, None] > bad[None, :]).mean() + (good[:, None] == bad[None, :]).mean() / 2)


# --------------------------------------------------------------------------------------------------------------- states


def test_a_state_depends_on_the_rows_alone_and_not_on_their_order_or_type() -> None:
    given = table(*invented(1500, 1))
    order = np.random.default_rng(2).permutation(1500)
    mixed = pa.concat_tables([given.take(pa.array(order[:400])), given.take(pa.array(order[400:]))])
    assert mixed["src"].num_chunks > 1
    assert quality.prepare(mixed, SETTINGS, 1) == state()
    large = given.set_column(0, "src", given["src"].cast(pa.large_string()))
    assert quality.prepare(large, SETTINGS, 1) == state()
    assert quality.prepare(given.slice(1), SETTINGS, 1) != state()


def test_the_sample_is_bounded_and_chosen_by_the_seed() -> None:
    given = table(*invented(1500, 1))
    small = QualitySettings(sample=300)
    one, two = quality.prepare(given, small, 1), quality.prepare(given, small, 2)
    assert quality.evidence(small, one) == quality.evidence(small, two) == 300
    assert one != two


def test_a_score_does_not_depend_on_the_rows_around_it() -> None:
    src, tgt = invented(300, 9)
    whole = score(src, tgt)
    parts = np.concatenate([score(src[:7], tgt[:7]), score(src[7:], tgt[7:])])
    assert whole.tobytes() == parts.tobytes()


def test_pairs_are_judged_by_their_own_state_and_unknown_ones_not_at_all() -> None:
    src, tgt = invented(40, 10)
    mixed = pa.concat_tables([table(src, tgt, "en-sw"), table(src, tgt, "en-de")])
    order = np.random.default_rng(3).permutation(80)
    scores = quality.open_scorer(SETTINGS, {"en-de": state()}).score(mixed.take(pa.array(order)))
    assert np.isnan(scores[order < 40]).all()
    assert scores[order >= 40].tolist() == score(src, tgt)[order[order >= 40] - 40].tolist()


@pytest.mark.parametrize("rows", [0, 1, 19])
def test_too_few_rows_to_learn_anything(rows: int) -> None:
    given = table(*invented(rows, 11))
    learned = quality.prepare(given, SETTINGS, 1)
    assert quality.evidence(SETTINGS, learned) == rows
    assert np.isnan(quality.open_scorer(SETTINGS, {"en-de": learned}).score(given)).all()


@pytest.mark.parametrize("rows", [20, 40])
def test_few_rows_are_scored_but_none_is_dropped(rows: int) -> None:
    given = table(*invented(rows, 12))
    kept, dropped = quality.quality(given)
    assert dropped.num_rows == 0
    assert kept["quality"].null_count == 0


def test_equal_and_empty_rows_do_not_break_learning() -> None:
    for rows in (table(["same."] * 300, ["gleich."] * 300), table([""] * 300, [""] * 300)):
        kept, dropped = quality.quality(rows)
        assert kept.num_rows + dropped.num_rows == 300
        assert kept["quality"].null_count == 0


def test_a_state_is_the_model_again() -> None:
    model = lexical.unpack(state())
    assert lexical.pack(model) == state()
    assert model.values.shape == (model.targets.size, 5, 2)


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(RunError, match="another version"):
        quality.open_scorer(SETTINGS, {"en-de": b"corpusprep lexical 0\n" + bytes(400)}).score(table(["a"], ["b"]))


# -------------------------------------------------------------------------------------------------------- pieces: tokens


def cut(line: str, language: str = "de", level: int = 0) -> text.Cut:
    offsets, data = string_buffers(pa.array([line]))
    room = text.make_cut(int(offsets[-1]), text.plan(language, level))
    n = text.decode(data, offsets[0], offsets[1], room.points)
    text.scan(room, n, text.tables(), text.plan(language, level))
    return room


def tokens(line: str, language: str = "de", level: int = 0) -> list[int]:
    room = cut(line, language, level)
    return room.tokens[: room.counts[text.N_TOKENS]].tolist()


def numbers(line: str) -> list[int]:
    room = cut(line)
    return room.numbers[: room.counts[text.N_NUMBERS]].tolist()


def sounds(word: str) -> list[list[int]]:
    room = cut(word)
    return [room.sounds[room.ends[k] : room.ends[k + 1]].tolist() for k in range(room.counts[text.N_NAMES])]


@given(st.text(max_size=60))
def test_text_is_decoded_as_python_does(line: str) -> None:
    line = line.encode("utf-8", "ignore").decode()
    offsets, data = string_buffers(pa.array([line]))
    out = np.empty(len(data) + 1, np.uint32)
    n = text.decode(data, offsets[0], offsets[1], out)
    assert out[:n].tolist() == [ord(c) for c in line]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1000", "1,000"),
        ("1000", "1.000"),
        ("1000", "1\u00a0000"),
        ("1000000", "1.000.000"),
        ("2024", "٢٠٢٤"),
        ("2024", "２０２４"),
        ("15", "१५"),
    ],
)
def test_one_number_in_several_writings(one: str, other: str) -> None:
    assert numbers(f"a {one} b") == numbers(f"c {other}.")
    assert len(numbers(one)) == 1


@pytest.mark.parametrize(
    ("line", "count"), [("3.5", 2), ("1.0000", 2), ("1.2.3", 3), ("12,34", 2), ("1,000,00", 2), ("a1b2", 2)]
)
def test_other_marks_part_numbers(line: str, count: int) -> None:
    assert len(numbers(line)) == count


@pytest.mark.parametrize(
    ("one", "other"), [("House", "house"), ("ＨＯＵＳＥ", "house"), ("كِتَاب", "كتاب"), ("soft\u00adware", "software")]
)
def test_writings_that_are_the_same_word(one: str, other: str) -> None:
    assert tokens(one) == tokens(other)


def test_tokens_by_script() -> None:
    assert len(tokens("cat")) == 1
    assert len(tokens("kitten")) == 2  # and its first four letters
    assert len(tokens("kitten", level=1)) == 2 + 4  # and its trigrams
    assert len(tokens("kitten", "en", level=1)) == 2
    assert len(tokens("kitten", "en", level=2)) == 2 + 4
    assert len(tokens("天地人")) == 3 + 2  # characters and pairs
    assert len(tokens("ภาษา")) == 2  # trigrams


@pytest.mark.parametrize("name", ["Tom", "Том", "톰", "トム", "ทอม", "توم", "টম", "టామ్", "טום"])
def test_a_name_sounds_alike_in_every_script(name: str) -> None:
    assert sounds(name) == sounds("Tom") != [[]]


@pytest.mark.parametrize("name", ["Бостон", "보스턴", "ボストン", "بوسطن", "বোস্টন", "బోస్టన్", "Μποστον"])
def test_a_longer_name_does_too(name: str) -> None:
    found = sounds(name)[0]
    wanted = sounds("Boston")[0]
    assert found == wanted or name == "Μποστον"


_PIECES = st.sampled_from([
    "Haus", "haus", "Straße", "Tom", "TOM", "Entwicklungszusammenarbeit", "a", "Ünal", "soft\u00adware", "don't", "Ελλάδα", "Том",
    "東京", "トム", "ภาษา", "한국", "12", "1,000", "1,٣٣٣", "٣,٣٣٣", "१,२३४", "٣,000", "٣٣٣", "1," * 40, "٣4", "4٣", "1\u00a0000", "3.14", "'", "(", ")", "?", "!", ".", "。", "“", "”", ",",
    ":", " ", " ", " ", " ", "\t", "\u00a0", "\u0000", "\U0001f600", "x" * 40, "é" * 30, "\u0301", "bcdfghjklmnpqrstvwxz",
])  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.lists(_PIECES, max_size=30).map("".join) | st.text(max_size=40), min_size=1, max_size=6),
    st.sampled_from([("de", 0), ("de", 1), ("en", 1), ("en", 2), ("zh", 0)]),
)
def test_words_from_the_memo_are_those_that_are_scanned(lines: list[str], plan: tuple[str, int]) -> None:
    lines = [line.encode("utf-8", "ignore").decode() for line in lines] * 2  # the second time, most words are known
    offsets, data = string_buffers(pa.array(lines))
    level = text.plan(*plan)
    one, other = (text.make_cut(int(np.diff(offsets).max()), level) for _ in range(2))
    for start, end in itertools.pairwise(offsets.tolist()):
        text.scan(one, text.decode(data, start, end, one.points), text.tables(), level)
        words.read(other, data, start, end, text.tables(), level)
        assert _content(one) == _content(other)


def test_rows_of_many_words_from_the_memo() -> None:
    level = text.plan("de", 0)
    for line in ("Hauses " * 400, "a1 " * 700, "Namen sind Namen. " * 300, "Bcdfgh'" * 500, "1,2.3'" * 500):
        offsets, data = string_buffers(pa.array([line]))
        one, other = (text.make_cut(int(offsets[-1]), level) for _ in range(2))
        text.scan(one, text.decode(data, 0, offsets[1], one.points), text.tables(), level)
        words.read(other, data, 0, offsets[1], text.tables(), level)
        assert _content(one) == _content(other)
        assert other.memo[:, 0].any() == any(map(str.isalpha, line))


def _content(room: text.Cut) -> list[object]:
    n, words_, numbers_, names = (room.counts[k] for k in (text.N_TOKENS, text.N_WORDS, text.N_NUMBERS, text.N_NAMES))
    ends = room.ends[: names + 1].tolist()
    arrays = (
        room.counts, room.tokens[:n], room.kinds[:n], room.words[:words_], room.stems[:words_], room.sizes[:words_],
        room.numbers[:numbers_], room.sounds[: ends[-1]], room.marks[:names],
    )  # fmt: skip
    return [ends, *(array.tolist() for array in arrays)]


def test_very_long_rows_are_bounded() -> None:
    room = cut("word " * 100_000 + "1 " * 100_000 + "Name " * 1000)
    assert room.counts[text.N_TOKENS] == text.MAX_TOKENS
    assert 0 <= score(["word " * 50_000], ["Wort " * 50_000])[0] <= 1


# ------------------------------------------------------------------------------------------------------ pieces: learning


def numbers_of_tokens(rows: list[np.ndarray]) -> model1.Rows:
    at = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    return model1.Rows(at, np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32))


def trained(
    src: list[np.ndarray], tgt: list[np.ndarray], n: int, folds: np.ndarray, fold: int, rounds: int
) -> tuple[dict[tuple[int, int], tuple[float, float]], model1.Links]:
    """Probabilities of entries, by model1.train."""
    left, right = numbers_of_tokens(src), numbers_of_tokens(tgt)
    links = model1.link(left, right, n, n)
    share, prob = np.full(n, 1 / n, np.float32), np.empty((links.order.size, 2), np.float32)
    model1.train(links, folds, fold, share, share, rounds, prob)
    names = zip(links.sources[links.order].tolist(), links.targets[links.order].tolist(), strict=True)
    found = dict(zip(names, map(tuple, prob.tolist()), strict=True))
    assert [e for e, _ in found] == sorted(e for e, _ in found)
    return found, links


def trained_plainly(
    src: list[np.ndarray], tgt: list[np.ndarray], n: int, folds: np.ndarray, fold: int, rounds: int
) -> dict[tuple[int, int], tuple[float, float]]:
    """The same, link by link in double precision."""
    rows = [(a.tolist(), b.tolist()) for a, b, f in zip(src, tgt, folds, strict=True) if f != fold]
    prob: dict[tuple[int, int], tuple[float, float]] = {}
    for step in range(rounds + 1):
        count: dict[tuple[int, int], float] = {}
        for a, b in rows:
            null = [model1.NULL / n / (1 - model1.NULL) * len(side) for side in (a, b)]
            of_t = {f: null[0] + sum(prob[e, f][0] for e in a) for f in b} if step else {}
            of_s = {e: null[1] + sum(prob[e, f][1] for f in b) for e in a} if step else {}
            for e in a:
                for f in b:
                    p = prob[e, f][0] / of_t[f] * prob[e, f][1] / of_s[e] if step else (len(a) * len(b)) ** -0.5
                    count[e, f] = count.get((e, f), 0) + p
        left, right = ({k: sum(c for pair, c in count.items() if pair[side] == k) for k in range(n)} for side in (0, 1))
        prob = {(e, f): (c / left[e], c / right[f]) for (e, f), c in count.items()}
    return prob


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 3))
def test_model_1_is_trained_as_its_formula_says(seed: int, n: int, rounds: int) -> None:
    rng = np.random.default_rng(seed)
    sides = [[rng.permutation(n)[: rng.integers(0, min(n, 5) + 1)] for _ in range(15)] for _ in range(2)]
    folds = rng.integers(0, 3, 15)
    found, _ = trained(*sides, n, folds, 1, rounds)
    wanted = trained_plainly(*sides, n, folds, 1, rounds)
    met = {(int(e), int(f)) for a, b in zip(*sides, strict=True) for e in a for f in b}
    assert set(found) == met
    for pair in met:
        assert found[pair] == pytest.approx(wanted.get(pair, (0, 0)), abs=1e-4)


def test_model_1_finds_the_dictionary() -> None:
    rng = np.random.default_rng(5)
    rows = [np.unique(rng.integers(0, 20, 5)) for _ in range(400)]
    twins = [19 - row for row in rows]  # word k translates word 19 - k
    found, _ = trained(rows, twins, 20, np.zeros(400, np.int64), 1, 4)
    assert min(min(p) for (e, f), p in found.items() if f == 19 - e) > 0.9
    assert max(max(p) for (e, f), p in found.items() if f != 19 - e) < 0.1
    for e in range(20):
        assert sum(p[0] for (source, _), p in found.items() if source == e) == pytest.approx(1, abs=1e-4)


def test_rows_of_the_fold_teach_nothing() -> None:
    rows = [np.array([0]), np.array([1])]
    found, _ = trained(rows, rows, 2, np.array([0, 1]), 1, 2)
    assert found == {(0, 0): (1, 1), (1, 1): (0, 0)}


def test_what_occurs_in_one_row_lies_apart() -> None:
    src = [np.array(row) for row in ([0, 1], [0], [2])]
    tgt = [np.array(row) for row in ([0, 1], [0, 2], [2])]
    _, links = trained(src, tgt, 3, np.zeros(3, np.int64), 1, 1)
    entries = list(zip(links.sources.tolist(), links.targets.tolist(), strict=True))
    assert entries == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 2)]
    assert links.entry.tolist() == [0, 1, 2, 3, 0, 4, 5]
    assert links.shared == 1


@pytest.mark.parametrize("bits", [64, 50])
def test_the_truncated_copies_are_cut_anywhere(bits: int) -> None:
    """Also where the sample has the lowest of very many keys."""
    keys = np.sort(np.random.default_rng(1).integers(0, 1 << bits, 4000, np.uint64))
    clip = lexical._clips(keys)
    share = np.where(clip > 1, clip - 1, clip)
    assert 0.15 <= share.min() < 0.17
    assert 0.48 < share.max() <= 0.5
    assert abs(np.corrcoef(share, np.arange(share.size))[0, 1]) < 0.06
    assert 0.4 < (clip > 1).mean() < 0.6


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300)), max_size=400, unique=True),
    st.sampled_from([301, 5000, 1 << 20, 1 << 23]),
)
def test_every_entry_is_found_and_no_other(entries: list[tuple[int, int]], tokens: int) -> None:
    entries.sort()
    sources = np.array([e for e, _ in entries], np.int64)
    starts = np.searchsorted(sources, np.arange(11)).astype(np.int64)
    targets = np.array([f for _, f in entries], np.int32)
    values = np.arange(2 * len(entries), dtype=np.uint8).reshape(-1, 1, 2) % np.uint8(200)
    found = lexical.make_table(starts, targets, values, tokens)
    table, rows, columns = evidence.probabilities(), np.arange(10, dtype=np.int32), np.arange(301, dtype=np.int32)
    sums = np.empty(10, np.float32), np.empty(301, np.float32)
    evidence.translate(found, 0, table, rows, 10, columns, 301, *sums, evidence.make_room(301))
    wanted = np.zeros((2, 10, 301), np.float64)
    for (e, f), value in zip(entries, values, strict=True):
        wanted[:, e, f] = table[value[0]]
    assert sums[0] == pytest.approx(wanted[1].sum(1), rel=1e-4)
    assert sums[1] == pytest.approx(wanted[0].sum(0), rel=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_the_regression_stands_at_its_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    y = (x[:, 0] + rng.normal(size=200) > 0).astype(np.float64)
    w = rng.uniform(0.5, 1, 200)
    mean, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    nowhere = np.zeros(4)
    for start in (nowhere, lexical._regress(x, y, np.ones(200), 2.0, 30, nowhere)):
        weights = lexical._regress(x, y, w, 2.0, 30, start)
        p = 1 / (1 + np.exp(-(x @ weights[:3] + weights[3])))
        slope = ((x - mean) / scale).T @ (w * (y - p)) - 2.0 * weights[:3] * scale
        assert np.abs(slope).max() < 1e-2
        assert abs((w * (y - p)).sum()) < 1e-2


def test_a_constant_feature_weighs_nothing() -> None:
    x = np.ones((50, 2), np.float32)
    x[:25, 1] = 0
    y = np.repeat([0.0, 1.0], 25)
    weights = lexical._regress(x, y, np.ones(50), 1.0, 12, np.zeros(3))
    assert weights[0] == 0
    assert weights[1] > 1


def test_probabilities_are_stored_within_3_percent() -> None:
    p = np.array([1.0, 0.5, 0.01, 0.001, 0.0], np.float32)
    stored = np.empty((5, 2), np.uint8)
    evidence.quantise(np.stack([p, p[::-1]], 1), 5e-4, stored)
    back = evidence.probabilities()[stored]
    assert back[:, 0] == pytest.approx(p, rel=0.032)
    assert back[:, 1] == pytest.approx(p[::-1], rel=0.032)
    evidence.quantise(np.stack([p, p], 1), 0.1, stored)
    assert (stored == 255).tolist() == [[False] * 2] * 2 + [[True] * 2] * 3
