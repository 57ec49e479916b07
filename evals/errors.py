"""Errors of the task data. `evals` stands alone, so it has its own."""

from evals.visible import one_line


class DataError(ValueError):
    """Task data that is missing or malformed. One line that names the file, the line and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
