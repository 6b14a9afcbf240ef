"""The error that a user's mistake raises, and the warning of what a user should know."""


class UserError(ValueError):
    """A mistake in what the user passed.

    The message is one line that names the argument, its value and what it must be. The command line prints it without a
    traceback and exits with status 2.

    Attributes:
        where: the process and the machine that it is of, where one of several processes failed; "" otherwise. It
            precedes the message.
    """

    where = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text

    @property
    def text(self) -> str:
        """The message without `where`."""
        return super().__str__()


class UserNote(UserWarning):
    """A warning of what a user should know about files and data, such as images that were left out.

    The command line prints it in one line. Which code runs, and what would be faster, goes to the logger "gcahng".
    """
