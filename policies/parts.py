"""The parts that a policy's score is combined with: who may hold how much (`Allocator`), how it is held (`Store`), and
what of it a step attends to (`Reader`).

All hold settings only, as policies do, and are combined by configuration: `policy=snapkv policy/allocate=adakv`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, get_type_hints

from torch import Tensor

from src.kv.checks import check
from src.kv.plan import Allotment, Plan

if TYPE_CHECKING:
    from src.kv.cache import LayerCache
    from src.kv.prompt import PromptAttention
    from src.kv.state import ModelShape
    from src.kv.step import DecodeStep


@dataclass(frozen=True)
class Part:
    """Settings of a part, each checked against its annotation; ValueError names the setting and what is valid.

    Class attributes:
        reconstruction: as `Policy.reconstruction`.
    """

    reconstruction: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            check(setting.name, getattr(self, setting.name), hints[setting.name])


@dataclass(frozen=True)
class Allocator(Part, ABC):
    """Who may hold how many entries.

    Class attributes, or properties:
        exact: the counts add up to `Allotment.total`, which the engine checks; False for what reproduces an official
            rounding that does not.
        revises: the counts of a layer may still fall when later layers come (`Plan.revises`).
        evenhanded: KV heads of a layer whose scores are the same hold equally many.
        by_head: heads of a layer may hold different numbers.
        uses_budget: False: prompts that would fit into the budget are cut as others are.
    """

    by_head: ClassVar[bool] = True
    uses_budget: ClassVar[bool] = True

    @property
    def evenhanded(self) -> bool:
        return False

    @property
    def exact(self) -> bool:
        return True

    @property
    def revises(self) -> bool:
        return False

    @abstractmethod
    def plan(self, allotment: Allotment) -> Plan:
        """The plan of one request.

        Raises:
            ValueError: the budget is too small: it names layer, head and what is needed.
        """


@dataclass(frozen=True)
class Store(Part, ABC):
    """How the kept tokens of a layer are held.

    Class attributes:
        overwrites: a single slot can be given to another token; needed by policies that evict while decoding.
    """

    overwrites: ClassVar[bool] = False

    @property
    def last_queries(self) -> int | None:
        """How many of the prompt's last queries `hold` looks at; None: perhaps all, which must stay until then."""
        return None

    def check_model(self, model: ModelShape) -> None:
        """Asked before anything runs; ValueError: it cannot hold this model's keys and values."""

    @abstractmethod
    def hold(self, prompt: PromptAttention, kept: Sequence[Tensor], limit: int | None) -> LayerCache:
        """One layer's cache.

        Args:
            kept: of every KV head, the positions to keep, ascending, `(k,)`; heads may differ in k.
            limit: the most entries that a head may ever hold; None: it grows.
        """


@dataclass(frozen=True)
class Reader(Part, ABC):
    """Which of the held tokens a decoding step attends to. Nothing is lost for good: the next step chooses anew.

    The prompt itself is read with full attention, as for every policy. What a policy sees of a step (`Policy.observe`,
    `prune`, `rank`) are the weights after the choice: those the model used, 0 for what was not attended to (logits:
    -inf, as in an empty slot).

    Args:
        renormalise: divide the chosen weights by their sum.
    """

    renormalise: bool = field(default=True, kw_only=True)

    @abstractmethod
    def choose(self, step: DecodeStep) -> Tensor | None:
        """True for what is attended to, `(lanes, kv_heads, group, slots + 1)`, bool; None: everything.

        `step.weights` are still those over all tokens. The last column is the incoming token; what empty slots get
        is not looked at. To choose nothing for a query head while `renormalise` is on fails the sample: its weights
        are no numbers.
        """
