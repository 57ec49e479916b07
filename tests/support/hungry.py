"""A policy that fails as a device does: memory runs out in the middle of decoding."""

from dataclasses import dataclass
from typing import Any

import torch

from policies.h2o import H2O


@dataclass(frozen=True)
class HungryLater(H2O):
    """Runs out of memory at its fourth step, with more than one lane."""

    def observe(self, step: Any, state: Any) -> None:
        if step.t == 3 and step.logits.shape[0] > 1:
            raise torch.OutOfMemoryError("out of memory")
        super().observe(step, state)
