"""The two exceptions that answer the user; a command prints them as one line. Others are faults."""


class UsageError(ValueError):
    """The request cannot be met as asked: the message says what was expected, what came and what to do."""


class LoadError(RuntimeError):
    """A file or a model could not be read: the message names the file, what is wrong and what to do."""
