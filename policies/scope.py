"""SCOPE: the prompt and the output are compressed apart (Wu et al. 2024, arXiv 2412.13649)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from policies.ahakv import AhaKV
from policies.base import Policy
from policies.full import Full
from policies.h2o import H2O
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep

PROMPT_POLICIES = ("h2o", "snapkv", "streaming_llm", "full", "ahakv")


@dataclass(frozen=True)
class Scope(Policy):
    """A prompt pool, chosen once and never touched again, and a decode pool of output tokens (section 3).

    The prompt pool (alpha1 + alpha2 entries) is what any prompt policy keeps. Of the x output tokens so far, the one
    being read counted, the decode pool keeps the last beta2 and, of the older ones, those with the highest scores:

        slide          min(x, beta1 + beta2) tokens
        adaptive       beta2 + floor((x - beta2) beta1 / (T - beta2)) for x > beta2: the full size only at x = T
        discontinuous  as adaptive, but selected only when that number rises: at most beta1 selections instead of
                       T - beta2. In between nothing is dropped, so the pool is up to (T - beta2) / beta1 larger.

    T is the request's largest number of output tokens. With `prompt_scope=context` the question is read after the
    cut: it then belongs to the decode pool, and its tokens count in x and T.

    Args:
        strategy: one of the three.
        prompt: chooses the prompt pool (the paper's plug-in claim): "h2o" and "snapkv" with a window of
            `prompt_local` (the paper's alpha2), "streaming_llm", "full" and "ahakv" with their own defaults; or
            any other policy as a config with `_target_`. Only its choice among the prompt's tokens is used.
        prompt_local: alpha2; 8 in the paper.
        decode_local: beta2: below 1 a share of the decode pool, else tokens. The paper has 256 of 512 and of 1,024.
        decode_share: the decode pool's part of a `budget` that is one number; 0.2 as the paper's 512 of 2,048 + 512.
            `budget={prompt: .., decode: ..}` says both.
        score: "cumulative" attention, summed over all steps since the token came, as the paper says (default: the
            unified H2O here accumulates too, so that the two differ in their pools only), or the "current" row
            alone, as the authors' code does, with which the published numbers were made.
        decode, horizon: beta1 + beta2 and T; filled in for each request (`at`).

    Differences to the code: the prompt's H2O scores are causal (theirs let early rows see later tokens); one kept
    set per KV head, by the mean over its query heads (theirs stores a copy per query head); the schedule is the
    paper's formula (theirs is beta2 + t // ((T - beta2) // beta1) from t = 0 on).
    """

    strategy: Literal["slide", "adaptive", "discontinuous"] = "slide"
    prompt: str | Policy = "h2o"
    prompt_local: int = 8
    decode_local: float = 0.5
    decode_share: float = 0.2
    score: Literal["cumulative", "current"] = "cumulative"
    decode: int = 0
    horizon: int = 0
    evicts_while_decoding: ClassVar[bool] = True
    uses_decode_budget: ClassVar[bool] = True
    own_pool: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prompt, Policy) and self.prompt not in PROMPT_POLICIES:
            raise ValueError(f"prompt={self.prompt}: valid: {', '.join(PROMPT_POLICIES)}, or a policy's config")
        if isinstance(self.prompt, Policy) and self.prompt.sequel:
            raise ValueError(f"prompt={type(self.prompt).__name__}: looks ahead; valid: a policy that does not")
        if self.decode_local > 1 and self.decode_local != int(self.decode_local):
            raise ValueError(f"decode_local={self.decode_local}: valid: a share below 1, or a whole number of tokens")
        if not 0 < self.decode_share < 1:
            raise ValueError(f"decode_share={self.decode_share}: valid: a share between 0 and 1")
        if self.prompt_local < 1:
            raise ValueError(f"prompt_local={self.prompt_local}: valid: 1 or more")

    # The two budgets.

    def least_budget(self) -> int:
        return self.prompt_local + 1 if self.prompt == "h2o" else self._prompt_policy(1 << 30).least_budget()

    def least_decode(self) -> int:
        return 2 if self.decode_local < 1 else int(self.decode_local) + 1

    def split(self, budget: int) -> tuple[int, int]:
        decode = round(self.decode_share * budget)
        return budget - decode, decode

    def at(self, decode: int, horizon: int) -> Scope:
        return replace(self, decode=decode, horizon=horizon)

    @property
    def local(self) -> int:
        """beta2, at least the token being read."""
        local = round(self.decode_local * self.decode) if self.decode_local < 1 else int(self.decode_local)
        return min(max(1, local), self.decode - 1)

    @property
    def history(self) -> int:
        """beta1."""
        return self.decode - self.local

    def selected(self, x: int) -> int:
        """How many tokens older than the last beta2 the schedule allows after x output tokens (beta1 at x = T)."""
        if self.strategy == "slide" or x >= self.horizon:
            return self.history
        return max(0, x - self.local) * self.history // max(1, self.horizon - self.local)

    def size(self, x: int) -> int:
        """Entries of the decode pool after x output tokens (discontinuous: right after a selection)."""
        return min(x, self.local + self.selected(x))

    @property
    def most(self) -> int:
        """The most entries the decode pool ever has."""
        if self.strategy != "discontinuous":
            return self.decode
        pause = -(-max(0, self.horizon - self.local) // self.history)
        return self.decode + max(0, pause - 1)

    # The prompt.

    def _prompt_policy(self, budget: int) -> Policy:
        if isinstance(self.prompt, Policy):
            return self.prompt
        if self.prompt == "h2o":
            return H2O(heavy_share=max(0.0, 1 - self.prompt_local / budget))
        if self.prompt == "snapkv":
            return SnapKV(window=self.prompt_local)
        others: dict[str, Policy] = {"streaming_llm": StreamingLLM(), "full": Full(), "ahakv": AhaKV()}
        return others[self.prompt]

    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        return self._prompt_policy(budget).keep_prompt(prompt, budget)

    def prompt_limit(self, budget: int, length: int) -> int:
        return self._prompt_policy(budget).prompt_limit(budget, length)  # `full` keeps everything

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        state = State(fixed={"length": torch.tensor(prompt.length, device=kept.device)})
        if self.score == "cumulative":
            dtype = torch.promote_types(prompt.keys.dtype, torch.float32)
            state.slots["score"] = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
        return state

    def limit(self, budget: int, kept: int) -> int:
        return kept + self.most

    # Decoding: `step.t` output tokens came before the one being read.

    def observe(self, step: DecodeStep, state: State) -> None:
        if self.score == "cumulative":
            state.slots["score"] += step.weights.mean(dim=2)

    def _scores(self, step: DecodeStep, state: State) -> Tensor:
        """`(lanes, kv_heads, slots)`."""
        return (state.slots["score"] if self.score == "cumulative" else step.weights.mean(dim=2))[..., :-1]

    def _protected(self, step: DecodeStep, state: State) -> Tensor:
        """The prompt pool, the last beta2 output tokens, and empty slots."""
        prompt = step.positions < state.fixed["length"][:, None, None]
        return prompt | (step.positions > (step.position - self.local)[:, None, None])

    def room(self, t: int, limit: int) -> int:
        return limit - self.most + self.size(t + 1) if self.strategy == "adaptive" else limit

    def prune(self, step: DecodeStep, state: State) -> Tensor | None:
        x = step.t + 1
        if self.strategy != "discontinuous" or self.selected(x) == self.selected(x - 1) or self.size(x) == x:
            return None
        assert step.limit is not None
        keep = step.limit - self.most + self.size(x) - 1  # the prompt pool, and the decode pool without this token
        scores = self._scores(step, state).masked_fill(self._protected(step, state), torch.inf)
        scores = scores.masked_fill(step.positions < 0, -torch.inf)
        return scores.topk(keep, dim=-1).indices.sort(dim=-1).values

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        return self._scores(step, state).masked_fill(self._protected(step, state), torch.inf)
