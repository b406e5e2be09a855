"""Errors a user can cause: one line with what, where, was, wanted, and what to try."""


class CompactError(Exception):
    """The input cannot be served. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(CompactError):
    """The command was given wrongly: a flag, an option or a value that does not exist."""

    exit_code = 2
