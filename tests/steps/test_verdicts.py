"""The codes that columns of verdicts hold."""

from __future__ import annotations

from corpusprep import load_recipe
from corpusprep.pipeline import accounted
from corpusprep.stages import dedup, instruct
from corpusprep.steps.verdicts import DUPLICATES, VERDICTS, code


def test_the_first_codes_are_the_verdicts_of_the_stage_dedup() -> None:
    assert VERDICTS[0] == ""
    assert VERDICTS[1:3] == tuple(dedup.REASONS) == DUPLICATES


def test_every_reason_has_a_code_and_names_its_stage() -> None:
    assert len(set(VERDICTS)) == len(VERDICTS) < 256
    assert [code(reason) for reason in VERDICTS] == list(range(len(VERDICTS)))
    counted = accounted(load_recipe(None, sources=["tsv=x.tsv"]))
    assert {reason.partition(".")[0] for reason in VERDICTS[1:]} <= set(counted)
    assert set(instruct.REASONS) <= set(VERDICTS)
