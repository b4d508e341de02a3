"""What becomes of a row after the first step: the codes that columns of verdicts hold."""

from __future__ import annotations

VERDICTS = (
    "",
    "dedup.exact",
    "dedup.near",
    "quality.score",
    "instruct.template_tokens",
    "instruct.empty",
    "balance.quota",
    "quality.not_needed",
)
"""Reasons by code; 0 keeps the row, 1 and 2 are the stage dedup's own verdicts. A new reason, `STAGE.RULE`, goes at the end, so that the others keep their codes."""

DUPLICATES = ("dedup.exact", "dedup.near")
"""Reasons of rows that are dropped for another row, which `dedup.clusters` names."""


def code(reason: str) -> int:
    """The code of a reason."""
    return VERDICTS.index(reason)
