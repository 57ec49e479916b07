"""What a cache-eviction policy is: settings, and a few questions that the engine asks.

A policy answers for one layer at a time and never sees the engine. It holds settings only (frozen
dataclass); whatever it must remember between steps lives in a `State` that belongs to the lanes and dies
with their samples.

Shapes: `n` prompt tokens, `slots` cached tokens, `group` query heads per KV head. While decoding, tensors
have a leading `lanes` dimension: lanes of one policy and one budget are answered together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.parts import Allocator, Reader, Store
from src.kv.cache import LayerCache
from src.kv.checks import check
from src.kv.contract import check_recent, check_scores
from src.kv.position import log_slope, octave_means
from src.kv.sequel import Sequel
from src.kv.state import ModelShape, State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class Policy(ABC):
    """Decides which tokens each layer keeps.

    Attributes:
        evicts_while_decoding: the cache never holds more than `budget` entries; otherwise it grows by one
            entry per generated token after the prompt was cut to `budget`.
        uses_budget: False for policies whose kept set does not depend on a budget (the full cache).
        uses_decode_budget: the policy divides its budget between the prompt and the tokens that come after it
            (`split`, `least_decode`, `at`); a user may then give `budget={prompt: .., decode: ..}`.
        own_pool: lanes of this policy share their cache with no other policy's. Needed by those that give
            `room`, `prune` or `make_cache`.
        may_refuse: `evict` may turn the incoming token away instead of giving it a slot.
        allocate: who may hold how many entries; None: every layer and KV head `budget`.
        store: how a kept token is held; None: as it is.
        read: which held tokens a step attends to; None: all.
        reconstruction: where the formulas come from, if neither from the paper's own text nor from its authors'
            code. Figures of such a policy are shown as "(our reconstruction)", with this text in the notes.
    """

    evicts_while_decoding: ClassVar[bool] = False
    uses_budget: ClassVar[bool] = True
    uses_decode_budget: ClassVar[bool] = False
    own_pool: ClassVar[bool] = False
    may_refuse: ClassVar[bool] = False
    reconstruction: ClassVar[str] = ""

    allocate: Allocator | None = field(default=None, kw_only=True)
    store: Store | None = field(default=None, kw_only=True)
    read: Reader | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check every setting against its annotation; ValueError names the setting and what would be valid."""
        hints = get_type_hints(type(self))
        for setting in fields(self):
            check(setting.name, getattr(self, setting.name), hints[setting.name])
        self.check_parts()

    def check_parts(self) -> None:
        """ValueError: a part that does not go with this policy, or a hook that a part has taken the place of."""
        name, part = type(self).__name__, type(self.allocate).__name__
        for hook in ("adjust_weights", "attended"):
            if hasattr(self, hook):
                raise ValueError(f"{name}.{hook} is no hook any more; valid: read, a Reader of policies.parts")
        if not isinstance(self.read, Reader | None):
            raise ValueError(f"read={self.read}: valid: a reader (conf/policy/read), or null")
        if self.allocate is not None:
            if not isinstance(self.allocate, Allocator):
                raise ValueError(f"allocate={self.allocate}: valid: an allocator (conf/policy/allocate), or null")
            if not isinstance(self, RankedPolicy) or self.own_pool:
                raise ValueError(f"allocate={part}: {name} does not rank the prompt's tokens; valid: null")
        if self.store is None:
            return
        part = type(self.store).__name__
        if not isinstance(self.store, Store):
            raise ValueError(f"store={self.store}: valid: a store (conf/policy/store), or null")
        if self.own_pool:
            raise ValueError(f"store={part}: {name} has a cache of its own; valid: null")
        if not self.store.overwrites and self.limit(1 << 20, 1) is not None:
            raise ValueError(
                f"store={part}: cannot give one token's slot to another, and {name} evicts while decoding; "
                "valid: null, a store that can, or a policy that cuts the prompt only"
            )

    @property
    def reader(self) -> Reader | None:
        """`read`, or what the policy's own settings say in its place."""
        return self.read

    @property
    def sequel(self) -> Sequel | None:
        """What is to be read after the prompt, with the full cache, before it is cut; the policy finds what it showed
        in `PromptAttention.seen`. None: nothing, as for most.
        """
        return None

    def reconstructed(self) -> str:
        """`reconstruction` of the policy and of its parts; empty if none is one."""
        said = (part.reconstruction for part in (self, self.allocate, self.store, self.read) if part is not None)
        return "; ".join(filter(None, said))

    def least_budget(self) -> int:
        """The smallest budget (tokens per layer and KV head) with which the policy makes sense."""
        return 1

    def staying(self, budget: int) -> int:
        """Tokens that stay in every head whatever they are worth, where the policy is told this budget."""
        return self.least_budget() - 1

    # Before anything runs, and before each request: return a policy that knows more.

    def bind(self, model: ModelShape) -> Policy:
        """This policy for one model, asked once; ValueError when they do not go together."""
        return self

    def fingerprint(self) -> dict[str, Any]:
        """What `bind` found that changes outcomes and is no setting (codebooks): it names results folders too."""
        return {}

    def split(self, budget: int) -> tuple[int, int]:
        """One number as (prompt entries, decode entries)."""
        raise NotImplementedError(f"{type(self).__name__} has no decode pool")

    def least_decode(self) -> int:
        """The smallest number of decode entries that makes sense."""
        return 0

    def at(self, decode: int, horizon: int) -> Policy:
        """This policy for one request.

        Args:
            decode: entries for tokens after the prompt.
            horizon: the most tokens that will come after the prompt was cut (T).
        """
        return self

    # The prompt.

    @abstractmethod
    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        """Prompt positions to keep, ascending, `(kv_heads, k)` with `1 <= k <= prompt_limit`, int64."""

    def prompt_limit(self, budget: int, length: int) -> int:
        """The most positions that `keep_prompt` may keep of `length`."""
        return budget if self.uses_budget else length

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        """What to remember about the kept tokens, for one lane: `slots` tensors `(kv_heads, ..., k)`."""
        return State()

    def make_cache(self, prompt: PromptAttention, kept: Tensor, limit: int | None) -> LayerCache:
        """How one layer's kept tokens are stored."""
        if self.store is not None:
            return self.store.hold(prompt, list(kept), limit)
        return LayerCache.from_prompt(prompt.keys, prompt.values, kept, limit)

    def limit(self, budget: int, kept: int) -> int | None:
        """The most entries per KV head the cache ever holds, at most `budget`; None: it grows (only policies that do
        not evict while decoding). `kept` are those of the prompt.
        """
        return budget if self.evicts_while_decoding else None

    # Decoding, at every step, in this order.

    def adjust_logits(self, step: DecodeStep) -> None:
        """Change `step.logits` in place before the softmax (StreamingLLM moves its sinks here)."""

    def observe(self, step: DecodeStep, state: State) -> None:
        """Fold one decoding step into the state; `step.weights` are those the model used, after `read`'s choice."""

    def prune(self, step: DecodeStep, state: State) -> Tensor | None:
        """Slots to keep, `(lanes, kv_heads, k)`, ascending, before the incoming token is added; None: all."""
        return None

    def room(self, t: int, limit: int) -> int:
        """Entries the cache may hold once the incoming token is in; `t` tokens came before it."""
        return limit

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        """What every cached token is worth when there is no room for the incoming one, `(lanes, kv_heads, slots)`.

        The lowest leaves, infinity stays. Empty slots are not looked at. With `may_refuse` there is one more column,
        the incoming token's, `(lanes, kv_heads, slots + 1)`: it gets no slot where that is the lowest. Asked for all
        lanes as soon as one has no room; the answer for a lane that still has some is not used.
        """
        raise NotImplementedError(f"{type(self).__name__} does not evict while decoding")

    def evict(self, step: DecodeStep, state: State) -> Tensor:
        """In place of `rank`, for rules that are no order: the slot that the incoming token takes, `(lanes, kv_heads)`,
        int64. With `may_refuse`, the number of slots (the incoming token's column) means that it gets none.
        """
        raise NotImplementedError(f"{type(self).__name__} ranks")

    def prompt_measures(self, prompt: PromptAttention, budget: int) -> dict[str, Tensor]:
        """Figures to record about one layer's prompt, small tensors; a record lists them by layer."""
        return {}

    def measures(self, states: list[State], lane: int) -> dict[str, Any]:
        """Numbers (JSON) to record about a finished lane, from its states, one per layer."""
        return {}


def keep_all(prompt: PromptAttention) -> Tensor:
    """Every prompt position for every KV head, `(kv_heads, n)`."""
    return torch.arange(prompt.length, device=prompt.keys.device).expand(prompt.keys.shape[0], -1)


def lowest_slot(scores: Tensor, protected: Tensor) -> Tensor:
    """For `Policy.evict`: the slot of the lowest score among those not protected; `(..., slots)` twice -> `(...)`.

    -1, which is no slot, where a score is NaN or every slot is protected: the engine then fails the sample.
    """
    lowest = scores.masked_fill(protected, torch.inf).min(-1)
    return torch.where(lowest.values < torch.inf, lowest.indices, -1)


@dataclass(frozen=True)
class RankedPolicy(Policy):
    """Keep the prompt's tokens that are worth most. What has an order goes with every allocation (`allocate`)."""

    @abstractmethod
    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        """What every prompt token is worth, `(kv_heads, n)`: the lowest leaves first, infinity stays."""

    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        if prompt.length <= budget:
            return keep_all(prompt)
        return self.rank_prompt(prompt, budget).topk(budget, dim=-1).indices.sort(dim=-1).values


@dataclass(frozen=True)
class ScorePolicy(RankedPolicy):
    """Keep the most recent tokens and, of the older ones, those with the highest scores.

    Subclasses give `recent` and `score`, and most policies need nothing else.
    """

    @abstractmethod
    def recent(self, budget: int) -> int:
        """How many of the latest tokens are always kept (part of the budget)."""

    @abstractmethod
    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        """A score for every prompt token, `(kv_heads, n)`; the most recent ones' are not looked at and may be left out.

        Infinity: the token stays. NaN fails the sample.
        """

    def least_budget(self) -> int:
        return 2

    def staying(self, budget: int) -> int:
        return self.recent(budget)

    def keep_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        recent = check_recent(self.recent(budget), budget)
        if prompt.length <= budget:
            return keep_all(prompt)
        older = prompt.length - recent
        scores = self._older_scores(prompt, budget)
        prompt.doubts.append(check_scores(scores, prompt.kv_heads, older))
        top = scores.topk(budget - recent, dim=-1).indices.sort(dim=-1).values
        return torch.cat([top, keep_all(prompt)[:, older:]], dim=-1)

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        """The scores, and infinity for the most recent tokens."""
        recent = check_recent(self.recent(budget), budget)
        scores = self._older_scores(prompt, budget)
        prompt.doubts.append(check_scores(scores, prompt.kv_heads, prompt.length - recent))
        return F.pad(scores, (0, recent), value=torch.inf)

    def prompt_measures(self, prompt: PromptAttention, budget: int) -> dict[str, Tensor]:
        """How the score depends on the position (`src.kv.position`), over the tokens that compete."""
        if prompt.length <= budget:
            return {}
        scores = self._older_scores(prompt, budget)
        return {"score_slope": log_slope(scores), "score_by_octave": octave_means(scores).mean(dim=0)}

    def _older_scores(self, prompt: PromptAttention, budget: int) -> Tensor:
        """`score` without the most recent tokens, `(kv_heads, n - recent)`; looked at twice, computed once."""
        older = prompt.length - self.recent(budget)

        def compute() -> Tensor:
            scores = self.score(prompt, budget)
            return scores[:, :older] if isinstance(scores, Tensor) and scores.dim() == 2 else scores  # refused later

        return prompt.once(("score", self, budget), compute)

    def protect_recent(self, step: DecodeStep) -> Tensor:
        """True for the slots of the last `recent` tokens, the incoming one counted, `(lanes, kv_heads, slots)`."""
        return step.positions > (step.position - self.recent(step.budget))[:, None, None]
