"""What a pool's policies evict in one decoding step: made safe to index with at once, judged when it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.engine.members import Member
from src.kv.cache import LayerCache
from src.kv.faults import describe

BROKEN = -2  # in place of a token: the lane's policy has evicted no valid slot
NO_ORDER = "gave NaN, or infinity for all tokens of a head; expected numbers (infinity: stays)"


@dataclass(frozen=True)
class Eviction:
    """One layer's.

    Args:
        lowest: the rank of what leaves, `(lanes, kv_heads)`; infinity or NaN where there is nothing that may leave.
        given: what the policies gave instead of ranks, `(lanes, kv_heads, ...)`; None: all have ranked.
        expected: in words.
    """

    layer: int
    lowest: Tensor
    given: Tensor | None = None
    expected: str = ""

    def say(self, member: Member, lane: int) -> str:
        """One line about a lane that went wrong; the host waits for the device."""
        wrong = ~(self.lowest[lane] < torch.inf)
        if not wrong.any():
            return ""
        policy, head = member.cell.policy, int(wrong.int().argmax())
        where = [f"layer {self.layer}", f"KV head {head}"]
        if self.given is None or (member.ranks and self.given.dim() == 2):
            return describe(policy, "rank", NO_ORDER, where)
        given: Any = self.given[lane, head].tolist()
        hook, what = ("evict", "slot") if isinstance(given, int) else ("prune", "slots")
        refused = ", or the number of slots (no slot)" if policy.may_refuse else ""
        why = " (lowest_slot gives -1 where a score is NaN or all slots are protected)" if given == -1 else ""
        return describe(policy, hook, f"gave {what} {given}{why}; expected {self.expected}{refused}", where)


class Evictions:
    """One step's, layer by layer, of all lanes of a pool."""

    def __init__(self) -> None:
        self.layers: list[Eviction] = []

    def ranked(
        self, layer: int, cache: LayerCache, ranks: Sequence[Tensor], refusing: Sequence[bool], room: int
    ) -> Tensor:
        """The slots of the lowest ranks, `(lanes, kv_heads)`.

        Args:
            ranks: of each member, `(its lanes, kv_heads, slots)`, with one more column where it may refuse.
            refusing: of each member, whether it may.
            room: entries a lane may hold now; the slots from there on are empty.
        """
        slots = cache.slots
        if any(refusing) and not all(refusing):
            mixed = zip(ranks, refusing, strict=True)
            ranks = [rank if refuses else F.pad(rank, (0, 1), value=torch.inf) for rank, refuses in mixed]
        joined = ranks[0] if len(ranks) == 1 else torch.cat(list(ranks))
        if room < slots:
            joined = torch.cat([joined[..., :room], joined[..., slots:]], dim=-1)
        lacking = cache.lacking()
        if lacking is not None:
            joined = joined.masked_fill(F.pad(lacking, (0, joined.shape[-1] - slots)), torch.inf)
        lowest, slot = joined.min(dim=-1)
        if room < slots and any(refusing):
            slot = torch.where(slot < room, slot, slots)
        self._note(Eviction(layer, lowest), cache, room)
        return slot

    def chosen(
        self, layer: int, cache: LayerCache, victims: Sequence[Tensor], refusing: Sequence[bool], room: int
    ) -> Tensor:
        """Slots that policies name themselves, made valid. As `ranked`; `victims`: `(lanes, kv_heads)`, any numbers."""
        tops = [cache.slots if refuses else room - 1 for refuses in refusing]
        given = torch.cat(list(victims)).long()
        safe = torch.cat([v.long().clamp(0, top) for v, top in zip(victims, tops, strict=True)])
        wrong = safe != given
        if room < cache.slots and any(refusing):
            wrong |= (safe >= room) & (safe < cache.slots)
        lacking = cache.lacking()
        if lacking is not None:
            wrong |= F.pad(lacking, (0, 1)).gather(-1, safe[..., None])[..., 0]
        lowest = torch.zeros(wrong.shape, device=wrong.device).masked_fill_(wrong, torch.inf)
        self._note(Eviction(layer, lowest, given, f"a slot from 0 to {room - 1}"), cache, room)
        return safe

    def kept(self, layer: int, cache: LayerCache, kept: Tensor) -> Tensor:
        """The same for the slots that a policy keeps of its own pool, `(lanes, kv_heads, k)`."""
        wrong = ((kept < 0) | (kept >= cache.filled[:, None, None])).any(-1)
        wrong |= (kept.sort(dim=-1).values.diff(dim=-1) < 1).any(-1)
        lowest = torch.zeros(wrong.shape, device=wrong.device).masked_fill_(wrong, torch.inf)
        self.layers.append(Eviction(layer, lowest, kept, f"distinct slots from 0 to {max(cache.used) - 1}"))
        return kept.clamp(0, cache.slots - 1)

    def _note(self, eviction: Eviction, cache: LayerCache, room: int) -> None:
        if not cache.full and min(cache.used) < room:  # nothing is evicted from a lane that has room
            roomy = cache.filled_by_head() < room
            eviction = Eviction(
                eviction.layer, eviction.lowest.masked_fill(roomy, 0), eviction.given, eviction.expected
            )
        self.layers.append(eviction)

    def wrong(self) -> Tensor | None:
        """Which lanes to doubt, `(lanes,)`; None: nothing was evicted."""
        if not self.layers:
            return None
        lowest = torch.stack([e.lowest for e in self.layers])
        return ~(lowest < torch.inf).all(dim=-1).all(dim=0)

    def say(self, member: Member, lane: int) -> str:
        """What went wrong first, of a lane that is doubted."""
        return next(filter(None, (e.say(member, lane) for e in self.layers)), "")
