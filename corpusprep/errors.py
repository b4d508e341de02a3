"""Errors for the user: each says where the problem is, what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class CorpusprepError(Exception):
    """A problem that the user can solve. The command line prints it and ends with exit code 2."""


class Wording(NamedTuple):
    """Part of a remedy that a recipe and a command say differently.

    Attributes:
        recipe: for a recipe, whose settings it names.
        command: for a command of one stage, whose options it names.
        stopping: for a command that has no option `--on-error`; None if that makes no difference.
    """

    recipe: str
    command: str
    stopping: str | None = None


class InputError(CorpusprepError):
    """A file cannot be read.

    Args:
        file: the file, as the user would write its path.
        problem: what is wrong, in one clause.
        remedy: what to do, in one clause, in one piece or in pieces.
        row: line in the file, from 0, that has the problem; None if it is not in one row.

    Attributes:
        file, problem, row: as they were given.
        remedy: in one piece, as a recipe says it.
        pieces: the remedy as it was given.
    """

    def __init__(self, file: str, problem: str, remedy: str | Sequence[str | Wording], row: int | None = None) -> None:
        self.file, self.problem, self.row = file, problem, row
        self.pieces = remedy
        self.remedy = "".join(piece.recipe if isinstance(piece, Wording) else piece for piece in remedy)
        where = file if row is None else f"{file}, row {row}"
        super().__init__(f"{where}: {problem}. {self.remedy}.")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str | Sequence[str | Wording], int | None]]:
        return (type(self), (self.file, self.problem, self.pieces, self.row))

    def for_command(self, on_error: bool) -> InputError:
        """The same error as a command says it, with options instead of settings.

        Args:
            on_error: whether the command has the option `--on-error`.
        """

        def said(piece: str | Wording) -> str:
            if isinstance(piece, str):
                return piece
            return piece.command if on_error or piece.stopping is None else piece.stopping

        return InputError(self.file, self.problem, "".join(map(said, self.pieces)), self.row)


class SettingsError(CorpusprepError):
    """A key or value in a recipe or on the command line is not valid."""


class RunError(CorpusprepError):
    """A run cannot start or continue: a locked folder, a missing model, a failed check."""
