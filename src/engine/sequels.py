"""What policies want to have read after a prompt (`Policy.sequel`): read with the full cache, before it is cut.

One forward pass over the prompt and the first text; each further text is a pass of its own over the prompt's keys and
values, which are held meanwhile. Memory is O(text x n) at most, and where there is more than one text the whole
prompt's cache. The prefill itself comes after, untouched: so the prompt is read twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from policies.base import Policy
from src.engine.attention import Attention, forward
from src.engine.memory import MemoryMeter
from src.engine.request import Job, Request
from src.errors import InputError
from src.kv.faults import Fault, ask, describe
from src.kv.prompt import PromptAttention
from src.kv.sequel import Sequel


@dataclass
class Seen:
    """What the sequels of one request showed.

    Attributes:
        layers: per layer, what `Sequel.join` gave; empty where nothing was read.
        seconds: what reading took.
        faults: why it came to nothing, one line each.
    """

    layers: list[dict[Sequel, Tensor]] = field(default_factory=list)
    seconds: dict[Sequel, float] = field(default_factory=dict)
    faults: dict[Sequel, str] = field(default_factory=dict)

    def cost(self, policy: Policy) -> float:
        """Seconds that a policy's sequel took, as part of what the policy costs: not what nobody could know."""
        sequel = policy.sequel
        return 0.0 if sequel is None or sequel.answer else self.seconds.get(sequel, 0.0)

    def fault(self, policy: Policy) -> str:
        """Why a policy's sequel could not be read; empty: nothing was wrong."""
        return "" if policy.sequel is None else self.faults.get(policy.sequel, "")


@dataclass
class SequelReader:
    """Reads what the policies of a job ask for.

    Args:
        generate: gives the full cache's greedy answer to a request without a reference.
        refusal: why a text, of which so many tokens are read at once and so many in all, cannot be served.
    """

    model: PreTrainedModel
    memory: MemoryMeter
    generate: Callable[[Request], list[int]]
    refusal: Callable[[int, int], str | None]

    def read(self, job: Job) -> Seen:
        """All of a job's, each once.

        Raises:
            InputError: a policy looks at the reference answer and there is none.
        """
        seen, asked = Seen(), {variant.policy.sequel: variant.policy for variant in job.variants}
        found: dict[Sequel, list[Tensor]] = {}
        for sequel, policy in asked.items():
            if sequel is None:
                continue
            rest = self._rest(job.request, sequel, policy)
            try:
                started = time.perf_counter()
                found[sequel] = self._read(job, sequel, policy, rest)
                seen.seconds[sequel] = time.perf_counter() - started
            except Fault as fault:
                seen.faults[sequel] = str(fault)
        found = {sequel: layers for sequel, layers in found.items() if layers}
        seen.layers = [dict(zip(found, layer, strict=True)) for layer in zip(*found.values(), strict=True)]
        return seen

    def _rest(self, request: Request, sequel: Sequel, policy: Policy) -> list[int]:
        """What comes after the tokens that are cut, for a sequel that is told."""
        if sequel.answer is None:
            return []
        answer = request.reference if sequel.answer == "reference" else self.generate(replace(request, reference=None))
        if not answer:
            raise InputError(
                f"policy {type(policy).__name__}, answer=reference: sample {request.name} comes without a reference "
                "answer; valid: fidelity=true, or answer=generated"
            )
        return [*request.ids[request.first :], *answer[:-1]]

    def _read(self, job: Job, sequel: Sequel, policy: Policy, rest: list[int]) -> list[Tensor]:
        """Per layer, what the sequel's texts showed. Raises Fault."""
        prompt = job.request.ids[: job.request.first]
        n = len(prompt)
        texts = ask(policy, "sequel", None, sequel.texts, prompt, rest)
        longest = n + max((len(text) for text in texts), default=0)
        if why := self.refusal(n, longest):
            raise Fault(describe(policy, "sequel", f"asks for a text of {longest - n} tokens after {n}: {why}", []))
        if sequel.answer is None:
            self.memory.start()
        reading = Reading(policy, sequel, n, texts)
        for text, ids in enumerate(texts):
            reading.text, first = text, 0 if text == 0 else n
            new = torch.tensor([[*prompt, *ids][first:]], device=self.model.device)
            positions = torch.arange(first, n + len(ids), device=new.device)[None]
            forward(self.model, new, positions, reading, logits_to_keep=1)
        layers = enumerate(zip(*reading.seen, strict=True))
        joined = [ask(policy, "sequel", layer, sequel.join, seen) for layer, seen in layers]
        if sequel.answer is None:
            self.memory.stop("prefill")  # waits for the device, too
        return joined


class Reading:
    """The forward passes over a sequel's texts; the first text's reads the prompt, too.

    Args:
        n: tokens of the prompt.

    Attributes:
        text: index of the text whose pass it is.
        held: by layer, keys and values of the prompt, `(1, kv_heads, n, head_dim)`, where other texts need them.
        seen: by text and layer, what the sequel made of it.
    """

    def __init__(self, policy: Policy, sequel: Sequel, n: int, texts: Sequence[Sequence[int]]) -> None:
        self.policy, self.sequel, self.n, self.texts, self.text = policy, sequel, n, texts, 0
        self.held: list[tuple[Tensor, Tensor]] = []
        self.seen: list[list[Tensor]] = [[] for _ in texts]

    @property
    def longest(self) -> int:
        """Prompt and text, in tokens."""
        return self.n + len(self.texts[self.text])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention
    ) -> Tensor:
        """`(1, heads, new, head_dim)` in, `(1, new, heads, head_dim)` out."""
        if self.text == 0:
            out = attention(query, key, value)
            if len(self.texts) > 1:
                self.held.append((key[:, :, : self.n].clone(), value[:, :, : self.n].clone()))
        else:
            keys, values = self.held[layer]
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            out = attend_after(query, key, value, scaling)
        read = PromptAttention(query[0], key[0], value[0], scaling, layer, layer + 1)
        self.seen[self.text].append(ask(self.policy, "sequel", layer, self.sequel.see, read, self.n, self.text))
        return out


def attend_after(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last tokens of a text, `new` of `n`; a mask of `new x n` is all that it makes.

    Args:
        query: `(1, heads, new, head_dim)`; key and value `(1, kv_heads, n, head_dim)`.

    Returns:
        `(1, new, heads, head_dim)`.
    """
    new, n, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    past = torch.ones(new, n, dtype=torch.bool, device=query.device).tril_(n - new)
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=past, scale=scaling).transpose(1, 2)
