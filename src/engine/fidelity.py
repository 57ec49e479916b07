"""How close a lane stays to the full cache when both read the same reference answer (teacher forcing).

A denser signal than a task's score: every reference token gives a number, on any model. Each cell gets a
second lane, started from the same cut cache, that is fed the reference; the full cache gets one too, and at
every step the lane's next-token distribution and attention outputs are compared with the full cache's.

The meter is no probe (`src.engine.probes`): it compares rows of one batch in the middle of a step, on the device, and
nothing of it is read before a lane has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policies.full import Full
from src.engine.decode import Lane
from src.engine.prefill import Fork
from src.engine.request import Generation, Variant
from src.kv.prompt import precise


class FidelityMeter:
    """Sums for the fidelity lanes of one wave, kept on the device until a lane ends.

    For a reference of m tokens (its end token counted):
        nll: mean negative log-likelihood of the m tokens, nats.
        kl: mean KL(full || lane) of the next-token distributions, nats.
        top1: share of steps whose most likely token is the full cache's.
        output_error: per layer, mean of ||o_lane - o_full|| / ||o_full|| of the attention outputs
            (before the output projection; errors of earlier layers are part of it).
    kl, top1 and output_error are means over the steps that the lane's own cache took part in: the first token
    after the prompt comes from the prefill and is the same for all (unless `prompt_scope=context`).
    """

    def __init__(self, lanes: Sequence[Lane], layers: int, device: torch.device) -> None:
        self.index = {lane: i for i, lane in enumerate(lanes)}  # where each has its sums
        self.sums = torch.zeros(len(lanes), 4, device=device, dtype=torch.float64)  # nll, kl, top1, steps
        self.errors = torch.zeros(len(lanes), layers, device=device, dtype=torch.float64)
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._targets = torch.zeros(0, device=device, dtype=torch.long)

    def begin(self, batch: Sequence[Lane]) -> None:
        """The coming step of these lanes, in the order of the batch's rows.

        Before the forward pass, so that nothing has to wait for what is handed to the device here.
        """
        row_of = {lane: row for row, lane in enumerate(batch)}
        read = [lane for lane in batch if lane.target >= 0]
        lane = torch.tensor([row_of[each] for each in read], device=self.sums.device)
        full = torch.tensor([row_of[each.full] for each in read], device=self.sums.device)
        index = torch.tensor([self.index[each] for each in read], device=self.sums.device)
        self._targets = torch.tensor([each.target for each in read], device=self.sums.device)
        self._rows = (lane, full, index) if read else None

    def watch_layer(self, layer: int, out: Tensor) -> None:
        """Attention outputs of one layer, `(lanes, 1, heads, head_dim)`."""
        if self._rows is None:
            return
        lane, full, index = self._rows
        truth = out[full].flatten(1).double()
        error = (out[lane].flatten(1).double() - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)
        self.errors[index, layer] += error

    def watch_logits(self, logits: Tensor) -> None:
        """Next-token logits of the whole batch, `(lanes, vocabulary)`."""
        if self._rows is None:
            return
        lane, full, index = self._rows
        own, truth = precise(logits[lane]).log_softmax(-1), precise(logits[full]).log_softmax(-1)
        nll = -own.gather(1, self._targets[:, None])[:, 0]
        kl = (truth.exp() * (truth - own)).sum(-1)
        same = own.argmax(-1) == truth.argmax(-1)
        self.sums[index] += torch.stack([nll, kl, same.to(nll.dtype), torch.ones_like(nll)], dim=1).double()

    def result(self, lane: Lane) -> dict[str, float | list[float]]:
        """Means for one lane; the host waits for the device."""
        index, first_nll = self.index[lane], lane.first_nll
        nll, kl, top1, steps = self.sums[index].tolist()
        tokens = steps + (first_nll is not None)
        return {
            "nll": (nll + (first_nll or 0.0)) / tokens,
            "kl": kl / steps if steps else 0.0,
            "top1": top1 / steps if steps else 1.0,
            "tokens": int(tokens),
            "output_error": [e / steps if steps else 0.0 for e in self.errors[index].tolist()],
        }


FULL_CACHE = Variant(Full(), None, asked=False)  # what others are compared with, and what looking ahead needs


def fidelity_lanes(lanes: list[Lane], forks: list[Fork], logits: Tensor, question: list[int]) -> list[Lane]:
    """Second lanes, fed the reference answer, for every lane and for the full cache.

    Args:
        lanes: the generating lanes of one prompt.
        forks: of all its cells, one of them the full cache.
        logits: after the last token of the prefill, `(1, vocabulary)`.
        question: prompt tokens that were not part of the prefill.
    """
    request = lanes[0].result.request
    assert request.reference is not None
    reference = request.reference
    feed = [*question, *reference[:-1]]
    targets = [-1] * (len(question) - 1) + (reference if question else reference[1:])
    first = None if question else -float(logits[0].float().log_softmax(-1)[reference[0]])
    full_fork = next(fork for fork in forks if fork.cell.full)
    results = {lane.fork: lane.result for lane in lanes}
    full = Lane(results.pop(full_fork, Generation(request, FULL_CACHE)), full_fork, feed, targets, first)
    others = {fork: result for fork, result in results.items() if not result.error}
    return [full, *(Lane(result, fork, feed, targets, first, full) for fork, result in others.items())]
