"""The full cache: nothing is ever dropped. Everything else is compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from policies.base import Policy, keep_all

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every token of prompt and answer; the budget is ignored."""

    uses_budget: ClassVar[bool] = False

    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        return keep_all(prompt)
