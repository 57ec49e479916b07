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
import torch.nn.functional as F
from torch import Tensor

from policies.base import Policy, keep_all
from src.kv.cache import LayerCache
from src.kv.codebooks import Codebooks, load_codebooks
from src.kv.product import SplitCache, encode
from src.kv.state import ModelShape, State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep

BINS = 64  # of the histogram of chosen prompt positions


@dataclass(frozen=True)
class HCAttention(Policy):
    """Keeps every token, cheaply, and attends to few. Each of the three parts can be switched off alone.

    1. Keys: `groups` indices instead of head_dim numbers (`src.kv.product`), approximate logits z~.
    2. Choice: a~ = softmax(z~); with a~ sorted from the largest, k* = min{k : sum of the first k >= tau}; only those
       are attended to. Per layer, step and query head (the last is ours), so nothing is lost for good.
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
    chooses: ClassVar[bool] = True
    reconstruction: ClassVar[str] = (
        "what is known comes from a third party's notes; the body of the paper could not be read, and no code of the "
        "authors is public"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau}: valid: a share of the attention in (0, 1]; 1 attends to everything")
        most = 2 ** (15 if self.key_bits == 16 else 8)
        if not 1 <= self.centroids <= most:
            raise ValueError(f"centroids={self.centroids}: valid with key_bits={self.key_bits}: 1 to {most}")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups}: valid: a divisor of the head size")

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

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        """`picks`: how often each token was chosen, `last`: by what share of the query heads at the last step;
        `chosen`: tokens chosen at each step, mean over query heads.
        """
        if self.tau == 1:
            return State()
        return State(
            slots={
                "picks": torch.zeros(kept.shape, dtype=torch.int32, device=kept.device),
                "last": torch.zeros(kept.shape, device=kept.device),
            },
            fixed={
                "chosen": torch.zeros(0, device=kept.device),
                "length": torch.tensor(prompt.length, device=kept.device),
            },
        )

    def adjust_weights(self, step: DecodeStep, state: State) -> None:
        if self.tau == 1:
            return
        chosen = smallest_set(step.weights, self.tau)
        step.weights.masked_fill_(~chosen, 0)
        if self.renormalise:
            step.weights /= step.weights.sum(-1, keepdim=True)
        state.slots["picks"] += chosen.sum(dim=2, dtype=torch.int32)
        state.slots["last"] = chosen.float().mean(dim=2)
        counts = chosen.sum(-1, dtype=torch.float32).mean(dim=(1, 2))
        state.fixed["chosen"] = torch.cat([state.fixed["chosen"], counts[:, None]], dim=1)

    def attended(self, state: State) -> Tensor | None:
        return state.slots.get("last")

    def picks(self, state: State) -> Tensor | None:
        return state.slots.get("picks")

    def measures(self, states: list[State], lane: int) -> dict[str, Any]:
        """Tokens chosen (mean over query heads), their share of all cached ones, and where in the prompt they stood."""
        found: dict[str, Any] = {"codebook_bytes": self.loaded.centroids.nbytes} if self.loaded else {}
        if self.tau == 1 or not states[0].fixed["chosen"].shape[1]:
            return found
        length = int(states[0].fixed["length"][lane])
        chosen = torch.stack([state.fixed["chosen"][lane] for state in states]).double().cpu()  # (layers, steps)
        cached = length + 1 + torch.arange(chosen.shape[1])
        picks = sum(state.slots["picks"][lane, :, :length].sum(0).double().cpu() for state in states)
        assert isinstance(picks, Tensor)
        bins = torch.zeros(BINS, dtype=torch.float64)
        bins.index_add_(0, torch.arange(length) * BINS // length, picks)
        return found | {
            "chosen_share": round(float((chosen / cached).mean()), 6),
            "chosen_by_layer": [round(x, 2) for x in chosen.mean(dim=1).tolist()],
            "chosen_by_step": [round(x, 2) for x in chosen.mean(dim=0).tolist()],
            "chosen_positions": [round(x, 6) for x in (bins / bins.sum().clamp_min(1)).tolist()],
        }


def smallest_set(weights: Tensor, tau: float) -> Tensor:
    """True for the fewest largest weights of each row that add up to at least `tau`."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, (before < tau) & (ordered > 0))
