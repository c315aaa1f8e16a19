"""The one exception that stands for a user's mistake, as against a bug in this library."""


class UserError(Exception):
    """What a user got wrong: one message that says what, where (file:line or key), and what to do.

    The command line prints the message without a traceback and exits with code 2 (`--debug` shows the traceback).
    Any part of the package may raise it. What can only be a bug is an `assert` or a `ValueError`, never this.
    """
