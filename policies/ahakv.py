"""AhaKV: adaptive holistic attention (Gu et al. 2025, arXiv 2506.03762). A reconstruction.

No code of the authors is public, and the body of the paper could not be read; the formulas come from two
independent third-party summaries of it, which agree. *Known*: the three components, lambda, the squared value
norm with mean pooling and max normalisation, r = 32, eviction that goes on while decoding. *Reconstructed*:
everything that a switch below says "ours" about. Each component can be switched off alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.base import ScorePolicy
from policies.snapkv import pool, pool_cached
from src.kv.prompt import vector_norm
from src.kv.state import State

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class AhaKV(ScorePolicy):
    """Keep the last r tokens and the older ones with the highest score

        S_j = gamma_j / max(gamma) * sum over the last r rows i of softmax_j(g_i z_i),  z = q k^T / sqrt(d)
        g_i = sqrt(2 ln(i / k))               step-gain softmax: row entropy near ln k, k = budget
        gamma = mean-pool of ||v_j||^2        value prior

    lambda_i = sqrt(2 ln(i/k) / d) on raw q k^T in the paper equals g_i on z. Attention outputs always use the
    ordinary softmax; the gain serves the score only.

    Args:
        recent_accumulation: sum the last r rows; off: all rows, as H2O does.
        step_gain: sharpen each row by g_i; off: ordinary softmax.
        value_prior: weigh by the value norms; off: gamma = 1.
        window: r, rows summed and recent tokens kept; 32 in all of the paper's experiments.
        value_pool: width of the mean pooling of the norms; not reported, 5 is ours.
        gain_position: i while decoding: "absolute" position (default, ours; "step gain" points there), "cached"
            tokens (nearly uniform rows), or "frozen" at the prompt's length.
        gain_budget: k: the "whole" budget (default, ours) or "history" = budget - r.
        gain_guard: rows with i <= k sqrt(e), where the formula would flatten or is undefined: "softmax"
            (g = 1; default, ours), "literal" (g = sqrt(max(0, .))), "skip" (literal, and rows i <= k not counted).
        decode_score: "window" of the last r rows (default, ours), "running" sum, or "decay"ing running sum.
        decay: factor per step for decode_score=decay.
        logit_variance: "unit", the paper's assumption (default); extensions that are not AhaKV: "measured"
            divides g by the standard deviation of z per head, "entropy" solves for mean row entropy = ln k.
        group: joins the query heads of a KV head: "mean" (default, ours) or "max".
        value_norm: "l2_squared" (paper), "l2", or "l1".
        score_pool: max-pooling of S along the text before the value prior, by width; 1: none (default; the
            summaries mention none), 7: SnapKV's. On real text this switch decides AhaKV's rank.
        sinks: first tokens that always stay; 0 (default). Their tiny value norms demote them otherwise.
    """

    recent_accumulation: bool = True
    step_gain: bool = True
    value_prior: bool = True
    window: int = 32
    value_pool: int = 5
    gain_position: Literal["absolute", "cached", "frozen"] = "absolute"
    gain_budget: Literal["whole", "history"] = "whole"
    gain_guard: Literal["softmax", "literal", "skip"] = "softmax"
    decode_score: Literal["window", "running", "decay"] = "window"
    decay: float = 0.97
    logit_variance: Literal["unit", "measured", "entropy"] = "unit"
    group: Literal["mean", "max"] = "mean"
    value_norm: Literal["l2_squared", "l2", "l1"] = "l2_squared"
    score_pool: int = 1
    sinks: int = 0
    evicts_while_decoding: ClassVar[bool] = True
    reconstruction: ClassVar[str] = (
        "the formulas come from two third-party summaries, which agree; the body of the paper could not be read, and "
        "no code of the authors is public"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.value_pool % 2 == 0 or self.score_pool % 2 == 0:
            raise ValueError(
                f"window={self.window}, value_pool={self.value_pool}, score_pool={self.score_pool}: "
                "valid: a window of 1 or more, odd pools"
            )
        if self.value_pool // 2 >= self.window:
            raise ValueError(f"value_pool={self.value_pool}: valid: narrower than twice window={self.window}")

    def recent(self, budget: int) -> int:
        return self.window

    def least_budget(self) -> int:
        return self.window + self.sinks + 1

    def staying(self, budget: int) -> int:
        return self.window + self.sinks

    # The prompt.

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        older = prompt.length - self.window
        sums = self._join(self._sums(prompt, budget))[:, :older]
        score = pool(sums, self.score_pool, "max")
        if self.value_prior:
            gamma = self._gamma(prompt)[:, :older]
            score = score * gamma / gamma.amax(dim=-1, keepdim=True)
        score[:, : self.sinks] = torch.inf
        return score

    def start(self, prompt: PromptAttention, kept: Tensor, budget: int) -> State:
        at = kept[:, None].expand(-1, 1 if self.group == "mean" else prompt.group, -1)
        state = State(slots={"sum": self._reduce(self._sums(prompt, budget), 1).gather(-1, at)})
        if self._slides:
            rows = self._reduce(self._rows(prompt, budget), 1)
            rows = F.pad(rows, (0, 0, self.window - rows.shape[2], 0))
            state.slots["rows"] = rows.gather(-1, at[:, :, None].expand(-1, -1, self.window, -1))
        if self.value_prior:
            norms = prompt.value_norms(self.value_norm)
            count = self._neighbours(prompt.length, norms)
            state.slots["norm"] = norms.gather(-1, kept)
            state.slots["gamma_sum"] = (self._gamma(prompt) * count).gather(-1, kept)
            state.slots["gamma_count"] = count.gather(-1, kept)
        state.fixed["length"] = torch.tensor(prompt.length, device=kept.device)
        state.fixed["factor"] = self._factor(prompt, budget)
        return state

    @property
    def _slides(self) -> bool:
        return self.recent_accumulation and self.decode_score == "window"

    def _rows(self, prompt: PromptAttention, budget: int) -> Tensor:
        """The last r rows after the gain, `(kv_heads, group, r, n)`."""
        if not self.step_gain:
            return prompt.window_weights(self.window)
        return prompt.once((self, "rows", budget), lambda: self._gained_rows(prompt, budget))

    def _gained_rows(self, prompt: PromptAttention, budget: int) -> Tensor:
        logits = prompt.window_logits(self.window)
        rows, n = logits.shape[2:]
        visible = torch.arange(n - rows + 1, n + 1, device=logits.device)
        gain = self._gain(visible, budget, logits.dtype) * self._factor(prompt, budget)
        weights = softmax_with_gain(logits, gain[..., None])
        return weights * self._counts(visible, budget)[:, None]

    def _sums(self, prompt: PromptAttention, budget: int) -> Tensor:
        """Accumulated attention, `(kv_heads, group, n)`."""
        if self.recent_accumulation:
            return prompt.once((self, "sums", budget), lambda: self._rows(prompt, budget).sum(dim=2))
        if not self.step_gain:
            return prompt.column_sums()
        visible = torch.arange(1, prompt.length + 1, device=prompt.keys.device)
        factor = self._factor(prompt, budget)
        gain = self._gain(visible, budget, factor.dtype) * factor
        first_row = int((visible <= self._k(budget)).sum()) if self.gain_guard == "skip" else 0
        return prompt.column_sums(gain, first_row, key=(self, budget))

    def _gamma(self, prompt: PromptAttention) -> Tensor:
        return pool(prompt.value_norms(self.value_norm), self.value_pool, "avg")

    def _neighbours(self, n: int, like: Tensor) -> Tensor:
        """How many tokens each mean of the value pooling is over, `(kv_heads, n)`."""
        ones = torch.ones_like(like)
        return F.avg_pool1d(ones, self.value_pool, 1, self.value_pool // 2) * self.value_pool

    # The gain.

    def _k(self, budget: int) -> int:
        return budget if self.gain_budget == "whole" else budget - self.window

    def _gain(self, visible: Tensor, budget: int, dtype: torch.dtype) -> Tensor:
        """g_i for rows that see `visible` tokens."""
        k = self._k(budget)
        gain = (2 * (visible.to(dtype) / k).log()).clamp_min(0).sqrt()
        if self.gain_guard == "softmax":
            gain = torch.where(visible <= k * math.sqrt(math.e), torch.ones_like(gain), gain)
        return gain

    def _counts(self, visible: Tensor, budget: int) -> Tensor:
        """1 for rows that are summed, 0 for those skipped."""
        return ((visible > self._k(budget)) | (self.gain_guard != "skip")).float()

    def _factor(self, prompt: PromptAttention, budget: int) -> Tensor:
        """What the gain is multiplied by, `(kv_heads, group, 1)`: 1 unless `logit_variance` says otherwise."""
        k = self._k(budget)
        if not self.step_gain or self.logit_variance == "unit" or prompt.length <= k:
            return prompt.value_norms(self.value_norm).new_ones(prompt.kv_heads, prompt.group, 1)
        logits = prompt.window_logits(self.window)
        if self.logit_variance == "measured":
            return prompt.once(("1 / std of logits", self.window), lambda: 1 / visible_std(logits)[..., None])
        solved = prompt.once(("entropy gain", self.window, k), lambda: solve_entropy(logits, math.log(k)))
        return (solved / self._gain(torch.tensor(prompt.length), budget, logits.dtype).clamp_min(1e-6))[..., None]

    # Decoding.

    def observe(self, step: DecodeStep, state: State) -> None:
        row = self._reduce(self._decode_row(step, state), 2)
        sums = state.slots["sum"]
        if self._slides:
            rows, oldest = state.slots["rows"], step.t % self.window
            sums += row - rows[..., oldest, :]
            rows[..., oldest, :] = row
        else:
            if self.decode_score == "decay":
                sums *= self.decay
            sums += row
        if self.value_prior:
            self._observe_value(step, state)

    def _decode_row(self, step: DecodeStep, state: State) -> Tensor:
        if not self.step_gain:
            return step.weights
        if self.gain_position == "absolute":
            visible = step.position[:, None] + 1
        elif self.gain_position == "cached":
            visible = (step.positions >= 0).sum(dim=-1) + 1  # heads may hold different numbers
        else:
            visible = state.fixed["length"][:, None]
        gain = self._gain(visible, step.budget, step.logits.dtype)[..., None, None] * state.fixed["factor"]
        weights = softmax_with_gain(step.logits, gain)
        return weights * self._counts(visible, step.budget)[..., None, None]

    def _observe_value(self, step: DecodeStep, state: State) -> None:
        """The incoming token joins the means of its left neighbours, all of them recent, and they join its own."""
        norm, total, count = (state.slots[name] for name in ("norm", "gamma_sum", "gamma_count"))
        new = vector_norm(step.value, self.value_norm)
        near = (step.positions >= (step.position - self.value_pool // 2)[:, None, None]) & (step.positions >= 0)
        norm[..., -1] = new
        total[..., -1] = new + (norm[..., :-1] * near).sum(-1)
        count[..., -1] = 1 + near.sum(-1)
        total[..., :-1] += near * new[..., None]
        count[..., :-1] += near

    def rank(self, step: DecodeStep, state: State) -> Tensor:
        score = self._join(state.slots["sum"])[..., :-1]
        protected = self.protect_recent(step)
        if self.score_pool > 1:
            score = pool_cached(score.masked_fill(protected, 0), step.positions, self.score_pool)
        if self.value_prior:  # dividing by the maximum changes no order
            score = score * (state.slots["gamma_sum"] / state.slots["gamma_count"].clamp_min(1))[..., :-1]
        if self.sinks:
            protected = protected | (step.positions < self.sinks)
        return score.masked_fill(protected, torch.inf)

    # Query heads to KV heads: the mean can be taken before summing rows, the maximum only after.

    def _reduce(self, weights: Tensor, dim: int) -> Tensor:
        """Average the group dimension to length one; `group=max` leaves it for `_join`."""
        return weights.mean(dim=dim, keepdim=True) if self.group == "mean" else weights

    def _join(self, sums: Tensor) -> Tensor:
        """`(..., kv_heads, group, n)` -> `(..., kv_heads, n)`."""
        return sums.mean(dim=-2) if self.group == "mean" else sums.amax(dim=-2)


def softmax_with_gain(logits: Tensor, gain: Tensor) -> Tensor:
    """softmax(gain * logits); masked entries (-inf) stay masked because the gain is never 0."""
    return (logits * gain.clamp_min(1e-6)).softmax(dim=-1)


def visible_std(logits: Tensor) -> Tensor:
    """Standard deviation of the finite logits of each head, `(kv_heads, group, r, n)` -> `(kv_heads, group)`."""
    visible = logits.isfinite()
    count = visible.sum(dim=(-2, -1))
    known = logits.masked_fill(~visible, 0)
    mean = known.sum(dim=(-2, -1)) / count
    return (known.square().sum(dim=(-2, -1)) / count - mean.square()).clamp_min(1e-12).sqrt()


def solve_entropy(logits: Tensor, target: float) -> Tensor:
    """The factor of each head's logits at which the mean row entropy is `target` nats, by bisection.

    `(kv_heads, group, r, n)` -> `(kv_heads, group)`; entropy falls as the factor grows.
    """
    low = torch.full(logits.shape[:2], -6.0, device=logits.device, dtype=logits.dtype)
    high = -low
    for _ in range(24):
        middle = (low + high) / 2
        weights = softmax_with_gain(logits, middle.exp2()[..., None, None])
        entropy = torch.special.entr(weights).sum(dim=-1).mean(dim=-1)
        low = torch.where(entropy > target, middle, low)
        high = torch.where(entropy > target, high, middle)
    return ((low + high) / 2).exp2()
