"""Prompts and variants in, generations out: one prefill per prompt, every variant forked, lockstep decoding.

`Engine.run` takes jobs (a request and the variants it is wanted under), prefills each prompt once, forks it
into one lane per variant and decodes all lanes of a wave together, greedily. It knows no policy by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies.full import Full
from src.engine import attention
from src.engine.decode import Lane, choose, failed
from src.engine.fidelity import FULL_CACHE, fidelity_lanes
from src.engine.layer_kinds import TextLengths, check_kinds
from src.engine.memory import MemoryMeter
from src.engine.prefill import Cell, Fork, Prefill
from src.engine.probes import Probe
from src.engine.request import Generation, Job, Request, Variant
from src.engine.rotary import Rotary
from src.engine.sequels import Seen, SequelReader
from src.engine.wave import Wave, refuse_nan
from src.errors import InputError
from src.kv.faults import Fault, ask, is_out_of_memory

PATIENCE = 8  # waves that must have fitted before wider ones are tried again


class Engine:
    """Runs a causal language model over many (prompt, policy, budget) cells.

    Args:
        model: any model whose attention goes through transformers' attention interface.
        max_lanes: the most lanes decoded together. At least one prompt's lanes always are.
        probes: are shown what is cached while answers grow (`src.engine.probes`).

    Raises:
        InputError: the model has layers that cannot be served (`src.engine.layer_kinds`).
    """

    def __init__(self, model: PreTrainedModel, max_lanes: int = 8, probes: Sequence[Probe] = ()) -> None:
        self.model, self.max_lanes, self.probes = model, max_lanes, probes
        model.train(False)
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
                fitted = yield from self._together(wave, stop)
                # A wave as wide would fail again, unless one long prompt was to blame: then it may be tried later.
                fitting = fitting + 1 if fitted else 0
                if not fitted:
                    most = max(1, min(most, sum(j.lanes for j in wave)) // 2)
                elif fitting % PATIENCE == 0:
                    most = min(self.max_lanes, 2 * most)
                wave = []
            wave.append(job)
        if wave:
            yield from self._together(wave, stop)

    @torch.inference_mode()
    def begin(self, job: Job) -> Wave:
        """One job's lanes, cut and ready, for who takes the steps himself (`src.bench`). Its policies must be sound."""
        return Wave(self.model, self.prefill(job), self.rotary.turn, self.probes)

    def refusal(self, request: Request) -> str | None:
        """Why a text cannot be served (too long for a window, table or rotary set); None: it can."""
        return self.lengths.refusal(request.first, request.last)

    def _long(self, request: Request) -> bool:
        return self.lengths.long(request.last)

    def _together(self, jobs: list[Job], stop: Callable[[], bool]) -> Generator[Generation, None, bool]:
        """One wave; when memory runs out, what is unfinished is tried again in halves. Returns whether it fitted."""
        finished: set[tuple[Request, Variant]] = set()
        lanes: list[Lane] = []
        begun: list[Job] = []
        again: list[Job] = []  # what failed together with other samples
        try:
            for job in jobs:
                if not stop():
                    begun.append(job)
                    lanes += self.prefill(job)
            for result in self._decode(lanes, again):
                finished.add((result.request, result.variant))
                yield result
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["host memory"])[0]
        else:
            lanes.clear()
            for job in again:  # alone, it fails for itself or not at all
                yield from self._together([job], lambda: False)
            return True
        lanes.clear()  # or the failed wave's caches would stay while it is tried again
        self.memory.release()
        if stop():  # what is under way is finished all the same
            jobs, stop = begun, lambda: False
        left = [Job(j.request, [v for v in j.variants if (j.request, v) not in finished]) for j in jobs]
        left = [j for j in left if j.variants]
        if not (parts := halves(left)) and left:
            yield Generation(left[0].request, left[0].variants[0], error=f"out of memory: {reason}")
        for part in parts:
            yield from self._together(part, stop)
        return False

    def prefill(self, job: Job) -> list[Lane]:
        """The prompt's forward pass, cut for every variant right after each layer's attention.

        Returns:
            The lane of every variant, some of which may have failed; then those that read the reference answer.

        Raises:
            InputError: as `run`.
        """
        request, scope = job.request, job.request.first
        if scope < 1:
            raise InputError(f"sample {request.name}: the prompt is empty; valid: at least one token")
        if reason := self.refusal(request):
            raise InputError(f"sample {request.name}: {reason}")
        prefill, seen = self._forks(job)
        started = time.perf_counter()
        logits, token = self._read_prompt(request, prefill)
        seconds = time.perf_counter() - started
        if token < 0:
            caches = next((fork.caches for fork in prefill.forks if not fork.error), [])
            refuse_nan(request, caches, 0, "the prompt")
        lanes = []
        for variant, fork in zip(job.variants, prefill.forks, strict=False):  # the last may be there to compare with
            took = seconds + seen.cost(variant.policy)
            lanes.append(self._lane(Generation(request, variant, prefill_seconds=took), fork, token))
        if request.reference:
            lanes += fidelity_lanes(lanes, prefill.forks, logits, request.ids[scope:])
        return lanes

    def _forks(self, job: Job) -> tuple[Prefill, Seen]:
        """A fork for every variant, and for the full cache where fidelity needs it and nobody asked for it.

        What policies want to have read after the prompt has been read by then.
        """
        request, scope = job.request, job.request.first
        horizon = len(request.ids) - scope + request.max_new_tokens
        cells: list[Cell] = []
        unusable: dict[int, str] = {}
        for i, variant in enumerate(job.variants):
            try:
                cells.append(ask(variant.policy, "at", None, variant.cell, scope, horizon))
            except Fault as fault:
                cells.append(Cell(variant.policy, scope))
                unusable[i] = str(fault)
        if request.reference and not any(cell.full for cell in cells):
            cells.append(Cell(Full(), scope))
        seen = SequelReader(self.model, self.memory, self._full_answer, self.lengths.refusal).read(job)
        unusable |= {i: why for i, variant in enumerate(job.variants) if (why := seen.fault(variant.policy))}
        prefill = Prefill(cells, self.layers, scope, seen.layers)
        for i, why in unusable.items():
            prefill.forks[i].fail(why)
        return prefill, seen

    def _read_prompt(self, request: Request, prefill: Prefill) -> tuple[Tensor, int]:
        """Logits `(1, vocabulary)` after the prompt's last token, and the first new token; -1: they are no numbers."""
        self.memory.start()
        ids = torch.tensor([request.ids[: request.first]], device=self.model.device)
        positions = torch.arange(request.first, device=ids.device)[None]
        logits = attention.forward(self.model, ids, positions, prefill, logits_to_keep=1)[:, -1]
        token = int(choose(logits.clone(), [(request, 0)])[0])  # fidelity needs them unchanged
        if token >= 0:  # or the model is to blame
            prefill.settle()
        self.memory.stop("prefill")
        return logits, token

    def _lane(self, result: Generation, fork: Fork, token: int) -> Lane:
        """The lane that continues a cut prompt; `token`: what comes next, where the whole prompt has been read."""
        lane = Lane(result, fork, result.request.ids[fork.length :])
        try:
            if not fork.error:
                result.describe_prompt(fork)
        except Fault as fault:
            fork.fail(str(fault))
        if fork.error:
            lane.fail(fork.error)
            return lane
        if not lane.feed:
            lane.take(token)
        if lane.watched:
            for probe in self.probes:
                probe.on_cut(result)
        return lane

    def _full_answer(self, request: Request) -> list[int]:
        """What the full cache answers, for policies that look ahead."""
        lanes = self.prefill(Job(request, [FULL_CACHE]))
        list(self._decode(lanes, []))
        return lanes[0].result.tokens

    def _decode(self, lanes: list[Lane], again: list[Job]) -> Iterator[Generation]:
        """All lanes until each has finished.

        Args:
            again: takes what `Wave.again` says.
        """
        for lane in lanes:
            if lane.result.error:  # its prompt was cut wrongly
                yield failed(lane)
        sound = [lane for lane in lanes if not lane.result.error]
        if sound:
            self.memory.start()
            wave = Wave(self.model, sound, self.rotary.turn, self.probes)
            yield from wave.run()
            again += wave.again
            self.memory.stop("decode")


def halves(jobs: list[Job]) -> list[list[Job]]:
    """Jobs in two parts, or one job's variants; nothing where there is nothing to divide."""
    if len(jobs) > 1:
        return [jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]]
    if not jobs or len(jobs[0].variants) < 2:
        return []
    request, variants = jobs[0].request, jobs[0].variants
    middle = len(variants) // 2
    return [[Job(request, variants[:middle])], [Job(request, variants[middle:])]]
