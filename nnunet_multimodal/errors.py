"""What a user is told when something cannot go on: one message, one exit code, no traceback.

A message says what, where, found against expected, and what to do next. The command line prints it and ends with
``exit_code``; ``--debug`` shows the traceback.
"""

from __future__ import annotations


class MultimodalError(Exception):
    """Anything that stops us and that the user can do something about."""

    exit_code = 1


class UsageError(MultimodalError):
    """The command or a setting is wrong."""

    exit_code = 2


class EnvironmentProblem(MultimodalError):
    """A path, variable, package or file that the command stands on is missing or unfit."""

    exit_code = 3


class DataProblem(MultimodalError):
    """An image, label, scribble or data set is not what it has to be."""

    exit_code = 4
