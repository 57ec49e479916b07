"""What a pool's policies evict in one decoding step: made safe to index with at once, judged when it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policies.base import Policy
from src.kv.cache import LayerCache
from src.kv.faults import describe

BROKEN = -2  # in place of a token: the lane's policy has evicted no valid slot


@dataclass(frozen=True)
class Eviction:
    """One layer's.

    Args:
        hook: of the policies.
        given: what they gave, `(lanes, kv_heads, ...)`.
        wrong: where it is no valid slot, `(lanes, kv_heads)`.
        expected: in words.
    """

    hook: str
    layer: int
    given: Tensor
    wrong: Tensor
    expected: str

    def say(self, policy: Policy, lane: int) -> str:
        """One line about a lane that went wrong; the host waits for the device."""
        head = int(self.wrong[lane].int().argmax())
        given: Any = self.given[lane, head].tolist()
        refused = ", or the number of slots (no slot)" if policy.may_refuse else ""
        why = " (lowest_slot gives -1 where a score is NaN or all slots are protected)" if given == -1 else ""
        text = f"gave {'slot ' if isinstance(given, int) else 'slots '}{given}{why}; expected {self.expected}{refused}"
        return describe(policy, self.hook, text, [f"layer {self.layer}", f"KV head {head}"])


class Evictions:
    """One step's, layer by layer, of all lanes of a pool."""

    def __init__(self) -> None:
        self.layers: list[Eviction] = []

    def slots(
        self, layer: int, cache: LayerCache, victims: Sequence[Tensor], refusing: Sequence[bool], room: int | None
    ) -> Tensor:
        """All members' victims as valid slots, `(lanes, kv_heads)`.

        Args:
            victims: of each member, `(its lanes, kv_heads)`.
            refusing: of each member, whether the number of slots is valid, too.
            room: entries a lane may hold now; None: as many as there are slots.
        """
        room = cache.slots if room is None else room
        tops = [cache.slots if refuses else room - 1 for refuses in refusing]
        given = torch.cat(list(victims)).long()
        if len(set(tops)) == 1:
            safe = given.clamp(0, tops[0])
        else:
            safe = torch.cat([v.long().clamp(0, top) for v, top in zip(victims, tops, strict=True)])
        wrong = safe != given
        if room < cache.slots and any(refusing):
            wrong |= (safe >= room) & (safe < cache.slots)
        if min(cache.used) < room:  # nothing is evicted from a lane that has room
            wrong &= (cache.filled >= room)[:, None]
        self.layers.append(Eviction("evict", layer, given, wrong, f"a slot from 0 to {room - 1}"))
        return safe

    def kept(self, layer: int, cache: LayerCache, kept: Tensor) -> Tensor:
        """The same for the slots that a policy keeps of its own pool, `(lanes, kv_heads, k)`."""
        wrong = ((kept < 0) | (kept >= cache.filled[:, None, None])).any(-1)
        wrong |= (kept.sort(dim=-1).values.diff(dim=-1) < 1).any(-1)
        expected = f"distinct slots from 0 to {max(cache.used) - 1}"
        self.layers.append(Eviction("prune", layer, kept, wrong, expected))
        return kept.clamp(0, cache.slots - 1)

    def wrong(self) -> Tensor | None:
        """Which lanes to doubt, `(lanes,)`; None: nothing was evicted."""
        return torch.stack([e.wrong for e in self.layers]).any(dim=0).any(dim=-1) if self.layers else None

    def say(self, policy: Policy, lane: int) -> str:
        """What went wrong first, of a lane that is doubted."""
        return next((e.say(policy, lane) for e in self.layers if e.wrong[lane].any()), "")
