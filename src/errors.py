"""The one exception for everything a user can cause."""

from evals.visible import one_line


class InputError(Exception):
    """A wrong setting or input. The message is one line: the setting, its value, and what would be valid.

    Entry points print it on stderr and exit with code 2; no traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Damaged(InputError):
    """A file of ours that has changed since it was written, or was cut. What it held can be computed again."""
