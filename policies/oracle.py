"""Oracle: keeps what the coming answer will attend to. Nobody can deploy it; it bounds what a score can reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from policies.base import RankedPolicy
from src.kv.sequel import Answer, Sequel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from src.kv.prompt import PromptAttention


@dataclass(frozen=True)
class ComingAnswer(Sequel):
    """What comes after the prompt, read once with the full cache: the attention that each prompt token gets from it."""

    kind: Answer

    @property
    def answer(self) -> Answer:
        return self.kind

    def texts(self, prompt: Sequence[int], rest: Sequence[int]) -> list[Sequence[int]]:
        return [rest]

    def see(self, read: PromptAttention, n: int, text: int) -> Tensor:
        """Summed over the rows after the prompt, `(kv_heads, group, n)`.

        An answer of one token has no row of its own; then it is the row that predicted it.
        """
        return read.column_sums(first_row=min(n, read.length - 1))[..., :n]


@dataclass(frozen=True)
class Oracle(RankedPolicy):
    """Keep the `budget` prompt tokens that the answer's tokens attend to most

        s_j = sum over the rows i of the answer of a_ij,  a from a run with the full cache

    per layer and KV head, the query heads of a group joined. The rows are those that are decoded from the cut
    cache: every answer token but the last, which is never read (with `prompt_scope=context` the question's, too).
    No window and no first tokens are protected: what the answer needs, it shows. The prompt is cut once; then the
    cache grows by one entry per token, as with SnapKV.

    It maximises attention mass, which is not quite the fidelity of the outputs: a token of large attention and
    tiny value (a sink) is worth less than its mass says. `weigh_values` corrects for that.

    Args:
        answer: which answer is foreseen: "generated", what the full cache answers greedily, or "reference", the
            task's first reference answer, which is what fidelity is measured on (needs `fidelity=true`).
        group: joins the query heads of a KV head: "mean" or "max".
        weigh_values: multiply s_j by ||v_j||_2.
    """

    answer: Literal["generated", "reference"] = "generated"
    group: Literal["mean", "max"] = "mean"
    weigh_values: bool = False

    @property
    def sequel(self) -> Sequel:
        return ComingAnswer(self.answer)

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        received = prompt.seen(ComingAnswer(self.answer))
        score = received.mean(dim=1) if self.group == "mean" else received.amax(dim=1)
        if self.weigh_values:
            score = score * prompt.value_norms("l2")
        return score
