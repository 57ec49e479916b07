"""What a policy may know about one layer's prompt: computed when asked for, once, for all lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from src.kv.contract import Doubt

# Elements of one block of logits: about 9 MB of float32, so that a block stays in a CPU's cache while its
# softmax and its column sum read it again. GPUs want larger launches.
BLOCK_ELEMENTS = {"cpu": 2_400_000, "cuda": 64_000_000}


class PromptAttention:
    """One layer's queries, keys and values over the prompt, and attention statistics of them.

    Args:
        queries: after the rotary embedding, `(heads, n, head_dim)`; of a text that was read after other tokens, the
            last ones only.
        keys: after the rotary embedding, `(kv_heads, n, head_dim)`.
        values: `(kv_heads, n, head_dim)`.
        scaling: what the model multiplies `q @ k` by, usually `head_dim ** -0.5`.
        layer: index of the layer, from 0.
        layers: how many layers the model has.
        seen: for policies that had something read after the prompt, what it showed (`seen`).

    Everything here is exact and causal, and no tensor of `n x n` elements is ever made.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        layer: int,
        layers: int,
        seen: Mapping[Any, Tensor] | None = None,
    ) -> None:
        self.queries, self.keys, self.values = queries, keys, values
        self.scaling, self.layer, self.layers = scaling, layer, layers
        self._seen = seen or {}
        self._memo: dict[object, Tensor] = {}
        self.doubts: list[Doubt] = []  # what a policy wants to have looked at once its numbers can be read

    @property
    def length(self) -> int:
        """Prompt tokens, `n`."""
        return self.keys.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def group(self) -> int:
        """Query heads per KV head (1 for multi-head attention)."""
        return self.queries.shape[0] // self.keys.shape[0]

    def once(self, key: object, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, remembered under `key` for as long as this layer's prompt lives."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def window_logits(self, rows: int) -> Tensor:
        """Scaled logits of the last `rows` queries, `(kv_heads, group, rows, n)`, float32, causal (-inf)."""
        rows = min(rows, self.length)

        def compute() -> Tensor:
            logits = precise(self._logits(self.length - rows, self.length))
            return logits.view(self.kv_heads, self.group, rows, self.length)

        return self.once(("window", rows), compute)

    def window_weights(self, rows: int) -> Tensor:
        """Softmax of `window_logits`, `(kv_heads, group, rows, n)`, float32."""
        return self.once(("weights", rows), lambda: self.window_logits(rows).softmax(dim=-1))

    def column_sums(self, row_gain: Tensor | None = None, first_row: int = 0, key: object = None) -> Tensor:
        """Attention that every token received from all queries, exactly: `S_j = sum over i >= j of a_ij`.

        Memory is O(block x n): blocks of rows are soft-maxed and added up (H2O without its n x n matrix).

        Args:
            row_gain: multiplies the logits of each query before its softmax, `(kv_heads, group, n)`.
            first_row: queries before it are not counted.
            key: names the gain, so that equal questions are answered once.

        Returns:
            `(kv_heads, group, n)`, float32.
        """
        if row_gain is not None and key is None:
            raise ValueError("column_sums: a row_gain needs a key, or two gains would share one answer")
        return self.once(("columns", key, first_row), lambda: self._column_sums(row_gain, first_row))

    def value_norms(self, kind: str = "l2_squared") -> Tensor:
        """Norm of every value vector, `(kv_heads, n)`, float32. `kind`: l2_squared, l2 or l1."""
        return self.once(("norm", kind), lambda: vector_norm(self.values, kind))

    def column_max(self) -> Tensor:
        """The most attention that every token received from any query, `(kv_heads, group, n)`, float32.

        In blocks of rows, as `column_sums`.
        """
        return self.once("largest", self._column_max)

    def seen(self, sequel: object) -> Tensor:
        """What this layer showed when a policy's `sequel` was read after the whole prompt (`Sequel.join`)."""
        return self._seen[sequel]

    @property
    def first_query(self) -> int:
        """The token that the first query is of: 0, unless other tokens were read before."""
        return self.length - self.queries.shape[1]

    @cached_property
    def _scaled_queries(self) -> Tensor:
        return (self.queries * self.scaling).view(self.kv_heads, self.group, self.queries.shape[1], -1)

    def _logits(self, start: int, stop: int, row_gain: Tensor | None = None) -> Tensor:
        """Logits of query rows `start..stop`, `(kv_heads, group * rows, stop)`, -inf above the diagonal."""
        rows = self._scaled_queries[:, :, start - self.first_query : stop - self.first_query]
        if row_gain is not None:
            rows = rows * row_gain[..., start:stop, None].to(rows.dtype)
        logits = rows.reshape(self.kv_heads, -1, rows.shape[-1]) @ self.keys[:, :stop].transpose(1, 2)
        corner = logits.view(self.kv_heads, self.group, stop - start, stop)[..., start:]
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=logits.device).triu_(1)
        corner.masked_fill_(future, -torch.inf)
        return logits

    def _column_sums(self, row_gain: Tensor | None, first_row: int) -> Tensor:
        sums = precise(self.keys.new_zeros(self.kv_heads, self.group, self.length))
        for weights in self._row_blocks(first_row, row_gain):
            sums[..., : weights.shape[-1]] += weights.sum(dim=2)
        return sums

    def _column_max(self) -> Tensor:
        largest = precise(self.keys.new_zeros(self.kv_heads, self.group, self.length))
        for weights in self._row_blocks(self.first_query):
            columns = largest[..., : weights.shape[-1]]
            torch.maximum(columns, weights.amax(dim=2), out=columns)
        return largest

    def _row_blocks(self, first_row: int, row_gain: Tensor | None = None) -> Iterator[Tensor]:
        """Attention of the rows from `first_row` on, a block at a time: `(kv_heads, group, rows, columns so far)`."""
        n, heads = self.length, self.queries.shape[0]
        dtype = torch.float64 if self.keys.dtype == torch.float64 else torch.float32
        block = max(16, BLOCK_ELEMENTS.get(self.keys.device.type, BLOCK_ELEMENTS["cpu"]) // (heads * n))
        for start in range(first_row, n, block):
            stop = min(start + block, n)
            weights = self._logits(start, stop, row_gain).softmax(dim=-1, dtype=dtype)
            yield weights.view(self.kv_heads, self.group, stop - start, stop)


def vector_norm(values: Tensor, kind: str) -> Tensor:
    """Norm over the last dimension: `l2_squared`, `l2` or `l1`."""
    values = precise(values)
    if kind == "l1":
        return values.abs().sum(-1)
    squared = values.square().sum(-1)
    return squared if kind == "l2_squared" else squared.sqrt()


def precise(tensor: Tensor) -> Tensor:
    """As float32, the precision of all scores; float64 stays (tests compare in it)."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
