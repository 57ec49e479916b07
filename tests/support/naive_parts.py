"""`tests.support.naive` with parts: budgets that differ by layer and head, and stores, as loops over the formulas."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from policies.adakv import AdaKV
from policies.ahakv import AhaKV
from policies.cake import CAKE, Cascade
from policies.duo_attention import RetrievalHeads
from policies.kivi import KIVI
from policies.pyramidkv import Pyramid
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from policies.think import ThinK
from tests.support.naive import Naive, Token, pooled, softmax, top

Scores = dict[int, float]


class NaiveParts(Naive):
    """One prompt under one policy with parts; what every layer is told and holds is known after the last layer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mean = self.budget
        self.told = [self.budget] * self.layers
        self.given: list[list[int]] = []
        self.new = 0  # tokens after the prompt that no store has coded
        self.rest: list[list[int]] = [[0] * self.kv_heads for _ in range(self.layers)]
        self.queries: list[Tensor] = []

    # Who may hold how much.

    def prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        n, self.budget = q.shape[1], q.shape[1]
        out = super().prompt(layer, q, k, v, scale)  # keeps everything
        self.queries.append(q)
        self.budget = self.mean
        if layer == self.layers - 1:
            if n <= self.mean:
                self.given = [[self.mean] * self.kv_heads for _ in range(self.layers)]
            else:
                self.divide(n)
            for at in range(self.layers):
                for g in range(self.kv_heads):
                    self.code_prompt(at, g)
        return out

    def divide(self, n: int) -> None:
        rule = self.policy.allocate
        always = self.policy.least_budget() - 1
        outer = rule.base if isinstance(rule, AdaKV) else rule
        if isinstance(outer, Pyramid):
            self.told = self.pyramid(outer.beta, always, n)
        self.given = [[told] * self.kv_heads for told in self.told]
        if isinstance(rule, Cascade):
            self.given = [[count] * self.kv_heads for count in self.cascade(rule, self.policy.staying(self.mean), n)]
        elif isinstance(rule, RetrievalHeads):
            self.given = self.retrieval(rule, n)
        for layer in range(self.layers):
            self.budget = self.told[layer]
            scores = [self.worth(layer, g, n) for g in range(self.kv_heads)]
            if isinstance(rule, AdaKV):
                self.given[layer] = self.compete(rule.floor, scores, self.told[layer])
            for g, count in enumerate(self.given[layer]):
                kept = top(scores[g], count, self.hint(0, layer, g))
                self.cached[layer][g] = [t for t in self.cached[layer][g] if t.position in kept]
        self.budget = self.mean

    def worth(self, layer: int, g: int, n: int) -> Scores:
        """Of every token; infinity: stays."""
        if isinstance(self.policy, StreamingLLM):
            return {j: math.inf if j < self.policy.sinks else j for j in range(n)}
        recent = self.recent()
        scores = {j: self.score(layer, g, j) for j in range(n - recent)}
        if isinstance(self.policy, SnapKV):
            scores = pooled(scores, self.policy.kernel, self.policy.pooling)
        scores = self.finish(layer, g, scores)
        if isinstance(self.policy, AhaKV):  # which changes no order within a head
            largest = max(self.gamma(layer, g, j) for j in scores)
            scores = {j: s / largest for j, s in scores.items()}
        return scores | {j: math.inf for j in range(n - recent, n)}

    def recent(self) -> int:
        return self.policy.window if isinstance(self.policy, CAKE) else super().recent()

    def score(self, layer: int, g: int, j: int) -> float:
        if not isinstance(self.policy, CAKE):
            return super().score(layer, g, j)
        reach, old = self.policy.kernel // 2, self.position + 1 - self.policy.window
        heads = range(g * self.group, (g + 1) * self.group)
        near = [self.varying(layer, h, i) for h in heads for i in range(j - reach, j + reach + 1) if 0 <= i < old]
        return sum(near) / len(near)

    def varying(self, layer: int, h: int, j: int) -> float:
        assert isinstance(self.policy, CAKE)
        column = [self.attention(layer, h, i)[j] for i in self.last(self.policy.window)]
        return statistics.mean(column) + self.policy.gamma * statistics.variance(column)

    def last(self, rows: int) -> range:
        return range(self.position + 1 - rows, self.position + 1)

    def attention(self, layer: int, h: int, i: int) -> Scores:
        if (layer, h, i) not in self.gained:
            self.gained[layer, h, i] = softmax(self.rows[layer][h][i])
        return self.gained[layer, h, i]

    def pyramid(self, beta: float, always: int, n: int) -> list[int]:
        free = self.mean - always
        if n < 2 * free:
            return [self.mean] * self.layers
        low = max(1.0, free / beta)
        high = min(2 * free - low, n - always)
        low = 2 * free - high
        counts = [math.floor(high - i * (high - low) / (self.layers - 1) + 1e-9) for i in range(self.layers)]
        while sum(counts) < free * self.layers:
            for layer in range(self.layers):
                if sum(counts) < free * self.layers and counts[layer] < n - always:
                    counts[layer] += 1
        return [always + count for count in counts]

    def compete(self, floor: float, scores: list[Scores], told: int) -> list[int]:
        """Every head's best is safe; of the others the best of all heads, mixed with the even share."""
        heads = range(self.kv_heads)
        ordered = [sorted(of_head.values(), reverse=True) for of_head in scores]
        stays = [row.count(math.inf) for row in ordered]
        free = sum(told - stay for stay in stays) / self.kv_heads
        entries = sorted(((-s, rank, h) for h in heads for rank, s in enumerate(ordered[h]) if rank > stays[h]))[
            : told * self.kv_heads - sum(stays) - self.kv_heads
        ]
        won = [1 + sum(h == head for _, _, h in entries) for head in heads]
        amounts = [(1 - floor) * count + floor * free for count in won]
        counts = [math.floor(amount + 1e-9) for amount in amounts]
        for head in sorted(heads, key=lambda h: (round(counts[h] - amounts[h], 9), h)):
            if sum(counts) + sum(stays) < told * self.kv_heads:
                counts[head] += 1
        return [stay + count for stay, count in zip(stays, counts, strict=True)]

    def cascade(self, rule: Cascade, always: int, n: int) -> list[int]:
        """Entry by entry to the layer with the largest preference for each, all layers known."""
        preferences = []
        for layer in range(self.layers):
            spread, shift = 0.0, 0.0
            for h in range(self.heads):
                for j in range(n - rule.window):
                    column = [self.attention(layer, h, i)[j] for i in self.last(rule.window)]
                    spread -= sum(a * math.log(a + 1e-10) for a in column)
                    shift += statistics.variance(column)
            preferences.append(spread ** (1 / rule.tau1) * shift ** (1 / rule.tau2))
        counts = [1] * self.layers
        while sum(counts) < (self.mean - always) * self.layers:
            open_ones = [layer for layer in range(self.layers) if counts[layer] < n - always]
            counts[max(open_ones, key=lambda layer: preferences[layer] / (counts[layer] + 0.5))] += 1
        return [always + count for count in counts]

    def retrieval(self, rule: RetrievalHeads, n: int) -> list[list[int]]:
        """The heads that look furthest share what the others leave."""
        reach = {}
        for layer in range(self.layers):
            for h in range(self.heads):
                for i in self.last(rule.window):
                    row = self.attention(layer, h, i)
                    far = sum(a for j, a in row.items() if rule.sinks <= j <= i - rule.recent)
                    at = layer, h // self.group
                    reach[at] = reach.get(at, 0.0) + far
        near, heads = rule.sinks + rule.recent, self.layers * self.kv_heads
        far_heads = math.ceil((self.mean - near) * heads / (n - near))
        share, more = divmod(self.mean * heads - near * (heads - far_heads), far_heads)
        counts = [[near] * self.kv_heads for _ in range(self.layers)]
        for place, (layer, g) in enumerate(sorted(reach, key=lambda at: -reach[at])[:far_heads]):
            counts[layer][g] = share + (place < more)
        return counts

    # Decoding: within what a head was given.

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        store = self.policy.store
        if isinstance(store, KIVI) and self.new == store.residual:
            for g in range(self.kv_heads):
                self.code_rest(layer, g, store)
        self.budget = self.told[layer]
        out = super().decode(layer, q, k, v, scale)
        if layer == self.layers - 1:
            self.new = 1 if isinstance(store, KIVI) and self.new == store.residual else self.new + 1
        return out

    def room(self, layer: int, g: int) -> int:
        return self.given[layer][g]

    # How it is held.

    def code_prompt(self, layer: int, g: int) -> None:
        held, store = self.cached[layer][g], self.policy.store
        if isinstance(store, ThinK):
            old = held[: max(0, len(held) - store.recent)]
            queries = self.queries[layer][g * self.group : (g + 1) * self.group, -store.rows :].flatten(0, 1)
            worth = [
                statistics.mean(float(q[c]) ** 2 for q in queries) * statistics.mean(float(t.key[c]) ** 2 for t in held)
                for c in range(len(held[0].key))
            ]
            drop = sorted(range(len(worth)), key=lambda c: worth[c])[: int(store.ratio * len(worth))]
            for token in old:
                token.key = token.key.clone()
                token.key[drop] = 0
        if isinstance(store, KIVI):
            self.rest[layer][g] = len(held) % store.residual
            code(held[: len(held) - self.rest[layer][g]], store)

    def code_rest(self, layer: int, g: int, store: KIVI) -> None:
        """The prompt's exact rest, and as many new tokens as wait."""
        held, rest = self.cached[layer][g], self.rest[layer][g]
        code(held[len(held) - self.new - rest : len(held) - self.new], store)
        code(held[len(held) - self.new :], store)
        self.rest[layer][g] = 0


def code(tokens: list[Token], store: KIVI) -> None:
    """Rounded as if coded: keys by channel over a group of tokens, values by token over a group of channels."""
    for start in range(0, len(tokens), store.group):
        mates = tokens[start : start + store.group]
        keys = torch.stack([t.key for t in mates])
        for c in range(keys.shape[1]):
            keys[:, c] = rounded(keys[:, c], store.bits)
        for token, key in zip(mates, keys, strict=True):
            token.key, token.value = key, token.value.clone()
            for c in range(0, len(token.value), store.group):
                token.value[c : c + store.group] = rounded(token.value[c : c + store.group], store.bits)


def rounded(numbers: Tensor, bits: int) -> Tensor:
    """To the nearest of the codes between the least and the largest; one number, or equal ones, to float16."""
    low = float(numbers.min().half())
    step = max(0.0, float(((numbers.max() - low) / (2**bits - 1)).half()))
    if step == 0:
        return torch.full_like(numbers, low)
    return torch.tensor([low + step * min(2**bits - 1, max(0, round((float(x) - low) / step))) for x in numbers]).to(
        numbers
    )
