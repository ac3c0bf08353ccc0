"""The two exceptions that are answers to a user, not faults of the program; a command prints them as one
line.
"""


class UsageError(ValueError):
    """The request cannot be met as asked: the message says what was expected, what came and what to do."""


class LoadError(RuntimeError):
    """A file or a model could not be read: the message names the file, what is wrong with it and what to do."""
