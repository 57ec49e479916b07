"""Keys with fewer channels: what is left out is chosen for each lane and KV head, the same for all its coded keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from src.kv.prompt import precise
from src.kv.rows import Block, Codec, Rows


class PrunedRows(Rows):
    """Keys of which some channels are stored; the others read as zero.

    Args:
        planes: "rows", `(N, channels left)`; "channels", which ones, ascending, `(segments, channels left)`, int16.
        dim: channels of a whole key, head_dim.
    """

    def __init__(self, planes: Mapping[str, Tensor], counts: Sequence[int], starts: Sequence[int], dim: int) -> None:
        super().__init__(planes, counts, starts)
        self.dim = dim

    def like(self, planes: Mapping[str, Tensor], counts: Sequence[int], starts: Sequence[int]) -> Self:
        return type(self)(planes, counts, starts, self.dim)

    def span(self, name: str, count: int) -> int:
        return 1 if name == "channels" else count

    @property
    def channels(self) -> Tensor:
        return self.planes["channels"].long()

    def decoded(self, block: Block) -> Tensor:
        rows, counts = self.planes["rows"][block.rows], self.counts[block.segments]
        at = self.channels[block.segments].repeat_interleave(self.on_device(counts), dim=0, output_size=len(rows))
        return rows.new_zeros(len(rows), self.dim).scatter_(1, at, rows)

    def logits(self, query: Tensor, out: Tensor) -> None:
        """The query loses the same channels; no key is made whole."""
        at = self.channels[:, None].expand(-1, query.shape[1], -1)
        self.multiply(query.gather(2, at), super().decoded, out)

    def put(self, slot: Tensor, new: Tensor, stored: Tensor | None) -> None:
        """A token that takes the slot of a coded key keeps that key's channels only."""
        if self.held:
            super().put(slot, new.gather(1, self.channels), stored)


@dataclass(frozen=True, eq=False)
class Channels(Codec):
    """Some channels of all keys but the newest of each head; values as they are.

    Args:
        left: the channels that stay, ascending, `(kv_heads, channels left)`, int64.
        recent: the newest kept keys of each head, which keep all channels.
    """

    left: Tensor
    recent: int

    def exact(self, count: int) -> int:
        return min(count, self.recent)

    def keys(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        pieces = zip(torch.split(rows, list(counts)), self.left, strict=True)
        planes = {"rows": torch.cat([piece[:, at] for piece, at in pieces]), "channels": self.left.to(torch.int16)}
        return PrunedRows(planes, counts, starts, rows.shape[-1])

    def values(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        return Rows({"rows": rows}, counts, starts)


def strongest_channels(queries: Tensor, keys: Sequence[Tensor], dropped: int) -> Tensor:
    """The channels that matter most to `q @ k`: `mean(q_c^2) * mean(k_c^2)`, over all given rows, is largest.

    Args:
        queries: `(kv_heads, rows, head_dim)`.
        keys: of every KV head `(k, head_dim)`.
        dropped: how many of the weakest are left out.

    Returns:
        Ascending, `(kv_heads, head_dim - dropped)`, int64.
    """
    asked = precise(queries).square().mean(dim=1)
    held = torch.stack([precise(of_head).square().mean(dim=0) for of_head in keys])
    score = asked * held
    return score.topk(score.shape[-1] - dropped, dim=-1).indices.sort(dim=-1).values
