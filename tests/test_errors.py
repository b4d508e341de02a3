"""Errors: what they say, in the words of a recipe and in those of a command."""

from __future__ import annotations

import pickle

import pytest

from corpusprep.errors import InputError, Wording
from corpusprep.sources.remedies import LANGUAGES, OR_NAME_LANGUAGES, or_keep

TRUNCATED = InputError("a.gz", "it breaks off", ("Fetch it again", or_keep("to read what is there")), 7)
NAMELESS = InputError("a.tsv", "nothing tells its languages", ("Give ", LANGUAGES, *OR_NAME_LANGUAGES))


@pytest.mark.parametrize(
    ("error", "recipe", "command", "stopping"),
    [
        (
            TRUNCATED,
            'a.gz, row 7: it breaks off. Fetch it again, or set on_error = "keep" to read what is there.',
            "a.gz, row 7: it breaks off. Fetch it again, or give --on-error keep to read what is there.",
            "a.gz, row 7: it breaks off. Fetch it again.",
        ),
        (
            NAMELESS,
            'a.tsv: nothing tells its languages. Give src_lang = "en" and tgt_lang = "sw", or name the columns that hold the '
            'languages, as in columns = {src_lang = "from", tgt_lang = "to"}.',
            *["a.tsv: nothing tells its languages. Give --src-lang en and --tgt-lang sw, or name the columns that hold the "
              "languages, as in --column src_lang=from --column tgt_lang=to."] * 2,
        ),
        (InputError("a", "it is empty", "Name another"), *["a: it is empty. Name another."] * 3),
        (InputError("a", "b", [Wording("c", "d")]), "a: b. c.", "a: b. d.", "a: b. d."),
    ],
)  # fmt: skip
def test_a_remedy_names_settings_or_options(error: InputError, recipe: str, command: str, stopping: str) -> None:
    for each in (error, pickle.loads(pickle.dumps(error))):  # as it comes from a worker
        assert str(each) == recipe
        assert str(each.for_command(True)) == command
        assert str(each.for_command(False)) == stopping
        assert (each.file, each.row) == (error.file, error.row)
        assert str(each).endswith(f" {each.remedy}.")
        assert type(each.remedy) is str
