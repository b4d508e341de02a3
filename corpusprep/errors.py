"""The errors that a user meets: each says where, what and how to go on."""

from __future__ import annotations


class CorpusprepError(Exception):
    """A condition that the user can mend. The command line prints it and ends with exit code 2."""


class InputError(CorpusprepError):
    """A file that cannot be read as it stands.

    Args:
        file: the file as the user would name it.
        problem: what is wrong, in one clause.
        remedy: what to do, in one clause.
        row: line in the file, from 0, where the problem was met; None where no row is to blame.
    """

    def __init__(self, file: str, problem: str, remedy: str, row: int | None = None) -> None:
        self.file, self.problem, self.remedy, self.row = file, problem, remedy, row
        where = file if row is None else f"{file}, row {row}"
        super().__init__(f"{where}: {problem}. {remedy}.")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str, int | None]]:
        return (type(self), (self.file, self.problem, self.remedy, self.row))


class SettingsError(CorpusprepError):
    """A key or value in a recipe or on the command line that is not understood."""


class RunError(CorpusprepError):
    """A run that cannot start or go on: a locked folder, a model that is missing, a failed check."""
