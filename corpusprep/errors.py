"""Errors for the user: each says where the problem is, what is wrong and what to do."""

from __future__ import annotations


class CorpusprepError(Exception):
    """A problem that the user can solve. The command line prints it and ends with exit code 2."""


class InputError(CorpusprepError):
    """A file cannot be read.

    Args:
        file: the file, as the user would write its path.
        problem: what is wrong, in one clause.
        remedy: what to do, in one clause.
        row: line in the file, from 0, that has the problem; None if it is not in one row.
    """

    def __init__(self, file: str, problem: str, remedy: str, row: int | None = None) -> None:
        self.file, self.problem, self.remedy, self.row = file, problem, remedy, row
        where = file if row is None else f"{file}, row {row}"
        super().__init__(f"{where}: {problem}. {remedy}.")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str, int | None]]:
        return (type(self), (self.file, self.problem, self.remedy, self.row))


class SettingsError(CorpusprepError):
    """A key or value in a recipe or on the command line is not valid."""


class RunError(CorpusprepError):
    """A run cannot start or continue: a locked folder, a missing model, a failed check."""
