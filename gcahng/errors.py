"""The error that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user passed: one line that names the argument, its value and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """
