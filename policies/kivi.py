"""KIVI: keys in few bits channel by channel, values token by token (Liu et al. 2024, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from policies.parts import Store
from src.kv.bits import Bits
from src.kv.ragged import RaggedCache

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.state import ModelShape


@dataclass(frozen=True)
class KIVI(Store):
    """Asymmetric codes between the least and the largest number of a group (`src.kv.bits`); the newest tokens exact.

    Keys, after the rotary embedding, share a range over `group` tokens of a channel, values over `group` channels of a
    token. When the prompt is cut, a KV head with k kept tokens holds the newest k mod R exactly; new tokens are exact
    until there are R of them, then all that is exact is coded. The prompt's own attention sees exact keys and values.

    That is the authors' rule for keys; for values they keep the last R exact and code one token at each step. One rule
    for both is ours, and so are: that a head's exact rest of the prompt waits for R new tokens, not for R - k mod R, so
    that all heads of a batch are coded at once; the shorter group at that rest's end; float16 ranges for every model.

    Ours, too, is eviction while decoding: the incoming token is exact in its own step, then takes its victim's slot and
    is coded there; of a key, the victim's group is decoded and coded anew, so its other keys are rounded once more.
    Slots that were exact when the prompt was cut stay exact, whoever takes them.

    Args:
        bits: of a code: 2 and 4 in the paper.
        group: 32 there; must divide the head size.
        residual: R, a multiple of the group; 128 in the paper's LongBench runs, 32 in the authors' examples. The
            smaller the budget, the more a head's rest of up to R - 1 exact tokens weighs.
    """

    bits: Literal[2, 4, 8] = 2
    group: int = 32
    residual: int = 32
    overwrites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"group={self.group}: valid: a divisor of the head size")
        if self.residual < 1 or self.residual % self.group:
            raise ValueError(f"residual={self.residual}: valid: a multiple of group={self.group}")

    @property
    def last_queries(self) -> int:
        return 0

    def check_model(self, model: ModelShape) -> None:
        """ValueError: the head size is no multiple of the group, or does not fill bytes."""
        self.check_dim(model.head_dim)

    def check_dim(self, dim: int) -> None:
        """The same for a head size."""
        if dim % self.group:
            valid = ", ".join(str(g) for g in range(1, dim + 1) if dim % g == 0)
            raise ValueError(f"group={self.group}: does not divide the head size {dim}; valid: {valid}")
        if dim * self.bits % 8:
            raise ValueError(f"bits={self.bits}: a key of {dim} numbers does not fill bytes; valid: 8")

    def hold(self, prompt: PromptAttention, kept: Sequence[Tensor], limit: int | None) -> RaggedCache:
        """One layer's cache.

        Raises:
            ValueError: as `check_model`, and as `RaggedCache.from_prompt`.
        """
        self.check_dim(prompt.keys.shape[-1])
        codec = Bits(self.bits, self.group, self.residual)
        return RaggedCache.from_prompt(prompt.keys, prompt.values, kept, limit, codec)
