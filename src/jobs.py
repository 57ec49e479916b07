"""What the engine is asked and what it answers: variants, requests, generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from policies.base import Policy
from src.errors import InputError
from src.lanes import Cell, Fork, LaneBatch


@dataclass(frozen=True)
class Variant:
    """A policy and the budget as the user gave it.

    Args:
        policy: settings of the policy.
        budget: entries per layer and KV head; a fraction in (0, 1] of the prompt; None for policies without.

    Raises:
        InputError: a budget the policy cannot work with.
    """

    policy: Policy
    budget: int | float | None

    def __post_init__(self) -> None:
        name, least = type(self.policy).__name__, self.policy.least_budget()
        if not self.policy.uses_budget:
            return
        if self.budget is None or self.budget <= 0 or (isinstance(self.budget, float) and self.budget > 1):
            raise InputError(
                f"budget={self.budget}: valid for {name}: entries per layer and KV head, at least {least}, "
                "or a fraction of the prompt in (0, 1]"
            )
        if isinstance(self.budget, int) and self.budget < least:
            raise InputError(f"budget={self.budget}: {name} always keeps {least - 1} tokens; valid: {least} or more")

    def cell(self, tokens: int) -> Cell:
        """The budget in entries for a prompt of `tokens` tokens."""
        if not self.policy.uses_budget or self.budget is None:
            return Cell(self.policy, tokens)
        if isinstance(self.budget, float):
            return Cell(self.policy, max(self.policy.least_budget(), round(self.budget * tokens)))
        return Cell(self.policy, self.budget)


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Args:
        name: what errors call it.
        ids: prompt tokens.
        stop_ids: generation ends with any of these.
        max_new_tokens: at most so many.
        min_new_tokens: stop tokens are not chosen before so many.
        context_tokens: the cache is cut after so many tokens and the rest of the prompt is fed through the cut
            cache (`prompt_scope=context`); None: the policy sees the whole prompt.
        reference: tokens of a reference answer, for fidelity; None: not measured.
    """

    name: str
    ids: list[int]
    stop_ids: frozenset[int]
    max_new_tokens: int
    min_new_tokens: int = 0
    context_tokens: int | None = None
    reference: list[int] | None = None


@dataclass(frozen=True)
class Job:
    request: Request
    variants: Sequence[Variant]


@dataclass
class Generation:
    """What one lane produced. Times in seconds, memory in bytes.

    Attributes:
        tokens: generated, the stop token included.
        kept_prompt: per layer, original positions kept when the prompt had been cut, `(kv_heads, k)`.
        kept_end: the same when the lane ended, generated tokens included.
        kv_bytes: keys and values after the cut, read off the storages.
        kv_bytes_peak: the most entries held times the bytes of an entry.
        kv_bytes_full: what everything read up to the cut would take (with `prompt_scope=context`, the context).
        bookkeeping_bytes: positions and the policy's own state.
        decode_seconds: the lane's share of the batch's time (step time / lanes in the step, summed).
        lanes: lanes in the batch at its start.
        error: why there is no result; everything else is then empty.
    """

    request: Request
    variant: Variant
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    kept_prompt: list[Tensor] = field(default_factory=list)
    kept_end: list[Tensor] = field(default_factory=list)
    kv_bytes: int = 0
    kv_bytes_peak: int = 0
    kv_bytes_full: int = 0
    bookkeeping_bytes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    lanes: int = 0
    fidelity: dict[str, float | list[float]] | None = None
    error: str | None = None

    def describe_prompt(self, fork: Fork) -> None:
        """Record what is left of the prompt right after the cut."""
        self.kept_prompt = [cache.positions[0].to("cpu", copy=True) for cache in fork.caches]
        self.kv_bytes, self.bookkeeping_bytes = fork.nbytes(), fork.bookkeeping_nbytes()
        self.kv_bytes_full = sum(cache.entry_bytes for cache in fork.caches) * fork.length

    def describe_end(self, batch: LaneBatch, row: int) -> None:
        """Record what is cached when the lane has finished."""
        caches, lane = batch.locate(row)
        self.kept_end = [cache.positions[lane, :, : cache.used[lane]].to("cpu", copy=True) for cache in caches]
        held = sum(cache.entry_bytes * cache.used[lane] for cache in caches)
        self.kv_bytes_peak = max(self.kv_bytes, held)
