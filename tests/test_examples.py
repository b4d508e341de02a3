"""The examples: phrasebook, builder, recipes and script; and the generator of large corpora."""

from __future__ import annotations

import gzip
import importlib.util
import re
import subprocess
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

from corpusprep import load_recipe

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LANGUAGES = ["ar", "bn", "cs", "de", "en", "es", "fr", "hu", "ja", "ko", "ru", "sr", "sw", "te", "th", "vi", "zh"]
# First words of the Unicode names of a language's letters.
SCRIPTS = {
    "ar": {"ARABIC"},
    "bn": {"BENGALI"},
    "ja": {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"},
    "ko": {"HANGUL"},
    "ru": {"CYRILLIC"},
    "sr": {"CYRILLIC"},
    "te": {"TELUGU"},
    "th": {"THAI"},
    "zh": {"CJK"},
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load(EXAMPLES / "build.py")


def table(name: str) -> list[list[str]]:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [line.split("\t") for line in text[:-1].split("\n")]


def slots(text: str) -> list[str]:
    return sorted(re.findall(r"\{(\w+)\}", text))


def in_script(text: str, language: str) -> float:
    letters = [unicodedata.name(c).split()[0] for c in re.sub(r"\{\w+\}", "", text) if c.isalpha()]
    right = SCRIPTS.get(language, {"LATIN"})
    return sum(script in right for script in letters) / max(1, len(letters))


class TestPhrasebook:
    header, *rows = table("phrasebook.tsv")
    slot_header, *slot_rows = table("slots.tsv")

    def test_has_every_language(self) -> None:
        assert self.header == LANGUAGES
        assert self.slot_header == ["slot", *LANGUAGES]

    def test_is_complete(self) -> None:
        assert len(self.rows) >= 48
        assert all(len(row) == 17 for row in self.rows)
        assert all(len(row) == 18 for row in self.slot_rows)
        cells = [cell for row in (*self.rows, *self.slot_rows) for cell in row]
        assert all(cell and cell == cell.strip() for cell in cells)
        assert all(cell == unicodedata.normalize("NFC", cell) for cell in cells)
        assert not any(unicodedata.category(c) in ("Cc", "Co", "Cn") for cell in cells for c in cell)

    def test_varies_in_length(self) -> None:
        lengths = [len(row[self.header.index("en")].split()) for row in self.rows]
        assert min(lengths) <= 3
        assert 30 <= max(lengths) <= 35
        assert len(set(lengths)) >= 15

    def test_slots_agree(self) -> None:
        for row in self.rows:
            assert all(slots(cell) == slots(row[4]) for cell in row), row[4]
        assert sum(bool(slots(row[4])) for row in self.rows) >= 24

    def test_every_slot_has_values(self) -> None:
        listed = defaultdict(list)
        for name, *values in self.slot_rows:
            listed[name].append(values)
        assert {name: len(values) for name, values in listed.items()} == {
            "city": 16, "day": 7, "month": 12, "woman": 8, "man": 8,
        }  # fmt: skip
        used = {name.rstrip("2") for row in self.rows for name in slots(row[4])}
        assert used == {*listed, *build._NUMBERS, "time"}
        for name, table_of_values in listed.items():
            for column in zip(*table_of_values, strict=True):
                assert len(set(column)) == len(column), (name, column)

    def test_no_phrase_stands_twice(self) -> None:
        for language, column in zip(self.header, zip(*self.rows, strict=True), strict=True):
            assert len(set(column)) == len(column), language

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_is_in_the_right_script(self, language: str) -> None:
        place = LANGUAGES.index(language)
        for row in self.rows:
            assert in_script(row[place], language) >= 0.8, row[place]
        for row in self.slot_rows:
            assert in_script(row[place + 1], language) == 1 or row[0] == "month", row

    def test_scripts_with_two_languages_are_told_apart(self) -> None:
        def letters(language: str) -> set[str]:
            return set("".join(row[LANGUAGES.index(language)] for row in self.rows).lower())

        assert not letters("sr") & set("ыэъщюяйь")
        assert not letters("ru") & set("јљњћђџ")
        assert letters("sr") >= set("јљњћђ")
        assert letters("zh") >= set("这们说")
        assert not letters("ja") & set("这们说")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("corpus")
    build.build(out, rows=250, seed=1)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(path: Path) -> list[bytes]:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    assert data.endswith(b"\n")
    return data[:-1].split(b"\n")


def truth(folder: Path) -> list[dict[str, str]]:
    header, *rows = (folder / "truth.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(header.split("\t"), row.split("\t"), strict=True)) for row in rows]


def sides(folder: Path, name: str) -> list[tuple[bytes, bytes]]:
    """English and the other side of every row of a training shard that is not malformed in its columns."""
    if name.startswith("opus"):
        first, second = name.split("/")[3].split("-")
        both = lines(folder / f"{name}.en"), lines(folder / f"{name}.{second if first == 'en' else first}")
        return list(zip(*both, strict=True))
    rows = [line.split(b"\t") for line in lines(folder / name)]
    columns = (1, 2) if name.startswith("ccmatrix") else (0, 1)
    if not Path(name).name.startswith(("en-", "eng_")):
        columns = columns[::-1]
    return [(row[columns[0]], row[columns[1]]) if len(row) > 1 else (b"", b"") for row in rows]


class TestBuilder:
    def test_same_arguments_same_bytes(self, corpus: Path, tmp_path: Path) -> None:
        build.build(tmp_path / "again", rows=250, seed=1)
        assert files(tmp_path / "again") == files(corpus)
        build.build(tmp_path / "other", rows=250, seed=2)
        assert files(tmp_path / "other")["truth.tsv"] != files(corpus)["truth.tsv"]

    def test_layout_of_opus100(self, corpus: Path) -> None:
        folder = corpus / "opus-100-corpus/v1.0/supervised"
        pairs = sorted(path.name for path in folder.iterdir())
        assert pairs == [
            "ar-en", "cs-en", "de-en", "en-es", "en-fr", "en-ja", "en-ru", "en-te", "en-th", "en-zh",
        ]  # fmt: skip
        for pair in pairs:
            codes = pair.split("-")
            names = sorted(path.name for path in (folder / pair).iterdir())
            assert names == sorted(f"opus.{pair}-{s}.{c}" for s in ("train", "dev", "test") for c in codes)
            for split, rows in (("train", 250), ("dev", 10), ("test", 10)):
                assert [len(lines(folder / pair / f"opus.{pair}-{split}.{code}")) for code in codes] == [rows, rows]

    def test_layout_of_nllb_and_ccmatrix(self, corpus: Path) -> None:
        malformed = {(row["file"], int(row["row"])) for row in truth(corpus) if row["label"] == "malformed"}
        names = sorted(path.name for path in (corpus / "nllb").iterdir())
        assert names == [
            "ben_Beng-eng_Latn.gz", "eng_Latn-kor_Hang.gz", "eng_Latn-srp_Cyrl.gz", "eng_Latn-swh_Latn.gz",
            "eng_Latn-vie_Latn.gz",
        ]  # fmt: skip
        for name in names:
            rows = lines(corpus / "nllb" / name)
            wrong = {n for n, row in enumerate(rows) if row.count(b"\t") != 8}
            assert wrong
            assert {(f"nllb/{name}", n) for n in wrong} <= malformed
            fields = next(row for n, row in enumerate(rows) if n not in wrong).split(b"\t")
            assert 1 < float(fields[2]) < 1.3
            assert all(0 <= float(field) <= 1 for field in fields[3:5])
        for name in ("de-en.bitextf.tsv.gz", "en-hu.bitextf.tsv.gz"):
            rows = lines(corpus / "ccmatrix" / name)
            assert all(row.count(b"\t") == 2 for row in rows)
            assert all(1 < float(row.split(b"\t")[0]) < 1.3 for row in rows)
        for path in corpus.rglob("*.gz"):
            assert path.read_bytes()[4:8] == bytes(4), "the time of a gzip file would make its bytes differ"

    def test_truth_covers_each_row(self, corpus: Path) -> None:
        found = defaultdict(list)
        for row in truth(corpus):
            found[row["file"]].append(int(row["row"]))
        assert len(found) == 17
        for name, rows in found.items():
            assert rows == list(range(len(sides(corpus, name))))
        assert {row["label"] for row in truth(corpus)} == {"clean", *build.RATES}

    def test_rows_are_what_truth_says(self, corpus: Path) -> None:
        text = {name: sides(corpus, name) for name in {row["file"] for row in truth(corpus)}}
        originals: dict[tuple[str, str], tuple[bytes, bytes]] = {}
        evaluation = set()
        for path in corpus.rglob("*-dev.*"):
            evaluation |= {*lines(path), *lines(Path(str(path).replace("-dev.", "-test.")))}
        for row in truth(corpus):
            english, other = text[row["file"]][int(row["row"])]
            group = (row["pair"], row["group"])
            match row["label"]:
                case "clean":
                    assert group not in originals
                    assert english
                    assert other
                    assert english not in evaluation
                    originals[group] = english, other
                case "exact_duplicate":
                    assert originals[group] == (english, other), "the original comes first"
                case "near_duplicate" | "markup" | "mojibake":
                    assert originals[group] != (english, other)
                case "empty_side":
                    assert not (english and other)
                case "untranslated" | "url_only":
                    assert english == other
                case "malformed" if english:
                    with pytest.raises(UnicodeDecodeError):
                        other.decode()
                case "chat_template":
                    assert english.startswith(b"<|im_start|>")

    def test_clean_rows_of_a_pair_differ(self, corpus: Path) -> None:
        seen: dict[str, set[tuple[bytes, bytes]]] = defaultdict(set)
        text = {name: sides(corpus, name) for name in {row["file"] for row in truth(corpus)}}
        for row in truth(corpus):
            if row["label"] == "clean":
                both = text[row["file"]][int(row["row"])]
                assert both not in seen[row["pair"]]
                seen[row["pair"]].add(both)

    def test_scripts_without_spaces_are_joined_without_space(self) -> None:
        book = build.Phrasebook.read()
        item = tuple(build.Phrase(place, {}) for place in range(2))
        assert book.text(item, "zh").count(" ") == book.text(item, "ja").count(" ") == 0
        assert book.text(item, "th").count(" ") == 1

    @pytest.mark.parametrize("rows", [1, 5, 199])
    def test_small_corpora_are_clean(self, tmp_path: Path, rows: int) -> None:
        assert set(build.build(tmp_path, rows=rows).values()) == {rows}
        assert {row["label"] for row in truth(tmp_path)} == {"clean"}

    @pytest.mark.parametrize("rows", ["0", "-1", "1000000", "many"])
    def test_refuses_nonsense(self, tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            build.main([str(tmp_path), "--rows", rows])
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quickstart", "llamax2"])
def test_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(EXAMPLES / f"{name}.toml")
    assert recipe.name == name
    assert recipe.instruct.format == "messages"


def test_the_full_recipe_is_the_one_described() -> None:
    recipe = load_recipe(EXAMPLES / "llamax2.toml")
    pairs = {code for source in recipe.source for pair in source.pairs for code in pair.split("-")}
    assert pairs == set(LANGUAGES)
    assert recipe.dedup.max_distance == 3
    assert recipe.dedup.against
    assert (recipe.quality.scorer, recipe.quality.model) == ("comet", "Unbabel/wmt22-cometkiwi-da")
    assert recipe.quality.threshold == 0.75
    assert (recipe.balance.budget, recipe.balance.tokenizer) == (800_000_000, "Qwen/Qwen3-8B")
    assert recipe.instruct.directions == "both"


def test_library_script_runs() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "library.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for stage in ("clean", "langid", "dedup", "quality", "balance", "instruct"):
        assert re.search(rf"^{stage}: kept [1-9]", ran.stdout, re.MULTILINE), ran.stdout
    assert "dedup.evaluation" in ran.stdout


class TestGenerator:
    generate = load(ROOT / "tests/benchmarks/generate.py")

    def test_words_are_aligned_and_whole(self) -> None:
        header, *rows = (ROOT / "tests/benchmarks/words.tsv").read_text(encoding="utf-8").splitlines()
        assert header.split("\t") == list(self.generate.FLORES)
        assert len(rows) >= 150
        assert all(len(cells) == 7 and all(cells) for cells in (row.split("\t") for row in rows))
        script = {"ru": "ru", "zh": "zh"}
        for row in rows:
            for language, word in zip(header.split("\t"), row.split("\t"), strict=True):
                assert in_script(word, script.get(language, "en")) == 1, word

    @pytest.mark.parametrize(
        ("layout", "names", "columns"),
        [
            ("nllb", ["nllb/eng_Latn-zho_Hans.gz", "nllb/deu_Latn-eng_Latn.gz"], 9),
            ("tsv", ["en-zh.tsv", "en-de.tsv"], 2),
            ("opus100", [f"opus-100-corpus/v1.0/supervised/{p}/opus.{p}-train.en" for p in ("en-zh", "de-en")], 1),
        ],
    )
    def test_rows_and_columns(self, tmp_path: Path, layout: str, names: list[str], columns: int) -> None:
        arguments = ["--rows", "2001", "--pairs", "en-zh,en-de", "--format", layout]
        self.generate.main([str(tmp_path / "a"), *arguments])
        self.generate.main([str(tmp_path / "b"), *arguments])
        assert files(tmp_path / "a") == files(tmp_path / "b")
        for name, rows in zip(names, (1001, 1000), strict=True):
            found = lines(tmp_path / "a" / name)
            assert len(found) == rows
            assert {line.count(b"\t") for line in found} == {columns - 1}

    def test_sides_are_translations_for_the_most_part(self) -> None:
        batch = next(self.generate.batches("en", "zh", 5000, 1))
        rows = list(zip(batch.src.to_pylist(), batch.tgt.to_pylist(), strict=True))
        numbers = [(re.findall(r"\d+", src), re.findall(r"\d+", tgt)) for src, tgt in rows]
        numbers = [pair for pair in numbers if any(pair)]
        assert len(numbers) > 1000
        assert 0.93 < sum(a == b for a, b in numbers) / len(numbers) < 1
        assert 0.02 < 1 - len(set(rows)) / len(rows) < 0.09
        assert sum(in_script(tgt, "zh") == 1 for _, tgt in rows) / len(rows) > 0.95
        assert sum(in_script(src, "en") == 1 for src, _ in rows) / len(rows) > 0.95
