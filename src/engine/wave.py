"""The lanes of a wave, decoded in lockstep from their cut prompts until the last has finished."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.engine import attention
from src.engine.attention import RotateLayer
from src.engine.decode import Lane, arrange, choose, failed, heed
from src.engine.evictions import BROKEN
from src.engine.fidelity import FidelityMeter
from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Job, Request
from src.errors import InputError
from src.kv.cache import LayerCache
from src.kv.faults import Fault


class Wave:
    """All lanes that are decoded together. It takes over what their forks hold.

    Args:
        lanes: none of them failed yet.
        turn: see `src.engine.rotary`.
        probes: are shown every lane that answers, after every step.

    Attributes:
        again: what failed because of a policy that was asked about several samples at once; alone, each fails for
            itself or not at all.
    """

    def __init__(
        self, model: PreTrainedModel, lanes: list[Lane], turn: RotateLayer, probes: Sequence[Probe] = ()
    ) -> None:
        self.model, self.probes = model, probes
        self.again: list[Job] = []
        self.batch, self.lanes = arrange(lanes, turn)
        heed(self.batch, self.lanes)
        self.meter: FidelityMeter | None = None
        if reading := [lane for lane in self.lanes if not lane.generates]:
            self.meter = FidelityMeter(reading, len(self.batch.pools[0].caches), model.device)
            self.batch.watch = self.meter.watch_layer
        self._open = Counter(lane.result for lane in self.lanes)  # lanes that a result still waits for
        for result in self._open:
            result.lanes = len(self.lanes)

    def run(self) -> Iterator[Generation]:
        """Steps until all lanes have finished. A result leaves when all its lanes have."""
        yield from self._leave()
        while self.lanes:
            self.step()
            yield from self._leave()

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every lane; the host waits for the device once."""
        started = time.perf_counter()
        if self.meter:
            self.meter.begin(self.lanes)
        self.batch.begin([lane.position for lane in self.lanes], self.model.device)
        ids = torch.tensor([[lane.next_input()] for lane in self.lanes], device=self.model.device)
        logits = attention.forward(self.model, ids, self.batch.position[:, None].long(), self.batch)[:, -1]
        self.batch.end()
        if self.meter:
            self.meter.watch_logits(logits)
        chosen = self._read(logits)
        heed(self.batch, self.lanes, [row for row, token in enumerate(chosen) if token == BROKEN])
        self._advance(chosen, (time.perf_counter() - started) / len(self.lanes))
        if self.probes:
            self._show()

    def _read(self, logits: Tensor) -> list[int]:
        """Every row's next token; -1 where logits are not numbers, BROKEN where its policy gave no valid slot."""
        best = choose(logits, [(lane.result.request, len(lane.result.tokens)) for lane in self.lanes])
        wrong = self.batch.wrong()
        chosen: list[int] = (best if wrong is None else torch.where(wrong & (best >= 0), BROKEN, best)).tolist()
        return chosen

    def _advance(self, chosen: Sequence[int], seconds: float) -> None:
        """Hand every lane its token; `seconds`: its share of the step."""
        for row, (lane, token) in enumerate(zip(self.lanes, chosen, strict=True)):
            if lane.result.error:
                continue
            if token < 0:
                if not self._policy_to_blame(row, chosen):
                    caches, pool_row = self.batch.locate(row)
                    refuse_nan(lane.result.request, caches, pool_row, f"the token at position {lane.position}")
                what = "left logits that are not numbers"
                lane.fail(self.batch.blame(row, "adjust_logits, read", what))
                continue
            if lane.generates:  # what a fidelity lane takes is not the policy's decoding
                lane.result.decode_seconds += seconds
                lane.result.decode_steps += 1
            lane.advance(token)

    def _policy_to_blame(self, row: int, chosen: Sequence[int]) -> bool:
        """Whether only policies that have a hand in the attention came to logits that are not numbers."""
        changing = [self.batch.changes_weights(other) for other in range(len(self.lanes))]
        return changing[row] and all(changes for changes, token in zip(changing, chosen, strict=True) if token < 0)

    def _show(self) -> None:
        for row, lane in enumerate(self.lanes):
            if lane.watched and not lane.result.error:
                view = LaneView(lane.result, self.batch.t, self.batch, row)
                for probe in self.probes:
                    probe.on_step(view)

    def _leave(self) -> Iterator[Generation]:
        """Lanes that have nothing left to do leave the batch."""
        keep = []
        for row, lane in enumerate(self.lanes):
            if not lane.over:
                keep.append(row)
                continue
            if not lane.result.error:
                self._describe(row, lane)
            self._open[lane.result] -= 1
            if self._open[lane.result] == 0 and lane.result.variant.asked:
                if not lane.result.error:
                    yield lane.result
                elif lane.shared and len({self.lanes[mate].result for mate in self.batch.mates(row)}) > 1:
                    self.again.append(Job(lane.result.request, [lane.result.variant]))
                else:
                    yield failed(lane)
        if len(keep) < len(self.lanes):
            self.batch.select(keep)
            self.lanes = [self.lanes[row] for row in keep]

    def _describe(self, row: int, lane: Lane) -> None:
        """Note what a lane has come to."""
        try:
            if lane.generates:
                lane.result.describe_end(self.batch, row)
            elif self.meter:
                lane.result.fidelity = self.meter.result(lane)
        except Fault as fault:
            lane.fail(str(fault))


def refuse_nan(request: Request, caches: Sequence[LayerCache], row: int, where: str) -> None:
    """Logits are not numbers: name the sample and the first layer that was handed something else.

    Raises:
        InputError: always.
    """
    layers = [i for i, cache in enumerate(caches) if not cache.is_finite(row)]
    first = f"the keys or values of layer {layers[0]}" if layers else "what follows the last layer's attention"
    raise InputError(
        f"sample {request.name}: logits after {where} are not numbers, first seen in {first}; "
        "valid: finite weights, and a model.dtype that holds them (bfloat16 or float32)"
    )
