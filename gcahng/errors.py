"""The error that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user passed.

    The message is one line that names the argument, its value and what it must be. The command line prints it without a
    traceback and exits with status 2.
    """
