"""KVzip: keep what the model needs to repeat the prompt, whatever will be asked (Kim et al. 2025, arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.base import RankedPolicy
from policies.parts import Allocator
from src.kv.plan import Allotment, Plan
from src.kv.prompt import PromptAttention
from src.kv.sequel import Sequel
from src.kv.shares import ByLayer, competing, shrinking

if TYPE_CHECKING:
    from src.kv.state import ModelShape

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """Token ids of an instruction's text, of that for all chunks but the first, and of what comes before the answer."""

    first: Ids = ()
    later: Ids = ()
    turn: Ids = ()


@dataclass(frozen=True)
class Repetition(Sequel):
    """The prompt's own text in chunks, each after an instruction to repeat it; see `KVzip`."""

    sinks: int
    chunk: int
    tail: int
    words: Words

    def texts(self, prompt: Sequence[int], rest: Sequence[int]) -> list[list[int]]:
        found = []
        for start in range(self.sinks, len(prompt), self.chunk):
            before = prompt[max(self.sinks, start - self.tail) : start]  # of the first chunk: nothing
            words = self.words.first if start == self.sinks else self.words.later
            found.append([*words, *before, *self.words.turn, *prompt[start : start + self.chunk]])
        return found

    def see(self, read: PromptAttention, n: int, text: int) -> Tensor:
        """The scores of one chunk, `(kv_heads, chunk)`."""
        start = self.sinks + text * self.chunk
        stop = min(start + self.chunk, n)
        spans = [slice(0, self.sinks), slice(start, stop), slice(n, None)]
        keys, values = (torch.cat([rows[:, span] for span in spans], dim=1) for rows in (read.keys, read.values))
        queries = read.queries[:, n - read.length :]
        subset = PromptAttention(queries, keys, values, read.scaling, read.layer, read.layers)
        return subset.column_max()[..., self.sinks : self.sinks + stop - start].amax(dim=1)


@dataclass(frozen=True)
class KVzip(RankedPolicy):
    """Keep the first tokens and those that some token looks at most while the model repeats the prompt.

        s_j = max over the group and the rows i of a_ij,  i over the text that is read for the chunk that holds j,
        a_i = softmax over the first `sinks` tokens, the chunk, and the text up to i

    The prompt after its first tokens is repeated in chunks. Read for each, with the whole prompt in the cache: the
    instruction, for later chunks the last `tail` tokens before it, what the chat form puts before an answer, and the
    chunk. Attention itself is over everything; only the scores are of that softmax over a part of it, as in the
    authors' code and kvpress. The prompt is cut once; then the cache grows by one entry per token. Its budgets are
    `Globally`'s; without an allocator all heads hold the same, the authors' uniform variant.

    Costs: the prompt is read twice and repeated once (the authors read it once; here the pass that others share stays
    untouched), and while it is repeated in several chunks its whole cache is held. The text reaches so many tokens
    beyond the prompt as a chunk and its instruction have: leave room in the model's context.

    Ours: the first tokens stand for the system prompt, which the authors keep and do not repeat; what follows of a chat
    form's beginning is repeated with the rest. With `prompt_scope=prompt` the instruction stands after the form's end.
    Scores are float32 (there: the model's precision). A policy that no tokenizer was shown (`bind`) has no instruction
    and nothing before the answer: it reads the chunks alone.

    Args:
        sinks: first tokens, always kept; 4 in kvpress.
        chunk: tokens of a chunk, 2,048 in kvpress (2,000 in the authors' code).
        tail: tokens that remind of where a later chunk begins, 8 there.
        instruction, later: before the first chunk and before all others, the authors' words.
        words: their token ids, filled in by `bind`.
    """

    sinks: int = 4
    chunk: int = 2048
    tail: int = 8
    instruction: str = "\n\nRepeat the previous context exactly."
    later: str = "\n\nRepeat the part of the previous context exactly, starting with "
    words: Words = field(default=Words(), compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: valid: 1 or more")
        for name, text in (("instruction", self.instruction), ("later", self.later)):
            if not isinstance(text, str):
                raise ValueError(f"{name}={text}: valid: a text, '' for none")

    def bind(self, model: ModelShape) -> KVzip:
        if model.encode is None:
            return self
        turn = model.turn() if model.turn else []
        words = Words(tuple(model.encode(self.instruction)), tuple(model.encode(self.later)), tuple(turn))
        return replace(self, words=words)

    def least_budget(self) -> int:
        return self.sinks + 1

    @property
    def sequel(self) -> Sequel:
        return Repetition(self.sinks, self.chunk, self.tail, self.words)

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        """The scores, and infinity for the first tokens."""
        return F.pad(prompt.seen(self.sequel), (self.sinks, 0), value=torch.inf)


@dataclass(frozen=True)
class Globally(Allocator):
    """One competition of all tokens of all layers and KV heads: the best of the whole model stay.

    That keeps the largest sum of scores that the whole model's budget can. Of equal scores the earlier layer's wins,
    then the better rank in its own head, then the first head. A head keeps one entry at least beside those that always
    stay, whatever its scores (ours; the authors' threshold has no floor).

    Tokens that are not among the best of the layers so far cannot be among the best of all, so they go at once (ours;
    the authors hold the whole prompt until the last layer): never more entries than the budget's and one layer's
    prompt. Until the last layer a layer is padded to its longest head.
    """

    def plan(self, allotment: Allotment) -> Plan:
        if allotment.budget >= allotment.length:
            return ByLayer.uniform(allotment)
        return GlobalPlan(allotment, competing(allotment) - 1)


@dataclass
class GlobalPlan:
    """One request's.

    Args:
        beside: entries of a KV head, on average, beside those that always stay and the one that it keeps at least.

    Attributes:
        scores: the best so far of all that compete, from the highest on; heads: whose they are, counted from layer 0.
        counts: what each head of the layers so far holds.
    """

    allotment: Allotment
    beside: int
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    heads: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    counts: list[list[int]] = field(default_factory=list)
    revises: ClassVar[bool] = True

    def told(self, layer: int) -> int:
        return self.allotment.budget

    def cut(self, prompt: PromptAttention, scores: Tensor) -> dict[int, list[int]]:
        a, least = self.allotment, self.allotment.always + 1
        ranked = scores.sort(dim=-1, descending=True).values[:, least:].T  # rank after rank, for ties as promised
        heads = torch.arange(a.kv_heads, device=scores.device) + prompt.layer * a.kv_heads
        found = torch.cat([self.scores.to(ranked), ranked.flatten()])
        whose = torch.cat([self.heads.to(heads), heads.expand_as(ranked).flatten()])
        best = found.sort(descending=True, stable=True).indices[: self.beside * a.layers * a.kv_heads]
        self.scores, self.heads = found[best], whose[best]
        won = self.heads.bincount(minlength=len(heads) * (prompt.layer + 1))
        before, self.counts = self.counts, (won + least).view(-1, a.kv_heads).tolist()
        return shrinking(self.counts, before)
