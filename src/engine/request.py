"""What the engine is asked and what it answers: variants, requests, generations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from policies.base import Policy
from src.engine.pool import LaneBatch
from src.engine.prefill import Cell, Fork
from src.errors import InputError
from src.kv.budget import Budget, SplitBudget, check_budget


@dataclass(frozen=True, eq=False)
class Variant:
    """A policy and the budget as the user gave it. Each is itself only, like requests and generations.

    Args:
        policy: settings of the policy.
        budget: entries per layer and KV head; a fraction in (0, 1] of the prompt; both parts of it, for policies
            with a decode pool; None for policies without.
        asked: False: nobody waits for what comes of it, it is there for the others' sake.

    Raises:
        InputError: a budget the policy cannot work with.
    """

    policy: Policy
    budget: Budget | None
    asked: bool = True

    def __post_init__(self) -> None:
        policy, budget, name = self.policy, self.budget, type(self.policy).__name__
        if not policy.uses_budget:
            return
        least, least_decode = policy.least_budget(), policy.least_decode()
        if isinstance(budget, SplitBudget):
            if not policy.uses_decode_budget:
                raise InputError(f"budget={budget}: {name} has no decode phase of its own; valid: one number")
            check_budget("budget.prompt", budget.prompt, name, least)
            check_budget("budget.decode", budget.decode, name, least_decode)
            return
        check_budget("budget", budget, name, least)
        if policy.uses_decode_budget and isinstance(budget, int):
            prompt, decode = policy.split(budget)
            check_budget(f"budget={budget}, its prompt part", prompt, name, least)
            check_budget(f"budget={budget}, its decode part", decode, name, least_decode)

    def cell(self, tokens: int, horizon: int = 0) -> Cell:
        """The budget in entries for a prompt of `tokens` tokens, after which at most `horizon` come."""
        policy = self.policy
        if not policy.uses_budget or self.budget is None:
            return Cell(policy, tokens)

        def entries(share: int | float, least: int) -> int:
            return max(least, round(share * tokens)) if isinstance(share, float) else share

        least, least_decode = policy.least_budget(), policy.least_decode()
        if isinstance(self.budget, SplitBudget):
            prompt, decode = entries(self.budget.prompt, least), entries(self.budget.decode, least_decode)
            return Cell(policy.at(decode, horizon), prompt)
        budget = entries(self.budget, least)
        if not policy.uses_decode_budget:
            return Cell(policy, budget)
        prompt, decode = policy.split(budget)
        return Cell(policy.at(max(decode, least_decode), horizon), max(prompt, least))


@dataclass(frozen=True, eq=False)
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

    @property
    def first(self) -> int:
        """Tokens of the first forward pass."""
        return len(self.ids) if self.context_tokens is None else self.context_tokens

    @property
    def last(self) -> int:
        """The most tokens that are ever read: the last new token is not."""
        return len(self.ids) + self.max_new_tokens - 1


@dataclass(frozen=True)
class Job:
    """A request, and the variants that it is wanted under."""

    request: Request
    variants: Sequence[Variant]

    @property
    def lanes(self) -> int:
        """How many it takes; a reference answer is read by lanes of its own."""
        return len(self.variants) * (2 if self.request.reference else 1)


@dataclass(eq=False)
class Generation:
    """What one lane produced. Times in seconds, memory in bytes.

    Attributes:
        tokens: generated, the stop token included.
        kept_prompt: per layer, original positions kept when the prompt had been cut, `(kv_heads, k)`; -1 where a head
            holds fewer than another.
        kept_end: the same when the lane ended, generated tokens included.
        kv_bytes: keys and values after the cut, read off the storages.
        kv_bytes_by_device: the same, apart where some of it lies in host memory: "device" and "host".
        kv_bytes_peak: the most entries held times the bytes of an entry.
        kv_byte_steps: bytes of keys and values held after each decoding step, summed over the steps.
        kv_bytes_cutting: the most that keys and values took while layers could still shrink; 0 without such a plan.
        kv_bytes_full: what everything read up to the cut would take (with `prompt_scope=context`, the context).
        bookkeeping_bytes: positions and the policy's own state.
        prefill_seconds: the prompt's pass, which all lanes of the prompt share, and the passes over what its own policy
            wanted read before (`Policy.sequel`; these read the prompt once more), but for a foreseen answer's.
        decode_seconds: the lane's share of the batch's time (step time / lanes in the step, summed).
        decode_steps: tokens read one by one, those of the question with `prompt_scope=context` included.
        lanes: lanes in the batch at its start.
        picks: per layer, how often each entry of `kept_end` was attended to, `(kv_heads, k)`; empty where always.
        extra: what the policy itself reports about the prompt and the lane.
        error: why there is no result; everything else is then empty.
    """

    request: Request
    variant: Variant
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    kept_prompt: list[Tensor] = field(default_factory=list)
    kept_end: list[Tensor] = field(default_factory=list)
    kv_bytes: int = 0
    kv_bytes_by_device: dict[str, int] = field(default_factory=dict)
    kv_bytes_peak: int = 0
    kv_byte_steps: int = 0
    kv_bytes_cutting: int = 0
    kv_bytes_full: int = 0
    bookkeeping_bytes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    lanes: int = 0
    fidelity: dict[str, float | list[float]] | None = None
    picks: list[Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def describe_prompt(self, fork: Fork) -> None:
        """Record what is left of the prompt right after the cut.

        Raises:
            Fault: the policy's measures of the prompt do not fit together.
        """
        self.kept_prompt = [cache.positions[0].to("cpu", copy=True) for cache in fork.caches]
        self.kv_bytes, self.bookkeeping_bytes = fork.nbytes(), fork.bookkeeping_nbytes()
        self.kv_bytes_by_device, self.kv_bytes_full = fork.nbytes_by_device(), fork.full_nbytes
        self.kv_bytes_cutting = fork.cutting_nbytes
        self.extra = {name: four_digits(values.tolist()) for name, values in fork.measures().items()}

    def describe_end(self, batch: LaneBatch, row: int) -> None:
        """Record what is cached when the lane has finished.

        Raises:
            Fault: the policy cannot say what the record needs.
        """
        caches, lane = batch.locate(row)
        self.kept_end = [pad_sequence(cache.kept(lane), batch_first=True, padding_value=-1) for cache in caches]
        self.kv_bytes_peak = max(self.kv_bytes, sum(cache.most_bytes(lane) for cache in caches))
        self.kv_byte_steps = sum(cache.byte_steps(lane) for cache in caches)
        self.picks = [
            pad_sequence(cache.by_head(lane, count), batch_first=True)
            for count, cache in zip(batch.picks(row), caches, strict=False)
        ]
        self.extra |= batch.measures(row)


def four_digits(value: Any) -> Any:
    """Nested lists of numbers, rounded to four significant digits; None for what is not a number."""
    if isinstance(value, list):
        return [four_digits(item) for item in value]
    return float(f"{value:.4g}") if math.isfinite(value) else None
