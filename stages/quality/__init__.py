"""Stage 4, quality: scores how well the two sides of a row translate each other, and drops rows with low scores.

A scorer has one method, `score(table) -> float32[n]`. `lexical`, the default, learns from the corpus itself and needs
no model; `comet` runs a COMET quality estimation checkpoint; `column` uses a score from the source; `module:function`
is a custom scorer. If a score is NaN, the row was not judged and is kept.

A COMET model scores a translation of a source. Bitext does not say which side is the source; `direction` does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from corpusprep.arrow import hash_strings, order_of, value_of
from corpusprep.codes import matches, parse_pair
from corpusprep.errors import RunError, SettingsError
from corpusprep.stage import Outcome, Settings, StageSettings, load_function, pairs_of, split

F32 = npt.NDArray[np.float32]

_BUILT_IN = ("lexical", "comet", "column")
_LEXICAL_THRESHOLD = 0.2


class PairSettings(Settings):
    """Overrides for one language pair."""

    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Drop rows of this pair with a score below this."""
    quantile: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Drop this share of the pair's rows, those with the lowest scores."""

    @model_validator(mode="after")
    def _one(self) -> PairSettings:
        if (self.threshold is None) == (self.quantile is None):
            raise ValueError("give exactly one of threshold and quantile")
        return self


class QualitySettings(StageSettings):
    """Settings of the quality stage."""

    scorer: str = "lexical"
    """`lexical`, `comet`, `column`, or a custom function as `module:function` (takes an Arrow table, returns one float
    per row)."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Drop rows with a score below this. If neither threshold nor quantile is set, `lexical` uses 0.2; the other
    scorers have different scales and drop nothing."""
    quantile: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Drop this share of each pair's rows, those with the lowest scores; replaces threshold."""
    pair: dict[str, PairSettings] = Field(default_factory=dict)
    """Threshold or quantile for single pairs, as in `[quality.pair.en-sw]`."""
    sample: Annotated[int, Field(ge=1)] = 100_000
    """`lexical`: rows of each pair to learn from."""
    min_rows: Annotated[int, Field(ge=0)] = 200
    """`lexical`: a pair with fewer rows to learn from is scored, but none of its rows are dropped."""
    column: Annotated[str, Field(min_length=1)] = "score"
    """`column`: the column with the score; rows with null are kept."""
    until: Literal["all", "budget"] = "all"
    """`budget`: rows are scored in the order of prior until the rows that pass fill each pair's share of
    balance.budget; the other rows are dropped as `quality.not_needed`."""
    prior: Literal["hash", "score", "lexical"] = "hash"
    """The order in which rows are scored until the budget is filled: at random by the seed (`hash`), or best first by
    the score of the source (`score`) or by the lexical score (`lexical`)."""
    model: str | None = None
    """`comet`: name on the Hugging Face hub, folder, or `.ckpt` file of a checkpoint that needs no reference."""
    encoder: str | None = None
    """`comet`: name on the hub or folder of the encoder's config.json and tokenizer. The default is the model's folder
    if it has these files, else the pretrained model that the model names."""
    direction: Literal["english", "forward", "backward"] = "english"
    """`comet`: which side is the source: the English side, or `src` if there is none (`english`); always `src`
    (`forward`); or always `tgt` (`backward`)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`comet`: precision of the model; `auto` is bf16 on a GPU that supports it, else fp32."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """`comet`: maximum tokens per batch, except for longer rows; by default 65,536 on a GPU, and 4,096 without."""
    kernels: bool = True
    """`comet`: on a GPU, use the built-in kernels, which Triton compiles if there is a C compiler; false uses only
    PyTorch's kernels."""
    backend: Literal["native", "unbabel"] = "native"
    """`comet`: `unbabel` runs the model with the package unbabel-comet, for model classes that `native` does not
    support."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """`comet` with `unbabel`: maximum rows per batch."""
    cache: str | None = None
    """`comet`: folder that keeps scores for other runs and recipes, by text, direction and model. If not set, each run
    keeps them in its own folder `scores`."""

    @field_validator("scorer")
    @classmethod
    def _known(cls, value: str) -> str:
        module, colon, function = value.partition(":")
        if value not in _BUILT_IN and not (colon and module and function):
            raise ValueError(f"{value!r} is not a scorer; use lexical, comet, column, or a custom module:function")
        return value

    @field_validator("pair")
    @classmethod
    def _pairs(cls, value: dict[str, PairSettings]) -> dict[str, PairSettings]:
        seen: dict[frozenset[str], str] = {}
        for name in value:
            try:
                key = frozenset(parse_pair(name))
            except SettingsError as error:
                raise ValueError(str(error)) from None
            if key in seen:
                raise ValueError(f"{seen[key]!r} and {name!r} name the same pair")
            seen[key] = name
        return value

    @model_validator(mode="after")
    def _agree(self) -> QualitySettings:
        if self.threshold is not None and self.quantile is not None:
            raise ValueError("give threshold or quantile, not both")
        if self.until == "budget" and (
            self.quantile is not None or any(p.quantile is not None for p in self.pair.values())
        ):
            raise ValueError('a quantile needs the scores of all rows: give a threshold, or remove until = "budget"')
        if self.until == "all" and self.prior != "hash":
            raise ValueError('prior is used only with until = "budget": set until = "budget", or remove prior')
        if self.scorer == "comet" and self.model is None:
            raise ValueError('the comet scorer needs a model, such as model = "Unbabel/wmt22-cometkiwi-da"')
        return self


def quality(
    table: pa.Table,
    settings: QualitySettings = QualitySettings(),
    states: Mapping[str, bytes] | None = None,
    seed: int = 1,
) -> Outcome:
    """Scores rows and drops those below their pair's cut-off.

    Args:
        table: rows with `src tgt src_lang tgt_lang`, any pairs mixed.
        settings: the scorer and the thresholds.
        states: results of `prepare`, by pair (`"en-sw"`); if None, a scorer that learns does so from the table itself.
        seed: seed of the sample, if states is None.

    Returns:
        The rows with a column `quality` (float32; null if not judged). Dropped rows have the reason `quality.score`.

    Examples:
        A score from the table; the lexical scorer needs thousands of rows to learn from.

        >>> sides = {"src": ["bread", "water"], "tgt": ["Brot", "Haus"], "src_lang": ["en"] * 2, "tgt_lang": ["de"] * 2}
        >>> table = pa.table({**sides, "laser": [1.2, 0.9]})
        >>> kept, dropped = quality(table, QualitySettings(scorer="column", column="laser", threshold=1.0))
        >>> kept["tgt"].to_pylist(), dropped["reason"].to_pylist()
        (['Brot'], ['quality.score'])
    """
    if not settings.enabled:
        return split(table, np.zeros(table.num_rows, np.uint8), [])
    table = _plain(table)
    names, codes = pairs_of(table)
    if states is None:
        states = {
            name: prepare(table.filter(pa.array(codes == k)), settings, seed)
            for k, name in enumerate(names)
            if learns(settings)
        }
    scores = open_scorer(settings, states).score(table)
    verdict = np.zeros(table.num_rows, np.uint8)
    for k, name in enumerate(names):
        rows = codes == k
        mine = [scores[rows]]
        limit = cutoff(mine.copy, settings, name, evidence(settings, states.get(name, b"")))
        if limit is not None:
            verdict[rows] = mine[0] < limit
    return split(with_scores(table, scores), verdict, ["quality.score"])


class Scorer(Protocol):
    """Scores rows."""

    def score(self, table: pa.Table) -> F32:
        """One score per row, higher is better, NaN if the row is not judged; shape (n,)."""


def learns(settings: QualitySettings) -> bool:
    """Whether the scorer must see a sample of each pair before it can score."""
    return settings.scorer == "lexical"


def prepare(sample: pa.Table, settings: QualitySettings, seed: int) -> bytes:
    """Learns from rows of one pair. The same rows in any order give the same bytes.

    Returns:
        A state for `open_scorer`; empty if the scorer does not learn.
    """
    if not learns(settings):
        return b""
    from corpusprep.stages.quality.lexical import learn

    return learn(sample, settings.sample, seed)


def open_scorer(settings: QualitySettings, states: Mapping[str, bytes]) -> Scorer:
    """The scorer that the settings name. A scorer that learns does not judge rows whose pair has no state.

    Raises:
        SettingsError: a custom function cannot be loaded.
        RunError: COMET is not installed, or its model cannot be loaded.
    """
    if settings.scorer == "lexical":
        from corpusprep.stages.quality.lexical import LexicalScorer

        return LexicalScorer(states)
    if settings.scorer == "comet":
        return _Directed(_open_comet(settings), settings.direction)
    if settings.scorer == "column":
        return _ColumnScorer(settings.column)
    return _FunctionScorer(settings.scorer)


def evidence(settings: QualitySettings, state: bytes) -> int | None:
    """Number of rows that a state was learned from; None if the scorer does not learn."""
    if not learns(settings):
        return None
    from corpusprep.stages.quality.lexical import rows_of

    return rows_of(state)


def cutoff(
    scores: Callable[[], Iterable[F32]], settings: QualitySettings, pair: str, evidence: int | None = None
) -> float | None:
    """The score below which rows of a pair are dropped.

    Args:
        scores: returns all scores of the pair, in pieces, as often as it is called: twice for a quantile, else never.
        pair: name of the pair, such as `"en-sw"`.
        evidence: result of `evidence` for the pair's state.

    Returns:
        The limit, or None if no rows are dropped; `explain` gives the reason.
    """
    rule = _rule(settings, pair)
    if rule is None or explain(settings, pair, evidence) is not None:
        return None
    if rule.threshold is not None:
        return rule.threshold
    assert rule.quantile is not None
    high = np.zeros(1 << 16, np.int64)
    for piece in scores():
        high += np.bincount(order_of(piece[~np.isnan(piece)]) >> np.uint32(16), minlength=1 << 16)
    size = int(high.sum())
    if size == 0:
        return None
    place = math.floor(rule.quantile * size)
    leading = int(np.searchsorted(np.cumsum(high), place, side="right"))
    place -= int(high[:leading].sum())
    low = np.zeros(1 << 16, np.int64)
    for piece in scores():
        order = order_of(piece[~np.isnan(piece)])
        low += np.bincount(order[order >> np.uint32(16) == leading] & np.uint32(0xFFFF), minlength=1 << 16)
    return value_of(leading << 16 | int(np.searchsorted(np.cumsum(low), place, side="right")))


def explain(settings: QualitySettings, pair: str, evidence: int | None = None) -> str | None:
    """Why no rows of a pair are dropped, as one sentence for the manifest; None if rows may be dropped."""
    if evidence is not None and evidence < settings.min_rows:
        return (
            f"{pair}: {evidence} rows are too few to learn from (quality.min_rows = {settings.min_rows}), "
            "so the quality stage drops no rows of this pair."
        )
    if _rule(settings, pair) is None:
        return f"{pair}: neither quality.threshold nor quality.quantile is set, so the quality stage drops no rows."
    return None


def require(settings: QualitySettings) -> None:
    """Checks everything that the scorer needs, and downloads models from the hub, so that a run fails early.

    Raises:
        RunError: a package is not installed, or a model cannot be found or downloaded.
        SettingsError: a custom function cannot be loaded.
    """
    if not settings.enabled:
        return
    if settings.scorer == "comet":
        if settings.backend == "unbabel":
            from corpusprep.stages.quality.comet.unbabel import import_comet

            import_comet()
            model_files(settings)
        else:
            from corpusprep.stages.quality.comet import check, import_torch
            from corpusprep.stages.quality.comet.files import find_model

            assert settings.model is not None
            import_torch()
            check(find_model(settings.model, settings.encoder))
        if settings.cache is not None:
            try:
                Path(settings.cache).expanduser().mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(
                    f"quality.cache = {settings.cache!r}: the folder cannot be created ({error.strerror}). Set another "
                    "folder, or remove quality.cache."
                ) from None
    elif settings.scorer not in _BUILT_IN:
        _FunctionScorer(settings.scorer)


def model_files(settings: QualitySettings) -> list[Path]:
    """The files whose content determines the scores; a hub model that is not in the local cache is downloaded.

    Raises:
        RunError: a model cannot be found or downloaded.
    """
    if settings.scorer != "comet":
        return []
    from corpusprep.stages.quality.comet.files import find_checkpoint, find_model

    assert settings.model is not None
    if settings.backend == "unbabel":
        checkpoint = find_checkpoint(settings.model)
        return [checkpoint, checkpoint.parent.parent / "hparams.yaml"]
    return list(find_model(settings.model, settings.encoder))


SCORE_VERSION = 2
"""Version of the COMET scorer: increase it if the same model gives the same text a different score."""


def score_keys(table: pa.Table, settings: QualitySettings) -> npt.NDArray[np.uint64]:
    """Keys of COMET scores: 128-bit hashes of source and translation, shape (n, 2)."""
    source, translation = _sides(table, settings.direction)
    halves = [hash_strings(translation, hash_strings(source, seed)) for seed in (1, 2)]
    return np.stack(halves, 1)


def decided(settings: QualitySettings) -> QualitySettings:
    """The settings with `precision` and `kernels` resolved for this machine."""
    from corpusprep.stages.quality.comet import kernels_of, precision_of

    found = {"precision": precision_of(settings.precision), "kernels": kernels_of(settings.kernels)}
    return settings.model_copy(update=found)


def device() -> str:
    """The type of device that a COMET model runs on."""
    from corpusprep.stages.quality.comet import import_torch

    return "cuda" if import_torch().cuda.is_available() else "cpu"


def packages(settings: QualitySettings) -> dict[str, str]:
    """Versions of packages that may change the last digits of a COMET model's scores."""
    if settings.scorer != "comet":
        return {}
    names = ["torch", "tokenizers"] if settings.backend == "native" else ["torch", "unbabel-comet", "transformers"]
    found = {name: importlib.metadata.version(name) for name in names}
    if settings.backend == "native":  # Triton compiles kernels for a GPU
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["triton"] = importlib.metadata.version("triton")
    return found


def with_scores(table: pa.Table, scores: F32) -> pa.Table:
    """Sets the column `quality` of the table; NaN is stored as null."""
    column = pa.array(scores, type=pa.float32(), mask=np.isnan(scores))
    at = table.schema.get_field_index("quality")
    return table.append_column("quality", column) if at < 0 else table.set_column(at, "quality", column)


def _plain(table: pa.Table) -> pa.Table:
    """Converts string views to strings, because Arrow cannot take rows of string views."""
    for k, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            table = table.set_column(k, field.name, table.column(k).cast(pa.string()))
    return table


def _rule(settings: QualitySettings, pair: str) -> PairSettings | None:
    for name, rule in settings.pair.items():
        (a, b), (x, y) = parse_pair(pair), parse_pair(name)
        if (matches(x, a) and matches(y, b)) or (matches(x, b) and matches(y, a)):
            return rule
    if settings.threshold is not None:
        return PairSettings(threshold=settings.threshold)
    if settings.quantile is not None:
        return PairSettings(quantile=settings.quantile)
    return PairSettings(threshold=_LEXICAL_THRESHOLD) if settings.scorer == "lexical" else None


def _open_comet(settings: QualitySettings) -> Scorer:
    assert settings.model is not None
    if settings.backend == "unbabel":
        from corpusprep.stages.quality.comet.unbabel import UnbabelScorer

        return UnbabelScorer(settings.model, settings.batch_size)
    from corpusprep.stages.quality.comet import CometScorer
    from corpusprep.stages.quality.comet.files import find_model

    files = find_model(settings.model, settings.encoder)
    return CometScorer(files, settings.precision, settings.batch_tokens, settings.kernels)


def turned(table: pa.Table, direction: str) -> npt.NDArray[np.bool_]:
    """Which rows are scored with `tgt` as the source, shape (n,).

    Args:
        table: rows with `src_lang tgt_lang`.
        direction: see `QualitySettings.direction`.
    """
    if direction != "english":
        return np.full(table.num_rows, direction == "backward")
    src, tgt = (_english(table[side]) for side in ("src_lang", "tgt_lang"))
    return tgt & ~src


def _sides(table: pa.Table, direction: str) -> tuple[Any, Any]:
    """The texts that are scored as source and as translation; large strings."""
    mask = turned(table, direction)
    src, tgt = (table[side].cast(pa.large_string()) for side in ("src", "tgt"))
    if not mask.any():
        return src, tgt
    if mask.all():
        return tgt, src
    chosen: Any = pa.array(mask)
    return pc.if_else(chosen, tgt, src), pc.if_else(chosen, src, tgt)


def _english(column: pa.ChunkedArray[Any]) -> npt.NDArray[np.bool_]:
    codes = column.cast(pa.string())
    found = [code for code in codes.unique().to_pylist() if code is not None and _is_english(code)]
    known: Any = pc.is_in(codes, value_set=pa.array(found, pa.string()))
    return np.asarray(known.to_numpy(), np.bool_)


def _is_english(code: str) -> bool:
    try:
        return matches("en", code)
    except SettingsError:
        return False


class _Directed:
    """Applies a scorer of translations to rows, with the source side chosen by `direction`."""

    def __init__(self, scorer: Scorer, direction: str) -> None:
        self._scorer, self._direction = scorer, direction

    def score(self, table: pa.Table) -> F32:
        source, translation = _sides(table, self._direction)
        return self._scorer.score(pa.table({"src": source, "tgt": translation}))


class _ColumnScorer:
    def __init__(self, column: str) -> None:
        self._column = column

    def score(self, table: pa.Table) -> F32:
        if self._column not in table.column_names:
            raise SettingsError(
                f"quality.column = {self._column!r}: the column is missing. Use one of {', '.join(table.column_names)}."
            )
        try:
            values: Any = table[self._column].cast(pa.float32(), safe=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise SettingsError(f"quality.column = {self._column!r}: the column does not contain numbers.") from None
        return np.asarray(values.fill_null(float("nan")).to_numpy(), np.float32)


class _FunctionScorer:
    def __init__(self, name: str) -> None:
        self._name = name
        self._function = load_function(name, "quality.scorer")

    def score(self, table: pa.Table) -> F32:
        answer = self._function(table)
        try:
            if isinstance(answer, pa.Array | pa.ChunkedArray):
                column: Any = answer
                answer = column.cast(pa.float32(), safe=False).fill_null(float("nan")).to_numpy()
            scores = np.asarray(answer, np.float32)
        except (TypeError, ValueError, pa.ArrowException):
            raise SettingsError(f"quality.scorer = {self._name!r} must return one float per row.") from None
        if scores.shape != (table.num_rows,):
            raise SettingsError(
                f"quality.scorer = {self._name!r} returned shape {scores.shape} for {table.num_rows} rows; return one "
                "float per row."
            )
        return scores
