"""Turning already rotated queries by further positions: what StreamingLLM's in-cache positions need.

How a layer rotates its queries is learned from the model: the same tokens pass twice, at positions p and at p + s,
and the way of turning is chosen that takes the second pass' queries back to the first's. No architecture is known by
name here; a layer whose queries no way explains is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.engine.attention import Attention, forward
from src.errors import InputError
from src.kv.prompt import precise

TOKENS = 12  # of each pass
SHIFTS = (7, 401, 1 << 17)  # two near ones for precision, a far one for low frequencies and slow scales
TOLERANCE = 1e-4  # relative error of a layer's queries in float32


@dataclass(frozen=True, eq=False)
class Turning:
    """One way to rotate a head: dimension `first[c]` and `second[c]` are a pair, turned by `frequencies[c]`.

    Layers that turn alike share one object, so that only two ways that differ are unequal.

    Attributes:
        frequencies: radians per position, `(pairs,)`, float64; none for a layer without positions.
    """

    frequencies: Tensor
    first: slice
    second: slice

    def __call__(self, vectors: Tensor, shift: Tensor) -> Tensor:
        """`vectors` `(lanes, ..., head_dim)` turned by `shift` positions `(lanes,)`."""
        if not len(self.frequencies):
            return vectors
        shape = (shift.shape[0],) + (1,) * (vectors.dim() - 2) + (-1,)
        angle = (shift[:, None].double() * self.frequencies.to(vectors.device)).view(shape)
        cos, sin = precise(angle.cos().to(vectors.dtype)), precise(angle.sin().to(vectors.dtype))
        exact = precise(vectors)
        first, second = exact[..., self.first], exact[..., self.second]
        turned = exact.clone()
        turned[..., self.first] = first * cos - second * sin
        turned[..., self.second] = second * cos + first * sin
        return turned.to(vectors.dtype)


class Rotary:
    """Rotary position embedding as a group action: turning by `a` and then by `b` is turning by `a + b`.

    Nothing is asked of the model before the first `turn`, so runs that never turn pay nothing.

    Args:
        model: one whose attention is `src.engine.attention.NAME`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers: dict[int, Turning] = {}
        self.refused = ""

    def turn(self, vectors: Tensor, shift: Tensor, layer: int | None = None) -> Tensor:
        """`vectors` `(lanes, ..., head_dim)` of a layer turned by `shift` positions `(lanes,)`.

        Args:
            layer: may be left out where all layers rotate alike.

        Raises:
            InputError: the model's queries do not depend on their position by one fixed rotation per layer.
        """
        if not self.layers and not self.refused:
            try:
                self.layers = self._learn()
            except _Unexplained as error:
                self.refused = str(error)
        if self.refused:
            raise InputError(
                f"in-cache positions need queries that are rotated by fixed frequencies; {self.refused}. "
                "Valid: policy.positions=original"
            )
        if layer is not None:
            return self.layers[layer](vectors, shift)
        (one, common), *others = self.layers.items()
        for other, way in others:
            if way != common:
                raise InputError(f"layers {one} and {other} of this model rotate differently, and no layer was named")
        return common(vectors, shift)

    @torch.inference_mode()
    def _learn(self) -> dict[int, Turning]:
        """Per layer, the way of turning that short passes at shifted positions show.

        Raises:
            _Unexplained: it names the first layer without one.
        """
        if changing := rope_types(self.model) & {"dynamic", "longrope"}:
            raise _Unexplained(
                f"this model's frequencies change with the length of the text ({', '.join(sorted(changing))})"
            )
        config = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None) or 512
        tokens = max(1, min(TOKENS, most // 2))
        shifts = sorted({min(shift, most - tokens) for shift in SHIFTS})
        ids = torch.arange(1, tokens + 1, device=self.model.device)[None] % config.vocab_size
        passes = [QueryPass(tokens)]
        passes += [QueryPass(tokens, passes[0].outputs) for _ in shifts]
        for shift, one in zip((0, *shifts), passes, strict=True):
            positions = torch.arange(shift, shift + tokens, device=ids.device)[None]
            forward(self.model, ids, positions, one, logits_to_keep=1)
        sets = frequency_sets(self.model)
        by_width: dict[int, list[Turning]] = {}  # layers that turn alike share one way
        found: dict[int, Turning] = {}
        for layer, near in passes[0].queries.items():
            moved = {shift: one.queries[layer] for shift, one in zip(shifts, passes[1:], strict=True)}
            ways = by_width.setdefault(near.shape[-1], list(candidates(sets, near.shape[-1])))
            right = next((way for way in ways if turns_back(way, near, moved)), None)
            if right is None:
                raise _Unexplained(why_not(f"the queries of layer {layer}", near, moved, bool(sets)))
            found[layer] = right
        return found


class _Unexplained(Exception):
    """Why a model's queries cannot be turned, as a clause."""


class QueryPass:
    """A forward pass that notes every layer's queries, after the rotary embedding.

    Args:
        outputs: what each layer's attention gives, from an earlier pass, so that all layers see the hidden states
            of that pass and a difference between queries is the layer's own; None: this is the first pass.

    Attributes:
        queries: per layer, `(1, heads, n, head_dim)`.
    """

    def __init__(self, length: int, outputs: dict[int, Tensor] | None = None) -> None:
        self.longest, self.given = length, outputs
        self.queries: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """`(1, heads, n, head_dim)` in, `(1, n, heads, head_dim)` out."""
        self.queries[layer] = query.clone()
        self.outputs[layer] = attention(query, key, value) if self.given is None else self.given[layer]
        return self.outputs[layer]


def rope_types(model: torch.nn.Module) -> set[str]:
    """Kinds of rotary frequencies in a model; a module may have one for each type of layer."""
    found: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        found.update(map(str, kind.values() if isinstance(kind, dict) else [kind]))
    return found


def frequency_sets(model: torch.nn.Module) -> list[Tensor]:
    """The distinct sets of rotary frequencies that a model's modules hold, `(pairs,)` each, float64."""
    sets: list[Tensor] = []
    for module in model.modules():
        for name, value in [*module.named_buffers(recurse=False), *vars(module).items()]:
            if name.endswith("inv_freq") and isinstance(value, Tensor) and value.dim() == 1:
                exact = value.double()
                if not any(torch.equal(exact, other) for other in sets):
                    sets.append(exact)
    return sets


def candidates(sets: list[Tensor], width: int) -> Iterator[Turning]:
    """Every way of turning a head of `width` dimensions: pairs halves apart or neighbours, of its first or last
    dimensions, in either direction; and not at all."""
    for frequencies in sets:
        pairs = len(frequencies)
        for start in sorted({0, width - 2 * pairs} if 2 * pairs <= width else ()):
            stop, half = start + 2 * pairs, start + pairs
            for signed in (frequencies, -frequencies):
                yield Turning(signed, slice(start, half), slice(half, stop))
                yield Turning(signed, slice(start, stop, 2), slice(start + 1, stop, 2))
    yield Turning(torch.empty(0, dtype=torch.float64), slice(0), slice(0))


def turns_back(way: Turning, near: Tensor, moved: dict[int, Tensor]) -> bool:
    """Whether the queries of every shifted pass, turned back by its shift, are those of the first pass."""
    return all(
        relative_error(way(queries, torch.tensor([-shift], device=queries.device)), near) < tolerance(near, shift)
        for shift, queries in moved.items()
    )


def relative_error(found: Tensor, right: Tensor) -> float:
    right = right.double()
    return float((found.double() - right).norm() / right.norm().clamp_min(torch.finfo(torch.float64).tiny))


def tolerance(queries: Tensor, shift: int) -> float:
    """Rounding: of the queries' own type, and of the angle of a far position, which models compute in float32."""
    return max(TOLERANCE, 3 * torch.finfo(queries.dtype).eps) + shift * torch.finfo(torch.float32).eps


def why_not(queries_of: str, near: Tensor, moved: dict[int, Tensor], rotary: bool) -> str:
    """How queries move that no way of turning explains."""
    if not rotary:
        return f"{queries_of} depend on the position without a rotary embedding"
    for shift, queries in moved.items():
        if relative_error(queries.double().norm(dim=-1), near.double().norm(dim=-1)) > tolerance(near, shift):
            return f"the size of {queries_of} depends on the position"
    return f"no way of rotating by the model's own frequencies explains how {queries_of} move"
