"""Keys and values in few bits: asymmetric codes between the least and the largest number of a group.

    code = round((x - low) / step),  step = (high - low) / (2^bits - 1),  x' = code * step + low

Keys share low and step over `group` tokens, channel by channel; values over `group` channels, token by token (KIVI).
Both are float16 whatever the model's type, so a number takes `bits + 32 / group` bits; codes are chosen for the
rounded ones. Codes are packed along the channels, `8 / bits` to a byte, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import ClassVar, Self

import torch
from torch import Tensor

from src.kv.prompt import precise
from src.kv.rows import Block, Codec, Rows

MOST = torch.finfo(torch.float16).max


def pack(codes: Tensor, bits: int) -> Tensor:
    """`(..., d)` codes of so many bits, uint8 -> `(..., d * bits / 8)`, uint8."""
    return (by_group(codes, 8 // bits) << shifts(codes, bits)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`."""
    return (packed[..., None] >> shifts(packed, bits)).bitwise_and(2**bits - 1).flatten(-2)


def shifts(like: Tensor, bits: int) -> Tensor:
    """Where each code of a byte begins."""
    return torch.arange(0, 8, bits, device=like.device, dtype=torch.uint8)


def by_group(tensor: Tensor, size: int) -> Tensor:
    """`(..., d)` -> `(..., d / size, size)`."""
    return tensor.view(*tensor.shape[:-1], tensor.shape[-1] // size, size)


def quantise(numbers: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of numbers whose groups lie along `dim`.

    Returns:
        Codes, uint8, same shape; steps and lows, float16, without `dim`. Where all numbers of a group are the same, the
        step may be 0, and the low stands for all.
    """
    numbers = precise(numbers)
    low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    low16 = low.clamp(-MOST, MOST).half()
    step16 = ((high - low16).clamp_min(0) / (2**bits - 1)).half()
    step = step16.to(numbers.dtype)
    codes = (numbers - low16) / torch.where(step > 0, step, 1)
    return codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8), step16.squeeze(dim), low16.squeeze(dim)


def restore(codes: Tensor, step: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers from codes; `step` and `low` broadcast. float32 in between."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return codes.to(wide).mul_(step).add_(low).to(dtype)


class CodedRows(Rows):
    """Rows in few bits. They are decoded block by block, in each step, for as long as a product needs them.

    What that takes is in no `nbytes`: at most `at_once` rows (or one segment, if it has more) of head_dim numbers, at
    most 11 bytes each for a model in 16 bits (code, float32, result, a key's step and low), 9 in float32.

    Args:
        planes: "codes", `(N, head_dim * bits / 8)`, uint8; "steps" and "lows", float16, see the two kinds.
        bits: of a code: 2, 4 or 8.
        group: numbers that share a step and a low.
        dtype: of decoded rows.
    """

    at_once: ClassVar[int | None] = 1 << 14

    def __init__(
        self,
        planes: Mapping[str, Tensor],
        counts: Sequence[int],
        starts: Sequence[int],
        bits: int,
        group: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(planes, counts, starts)
        self.bits, self.group, self.dtype = bits, group, dtype

    def like(self, planes: Mapping[str, Tensor], counts: Sequence[int], starts: Sequence[int]) -> Self:
        return type(self)(planes, counts, starts, self.bits, self.group, self.dtype)


class CodedValues(CodedRows):
    """Every row by itself: "steps" and "lows" `(N, head_dim / group)`."""

    @classmethod
    def planes_of(cls, rows: Tensor, bits: int, group: int) -> dict[str, Tensor]:
        codes, steps, lows = quantise(by_group(rows, group), -1, bits)
        return {"codes": pack(codes.flatten(-2), bits), "steps": steps, "lows": lows}

    def decoded(self, block: Block) -> Tensor:
        codes = by_group(unpack(self.planes["codes"][block.rows], self.bits), self.group)
        steps, lows = (self.planes[name][block.rows, :, None] for name in ("steps", "lows"))
        return restore(codes, steps, lows, self.dtype).flatten(-2)

    def put(self, slot: Tensor, new: Tensor, stored: Tensor | None) -> None:
        if not self.held:
            return
        at, inside = self.find(slot, stored)
        for name, plane in self.planes_of(new[self.holders], self.bits, self.group).items():
            self.replace(name, self.before + at, plane, inside)


class CodedKeys(CodedRows):
    """Neighbouring rows of a segment, `group` by `group`: "steps" and "lows" `(groups, head_dim)`.

    The last group of a segment may be shorter; `extended` wants whole groups in front.
    """

    @classmethod
    def planes_of(cls, rows: Tensor, counts: Sequence[int], bits: int, group: int) -> dict[str, Tensor]:
        padded = [whole_groups(piece, group) for piece in torch.split(rows, list(counts))]
        together = torch.cat(padded).view(-1, group, rows.shape[-1])
        codes, steps, lows = quantise(together, 1, bits)
        pieces = torch.split(codes.flatten(0, 1), [len(piece) for piece in padded])
        packed = pack(torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)]), bits)
        return {"codes": packed, "steps": steps, "lows": lows}

    def span(self, name: str, count: int) -> int:
        return count if name == "codes" else -(-count // self.group)

    @cached_property
    def groups_before(self) -> list[int]:
        """Groups before each segment, and all."""
        return list(accumulate((self.span("steps", count) for count in self.counts), initial=0))

    @cached_property
    def sizes(self) -> Tensor:
        """Rows of every group."""
        starts = [count - start for count in self.counts for start in range(0, count, self.group)]
        return self.on_device([min(self.group, left) for left in starts])

    def decoded(self, block: Block) -> Tensor:
        codes = unpack(self.planes["codes"][block.rows], self.bits)
        groups = slice(self.groups_before[block.segments.start], self.groups_before[block.segments.stop])
        steps, lows = (
            self.planes[name][groups].repeat_interleave(self.sizes[groups], dim=0, output_size=len(codes))
            for name in ("steps", "lows")
        )
        return restore(codes, steps, lows, self.dtype)

    @cached_property
    def first_groups(self) -> Tensor:
        """Groups before each of `held`."""
        return self.sums([self.span("steps", self.counts[segment]) for segment in self.held])

    def put(self, slot: Tensor, new: Tensor, stored: Tensor | None) -> None:
        """The victim's group is decoded, the victim replaced, the group encoded anew: the others are rounded again.

        Groups must be whole, as they are until a growing cache codes the rest of its prompt.
        """
        if not self.held:
            return
        at, inside = self.find(slot, stored)
        mates = at[:, None] // self.group * self.group + torch.arange(self.group, device=at.device)
        rows, group = self.before[:, None] + mates, self.first_groups + at // self.group
        steps, lows = (self.planes[name][group][:, None] for name in ("steps", "lows"))
        old = restore(unpack(self.planes["codes"][rows], self.bits), steps, lows, self.dtype)
        chosen = (mates == at[:, None])[..., None]
        codes, steps, lows = quantise(torch.where(chosen, new[self.holders][:, None], old), 1, self.bits)
        for name, where, what in (
            ("codes", rows, pack(codes, self.bits)),
            ("steps", group, steps),
            ("lows", group, lows),
        ):
            self.replace(name, where, what, inside)


def whole_groups(rows: Tensor, group: int) -> Tensor:
    """Rows up to a multiple of the group: the last one again, which changes neither least nor largest."""
    return torch.cat([rows, rows[-1:].expand(-len(rows) % group, -1)])


@dataclass(frozen=True)
class Bits(Codec):
    """Few bits for all rows but the newest of each head; tokens after the prompt follow, `residual` at a time.

    Args:
        bits: 2, 4 or 8.
        group: numbers that share a step and a low: tokens for keys, channels for values.
        window: R, a multiple of the group: rows of a head are coded R by R, and what is left stays exact.
    """

    bits: int
    group: int
    window: int

    @property
    def residual(self) -> int:
        return self.window

    def exact(self, count: int) -> int:
        return count % self.window

    def keys(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        planes = CodedKeys.planes_of(rows, counts, self.bits, self.group)
        return CodedKeys(planes, counts, starts, self.bits, self.group, rows.dtype)

    def values(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Rows:
        planes = CodedValues.planes_of(rows, self.bits, self.group)
        return CodedValues(planes, counts, starts, self.bits, self.group, rows.dtype)
