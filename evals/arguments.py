"""Command lines without Hydra: a wrong argument is one line, as every other wrong input."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Raises instead of printing the usage.

    Args:
        prog: the command, as one types it.
        refusal: what a wrong argument raises; its message ends in the command that explains the arguments.
    """

    def __init__(self, prog: str, refusal: type[Exception], description: str) -> None:
        super().__init__(prog, description=description)
        self.refusal = refusal

    def error(self, message: str) -> NoReturn:
        raise self.refusal(f"{message} ({self.prog} --help)")
