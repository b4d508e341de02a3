"""What a scorer is worth on given languages: agreement with human scores, and telling true pairs from shuffled ones."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from corpusprep.codes import explicit, parse_pair
from corpusprep.errors import InputError, SettingsError
from corpusprep.report.tables import columns
from corpusprep.sources.files import unpacked_name
from corpusprep.stages.quality import QualitySettings, Scorer, learns, open_scorer, prepare

F32 = npt.NDArray[np.float32]

_SOURCES = ("src", "source")
_TARGETS = ("tgt", "mt", "target", "translation")
_HUMAN = ("score", "human", "z_mean", "da_mean", "da", "z")


@dataclass(frozen=True)
class ScorerAgreement:
    """How a scorer does on one file.

    Attributes:
        pair: languages, in the order of the file.
        rows: rows with both sides, and a human score where there are any.
        spearman, pearson: correlation with the human scores; None without them.
        margin: half of the 95 % confidence interval of the correlations (Fisher's z), near 0.
        auc: chance that a true pair scores above a shuffled one; None where nothing was shuffled.
        unjudged: rows that the scorer gave no score.
    """

    pair: str
    rows: int
    spearman: float | None
    pearson: float | None
    margin: float | None
    auc: float | None
    unjudged: int


def agree(
    file: str | Path,
    settings: QualitySettings,
    *,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    human: str | int | None = None,
    shuffled: float = 0.1,
    seed: int = 1,
    scorer: Scorer | None = None,
) -> ScorerAgreement:
    """Scores the rows of a file and compares.

    Args:
        file: tab-separated, packed with gzip or not, without quoting: source, translation and human score. The columns are
            the first three, or found by name where the first line names them.
        settings: the scorer. A scorer that learns does so from these rows. A COMET model scores the first column as source
            where the direction is `forward`.
        src_lang, tgt_lang: languages, where the file is not named by them, as in `en-de.tsv`.
        human: column of the human scores, by name, or by number from 0.
        shuffled: share of rows to which the translation of another is put, in a second scoring, for the AUC; 0 for none.
        seed: decides which.
        scorer: the settings' scorer, where it is open already; by default it is opened here.

    Raises:
        InputError: the file cannot be read as that.
        SettingsError: the languages are not known, or the scorer cannot be had.
    """
    path = Path(file)
    sides = _languages(path, src_lang, tgt_lang)
    table, scores = _read(path, sides, human)
    if table.num_rows < 3:
        raise InputError(str(path), f"has {table.num_rows} rows that can be compared", "Give it more")
    spearman = pearson = margin = None
    if scorer is None and not learns(settings):
        scorer = open_scorer(settings, {})
    found = scorer.score(table) if scorer is not None else _learn_and_score(table, settings, sides, seed)
    judged = ~np.isnan(found)
    if scores is not None and judged.sum() > 3:
        frame = pl.DataFrame({"ours": found[judged], "human": scores[judged]})
        spearman, pearson = (
            float(frame.select(pl.corr("ours", "human", method=method)).item()) for method in ("spearman", "pearson")
        )
        margin = float(np.tanh(1.96 / np.sqrt(judged.sum() - 3)))
    auc = None
    if shuffled and table.num_rows >= 20:
        mixed, wrong = _mismatched(table, shuffled, seed)
        if scorer is None:  # what learns, learns from both
            scores_of_all = _learn_and_score(mixed, settings, sides, seed)
        else:
            scores_of_all = found.copy()
            scores_of_all[wrong] = scorer.score(mixed.take(pa.array(wrong, pa.int64())))
        auc = _auc(scores_of_all, wrong)
    return ScorerAgreement("-".join(sides), table.num_rows, spearman, pearson, margin, auc, int((~judged).sum()))


def describe(found: Sequence[ScorerAgreement]) -> str:
    """A table of several files, with the mean of all."""

    def shown(value: float | None) -> str:
        return "" if value is None or np.isnan(value) else f"{value:.3f}"

    rows = [
        (
            f.pair,
            f.rows,
            shown(f.spearman),
            shown(f.pearson),
            "" if f.margin is None else f"±{f.margin:.3f}",
            shown(f.auc),
        )
        for f in found
    ]
    if len(found) > 1:
        means: list[str] = []
        for name in ("spearman", "pearson", "margin", "auc"):
            values = [value for f in found if (value := getattr(f, name)) is not None and not np.isnan(value)]
            means.append("" if not values or name == "margin" else shown(float(np.mean(values))))
        rows.append(("mean", sum(f.rows for f in found), means[0], means[1], means[2], means[3]))
    text = columns(rows, ("pair", "rows", "spearman", "pearson", "95 %", "auc true/shuffled"))
    unjudged = {f.pair: f.unjudged for f in found if f.unjudged}
    return text + "".join(f"\n{pair}: {count:,} rows were not judged." for pair, count in unjudged.items())


def _learn_and_score(table: pa.Table, settings: QualitySettings, sides: tuple[str, str], seed: int) -> F32:
    # A state is found by its pair's name.
    states = {"-".join(sides): prepare(table, settings, seed)}
    return open_scorer(settings, states).score(table)


def _mismatched(table: pa.Table, share: float, seed: int) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """The table with a share of its translations moved to other rows, and which rows these are."""
    draw = np.random.default_rng(seed)
    wrong = draw.permutation(table.num_rows)[: max(2, int(table.num_rows * share))]
    order = np.arange(table.num_rows)
    order[wrong] = np.roll(wrong, 1)  # each gets another's: what is drawn is in no order
    return table.set_column(1, "tgt", table["tgt"].take(pa.array(order, pa.int64()))), wrong


def _auc(scores: F32, wrong: npt.NDArray[np.int64]) -> float:
    """The area under the curve of true against mismatched rows; NaN where either were not judged."""
    is_wrong = np.zeros(scores.size, np.bool_)
    is_wrong[wrong] = True
    judged = ~np.isnan(scores)
    ranks = pl.Series(scores[judged]).rank("average").to_numpy()
    bad = is_wrong[judged]
    good = int((~bad).sum())
    if not good or good == bad.size:
        return float("nan")
    return float((ranks[~bad].sum() - good * (good + 1) / 2) / (good * int(bad.sum())))


def _languages(path: Path, src: str | None, tgt: str | None) -> tuple[str, str]:
    if src is not None and tgt is not None:
        return explicit(src), explicit(tgt)
    stem = unpacked_name(path.name).rsplit(".", 1)[0]
    for word in stem.split("."):
        try:
            return parse_pair(word)
        except SettingsError:
            continue
    raise SettingsError(
        f"{path}: nothing tells its languages. Name it as in en-de.tsv, or give --src-lang and --tgt-lang."
    )


def _read(
    path: Path, sides: tuple[str, str], human: str | int | None
) -> tuple[pa.Table, npt.NDArray[np.float64] | None]:
    """The rows that have all that they need, and their human scores."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(str(path), f"cannot be read ({error})", "Check the path, or fetch it again") from None
    lines = content.decode("utf-8", "replace").removeprefix("\ufeff").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    fields = [line.removesuffix("\r").split("\t") for line in lines]
    if not fields:
        raise InputError(str(path), "is empty", "Name a file with rows")
    src, tgt, score, header = _places(fields[0], human, path)
    texts: list[tuple[str, str]] = []
    scores: list[float] = []
    for row in fields[header:]:
        if len(row) <= max(src, tgt, score or 0) or not row[src].strip() or not row[tgt].strip():
            continue
        if score is not None:
            try:
                value = float(row[score])
            except ValueError:
                continue
            if not np.isfinite(value):
                continue
            scores.append(value)
        texts.append((row[src], row[tgt]))
    data = {"src": [s for s, _ in texts], "tgt": [t for _, t in texts]}
    languages = {f"{side}_lang": [code] * len(texts) for side, code in zip(("src", "tgt"), sides, strict=True)}
    table: Any = pa.table({name: pa.array(values, pa.string()) for name, values in (data | languages).items()})
    return table, np.array(scores) if score is not None else None


def _places(first: list[str], human: str | int | None, path: Path) -> tuple[int, int, int | None, int]:
    """Columns of source, translation and human score, and how many lines are header."""
    names = [name.strip().lower() for name in first]

    def named(wanted: Sequence[str]) -> int | None:
        return next((names.index(name) for name in wanted if name in names), None)

    src, tgt = named(_SOURCES), named(_TARGETS)
    header = src is not None and tgt is not None
    if isinstance(human, str) and not (header and human.lower() in names):
        raise InputError(str(path), f"its first line names no column {human!r}", "Give the column by number, from 0", 0)
    if len(first) < 2:
        raise InputError(str(path), "its first line has one column", "Separate source and translation by a tab", 0)
    if isinstance(human, str):
        score: int | None = names.index(human.lower())
    elif human is not None:
        score = human
    elif header:
        score = named(_HUMAN)
    else:
        score = 2 if len(first) > 2 else None
    return (src, tgt, score, 1) if src is not None and tgt is not None else (0, 1, score, 0)
