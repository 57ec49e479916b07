"""What a policy may hand back, checked here.

Shapes, types and counts are looked at on the host, always. Values lie on the device: what must hold for them is
noted as a `Doubt` and read with all others at once, after a prompt (`Prefill.settle`); a decoding step's are read with
its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.kv.faults import ContractError, show

WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


@dataclass(frozen=True)
class Doubt:
    """Numbers that are still on the device.

    Args:
        hook: of the policy.
        numbers: one dimension.
        judge: what is wrong with them ("gave ...; expected ..."), or nothing.
    """

    hook: str
    numbers: Tensor
    judge: Callable[[Sequence[float]], str]


# The prompt.


def check_kept(kept: Any, kv_heads: int, length: int, most: int, device: torch.device) -> tuple[Tensor, Doubt]:
    """`Policy.keep_prompt`'s positions, made safe to index with, and what must hold for their values.

    Raises:
        ContractError: not `(kv_heads, k)` whole numbers, 1 <= k <= most.
    """
    fits = isinstance(kept, Tensor) and kept.dtype in WHOLE and kept.device == device
    if not fits or kept.dim() != 2 or kept.shape[0] != kv_heads or not 1 <= kept.shape[1] <= most:
        raise ContractError(
            f"gave {show(kept)}; expected positions ({kv_heads}, k), 1 <= k <= {most}, int64, on {device}"
        )
    kept = kept.long()
    low, high = kept.aminmax()
    safe, entries = kept.clamp(0, length - 1), kept.numel()
    distinct = kept.new_zeros(kv_heads, length).scatter_(1, safe, 1).sum()

    def judge(found: Sequence[float]) -> str:
        outside = [int(p) for p in found[:2] if not 0 <= p < length]
        if outside:
            return f"gave position {outside[0]}; expected positions from 0 to {length - 1}"
        return "gave a position more than once; expected distinct ones" if found[2] < entries else ""

    return safe, Doubt("keep_prompt", torch.stack([low, high, distinct]), judge)


def check_limit(limit: Any, kept: int, budget: int | None, grows: bool) -> int | None:
    """`Policy.limit`: None where the cache may grow, else at least what was kept and at most the budget (None: any).

    Raises:
        ContractError: anything else.
    """
    if limit is None and grows:
        return None
    if type(limit) is not int or limit < kept or (budget is not None and limit > budget):
        most = "" if budget is None else f" to {budget}, the budget"
        wanted = "a whole number" + (" or None" if grows else "")
        raise ContractError(f"gave {show(limit)}; expected {wanted}, from {kept}, what was kept,{most or ' on'}")
    return limit


def check_start(state: Any, kv_heads: int, kept: int) -> None:
    """`Policy.start`'s state, for one lane.

    Raises:
        ContractError: not a State, or one with a tensor in `slots` that is not `(kv_heads, ..., kept)`.
    """
    if not (isinstance(getattr(state, "slots", None), dict) and isinstance(getattr(state, "fixed", None), dict)):
        raise ContractError(f"gave {show(state)}; expected a State")
    for name, tensor in (*state.slots.items(), *state.fixed.items()):
        if not isinstance(tensor, Tensor):
            raise ContractError(f"gave {name!r} = {show(tensor)}; expected tensors")
    for name, tensor in state.slots.items():
        if tensor.dim() < 2 or tensor.shape[0] != kv_heads or tensor.shape[-1] != kept:
            raise ContractError(f"gave slots[{name!r}] of {show(tensor)}; expected ({kv_heads}, ..., {kept})")


def check_cache(cache: Any, counts: Sequence[int], limit: int | None) -> None:
    """`Policy.make_cache` and `Store.hold`: a cache of exactly the kept entries, positions `(1, kv_heads, kept)`.

    Args:
        counts: kept entries of every KV head; positions are padded to the most.

    Raises:
        ContractError: anything else.
    """
    positions, shape = getattr(cache, "positions", None), (1, len(counts), max(counts))
    if not isinstance(positions, Tensor) or positions.shape != shape or cache.held(0) != list(counts):
        raise ContractError(f"gave {show(cache)}; expected a LayerCache with positions {shape}")
    if cache.limit != limit or not cache.shaped(shape):
        raise ContractError(f"gave a cache of other shape or limit; expected keys {shape} and limit {limit}")


def check_measures(measures: Any, values: type | tuple[type, ...] = object) -> dict[str, Any]:
    """`Policy.prompt_measures` and `Policy.measures`: names and values.

    Raises:
        ContractError: anything else.
    """
    if isinstance(measures, dict) and all(isinstance(k, str) and isinstance(v, values) for k, v in measures.items()):
        return measures
    kind = "" if values is object else " and tensors"
    raise ContractError(f"gave {show(measures)}; expected a dict of names{kind}")


def check_scores(scores: Any, kv_heads: int, older: int) -> Doubt:
    """A `ScorePolicy`'s scores of the tokens that compete, `(kv_heads, older)`.

    Raises:
        ContractError: other shapes, or no numbers.
    """
    fits = isinstance(scores, Tensor) and (scores.is_floating_point() or scores.dtype in WHOLE)
    if not fits or scores.shape != (kv_heads, older):
        wanted = f"expected numbers ({kv_heads}, n), n from {older}, the tokens that compete,"
        raise ContractError(f"gave {show(scores)}; {wanted} to the prompt's length", "score")
    return Doubt("score", torch.cat(scores.aminmax(dim=-1)), judge_scores)


def judge_scores(found: Sequence[float]) -> str:
    """`found`: of every KV head the lowest score, then of every head the highest; one NaN makes both NaN."""
    lows, highs = found[: len(found) // 2], found[len(found) // 2 :]
    if any(low != low for low in lows):
        return "gave NaN for a token; expected numbers"
    if max(lows) == torch.inf or min(highs) == -torch.inf:
        return "gave the same infinity for all tokens of a head; expected numbers (infinity: stays)"
    return ""


def check_plan(plan: Any, layers: int, least: int, length: int) -> list[int]:
    """`Allocator.plan`: what every layer is told, from the policy's least budget to the prompt's length.

    Raises:
        ContractError: no plan, or another number.
    """
    if not all(hasattr(plan, name) for name in ("revises", "told", "cut")):
        raise ContractError(f"gave {show(plan)}; expected a Plan")
    told = [plan.told(layer) for layer in range(layers)]
    for layer, budget in enumerate(told):
        if type(budget) is not int or not least <= budget <= length:
            raise ContractError(
                f"tells layer {layer} {show(budget)}; expected a whole number from {least}, the policy's least, "
                f"to {length}, the prompt's length"
            )
    return told


def check_counts(given: Any, before: Sequence[Sequence[int]], revises: bool) -> Mapping[int, Sequence[int]]:
    """`Plan.cut`'s counts: for some of the layers so far, one for each KV head, from 1 to what it had `before`.

    Raises:
        ContractError: anything else, or earlier layers' from a plan that does not revise.
    """
    layers = range(len(before)) if revises else range(len(before) - 1, len(before))
    if not isinstance(given, Mapping) or not set(given) <= set(layers):
        wanted = (
            f"some of the layers 0 to {layers[-1]}" if revises else f"layer {layers[-1]} (the plan does not revise)"
        )
        raise ContractError(f"gave {show(given)}; expected counts for {wanted}")
    for layer, counts in given.items():
        had = before[layer]
        fits = isinstance(counts, Sequence) and len(counts) == len(had)
        if not fits or not all(
            type(count) is int and 1 <= count <= most for count, most in zip(counts, had, strict=True)
        ):
            raise ContractError(
                f"gave layer {layer} {show(counts)}; expected a whole number for each KV head, from 1 to what it had, "
                f"{str(list(had))[:60]}"
            )
    return given


def check_total(counts: Sequence[Sequence[int]], total: int) -> None:
    """All layers' counts add up. Raises ContractError."""
    given = sum(sum(heads) for heads in counts)
    if given != total:
        raise ContractError(f"gave {given} entries to all layers and heads together; expected {total}")


# Decoding.


def check_rank(ranks: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`Policy.rank`'s numbers, `(lanes, kv_heads, slots)`, or `slots + 1` where the policy may refuse; and those of
    `RankedPolicy.rank_prompt`, `(kv_heads, n)`.

    Raises:
        ContractError: other shapes, or no numbers.
    """
    if not isinstance(ranks, Tensor) or ranks.shape != shape or not (ranks.is_floating_point() or ranks.dtype in WHOLE):
        raise ContractError(f"gave {show(ranks)}; expected numbers {shape}")
    if ranks.device != device:
        raise ContractError(f"gave numbers on {ranks.device}; expected them on {device}")
    return ranks


def check_evict(victims: Any, lanes: int, kv_heads: int, device: torch.device) -> Tensor:
    """`Policy.evict`'s slots, `(lanes, kv_heads)`.

    Raises:
        ContractError: other shapes, or no whole numbers.
    """
    if not isinstance(victims, Tensor) or victims.shape != (lanes, kv_heads) or victims.dtype not in WHOLE:
        raise ContractError(f"gave {show(victims)}; expected slots ({lanes}, {kv_heads}), int64")
    if victims.device != device:
        raise ContractError(f"gave slots on {victims.device}; expected them on {device}")
    return victims


def check_prune(kept: Any, lanes: int, kv_heads: int, most: int, own_pool: bool, device: torch.device) -> Tensor:
    """`Policy.prune`'s slots, `(lanes, kv_heads, k)`, k <= most.

    Raises:
        ContractError: other shapes, no whole numbers, or a policy that shares its cache with others.
    """
    if not own_pool:
        raise ContractError("gave slots to keep; expected None, or own_pool = True in the policy's class")
    fits = isinstance(kept, Tensor) and kept.dtype in WHOLE and kept.device == device
    if not fits or kept.dim() != 3 or kept.shape[:2] != (lanes, kv_heads) or not 1 <= kept.shape[2] <= most:
        raise ContractError(
            f"gave {show(kept)}; expected slots ({lanes}, {kv_heads}, k), 1 <= k <= {most}, int64, or None"
        )
    slots: Tensor = kept.long()
    return slots


def check_state(slots: Mapping[str, Tensor], fixed: Mapping[str, Tensor], shape: tuple[int, int, int]) -> None:
    """A state after a step, `(lanes, kv_heads, ..., slots + 1)`: a policy may write into it, not reshape it.

    Raises:
        ContractError: another shape.
    """
    lanes, kv_heads, width = shape
    for name, tensor in slots.items():
        found = tensor.shape
        if found[0] != lanes or found[1] != kv_heads or found[-1] != width or len(found) < 3:
            raise ContractError(f"left slots[{name!r}] of {show(tensor)}; expected ({lanes}, {kv_heads}, ..., {width})")
    for name, tensor in fixed.items():
        if tensor.shape[0] != lanes:
            raise ContractError(f"left fixed[{name!r}] of {show(tensor)}; expected ({lanes}, ...)")


def check_choice(chosen: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`Reader.choose`'s tokens, `(lanes, kv_heads, group, slots + 1)`, bool.

    Raises:
        ContractError: other shapes, or no bools.
    """
    fits = isinstance(chosen, Tensor) and chosen.dtype == torch.bool and chosen.device == device
    if not fits or chosen.shape != shape:
        raise ContractError(f"gave {show(chosen)}; expected {tuple(shape)}, bool, on {device}, or None")
    tokens: Tensor = chosen
    return tokens


def check_room(room: Any, limit: int) -> int:
    """`Policy.room`: a whole number from 1 to `limit`. Raises ContractError."""
    return check_whole(room, 1, limit, "the cache's limit")


def check_recent(recent: Any, budget: int) -> int:
    """`ScorePolicy.recent`: a whole number from 0 to `budget`. Raises ContractError."""
    return check_whole(recent, 0, budget, "the budget", "recent")


def check_whole(number: Any, least: int, most: int, what: str, hook: str = "") -> int:
    """`what` says what `most` is; `hook` is of the policy, where it is another one than the engine asked."""
    if type(number) is not int or not least <= number <= most:
        raise ContractError(f"gave {show(number)}; expected a whole number from {least} to {most}, {what}", hook)
    return number
