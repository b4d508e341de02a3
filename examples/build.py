"""Makes a small, noisy corpus in real layouts from the phrasebook: `python examples/build.py out/example-data`.

Every row joins one to three phrases of `phrasebook.tsv`, with slots filled from `slots.tsv`, so that about sixty
phrases make many thousands of distinct rows. Defects are planted at the rates below; `truth.tsv` has the label of each
row. The same rows, seed and phrasebook give the same bytes.

    opus-100-corpus/v1.0/supervised/de-en/opus.de-en-train.de    OPUS-100: line pairs, with dev and test files
    nllb/eng_Latn-swh_Latn.gz                                    NLLB: nine columns
    ccmatrix/de-en.bitextf.tsv.gz                                CCMatrix: score, source, target
    truth.tsv                                                    file, row, pair, label, group
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

HERE = Path(__file__).parent

OPUS = ("ar", "cs", "de", "es", "fr", "ja", "ru", "te", "th", "zh")
NLLB = ("bn", "ko", "sr", "sw", "vi")
CCMATRIX = ("de", "hu")
FLORES = {"bn": "ben_Beng", "en": "eng_Latn", "ko": "kor_Hang", "sr": "srp_Cyrl", "sw": "swh_Latn", "vi": "vie_Latn"}

# The share of a shard's rows that has each defect; the rest is clean. Duplicates, markup and mojibake are made from a
# copy of a clean row of the same pair, and are in the same group as that row.
RATES = {
    "exact_duplicate": 0.04,
    "near_duplicate": 0.03,
    "markup": 0.02,
    "mojibake": 0.01,
    "misaligned": 0.04,
    "wrong_target_language": 0.02,
    "wrong_source_language": 0.01,
    "swapped_sides": 0.01,
    "untranslated": 0.02,
    "truncated": 0.01,
    "empty_side": 0.01,
    "url_only": 0.005,
    "chat_template": 0.005,
    "evaluation_leak": 0.02,
    "malformed": 0.002,
}
MOST_ROWS = 10_000
# Every sixth phrase is used only in the dev and test files (and leaks from them), so that no other row resembles them.
EVALUATION_PHRASES = slice(5, None, 6)

# Languages that a model may confuse: one is not planted in place of the other.
_ALIKE = ({"ru", "sr"}, {"ja", "zh"})
_NUMBERS = {"number": (12, 98), "code": (101, 989), "degrees": (14, 36), "oven": (150, 230), "year": (1962, 2019)}
_SLOT = re.compile(r"\{([a-z]+)(2?)\}")
_NO_SPACE = frozenset({"ja", "zh"})


class Phrase(NamedTuple):
    """One phrase with its slots filled: its index in the book, and for each slot a number or a row of its list."""

    place: int
    values: dict[str, str | int]


Item = tuple[Phrase, ...]


@dataclass(frozen=True)
class Phrasebook:
    """Phrases by language, and the values of each slot by language, aligned."""

    phrases: list[dict[str, str]]
    slots: dict[str, list[dict[str, str]]]

    @classmethod
    def read(cls, folder: Path = HERE) -> Phrasebook:
        """Reads `phrasebook.tsv` (one column per language) and `slots.tsv` (the slot's name, then the same columns)."""
        slots: dict[str, list[dict[str, str]]] = {}
        for row in _read_tsv(folder / "slots.tsv"):
            slots.setdefault(row.pop("slot"), []).append(row)
        return cls(_read_tsv(folder / "phrasebook.tsv"), slots)

    @property
    def languages(self) -> list[str]:
        return list(self.phrases[0])

    def fill(self, place: int, random: Random) -> Phrase:
        """Draws the values of a phrase's slots; `{day}` and `{day2}` get different ones."""
        values: dict[str, str | int] = {}
        drawn: dict[str, Iterator[str | int]] = {}
        for name, again in sorted(set(_SLOT.findall(self.phrases[place]["en"]))):
            if name not in drawn:
                drawn[name] = iter(self._draw(name, random))
            values[name + again] = next(drawn[name])
        return Phrase(place, values)

    def _draw(self, name: str, random: Random) -> Sequence[str | int]:
        """Two different values of a slot."""
        if name == "time":
            return [f"{hour:02}:{5 * random.randrange(1, 12):02}" for hour in random.sample(range(6, 23), 2)]
        if name in _NUMBERS:
            first, last = _NUMBERS[name]
            return [str(number) for number in random.sample(range(first, last + 1), 2)]
        return random.sample(range(len(self.slots[name])), 2)

    def text(self, item: Item, language: str) -> str:
        """The text of an item in one language."""

        def value(values: dict[str, str | int], slot: re.Match[str]) -> str:
            found = values[slot[1] + slot[2]]
            return found if isinstance(found, str) else self.slots[slot[1]][found][language]

        sentences = []
        for place, values in item:
            sentence = _SLOT.sub(functools.partial(value, values), self.phrases[place][language])
            sentences.append(sentence[0].upper() + sentence[1:])
        return ("" if language in _NO_SPACE else " ").join(sentences)


def _read_tsv(path: Path) -> list[dict[str, str]]:
    header, *rows = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [dict(zip(header.split("\t"), row.split("\t"), strict=True)) for row in rows]


class Row(NamedTuple):
    """A row of a shard: English and the other language, its label, and the clean row that it comes from (-1: none)."""

    english: str
    other: str
    label: str
    group: int


class Corpus:
    """The rows of one language pair, over all its shards, so that no clean row has an unlabelled copy elsewhere."""

    def __init__(self, book: Phrasebook, language: str, evaluation: list[Item], seed: int) -> None:
        self.book = book
        self.language = language
        self.evaluation = evaluation
        self.random = Random(f"{seed}/{language}")
        reserved = range(len(book.phrases))[EVALUATION_PHRASES]
        places = [place for place in range(len(book.phrases)) if place not in reserved]
        self.pools = [list(itertools.combinations(places, size)) for size in (1, 2, 3)]
        for pool in self.pools:
            self.random.shuffle(pool)
        self.clean: list[Row] = []

    def shard(self, rows: int) -> list[Row]:
        """The rows of the next shard, clean and damaged, shuffled."""
        wanted = {label: max(1, round(rate * rows)) for label, rate in RATES.items()}
        wanted = {label: count if rows >= 200 else 0 for label, count in wanted.items()}
        made = [self._clean_row(item) for item in self._items(rows - sum(wanted.values()))]
        for label, count in wanted.items():
            damage: Callable[[], Row] = getattr(self, f"_{label}")
            made += [damage() for _ in range(count)]
        self.random.shuffle(made)
        _originals_first(made)
        return made

    def _items(self, count: int) -> list[Item]:
        """New items: a few of one phrase, most of two phrases, the rest of three."""
        singles = min(len(self.pools[0]), count // 20)
        pairs = min(len(self.pools[1]), count * 2 // 3)
        sizes = (singles, pairs, count - singles - pairs)
        return [self._item(size) for size, number in zip((1, 2, 3), sizes, strict=True) for _ in range(number)]

    def _item(self, size: int) -> Item:
        places = list(self.pools[size - 1].pop())
        self.random.shuffle(places)
        return tuple(self.book.fill(place, self.random) for place in places)

    def _texts(self, item: Item) -> tuple[str, str]:
        return self.book.text(item, "en"), self.book.text(item, self.language)

    def _new(self) -> tuple[str, str]:
        """The two sides of a new item, which no clean row uses."""
        return self._texts(self._item(3))

    def _clean_row(self, item: Item) -> Row:
        row = Row(*self._texts(item), "clean", len(self.clean))
        self.clean.append(row)
        return row

    def _copy(self, label: str) -> Row:
        return self.random.choice(self.clean)._replace(label=label)

    # One function per label, named after it.

    def _exact_duplicate(self) -> Row:
        return self._copy("exact_duplicate")

    def _near_duplicate(self) -> Row:
        row = self._copy("near_duplicate")
        change = self.random.choice((_capitals, _no_full_stop, _spaces, _exclaim))
        return row._replace(english=change(row.english), other=change(row.other))

    def _markup(self) -> Row:
        row = self._copy("markup")
        kind = self.random.randrange(3)
        if kind == 0:
            return row._replace(english=f"<p>{row.english}</p>", other=f"<p>{row.other}</p>")
        if kind == 1:
            return row._replace(other=f'<span class="text">{row.other}</span><br />')
        return row._replace(english=f"&nbsp;{row.english}", other=row.other.replace(" ", "&nbsp;", 1) + "&nbsp;")

    def _mojibake(self) -> Row:
        """UTF-8 read as if it were a one-byte code page."""
        marked = [row for row in self.clean if not row.other.isascii()]
        row = self.random.choice(marked or self.clean)._replace(label="mojibake")
        data = row.other.encode()
        try:
            return row._replace(other=data.decode("cp1252"))
        except UnicodeDecodeError:
            return row._replace(other=data.decode("latin-1"))

    def _misaligned(self) -> Row:
        """English, and the translation of an item without a phrase in common."""
        item = self._item(3)
        used = {phrase.place for phrase in item}
        apart = next(set_ for set_ in reversed(self.pools[2]) if not used.intersection(set_))
        other = tuple(self.book.fill(place, self.random) for place in apart)
        return Row(self.book.text(item, "en"), self.book.text(other, self.language), "misaligned", -1)

    def _third_language(self) -> str:
        avoid = {"en", self.language}.union(*(group for group in _ALIKE if self.language in group))
        return self.random.choice([language for language in self.book.languages if language not in avoid])

    def _wrong_target_language(self) -> Row:
        item = self._item(3)
        text = self.book.text(item, self._third_language())
        return Row(self.book.text(item, "en"), text, "wrong_target_language", -1)

    def _wrong_source_language(self) -> Row:
        item = self._item(3)
        text = self.book.text(item, self._third_language())
        return Row(text, self.book.text(item, self.language), "wrong_source_language", -1)

    def _swapped_sides(self) -> Row:
        english, other = self._new()
        return Row(other, english, "swapped_sides", -1)

    def _untranslated(self) -> Row:
        text = self.random.choice(self._new())
        return Row(text, text, "untranslated", -1)

    def _truncated(self) -> Row:
        """One side is cut off after a fifth to a third."""
        english, other = self._new()
        share = self.random.uniform(0.2, 0.33)
        if self.random.random() < 0.5:
            return Row(_head(english, share), other, "truncated", -1)
        return Row(english, _head(other, share), "truncated", -1)

    def _empty_side(self) -> Row:
        english, other = self._new()
        return Row(english, "", "empty_side", -1) if self.random.random() < 0.5 else Row("", other, "empty_side", -1)

    def _url_only(self) -> Row:
        url = f"https://www.example.org/{self.language}/{self.random.randrange(10**6)}"
        return Row(url, url, "url_only", -1)

    def _chat_template(self) -> Row:
        sides = zip(("user", "assistant"), self._new(), strict=True)
        english, other = (f"<|im_start|>{role} {text}<|im_end|>" for role, text in sides)
        return Row(english, other, "chat_template", -1)

    def _evaluation_leak(self) -> Row:
        """A row of the dev or test files, some with a small change."""
        english, other = self._texts(self.random.choice(self.evaluation))
        change = self.random.choice((_same, _same, _spaces, _no_full_stop))
        return Row(change(english), change(other), "evaluation_leak", -1)

    def _malformed(self) -> Row:
        """A byte that is not UTF-8 (0xFF; the escape stands for it until the file is written)."""
        english, other = self._new()
        return Row(english, other[:5] + "\udcff" + other[5:], "malformed", -1)


def _originals_first(rows: list[Row]) -> None:
    """Puts the clean row of a group before its copies, because the first of several duplicates is kept."""
    first: dict[int, int] = {}
    for place, row in enumerate(rows):
        if row.group >= 0 and first.setdefault(row.group, place) != place and row.label == "clean":
            rows[first[row.group]], rows[place] = row, rows[first[row.group]]


def _same(text: str) -> str:
    return text


def _head(text: str, share: float) -> str:
    return text[: max(4, int(len(text) * share))].rstrip()


def _capitals(text: str) -> str:
    """Capital letters, or a doubled full stop if the script has no capitals."""
    return text.upper() if text.upper() != text else text + text[-1]


def _no_full_stop(text: str) -> str:
    return text.rstrip(".!?。！？।؟") or text


def _spaces(text: str) -> str:
    return f" {text.replace(' ', '  ', 3)} "


def _exclaim(text: str) -> str:
    return _no_full_stop(text) + "!"


def evaluation_items(book: Phrasebook, size: int, seed: int) -> list[Item]:
    """Items for the dev and test files, the same for all pairs, like a real evaluation set with one English side."""
    random = Random(f"{seed}/evaluation")
    places = range(len(book.phrases))[EVALUATION_PHRASES]
    sets = [*itertools.combinations(places, 2), *itertools.combinations(places, 3)]
    return [tuple(book.fill(place, random) for place in places) for places in random.sample(sets, size)]


def _opus_shard(folder: Path, language: str, split: str, rows: list[Row]) -> Path:
    """Writes two files of lines; returns their path without the language."""
    first, second = sorted((language, "en"))
    stem = folder / "opus-100-corpus/v1.0/supervised" / f"{first}-{second}" / f"opus.{first}-{second}-{split}"
    for code in (first, second):
        lines = [row.english if code == "en" else row.other for row in rows]
        _write(Path(f"{stem}.{code}"), _encode(lines))
    return stem


def _nllb_shard(folder: Path, language: str, rows: list[Row], random: Random) -> Path:
    """Writes src, tgt, laser_score, src_lid, tgt_lid, src_source, src_url, tgt_source, tgt_url."""
    first, second = sorted((FLORES[language], FLORES["en"]))
    lines: list[str] = []
    malformed = 0
    for row in rows:
        sides = (row.english, row.other) if first == FLORES["en"] else (row.other, row.english)
        if row.label == "malformed":
            malformed += 1
            if malformed % 2:
                lines.append(sides[0])  # one column instead of nine
                continue
        lid = [f"{random.uniform(0.6, 1.0):.4f}" for _ in range(2)]
        urls = [f"https://www.example.org/{random.randrange(10**6)}" for _ in range(2)]
        lines.append("\t".join((*sides, _laser(row, random), *lid, "example", urls[0], "example", urls[1])))
    path = folder / "nllb" / f"{first}-{second}.gz"
    _write(path, _compress(_encode(lines)))
    return path


def _ccmatrix_shard(folder: Path, language: str, rows: list[Row], random: Random) -> Path:
    """Writes score, src, tgt."""
    first, second = sorted((language, "en"))
    lines = []
    for row in rows:
        sides = (row.english, row.other) if first == "en" else (row.other, row.english)
        lines.append("\t".join((_laser(row, random), *sides)))
    path = folder / "ccmatrix" / f"{first}-{second}.bitextf.tsv.gz"
    _write(path, _compress(_encode(lines)))
    return path


def _laser(row: Row, random: Random) -> str:
    """A margin score like that of mined bitext: a weak sign of a bad row."""
    bad = row.label in ("misaligned", "truncated", "wrong_target_language", "wrong_source_language")
    return f"{random.uniform(1.04, 1.12) if bad else random.uniform(1.08, 1.25):.6f}"


def _encode(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogateescape")


def _compress(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def build(out: Path, rows: int = 1200, seed: int = 1) -> dict[str, int]:
    """Writes the corpus.

    Args:
        out: folder; files of the same names are replaced.
        rows: rows of each training shard. With fewer than 200 there are no defects.
        seed: another seed gives other rows.

    Returns:
        the number of rows of each training shard, by its path in `out` (line pairs: without the language).

    Raises:
        ValueError: more rows are asked for than the phrasebook has combinations.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"rows must be between 1 and {MOST_ROWS}: the phrasebook has no more combinations.")
    book = Phrasebook.read()
    held_out = min(60, max(10, rows // 40))
    evaluation = evaluation_items(book, 2 * held_out, seed)
    corpora = {code: Corpus(book, code, evaluation, seed) for code in (*OPUS, *NLLB, *CCMATRIX)}
    shards: list[tuple[Path, str, list[Row]]] = []
    for code in OPUS:
        made = corpora[code].shard(rows)
        shards.append((_opus_shard(out, code, "train", made), code, made))
        held = [Row(book.text(item, "en"), book.text(item, code), "evaluation", -1) for item in evaluation]
        _opus_shard(out, code, "dev", held[:held_out])
        _opus_shard(out, code, "test", held[held_out:])
    for code in NLLB:
        made = corpora[code].shard(rows)
        shards.append((_nllb_shard(out, code, made, corpora[code].random), code, made))
    for code in CCMATRIX:
        made = corpora[code].shard(rows)
        shards.append((_ccmatrix_shard(out, code, made, corpora[code].random), code, made))
    truth = ["file\trow\tpair\tlabel\tgroup"]
    for path, code, made in shards:
        name = path.relative_to(out).as_posix()
        truth += [f"{name}\t{number}\ten-{code}\t{row.label}\t{row.group}" for number, row in enumerate(made)]
    _write(out / "truth.tsv", _encode(truth))
    return {path.relative_to(out).as_posix(): len(made) for path, _, made in shards}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes a small, noisy corpus from the phrasebook.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--rows", type=int, default=1200, help="rows of each training shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        made = build(options.out, options.rows, options.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(made)} training shards, {sum(made.values()):,} rows: {options.out}")


if __name__ == "__main__":
    main()
