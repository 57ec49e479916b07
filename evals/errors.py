"""Errors of the task data. `evals` stands alone, so it has its own."""


class DataError(ValueError):
    """Task data that is missing or malformed. One line that names the file, the line and what is wrong."""
