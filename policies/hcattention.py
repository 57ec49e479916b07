"""HCAttention: quantised keys, values in host memory, tokens chosen anew at each step (arXiv 2507.19823).

A reconstruction: no code is public and the paper's body could not be read; what is known comes from a third party's
notes on it. *Known*: product quantisation of keys with codebooks fitted offline by MiniBatchKMeans; look-up tables;
the smallest set with attention mass tau = 0.9, per layer and step; values and their weighted sum on the host; bytes
counted on the device only, as g indices of 16 bits, without codebooks. *Ours*: what is marked so below.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from policies.base import Policy, keep_all
from policies.parts import Reader
from policies.smallest_set import SmallestSet
from src.kv.cache import LayerCache
from src.kv.codebooks import Codebooks, load_codebooks
from src.kv.product import SplitCache, encode
from src.kv.state import ModelShape, State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class HCAttention(Policy):
    """Keeps every token, cheaply, and attends to few. Each of the three parts can be switched off alone.

    1. Keys: `groups` indices instead of head_dim numbers (`src.kv.product`), approximate logits z~.
    2. Choice: of a~ = softmax(z~) the smallest set with mass tau (`SmallestSet`); nothing is lost for good.
    3. Values: in host memory, and their weighted sum is computed there.

    Args:
        quantise_keys: part 1.
        groups: g; must divide the head size. 64 and 32 of 128 in the paper.
        centroids: c, per group. 256 is ours, for the time a fit takes; the paper gains up to 2,048.
        key_bits: of an index: 16 as in the paper's accounting, or 8 where 256 centroids are enough.
        codebooks: a file of `python -m src.calibrate`; None: the one in the cache folder.
        tau: attention mass of the chosen set, (0, 1]; 1 switches part 2 off.
        renormalise: divide the chosen weights by their mass (ours: what the paper does is not known; without it
            attention outputs shrink by up to 1 - tau).
        offload_values: part 3.
        loaded: the codebooks, filled in by `bind`.

    The prompt itself is read with full attention, as for every policy here (the paper reads it in blocks). A token's
    key is exact in its own step and quantised from the next one on (ours).
    """

    quantise_keys: bool = True
    groups: int = 32
    centroids: int = 256
    key_bits: Literal[16, 8] = 16
    codebooks: str | None = None
    tau: float = 0.9
    renormalise: bool = True
    offload_values: bool = True
    loaded: Codebooks | None = field(default=None, compare=False, repr=False)
    uses_budget: ClassVar[bool] = False
    own_pool: ClassVar[bool] = True
    reconstruction: ClassVar[str] = (
        "what is known comes from a third party's notes; the body of the paper could not be read, and no code of the "
        "authors is public"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        SmallestSet(self.tau)  # ValueError: no share
        most = 2 ** (15 if self.key_bits == 16 else 8)
        if not 1 <= self.centroids <= most:
            raise ValueError(f"centroids={self.centroids}: valid with key_bits={self.key_bits}: 1 to {most}")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups}: valid: a divisor of the head size")

    def check_parts(self) -> None:
        super().check_parts()
        if self.read is not None:
            raise ValueError(f"read={type(self.read).__name__}: HCAttention reads as its tau says; valid: null")

    def bind(self, model: ModelShape) -> HCAttention:
        if not self.quantise_keys:
            return self
        if model.head_dim % self.groups:
            valid = ", ".join(str(g) for g in range(1, model.head_dim + 1) if model.head_dim % g == 0)
            raise ValueError(f"groups={self.groups}: does not divide the head size {model.head_dim}; valid: {valid}")
        return replace(self, loaded=load_codebooks(self.codebooks, model, self.groups, self.centroids))

    def fingerprint(self) -> dict[str, Any]:
        return {"codebooks_digest": self.loaded.digest} if self.loaded else {}

    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        return keep_all(prompt)

    def make_cache(self, prompt: PromptAttention, kept: Tensor, limit: int | None) -> LayerCache:
        plain = LayerCache.from_prompt(prompt.keys, prompt.values, kept, limit)
        kind = torch.int16 if self.key_bits == 16 else torch.uint8
        if not self.quantise_keys:
            return SplitCache.split(plain, None, kind, self.offload_values)
        if self.loaded is None:
            raise ValueError("HCAttention with quantised keys must be bound to a model first (`bind`)")
        centroids = self.loaded.centroids[prompt.layer]
        # Variants with the same codebooks share the codes; each cache gets a copy of its own.
        codes = prompt.once(("codes", self.loaded.digest), lambda: encode(plain.keys, centroids))
        return SplitCache.split(plain, centroids, kind, self.offload_values, codes)

    @property
    def reader(self) -> Reader | None:
        return SmallestSet(self.tau, renormalise=self.renormalise) if self.tau < 1 else None

    def measures(self, states: list[State], lane: int) -> dict[str, Any]:
        return {"codebook_bytes": self.loaded.centroids.nbytes} if self.loaded else {}
