"""What a scorer is worth on given languages: agreement with human scores, and telling true pairs from shuffled ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.codes import explicit, parse_pair
from corpusprep.commands.reader import TableReader, remedies_as_options
from corpusprep.errors import InputError, SettingsError
from corpusprep.report.tables import columns
from corpusprep.sources.files import printable, unpacked_name
from corpusprep.sources.tsv import first_line
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
        file: tab-separated, packed or not, without quoting: source, translation and human score. The columns are the first
            three, or found by name where the first line names them. `-` is standard input. Lines that cannot be read, that
            lack a side or whose score is no number are left out.
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
    with remedies_as_options(on_error=False):
        first = first_line(str(path))
    file = printable(str(path))
    if not first:
        raise InputError(file, "it is empty", "Name a file with rows")
    places = _places(first, human, file)
    reader = TableReader(path, named="tsv", columns=places, src_lang=sides[0], tgt_lang=sides[1], on_error=None)
    table, _ = reader.whole()
    texts: list[Any] = [pc.utf8_trim_whitespace(table[side]) for side in ("src", "tgt")]
    usable: Any = pc.and_(*(pc.not_equal(text, pa.scalar("")) for text in texts))
    if "score" in places:
        usable = pc.and_(usable, pc.is_valid(table["score"]))
    table = table.filter(usable)
    scores = table["score"].to_numpy().astype(np.float64) if "score" in places else None
    languages = [pa.repeat(pa.scalar(code, pa.string()), table.num_rows) for code in sides]
    data = {"src": table["src"], "tgt": table["tgt"], "src_lang": languages[0], "tgt_lang": languages[1]}
    return pa.table(data), scores


def _places(first: Sequence[str], human: str | int | None, file: str) -> Mapping[str, str | int]:
    """The columns of source, translation and human score: by name where the first line is a header, else by number."""
    names = {name.strip().lower(): name for name in reversed(first)}
    src, tgt = (next((names[name] for name in wanted if name in names), None) for wanted in (_SOURCES, _TARGETS))
    header = src is not None and tgt is not None
    if isinstance(human, str) and not (header and human.lower() in names):
        raise InputError(file, f"its first line names no column {human!r}", "Give the column by number, from 0", 0)
    if len(first) < 2:
        raise InputError(file, "its first line has one column", "Separate source and translation by a tab", 0)
    if isinstance(human, str):
        score: str | int | None = names[human.lower()]
    elif human is not None:
        score = human
    elif header:
        score = next((names[name] for name in _HUMAN if name in names), None)
    else:
        score = 2 if len(first) > 2 else None
    found: dict[str, str | int] = {"src": 0, "tgt": 1} if src is None or tgt is None else {"src": src, "tgt": tgt}
    return found if score is None else found | {"score": score}
