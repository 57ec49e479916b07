"""The frozen part of a ragged cache: cut from a prompt, joined with other lanes', lengthened by rows in reserve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from src.kv.rows import Codec, Part, Rows


def cut(keys: Tensor, values: Tensor, kept: Sequence[Tensor] | Tensor, codec: Codec) -> list[Part]:
    """One lane's rows, copied: what the codec encodes, and the newest of each head, which it leaves as they are.

    Args:
        keys: the layer's whole prompt, `(kv_heads, n, head_dim)`.
        values: same shape.
        kept: of every KV head, positions to keep, ascending, `(k,)`.
    """
    older = [len(positions) - codec.exact(len(positions)) for positions in kept]
    newest = [len(positions) - old for positions, old in zip(kept, older, strict=True)]

    def rows(of: Tensor, chosen: Sequence[Tensor]) -> Tensor:
        return torch.cat([of[head, positions] for head, positions in enumerate(chosen)])

    first = [positions[:old] for positions, old in zip(kept, older, strict=True)]
    rest = [positions[old:] for positions, old in zip(kept, older, strict=True)]
    start = [0] * len(older)
    return [
        Part(codec.keys(rows(keys, first), older, start), codec.values(rows(values, first), older, start)),
        Part(Rows({"rows": rows(keys, rest)}, newest, older), Rows({"rows": rows(values, rest)}, newest, older)),
    ]


def join(lanes: Iterable[Sequence[Part]]) -> list[Part]:
    """The parts of several lanes, part by part."""
    return [
        Part(Rows.join([part.keys for part in same]), Rows.join([part.values for part in same]))
        for same in zip(*lanes, strict=True)
    ]


def reserve(parts: Sequence[Part], heads: int, start: int, missing: int) -> list[Part]:
    """One lane's parts, every head with so many more rows, of zeros and as they are, from slot `start` on."""

    def more(rows: Rows) -> Rows:
        plane = rows.planes["rows"]
        blank = plane.new_zeros(missing * heads, plane.shape[-1])
        return rows.extended(Rows({"rows": blank}, [missing] * heads, [start] * heads))

    *others, newest = parts
    return [*others, Part(more(newest.keys), more(newest.values))]


def extended(part: Part, more: Part) -> Part:
    """Every segment followed by its rows of `more`."""
    return Part(part.keys.extended(more.keys), part.values.extended(more.values))


def coded(part: Part, codec: Codec) -> Part:
    """Rows that were held as they are, encoded."""
    keys, values = part
    return Part(
        codec.keys(keys.planes["rows"], keys.counts, keys.starts),
        codec.values(values.planes["rows"], values.counts, values.starts),
    )


def check_rows(counts: Sequence[int], limit: int | None, codec: Codec) -> None:
    """Entries of every KV head, and what may become of them. Raises ValueError: see `RaggedCache.from_prompt`."""
    if min(counts) < 1:
        raise ValueError(f"kept={list(counts)} entries by KV head: valid: 1 or more for each")
    if limit is not None and (limit < max(counts) or (limit > max(counts) and min(counts) < max(counts))):
        wanted = f"{max(counts)} (at capacity) or None (grows)"
        raise ValueError(f"limit={limit} for {list(counts)} kept entries by KV head: valid: {wanted}")
    if limit is not None and not codec.overwrites:
        raise ValueError(f"limit={limit} with {type(codec).__name__}, which cannot overwrite: valid: None (grows)")
