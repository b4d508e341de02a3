"""The codes that columns of verdicts hold."""

from __future__ import annotations

from corpusprep.stages import balance, dedup, instruct, quality
from corpusprep.steps.verdicts import DUPLICATES, VERDICTS, code


def test_the_first_codes_are_the_verdicts_of_the_stage_dedup() -> None:
    assert VERDICTS[0] == ""
    assert VERDICTS[1:3] == tuple(dedup.REASONS) == DUPLICATES


def test_every_reason_has_a_code_and_names_its_stage() -> None:
    assert len(set(VERDICTS)) == len(VERDICTS) < 256
    assert [code(reason) for reason in VERDICTS] == list(range(len(VERDICTS)))
    stages = {module.__name__.rpartition(".")[2] for module in (balance, dedup, instruct, quality)}
    assert {reason.partition(".")[0] for reason in VERDICTS[1:]} == stages
    assert set(instruct.REASONS) <= set(VERDICTS)
