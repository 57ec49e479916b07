"""ThinK: keys without the channels that the last queries hardly use (Xu et al. 2024, arXiv 2407.21018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from policies.parts import Store
from src.kv.channels import Channels, strongest_channels
from src.kv.ragged import RaggedCache

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class ThinK(Store):
    """Drop int(ratio * head_dim) channels of every kept key but the newest, the same ones for all keys of a KV head.

        score_c = mean over the last rows and the group of q_c^2  *  mean over the kept keys of k_c^2

    The lowest scores leave; both halves of a rotary pair are judged by themselves. Values and generated tokens keep all
    channels. The authors choose for each query head (keys are repeated there); one set per KV head, from the mean over
    its query heads, is ours, as grouped-query attention stores a key once. So is what happens if the policy evicts
    while decoding: a token that takes the slot of a pruned key keeps that key's channels only.

    Args:
        ratio: share of the channels to drop, 0 to less than 1; 0.4 and 0.5 in the paper.
        recent: the newest kept keys, with all channels; 32.
        rows: the last queries of the prompt that the score looks at; 32.
    """

    ratio: float = 0.4
    recent: int = 32
    rows: int = 32
    overwrites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: valid: a share of the channels, 0 to less than 1")
        if self.rows < 1:
            raise ValueError(f"rows={self.rows}: valid: 1 or more")

    @property
    def last_queries(self) -> int:
        return self.rows

    def hold(self, prompt: PromptAttention, kept: Sequence[Tensor], limit: int | None) -> RaggedCache:
        """One layer's cache; channel numbers, 16 bits each, count as key bytes.

        Raises:
            ValueError: as `RaggedCache.from_prompt`.
        """
        dim = prompt.keys.shape[-1]
        queries = prompt.queries[:, -self.rows :].reshape(prompt.kv_heads, -1, dim)
        keys = [prompt.keys[head, positions] for head, positions in enumerate(kept)]
        left = strongest_channels(queries, keys, int(self.ratio * dim))
        return RaggedCache.from_prompt(prompt.keys, prompt.values, kept, limit, Channels(left, self.recent))
