"""Makes large corpora for measurements: `python tests/benchmarks/generate.py OUT --rows 5000000 --pairs en-de,en-sw`.

A sentence is a sample of dictionary entries (`words.tsv`: common words, the same row is the same meaning), in the
same order on both sides, so that language identification recognises it and an alignment model can learn it. Word ranks
follow Zipf's law; behind the real words comes a tail of made-up ones in the language's script, which gives the models
a vocabulary of natural size. Some 4 % of tokens are numbers. Of the rows, `NOISE` are not what they should be.

The same arguments give the same bytes. Nothing here is fit to judge quality by: for that there is real text.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from isal import isal_zlib

HERE = Path(__file__).parent
FLORES = {
    "en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "es": "spa_Latn", "sw": "swh_Latn", "ru": "rus_Cyrl",
    "zh": "zho_Hans",
}  # fmt: skip
NOISE = {
    "exact_duplicate": 0.04,  # of a row near by
    "boilerplate": 0.01,  # one of `BOILERPLATE` rows, all over the corpus
    "misaligned": 0.02,
    "swapped_sides": 0.005,
    "untranslated": 0.005,
    "empty_side": 0.005,
}
WORDS_A_ROW = (4, 30)
VOCABULARY = 20_000
ZIPF, ZIPF_SHIFT = 1.2, 3.7
NUMBERS = 1999
NUMBER_RATE = 0.04
BOILERPLATE = 500
BATCH = 100_000

_SYLLABLES = {
    "Latn": "ba be bi bo da de di do fa ga ge ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe ra re sa se ta te",
    "Cyrl": "ба бе би бо да де ди до га го ка ке ки ко ла ле ли ло ма ме ми мо на не ни но па пе ра ре са се та те",
    "Hans": "山 水 木 火 土 金 石 田 云 雨 风 雪 花 草 竹 林 河 海 湖 江 东 西 南 北 春 秋 冬 夏 文 明 光 华 安 平 永",
}

Ids = npt.NDArray[np.int64]
Text: TypeAlias = "pa.Array[Any]"


class Lexicon(NamedTuple):
    """The words of a pair of languages, each language three times over: in the sentence (with the space before it),
    capitalised (the first word), and with the full stop (the last)."""

    data: npt.NDArray[np.uint8]
    offsets: Ids
    size: int
    """Words of one language in one of the three forms."""


def lexicon(languages: tuple[str, str]) -> Lexicon:
    """Reads the real words of two languages and makes up the rest, the same words each time."""
    forms: list[str] = []
    for language in languages:
        words = _words(language)
        chinese = FLORES[language].endswith("Hans")
        joint, stop = ("", "。") if chinese else (" ", ".")
        forms += [joint + word for word in words]
        forms += [word[0].upper() + word[1:] for word in words]
        forms += [joint + word + stop for word in words]
    encoded = [form.encode() for form in forms]
    offsets = np.concatenate(([0], np.cumsum([len(form) for form in encoded])))
    return Lexicon(np.frombuffer(b"".join(encoded), np.uint8), offsets, len(words))


def _words(language: str) -> list[str]:
    header, *rows = (HERE / "words.tsv").read_text(encoding="utf-8").splitlines()
    if language not in header.split("\t"):
        raise SystemExit(f"No words for {language!r}. Languages: {header.replace(chr(9), ' ')}.")
    column = header.split("\t").index(language)
    words = [row.split("\t")[column] for row in rows]
    script = FLORES[language][-4:]
    syllables = _SYLLABLES[script].split()
    random = np.random.default_rng(zlib.crc32(language.encode()))
    known = set(words)
    while len(words) < VOCABULARY:
        for count, *choice in random.integers(0, len(syllables), (VOCABULARY, 5)).tolist():
            word = "".join(syllables[which] for which in choice[: 2 + count % (2 if script == "Hans" else 3)])
            if word not in known and len(words) < VOCABULARY:
                known.add(word)
                words.append(word)
    return [*words, *(str(number) for number in range(1, NUMBERS + 1))]


class Pairs(NamedTuple):
    """Rows of one pair of languages."""

    src: Text
    tgt: Text


def batches(src_lang: str, tgt_lang: str, rows: int, seed: int) -> Iterator[Pairs]:
    """Rows of one pair, in batches of `BATCH`."""
    words = lexicon((src_lang, tgt_lang))
    random = np.random.default_rng([seed, zlib.crc32(f"{src_lang}-{tgt_lang}".encode())])
    weights = 1.0 / (np.arange(VOCABULARY) + ZIPF_SHIFT) ** ZIPF
    # The inverse of the distribution function as a table: one look-up a token.
    ranks = np.searchsorted(np.cumsum(weights / weights.sum()), (np.arange(1 << 20) + 0.5) / (1 << 20))
    boilerplate, boilerplate_offsets = _sentences(BOILERPLATE, ranks, random)
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        ids, offsets = _sentences(count, ranks, random)
        # The boilerplate's sentences follow those of the batch.
        offsets = np.concatenate((offsets, offsets[-1] + boilerplate_offsets[1:]))
        ids = np.concatenate((ids, boilerplate))
        src, tgt = _noise(count, random)
        yield Pairs(_text(ids, offsets, *src, words), _text(ids, offsets, *tgt, words))


def _sentences(count: int, ranks: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Word ids of `count` sentences, one after the other, and where each starts."""
    lengths = random.integers(WORDS_A_ROW[0], WORDS_A_ROW[1] + 1, count)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = int(offsets[-1])
    ids = ranks[random.integers(0, ranks.size, tokens)]
    number = random.random(tokens) < NUMBER_RATE
    number[1:] &= ~number[:-1]  # two in a row would be one number in a script without spaces
    ids[number] = VOCABULARY + random.integers(0, NUMBERS, int(number.sum()))
    return ids, offsets


def _noise(count: int, random: np.random.Generator) -> tuple[tuple[Ids, Ids], tuple[Ids, Ids]]:
    """For each side of each row the sentence (-1: empty) and the language (0 or 1) that it is written in."""
    src, src_language = np.arange(count), np.zeros(count, np.int64)
    tgt, tgt_language = np.arange(count), np.ones(count, np.int64)
    bounds = np.cumsum([0, *NOISE.values()])
    draw = random.random(count)
    rows = {name: np.flatnonzero((bounds[i] <= draw) & (draw < bounds[i + 1])) for i, name in enumerate(NOISE)}

    where = rows["exact_duplicate"]
    src[where] = tgt[where] = random.integers(0, count, where.size)
    where = rows["boilerplate"]
    src[where] = tgt[where] = count + random.integers(0, BOILERPLATE, where.size)
    where = rows["misaligned"]
    tgt[where] = random.integers(0, count, where.size)
    src_language[rows["swapped_sides"]] = 1
    tgt_language[rows["swapped_sides"]] = 0
    tgt_language[rows["untranslated"]] = 0
    tgt[rows["empty_side"]] = -1
    return (src, src_language), (tgt, tgt_language)


def _text(ids: Ids, offsets: Ids, sentence: Ids, language: Ids, words: Lexicon) -> Text:
    starts, data = _spell(ids, offsets, sentence, language, words.data, words.offsets, words.size)
    return pa.Array.from_buffers(pa.string(), sentence.size, [None, pa.py_buffer(starts), pa.py_buffer(data)])


@numba.njit(nogil=True)  # not cached: a cache would tie it to the name that it was imported by
def _spell(ids, offsets, sentence, language, letters, spelling, size):  # type: ignore[no-untyped-def]
    """Arrow offsets and data of each row's text."""
    rows = sentence.size
    starts = np.zeros(rows + 1, np.int32)
    for row in range(rows):
        length = 0
        if sentence[row] >= 0:
            first, end = offsets[sentence[row]], offsets[sentence[row] + 1]
            for at in range(first, end):
                word = ids[at] + size * (3 * language[row] + (1 if at == first else 2 if at == end - 1 else 0))
                length += spelling[word + 1] - spelling[word]
        starts[row + 1] = starts[row] + length
    data = np.empty(starts[rows], np.uint8)
    place = 0
    for row in range(rows):
        if sentence[row] >= 0:
            first, end = offsets[sentence[row]], offsets[sentence[row] + 1]
            for at in range(first, end):
                word = ids[at] + size * (3 * language[row] + (1 if at == first else 2 if at == end - 1 else 0))
                for letter in range(spelling[word], spelling[word + 1]):
                    data[place] = letters[letter]
                    place += 1
    return starts, data


class _Gzip:
    """A gzip file with no time in it, so that the same rows give the same bytes; at the fastest level."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._packer = isal_zlib.compressobj(0, isal_zlib.DEFLATED, 31)

    def write(self, data: bytes | memoryview | pa.Buffer) -> None:
        self._file.write(self._packer.compress(data))

    def __enter__(self) -> _Gzip:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.write(self._packer.flush())
        self._file.close()


def _lines(*columns: Text | str) -> pa.Buffer:
    """The rows as lines, columns parted by tabs: the data of one Arrow array."""
    join: Any = pc.binary_join_element_wise
    rows = join(*columns, "\t") if len(columns) > 1 else columns[0]
    rows = join(rows, "", "\n")
    first, end = np.frombuffer(rows.buffers()[1], np.int32)[[rows.offset, rows.offset + len(rows)]]
    data: pa.Buffer = rows.buffers()[2]
    return data.slice(int(first), int(end - first))


def _choices(texts: Sequence[str], count: int, random: np.random.Generator) -> Text:
    return pa.array(texts, pa.string()).take(random.integers(0, len(texts), count))


def write(out: Path, layout: str, pair: tuple[str, str], rows: int, seed: int) -> None:
    """Writes the rows of one pair in one of the layouts `nllb`, `opus100`, `tsv`."""
    a, b = pair
    made = batches(a, b, rows, seed)
    random = np.random.default_rng([seed, 1])
    with ExitStack() as stack:
        if layout == "opus100":
            first, second = sorted(pair)
            folder = out / "opus-100-corpus/v1.0/supervised" / f"{first}-{second}"
            folder.mkdir(parents=True, exist_ok=True)
            files: dict[str, IO[bytes]] = {
                code: stack.enter_context((folder / f"opus.{first}-{second}-train.{code}").open("wb")) for code in pair
            }
            for batch in made:
                files[a].write(_lines(batch.src))
                files[b].write(_lines(batch.tgt))
        elif layout == "nllb":
            swap = FLORES[a] > FLORES[b]
            name = "-".join(sorted((FLORES[a], FLORES[b])))
            (out / "nllb").mkdir(parents=True, exist_ok=True)
            packed = stack.enter_context(_Gzip(out / "nllb" / f"{name}.gz"))
            laser = [f"{1.04 + 0.0002 * step:.6f}" for step in range(1000)]
            lid = [f"{0.5 + 0.0005 * step:.4f}" for step in range(1000)]
            urls = [f"https://www.example.org/{number}" for number in range(10_000)]
            for batch in made:
                sides = (batch.tgt, batch.src) if swap else (batch.src, batch.tgt)
                columns = [_choices(texts, len(batch.src), random) for texts in (laser, lid, lid, urls, urls)]
                packed.write(_lines(*sides, *columns[:3], "example", columns[3], "example", columns[4]))
        else:
            out.mkdir(parents=True, exist_ok=True)
            plain = stack.enter_context((out / f"{a}-{b}.tsv").open("wb"))
            for batch in made:
                plain.write(_lines(batch.src, batch.tgt))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes large corpora for measurements.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of all pairs together (default: %(default)s)")
    parser.add_argument("--pairs", default="en-de,en-sw", help="pairs of languages (default: %(default)s)")
    parser.add_argument("--format", choices=("nllb", "opus100", "tsv"), default="nllb", help="layout (default: nllb)")
    parser.add_argument("--seed", type=int, default=1, help="seed (default: %(default)s)")
    options = parser.parse_args(arguments)
    pairs: list[tuple[str, str]] = []
    for text in options.pairs.split(","):
        a, _, b = text.partition("-")
        pairs.append((a, b))
    began = time.perf_counter()
    for number, pair in enumerate(pairs):
        rows = options.rows // len(pairs) + (number < options.rows % len(pairs))
        write(options.out, options.format, pair, rows, options.seed)
    seconds = time.perf_counter() - began
    print(f"{options.rows:,} rows in {seconds:.1f} s ({options.rows / max(seconds, 1e-9):,.0f} rows/s): {options.out}")


if __name__ == "__main__":
    main()
