"""TOVA: what the latest token attends to (Oren et al. 2024, arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from policies.base import RankedPolicy
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class TOVA(RankedPolicy):
    """Keep the `budget` tokens with the highest attention of the last query, averaged over all heads of the layer

        s_j = mean over heads h of a^h_nj

    once after the prompt and again at every decoding step, where the token with the lowest s_j of cache and
    incoming token goes. All heads of a layer keep the same tokens. No token is safe: neither the first ones nor
    the incoming one, which is turned away when it scores lowest itself (as in the authors' code).
    """

    evicts_while_decoding: ClassVar[bool] = True
    may_refuse: ClassVar[bool] = True

    def check_parts(self) -> None:
        super().check_parts()
        if self.allocate is not None and not self.allocate.evenhanded:
            raise ValueError(
                f"allocate={type(self.allocate).__name__}: TOVA keeps the same tokens in all heads of a layer; "
                "valid: an allocator that gives heads with equal scores equally many, e.g. adakv, or null"
            )

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        return prompt.window_weights(1)[:, :, 0].mean(dim=(0, 1)).expand(prompt.kv_heads, -1)

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        return step.weights.mean(dim=(1, 2))[:, None].expand(-1, step.positions.shape[1], -1)
