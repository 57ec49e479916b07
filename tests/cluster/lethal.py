"""A policy whose job dies without a word (as when the node runs out of memory) while the file $LETHAL exists."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from policies.h2o import H2O


@dataclass(frozen=True)
class Lethal(H2O):
    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(os.environ["LETHAL"]).exists():
            os.kill(os.getpid(), signal.SIGKILL)
