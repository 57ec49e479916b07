"""Prompts and variants in, generations out: one prefill per prompt, every variant forked, lockstep decoding.

`Engine.run` takes jobs (a request and the variants it is wanted under), prefills each prompt once, forks it
into one lane per variant and decodes all lanes of a wave together, greedily. It knows no policy by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from policies.full import Full
from src.engine import attention
from src.engine.decode import Lane, arrange, choose, failed, heed
from src.engine.fidelity import REFERENCE, FidelityMeter, fidelity_lanes
from src.engine.foresight import foresee
from src.engine.layer_kinds import TextLengths, check_kinds
from src.engine.memory import MemoryMeter
from src.engine.pool import LaneBatch
from src.engine.prefill import Cell, Prefill
from src.engine.request import Generation, Job, Request, Variant
from src.engine.rotary import Rotary
from src.errors import InputError
from src.kv.cache import LayerCache
from src.kv.contract import BROKEN, RAISED, ContractError, beyond_policy, fault, is_out_of_memory

PATIENCE = 8  # waves that must have fitted before wider ones are tried again


class Engine:
    """Runs a causal language model over many (prompt, policy, budget) cells.

    Args:
        model: any model whose attention goes through transformers' attention interface.
        max_lanes: the most lanes decoded together. At least one prompt's lanes always are.

    Raises:
        InputError: the model has layers that cannot be served (`src.engine.layer_kinds`).
    """

    def __init__(self, model: PreTrainedModel, max_lanes: int = 8) -> None:
        self.model, self.max_lanes = model.eval(), max_lanes
        check_kinds(model.config)
        self.lengths = TextLengths.of(model)
        self.layers = model.config.get_text_config().num_hidden_layers
        model.set_attn_implementation(attention.NAME)
        self.rotary = Rotary(model)
        self.memory = MemoryMeter(model.device)

    @torch.inference_mode()
    def run(self, jobs: Iterable[Job], stop: Callable[[], bool] = lambda: False) -> Iterator[Generation]:
        """Every job under each of its variants, in waves of at most `max_lanes` lanes.

        Once `stop()` is true no further prompt is begun, and those under way are finished.

        Yields:
            A `Generation` as soon as its lane has finished; one with `error` when memory ran out even alone, or when
            its policy raised or handed back what it may not (`src.kv.contract`). The others go on as without it.

        Raises:
            InputError: an empty prompt, a text that `refusal` has something against, a model that cannot be served,
                logits that are not numbers.
        """
        wave: list[Job] = []
        most, fitting = self.max_lanes, 0
        for job in jobs:
            # Texts on both sides of a switch of rotary frequencies would get one side's for all.
            apart = bool(wave) and self._long(wave[0].request) != self._long(job.request)
            if wave and (apart or sum(j.lanes for j in (*wave, job)) > most):
                fitted = yield from self._wave(wave, stop)
                # A wave as wide would fail again, unless one long prompt was to blame: then it may be tried later.
                fitting = fitting + 1 if fitted else 0
                if not fitted:
                    most = max(1, min(most, sum(j.lanes for j in wave)) // 2)
                elif fitting % PATIENCE == 0:
                    most = min(self.max_lanes, 2 * most)
                wave = []
            wave.append(job)
        if wave:
            yield from self._wave(wave, stop)

    def refusal(self, request: Request) -> str | None:
        """Why a text cannot be served (too long for a window, table or rotary set); None: it can."""
        return self.lengths.refusal(*span(request))

    def _long(self, request: Request) -> bool:
        return self.lengths.long(span(request)[1])

    def _wave(self, jobs: list[Job], stop: Callable[[], bool]) -> Generator[Generation, None, bool]:
        """One wave; when memory runs out, what is unfinished is tried again in halves. Returns whether it fitted."""
        finished: set[tuple[int, Variant]] = set()
        lanes: list[Lane] = []
        begun: list[Job] = []
        again: list[Job] = []  # what failed together with other samples
        try:
            for job in jobs:
                if not stop():
                    begun.append(job)
                    lanes += self._prefill(job)
            for result in self._decode(lanes, again):
                finished.add((id(result.request), result.variant))
                yield result
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["host memory"])[0]
        else:
            lanes.clear()
            for job in again:  # alone, it fails for itself or not at all
                yield from self._wave([job], lambda: False)
            return True
        lanes.clear()  # or the failed wave's caches would stay while it is tried again
        self.memory.release()
        if stop():  # what is under way is finished all the same
            jobs, stop = begun, lambda: False
        left = [Job(j.request, [v for v in j.variants if (id(j.request), v) not in finished]) for j in jobs]
        left = [j for j in left if j.variants]
        if len(left) > 1:
            yield from self._wave(left[: len(left) // 2], stop)
            yield from self._wave(left[len(left) // 2 :], stop)
        elif left and len(left[0].variants) > 1:
            request, variants = left[0].request, left[0].variants
            yield from self._wave([Job(request, variants[: len(variants) // 2])], stop)
            yield from self._wave([Job(request, variants[len(variants) // 2 :])], stop)
        elif left:
            yield Generation(left[0].request, left[0].variants[0], error=f"out of memory: {reason}")
        return False

    def _prefill(self, job: Job) -> list[Lane]:
        """The prompt's forward pass, cut for every variant right after each layer's attention."""
        request = job.request
        scope = len(request.ids) if request.context_tokens is None else request.context_tokens
        if scope < 1:
            raise InputError(f"sample {request.name}: the prompt is empty; valid: at least one token")
        if reason := self.refusal(request):
            raise InputError(f"sample {request.name}: {reason}")
        horizon = len(request.ids) - scope + request.max_new_tokens
        cells, unusable = [], {}
        for i, variant in enumerate(job.variants):
            try:
                cells.append(variant.cell(scope, horizon))
            except RAISED as error:
                if beyond_policy(error):
                    raise
                cells.append(Cell(variant.policy, scope))
                unusable[i] = fault(variant.policy, "at", None, error)
        if request.reference and not any(type(cell.policy) is Full for cell in cells):
            cells.append(Cell(Full(), scope))  # what the others are compared with
        prefill = Prefill(cells, self.layers, scope, foresee(job, scope, self.model, self._full_answer))
        for i, why in unusable.items():
            prefill.forks[i].fail(why)
        started = time.perf_counter()
        self.memory.start()
        ids = torch.tensor([request.ids[:scope]], device=self.model.device)
        positions = torch.arange(scope, device=ids.device)[None]
        logits = attention.forward(self.model, ids, positions, prefill, logits_to_keep=1)[:, -1]
        token = int(choose(logits.clone(), [(request, 0)])[0])  # fidelity needs them unchanged
        if token >= 0:  # or the model is to blame
            prefill.settle()
        self.memory.stop("prefill")
        seconds = time.perf_counter() - started
        if token < 0:
            caches = next((fork.caches for fork in prefill.forks if not fork.error), [])
            self._refuse_nan(request, caches, 0, "the prompt")
        question = request.ids[scope:]
        lanes = []
        for variant, fork in zip(job.variants, prefill.forks, strict=False):
            result = Generation(request, variant, prefill_seconds=seconds)
            lane = Lane(result, fork, question)
            if not fork.error:
                result.describe_prompt(fork)
            if fork.error:
                lane.fail(fork.error)
            elif not question:
                lane.take(token)
            lanes.append(lane)
        if request.reference:
            lanes += fidelity_lanes(lanes, prefill.forks, logits, question)
        return lanes

    def _full_answer(self, request: Request) -> list[int]:
        """What the full cache answers, for policies that look ahead."""
        lanes = self._prefill(Job(request, [REFERENCE]))
        list(self._decode(lanes, []))
        return lanes[0].result.tokens

    def _decode(self, lanes: list[Lane], again: list[Job]) -> Iterator[Generation]:
        """All lanes in lockstep until each has finished. A result leaves when all its lanes have.

        Args:
            again: takes what failed because of a policy that was asked about several samples at once.
        """
        for lane in lanes:
            if lane.result.error:  # its prompt was cut wrongly
                yield failed(lane)
        lanes = [lane for lane in lanes if not lane.result.error]
        if not lanes:
            return
        self.memory.start()
        batch, lanes = arrange(lanes, self.rotary.turn)
        heed(batch, lanes)
        meter = FidelityMeter(len(lanes), self.layers, self.model.device)
        measured = {id(lane): i for i, lane in enumerate(lanes)}
        open_lanes: dict[int, int] = {}
        for lane in lanes:
            open_lanes[id(lane.result)] = open_lanes.get(id(lane.result), 0) + 1
            lane.result.lanes = len(lanes)
        if any(lane.targets is not None for lane in lanes):
            batch.watch = meter.watch_layer
        while True:
            for row, lane in enumerate(lanes):
                lane.done = lane.done or lane.result.error is not None  # of the result's other lane
                if not lane.done:
                    continue
                if not lane.result.error:
                    self._describe(batch, row, lane, meter, measured)
                open_lanes[id(lane.result)] -= 1
                if open_lanes[id(lane.result)] == 0 and lane.result.variant is not REFERENCE:
                    if not lane.result.error:
                        yield lane.result
                    elif lane.shared and len({id(lanes[mate].result) for mate in batch.mates(row)}) > 1:
                        again.append(Job(lane.result.request, [lane.result.variant]))
                    else:
                        yield failed(lane)
            keep = [row for row, lane in enumerate(lanes) if not lane.done]
            if len(keep) < len(lanes):
                batch.select(keep)
                lanes = [lanes[row] for row in keep]
            if not lanes:
                self.memory.stop("decode")
                return
            self._step(batch, lanes, meter, measured)

    def _describe(self, batch: LaneBatch, row: int, lane: Lane, meter: FidelityMeter, measured: dict[int, int]) -> None:
        """Note what a lane has come to."""
        try:
            if lane.targets is None:
                lane.result.describe_end(batch, row)
            else:
                lane.result.fidelity = meter.result(measured[id(lane)], lane.first_nll)
        except ContractError as error:
            lane.fail(str(error))

    def _step(self, batch: LaneBatch, lanes: list[Lane], meter: FidelityMeter, measured: dict[int, int]) -> None:
        """One token for every lane; the host waits for the device once."""
        started = time.perf_counter()
        targets = [lane.targets[lane.position - lane.start] if lane.targets is not None else -1 for lane in lanes]
        rows = [row for row, target in enumerate(targets) if target >= 0]
        if batch.watch is not None:
            row_of = {id(lane): row for row, lane in enumerate(lanes)}
            full = [row_of[id(lanes[row].full or lanes[row])] for row in rows]
            meter.begin(rows, full, [measured[id(lanes[row])] for row in rows], [targets[row] for row in rows])
        where = [lane.position for lane in lanes]
        batch.position = torch.tensor(where, device=self.model.device, dtype=torch.int32)
        batch.longest = max(where) + 1
        batch.begin()
        ids = torch.tensor([[lane.next_input()] for lane in lanes], device=self.model.device)
        logits = attention.forward(self.model, ids, batch.position[:, None].long(), batch)[:, -1]
        batch.t += 1
        meter.watch_logits(logits)
        best = choose(logits, [(lane.result.request, len(lane.result.tokens)) for lane in lanes])
        wrong = batch.wrong()
        chosen = (best if wrong is None else torch.where(wrong & (best >= 0), BROKEN, best)).tolist()
        heed(batch, lanes, [token == BROKEN for token in chosen])
        share = (time.perf_counter() - started) / len(lanes)
        for row, (lane, token) in enumerate(zip(lanes, chosen, strict=True)):
            if lane.result.error:
                continue
            if token < 0:
                changing = [batch.changes_weights(other) for other in range(len(lanes))]
                if changing[row] and all(changes for changes, other in zip(changing, chosen, strict=True) if other < 0):
                    lane.fail(batch.blame(row, "adjust_logits, adjust_weights", "left logits that are not numbers"))
                    continue
                caches, pool_row = batch.locate(row)
                where_in_text = f"the token at position {lane.position}"
                self._refuse_nan(lane.result.request, caches, pool_row, where_in_text)
            if lane.targets is None:  # what a fidelity lane takes is not the policy's decoding
                lane.result.decode_seconds += share
                lane.result.decode_steps += 1
            lane.advance(token)

    def _refuse_nan(self, request: Request, caches: Sequence[LayerCache], row: int, where: str) -> None:
        """Logits are not numbers: name the sample and the first layer that was handed something else."""
        layers = [i for i, cache in enumerate(caches) if not cache.is_finite(row)]
        first = f"the keys or values of layer {layers[0]}" if layers else "what follows the last layer's attention"
        raise InputError(
            f"sample {request.name}: logits after {where} are not numbers, first seen in {first}; "
            "valid: finite weights, and a model.dtype that holds them (bfloat16 or float32)"
        )


def span(request: Request) -> tuple[int, int]:
    """Tokens of the first forward pass, and the most that are ever read: the last new token is not."""
    first = len(request.ids) if request.context_tokens is None else request.context_tokens
    return first, len(request.ids) + request.max_new_tokens - 1
