"""Every policy once more, naively: what `src/` and `policies/` do fast, done so that one can see it is right.

The real model runs, but its attention is this file's: full n x n over the prompt, and while decoding a growing
list of tokens per layer and KV head from which one token at a time is dropped. Every attention row that any query
ever made is remembered, and scores are added up from those rows anew at every step. Plain loops, no batches.

The formulas are those of the papers and of the docstrings of `policies/`, not of their code. Where several tokens
have exactly the same score at the edge of what is kept (max-pooling makes such ties), any choice is right; `hint`
says which one the other side made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from policies.ahakv import AhaKV
from policies.base import Policy
from policies.full import Full
from policies.h2o import H2O
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM

Row = dict[int, float]  # position of a key -> logit or weight
Kept = list[list[list[int]]]  # [layer][KV head] -> positions, ascending
Hint = Callable[[int, int, int], set[int]]  # step (0: the prompt), layer, KV head -> positions the other side kept


def attend_naively(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, naive: Any, **rest: Any) -> Any:
    return naive.attend(module.layer_idx, q[0], k[0], v[0], rest.get("scaling")), None


AttentionInterface.register("naive", attend_naively)
AttentionMaskInterface.register("naive", lambda *args, **rest: None)


def one_thread() -> Iterator[None]:
    """A fixture's body: with tensors as tiny as here, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with another attention function for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass
class Token:
    position: int
    key: Tensor
    value: Tensor


@dataclass
class Result:
    """`kept[0]` is after the prompt, `kept[s]` after decoding step s; `logits[s]` what followed then."""

    tokens: list[int]
    kept: list[Kept]
    logits: list[Tensor]
    outputs: list[list[Tensor]]  # [step][layer] -> attention output of the last token, (heads, head_dim)


def softmax(row: Row, gain: float = 1.0) -> Row:
    top = max(gain * x for x in row.values())
    raised = {j: math.exp(gain * x - top) for j, x in row.items()}
    total = sum(raised.values())
    return {j: x / total for j, x in raised.items()}


def entropy(row: Row) -> float:
    return -sum(a * math.log(a) for a in row.values() if a > 0)


def top(scores: dict[int, float], count: int, hint: set[int]) -> list[int]:
    """The `count` positions with the highest scores; of equal ones at the edge, those in `hint`."""
    edge = sorted(scores.values())[-count]
    slack = 1e-9 * abs(edge) if math.isfinite(edge) else 0.0
    above = [j for j, s in scores.items() if s > edge + slack]
    equal = [j for j, s in scores.items() if edge - slack <= s <= edge + slack]
    equal.sort(key=lambda j: j not in hint)
    return above + equal[: count - len(above)]


class Naive:
    """One prompt under one policy and budget."""

    def __init__(self, model: PreTrainedModel, policy: Policy, budget: int, hint: Hint | None = None) -> None:
        config = model.config
        self.model, self.policy, self.budget, self.config = model, policy, budget, config
        self.hint = hint or (lambda step, layer, head: set())
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.group = self.heads // self.kv_heads
        self.position = -1  # of the newest token
        self.step = 0
        self.cached: list[list[list[Token]]] = [[[] for _ in range(self.kv_heads)] for _ in range(self.layers)]
        self.rows: list[list[list[Row]]] = [[[] for _ in range(self.heads)] for _ in range(self.layers)]  # logits
        self.values: list[list[list[Tensor]]] = [[[] for _ in range(self.kv_heads)] for _ in range(self.layers)]
        self.gained: dict[tuple[int, int, int], Row] = {}
        self.factors: dict[tuple[int, int], float] = {}
        self.out: list[Tensor] = []

    @torch.no_grad()
    def run(self, ids: list[int], new: int, context: int | None = None, feed: list[int] | None = None) -> Result:
        """Greedy decoding of `new` tokens, or the given tokens fed in.

        Args:
            context: the policy sees so many tokens; the rest of the prompt is fed through the cut cache.
            feed: tokens to be read after the prompt in place of the model's own.
        """
        result = Result([], [], [], [])
        scope = len(ids) if context is None else context
        waiting = ids[scope:] + (feed or [])
        total = len(waiting) if feed is not None else len(ids) - scope + new - 1
        with implementation(self.model, "naive"):
            for fed in range(total + 1):
                text = ids[:scope] if fed == 0 else (waiting[fed - 1 : fed] or result.tokens[-1:])
                logits = self.forward(text)
                result.logits.append(logits)
                result.outputs.append(self.out)
                result.kept.append(self.kept())
                self.step += 1
                if fed >= len(waiting):
                    result.tokens.append(int(logits.argmax()))
        return result

    def forward(self, text: list[int]) -> Tensor:
        start = self.position + 1
        self.position += len(text)
        self.out = []
        positions = torch.arange(start, start + len(text))[None]
        return self.model(torch.tensor([text]), position_ids=positions, use_cache=False, naive=self).logits[0, -1]

    def kept(self) -> Kept:
        return [[sorted(t.position for t in head) for head in layer] for layer in self.cached]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        one = self.prompt if self.step == 0 else self.decode
        out = one(layer, q, k, v, scale)  # (new, heads, head_dim)
        self.out.append(out[-1])
        return out[None]

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        n = q.shape[1]
        out = q.new_zeros(n, self.heads, v.shape[-1])
        for h in range(self.heads):
            square = (q[h] @ k[h // self.group].T * scale).tolist()  # n x n
            for i in range(n):
                row = {j: square[i][j] for j in range(i + 1)}
                weights = softmax(row)
                out[i, h] = (
                    torch.tensor([weights[j] for j in range(i + 1)], dtype=v.dtype) @ v[h // self.group, : i + 1]
                )
                self.rows[layer][h].append(row)
        for g in range(self.kv_heads):
            self.values[layer][g] = list(v[g])
            kept = set(range(n)) if n <= self.budget or isinstance(self.policy, Full) else set(self.cut(layer, g, n))
            self.cached[layer][g] = [Token(j, k[g, j], v[g, j]) for j in sorted(kept)]
        return out

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = q.new_zeros(1, self.heads, v.shape[-1])
        for g in range(self.kv_heads):
            self.cached[layer][g].append(Token(self.position, k[g, 0], v[g, 0]))
            self.values[layer][g].append(v[g, 0])
        for h in range(self.heads):
            tokens = self.cached[layer][h // self.group]
            if isinstance(self.policy, StreamingLLM) and self.policy.positions == "cache":
                # Positions inside the cache: the s-th cached token stands at s, the query at the last one.
                query = self.rotated(q[h, 0], len(tokens) - 1 - self.position)
                keys = [self.rotated(t.key, s - t.position) for s, t in enumerate(tokens)]
            else:
                query, keys = q[h, 0], [t.key for t in tokens]
            row = {t.position: float(query @ key) * scale for t, key in zip(tokens, keys, strict=True)}
            row, mass = self.read(layer, h, row)
            weights = softmax(row)
            out[0, h] = mass * sum(weights[t.position] * t.value for t in tokens if t.position in row)
            self.rows[layer][h].append(row)
        if self.policy.evicts_while_decoding:
            for g in range(self.kv_heads):
                if len(self.cached[layer][g]) > self.room(layer, g):
                    victim = self.drop(layer, g)
                    self.cached[layer][g] = [t for t in self.cached[layer][g] if t.position != victim]
        return out

    def read(self, layer: int, h: int, row: Row) -> tuple[Row, float]:
        """The logits of what a query head attends to, and what its weights add up to."""
        return row, 1.0

    def room(self, layer: int, g: int) -> int:
        """Entries that a KV head may hold."""
        return self.budget

    def rotated(self, vector: Tensor, shift: int) -> Tensor:
        """Rotary embedding by hand: dimensions (c, c + d/2) are a complex number, turned by shift * theta_c."""
        rope = self.config.rope_parameters
        d = int(vector.shape[-1] * rope.get("partial_rotary_factor", 1.0))
        angle = torch.tensor([shift * rope["rope_theta"] ** (-2 * c / d) for c in range(d // 2)], dtype=torch.float64)
        turned, a, b = vector.clone(), vector[: d // 2], vector[d // 2 : d]
        turned[: d // 2] = a * angle.cos() - b * angle.sin()
        turned[d // 2 : d] = a * angle.sin() + b * angle.cos()
        return turned

    # What stays of the prompt, and what goes at each step.

    def cut(self, layer: int, g: int, n: int) -> list[int]:
        """Prompt positions that one KV head keeps."""
        policy = self.policy
        if isinstance(policy, StreamingLLM):
            return [j for j in range(n) if j < policy.sinks or j >= n - (self.budget - policy.sinks)]
        recent = self.recent()
        scores = {j: self.score(layer, g, j) for j in range(n - recent)}
        if isinstance(policy, SnapKV):
            scores = pooled(scores, policy.kernel, policy.pooling)
        scores = self.finish(layer, g, scores)
        return top(scores, self.budget - recent, self.hint(0, layer, g)) + list(range(n - recent, n))

    def drop(self, layer: int, g: int) -> int:
        """The position that goes, now that one token too many is cached."""
        there = [t.position for t in self.cached[layer][g]]
        if isinstance(self.policy, StreamingLLM):
            return min(j for j in there if j >= self.policy.sinks)
        scores = {j: self.score(layer, g, j) for j in there if j <= self.position - self.recent()}
        scores = self.finish(layer, g, scores)
        stay = top(scores, len(scores) - 1, self.hint(self.step, layer, g)) if len(scores) > 1 else []
        return next(j for j in scores if j not in stay)

    def recent(self) -> int:
        """Tokens at the end of the text that always stay."""
        if isinstance(self.policy, H2O):
            heavy = max(1, round(self.policy.heavy_share * self.budget))
            return self.budget - min(heavy, self.budget - 1)
        assert isinstance(self.policy, SnapKV | AhaKV)
        return self.policy.window

    def score(self, layer: int, g: int, j: int) -> float:
        """Attention that position j received, the query heads of KV head g joined."""
        heads = range(g * self.group, (g + 1) * self.group)
        received = [self.received(layer, h, j) for h in heads]
        join = getattr(self.policy, "group", "mean")
        return max(received) if join == "max" else sum(received) / len(received)

    def received(self, layer: int, h: int, j: int) -> float:
        """Attention that position j received from the rows that this policy counts, one query head."""
        rows = range(self.position + 1)
        if isinstance(self.policy, SnapKV):
            rows = rows[-self.policy.window :]
        if not isinstance(self.policy, AhaKV):
            return sum(self.weights(layer, h, i).get(j, 0.0) for i in rows)
        n = self.position + 1 - self.step  # tokens read before the first step
        if not self.policy.recent_accumulation:
            before, after = rows[:n], rows[n:]
        elif self.policy.decode_score == "window":
            before, after = range(0), rows[-self.policy.window :]
        else:
            before, after = rows[:n][-self.policy.window :], rows[n:]
        total = sum(self.weights(layer, h, i).get(j, 0.0) for i in before)
        for i in after:
            if self.policy.decode_score == "decay":
                total *= self.policy.decay
            total += self.weights(layer, h, i).get(j, 0.0)
        return total

    def weights(self, layer: int, h: int, i: int) -> Row:
        """Row i after the softmax, with AhaKV's gain; each is worked out once."""
        if (layer, h, i) not in self.gained:
            row = self.rows[layer][h][i]
            gain = self.gain(layer, h, i) if isinstance(self.policy, AhaKV) and self.policy.step_gain else 1.0
            self.gained[layer, h, i] = {} if gain is None else softmax(row, gain)
        return self.gained[layer, h, i]

    # AhaKV.

    def gain(self, layer: int, h: int, i: int) -> float | None:
        """g_i of the row at position i; None: the row is not counted."""
        policy, n = self.policy, self.position + 1 - self.step
        assert isinstance(policy, AhaKV)
        visible = i + 1
        if i >= n and policy.gain_position == "cached":
            visible = len(self.rows[layer][h][i])
        elif i >= n and policy.gain_position == "frozen":
            visible = n
        gain = self.plain_gain(visible)
        if gain is None or policy.logit_variance == "unit":
            return gain
        if (layer, h) not in self.factors:  # measured on the prompt once and for all
            window = self.rows[layer][h][:n][-policy.window :]
            if policy.logit_variance == "measured":
                self.factors[layer, h] = 1 / statistics.pstdev([z for row in window for z in row.values()])
            else:
                self.factors[layer, h] = self.solved(window) / (self.plain_gain(n) or math.inf)
        return gain * self.factors[layer, h]

    def plain_gain(self, visible: int) -> float | None:
        policy = self.policy
        assert isinstance(policy, AhaKV)
        k = self.budget if policy.gain_budget == "whole" else self.budget - policy.window
        if policy.gain_guard == "softmax" and visible <= k * math.sqrt(math.e):
            return 1.0
        if visible <= k:
            return None if policy.gain_guard == "skip" else 0.0
        return math.sqrt(2 * math.log(visible / k))

    def solved(self, window: list[Row]) -> float:
        """The factor at which the mean entropy of these rows is ln k (bisection; entropy falls with the factor)."""
        policy = self.policy
        assert isinstance(policy, AhaKV)
        k = self.budget if policy.gain_budget == "whole" else self.budget - policy.window
        low, high = 2.0**-6, 2.0**6
        for _ in range(30):
            middle = (low + high) / 2
            mean = sum(entropy(softmax(row, middle)) for row in window) / len(window)
            low, high = (middle, high) if mean > math.log(k) else (low, middle)
        return low

    def finish(self, layer: int, g: int, scores: dict[int, float]) -> dict[int, float]:
        """AhaKV's pooling of the scores, its value prior, and its sinks."""
        policy = self.policy
        if not isinstance(policy, AhaKV):
            return scores
        scores = pooled(scores, policy.score_pool, "max")
        if policy.value_prior:
            scores = {j: s * self.gamma(layer, g, j) for j, s in scores.items()}
        return {j: math.inf if j < policy.sinks else s for j, s in scores.items()}

    def gamma(self, layer: int, g: int, j: int) -> float:
        """Mean of the value norms around position j; dividing all by their maximum changes no order."""
        policy, all_values = self.policy, self.values[layer][g]
        assert isinstance(policy, AhaKV)
        reach = policy.value_pool // 2
        near = [
            norm(all_values[i], policy.value_norm) for i in range(j - reach, j + reach + 1) if 0 <= i < len(all_values)
        ]
        return sum(near) / len(near)


def norm(value: Tensor, kind: str) -> float:
    numbers = value.tolist()
    if kind == "l1":
        return sum(abs(x) for x in numbers)
    squared = sum(x * x for x in numbers)
    return squared if kind == "l2_squared" else math.sqrt(squared)


def pooled(scores: dict[int, float], width: int, kind: str) -> dict[int, float]:
    """Pooling over positions at most `width // 2` away that have a score."""
    result = {}
    for j in scores:
        near = [scores[i] for i in range(j - width // 2, j + width // 2 + 1) if i in scores]
        result[j] = max(near) if kind == "max" else sum(near) / len(near)
    return result
