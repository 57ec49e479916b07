"""Do a policy here and its namesake in kvpress keep the same positions? (part `overlap` of `src.bench`)

Settings are made equal explicitly; where kvpress has another rule by design, `Method.by_design` says so. It pools by
averages only, so that is what is compared; `kernel=1` switches pooling off on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evals.prompts import encode
from evals.suites import load_samples, task_names
from evals.visible import visible
from policies.base import RankedPolicy
from src.config.binding import bind
from src.config.cells import CellConfig, make_cell, policy_config
from src.engine.engine import Engine
from src.engine.request import Job, Request
from src.errors import InputError
from src.models.load import LoadedModel

if TYPE_CHECKING:
    from src.bench.peers import Peer
    from src.kv.prompt import PromptAttention

Kept = Sequence[Sequence[Sequence[int]]]  # layer -> KV head -> positions

# One LongBench task of each kind: one document, several, a summary, examples, made up, code.
LONGBENCH = ("qasper", "hotpotqa", "gov_report", "trec", "passage_retrieval_en", "lcc")


@dataclass(frozen=True)
class KeyNorm(RankedPolicy):
    """The keys with the smallest norms (Devoto et al. 2024, arXiv 2406.11430), as kvpress has it: no window. It is here
    to be compared, not to be run: there is no decoding rule.
    """

    def rank_prompt(self, prompt: PromptAttention, budget: int) -> Tensor:
        return -torch.linalg.vector_norm(prompt.keys, dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class Method:
    """The same method twice.

    Args:
        policy: ours: a name of conf/policy and what differs from that file, or a class.
        press: the peer's name for it (`kvpress_worker.py`).
        settings: of the press.
        by_design: what no setting makes equal.
        touched: positions of a prompt of n tokens whose worth that changes.
    """

    policy: Mapping[str, Any]
    press: str
    settings: Mapping[str, Any]
    by_design: str = ""
    touched: Callable[[int], set[int]] = lambda n: set()

    def cell(self, budget: int) -> CellConfig:
        given = self.policy if "_target_" in self.policy else policy_config(self.policy)
        return make_cell(given, budget, " ".join([self.policy["name"], *options(self.policy)]))

    def asked(self, budget: int) -> dict[str, Any]:
        return {"press": self.press, "settings": dict(self.settings), "budget": budget}

    @property
    def peer(self) -> str:
        return " ".join([self.press, *(f"{name}={value}" for name, value in self.settings.items())])


def options(given: Mapping[str, Any], of: str = "") -> Iterator[str]:
    """Settings as a command would give them, those of a part with its name before: `allocate.rounding=kvpress`."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from options(value, f"{of}{name}.")
        elif name not in ("name", "_target_"):
            yield f"{of}{name}={value}"


ENDS = "averages at both ends count zeros there"


def last(n: int) -> set[int]:
    return {n - 1}


def snapkv(window: int, kernel: int) -> Method:
    def ends(n: int) -> set[int]:
        return {*range(kernel // 2), *range(n - window - kernel // 2, n - window)}

    ours = {"name": "snapkv", "window": window, "kernel": kernel, "pooling": "avg", "group": "mean"}
    return Method(ours, "snapkv", {"window_size": window, "kernel_size": kernel}, ENDS if kernel > 1 else "", ends)


def pyramidkv(window: int, kernel: int, beta: int) -> Method:
    alike = snapkv(window, kernel)
    ours = {**alike.policy, "name": "pyramidkv", "allocate": {"beta": beta, "rounding": "kvpress"}}
    return Method(ours, "pyramidkv", {**alike.settings, "beta": beta}, alike.by_design, alike.touched)


def adakv(window: int, kernel: int, floor: float) -> Method:
    alike = snapkv(window, kernel)
    parts = {"floor": floor, "floor_rule": "protect", "rounding": "official"}
    ours = {**alike.policy, "name": "adakv", "allocate": parts}
    why = "; ".join(filter(None, [alike.by_design, "one entry beside each head's window here"]))
    return Method(ours, "adakv", {**alike.settings, "alpha_safeguard": floor}, why, alike.touched)


METHODS = (
    Method({"name": "streaming_llm", "sinks": 4}, "streaming_llm", {"n_sink": 4}),
    Method({"name": "tova"}, "tova", {}, "the last token always stays there", last),
    Method(
        {"name": "h2o", "normalise": "rows", "heavy_share": 1.0},
        "observed",
        {},
        "the last token always stays here",
        last,
    ),
    Method({"name": "knorm", "_target_": "src.bench.overlap.KeyNorm"}, "knorm", {}),
    snapkv(window=32, kernel=7),
    snapkv(window=64, kernel=5),
    snapkv(window=32, kernel=1),
    pyramidkv(window=8, kernel=7, beta=10),  # with 20 kvpress is uniform at 128: the last layer would hold 6 of 8
    adakv(window=32, kernel=7, floor=0.2),
    adakv(window=32, kernel=1, floor=0.2),
)


def prompts(loaded: LoadedModel, lengths: Sequence[int], longbench_dir: str | None) -> list[list[int]]:
    """One prompt per length, from one task after the other; longer texts lose their middle, the chat form comes on top.

    Args:
        longbench_dir: as `tasks.data_dir`; None: the generated pocket tasks, of 500 to 1,700 tokens.
    """
    suite = "longbench" if longbench_dir else "pocket"
    tasks = list(LONGBENCH if longbench_dir else task_names("pocket"))
    each = -(-len(lengths) // len(tasks))
    samples = load_samples(suite, tasks, each, longbench_dir, seed=0)
    by_task = [[sample for sample in samples if sample.task.name == task] for task in tasks]
    in_turn = [sample for turn in zip_longest(*by_task) for sample in turn if sample is not None]
    form, found = loaded.form, []
    for length, sample in zip(lengths, in_turn, strict=False):
        prompt = encode(sample, loaded.tokenizer, length, loaded.chat, form.kwargs, form.thinking, form.date)
        found.append(loaded.fit_ids(prompt.ids))
    return found


def overlap_rows(
    peer: Peer, loaded: LoadedModel, texts: Sequence[list[int]], budgets: Sequence[int], lanes: int
) -> list[dict[str, Any]]:
    """One row per method and budget.

    Args:
        texts: prompts, token ids.
        lanes: as `max_lanes`.

    Raises:
        InputError: a budget that holds a whole prompt, or is too small for a method.
    """
    shortest = min(map(len, texts))
    if max(budgets) >= shortest:
        raise InputError(f"overlap_budgets={list(budgets)}: a prompt has {shortest} tokens; valid: fewer than that")
    asked = [(method, budget) for method in METHODS for budget in budgets]
    cells = bind([method.cell(budget) for method, budget in asked], loaded)
    found: list[list[Agreement]] = [[] for _ in asked]
    for number, ids in enumerate(texts):
        ours = kept_here(loaded, ids, cells, lanes)
        theirs = peer.kept(ids, [method.asked(budget) for method, budget in asked])
        for mine, here, there, (method, _) in zip(found, ours, theirs, asked, strict=True):
            mine.append(Agreement.of(here, there, method.touched(len(ids))))
        print(f"  prompt {number + 1} of {len(texts)}: {len(ids)} tokens", file=sys.stderr, flush=True)
    return [
        {
            "part": "overlap",
            "what": cell.shown,
            "kvpress": f"{peer.version} {method.peer}".strip(),
            "budget": budget,
            "prompts": len(texts),
            "prompt_tokens": round(fmean(map(len, texts))),
            **mean(agreements),
            "by_design": method.by_design or None,
        }
        for (method, budget), cell, agreements in zip(asked, cells, found, strict=True)
    ]


def kept_here(loaded: LoadedModel, ids: list[int], cells: Sequence[CellConfig], lanes: int) -> list[Kept]:
    """What every cell keeps of a prompt."""
    job = Job(Request("overlap", ids, frozenset(), 1), [cell.variant for cell in cells])
    results = {result.variant: result for result in Engine(loaded.model, lanes).run([job])}
    for cell in cells:
        if error := results[cell.variant].error:
            raise InputError(f"overlap: {visible(cell.shown)}, budget {cell.budget}: {error}")
    return [
        [[[p for p in head if p >= 0] for head in layer.tolist()] for layer in results[cell.variant].kept_prompt]
        for cell in cells
    ]


@dataclass(frozen=True)
class Agreement:
    """One prompt, kept here and there: per layer, means over its KV heads.

    Attributes:
        shared: share of our positions that the peer keeps too.
        counts: absolute difference of the numbers of entries.
        unexplained: entries held by one side and exchanged for another, neither of them touched by design.
    """

    shared: list[float]
    counts: list[float]
    unexplained: list[float]

    @classmethod
    def of(cls, ours: Kept, theirs: Kept, touched: set[int]) -> Agreement:
        layers = [
            [(set(a), set(b)) for a, b in zip(here, there, strict=True)]
            for here, there in zip(ours, theirs, strict=True)
        ]
        return cls(
            [fmean(len(a & b) / len(a) for a, b in heads) for heads in layers],
            [fmean(abs(len(a) - len(b)) for a, b in heads) for heads in layers],
            [fmean(min(len(a - b - touched), len(b - a - touched)) for a, b in heads) for heads in layers],
        )


def mean(found: Sequence[Agreement]) -> dict[str, Any]:
    """Over prompts: the mean over all layers, and the layer that agrees least."""
    layers = [fmean(values) for values in zip(*(one.shared for one in found), strict=True)]
    lowest = min(range(len(layers)), key=layers.__getitem__)
    return {
        "overlap": fmean(layers),
        "lowest_layer": layers[lowest],
        "layer": lowest,
        "count_difference": fmean(fmean(one.counts) for one in found),
        "unexplained": fmean(fmean(one.unexplained) for one in found),
    }
