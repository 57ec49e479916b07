"""What a policy wants to have read after the prompt, with all of it in the cache, before it is cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from src.kv.prompt import PromptAttention

Answer = Literal["generated", "reference"]  # which one: the full cache's own, or the task's first reference


class Sequel(ABC):
    """Texts that are read after the prompt, and what of each the policy wants to know.

    Every text is read on its own: its tokens stand at the positions right after the prompt and attend to all of it and,
    causally, to themselves. What they show is there when the prompt is cut (`PromptAttention.seen`). Settings only, as
    policies have (a frozen dataclass): equal sequels of several cells are read once.
    """

    @property
    def answer(self) -> Answer | None:
        """The coming answer that `texts` must be told. None, as for every policy that could be deployed.

        Reading counts, its time as its memory, as part of the policy's prefill only where this is None.
        """
        return None

    @abstractmethod
    def texts(self, prompt: Sequence[int], rest: Sequence[int]) -> Sequence[Sequence[int]]:
        """The token ids of each text. No text at all: nothing is read, and nothing will have been seen.

        Args:
            prompt: the tokens that will be cut, `n` of them.
            rest: with an `answer`, what comes after them: the question with `prompt_scope=context`, then the answer
                without its last token, which is never read; else nothing.
        """

    @abstractmethod
    def see(self, read: PromptAttention, n: int, text: int) -> Tensor:
        """What one layer shows of one text; it should be small, for it stays until the prompt is cut.

        Args:
            read: keys and values of prompt and text; queries of the text's tokens at least.
            n: tokens of the prompt.
            text: index of the text.
        """

    def join(self, seen: Sequence[Tensor]) -> Tensor:
        """What all texts showed of one layer; here put end to end along the last dimension."""
        return torch.cat(list(seen), dim=-1)
