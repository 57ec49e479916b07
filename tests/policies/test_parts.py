"""Every policy that ranks with every allocator and every store: it runs and holds the contract, or is refused at once.

Found in conf/policy, so that a new one is covered on the day its file is there. All cells share one prefill per prompt.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from policies.base import Policy, RankedPolicy
from src.config.binding import bind
from src.config.cells import CellConfig, make_cell, policy_config
from src.config.compose import CONF
from src.engine.engine import Engine
from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Job, Request, Variant
from src.errors import InputError
from src.models.load import LoadedModel
from tests.support import naive
from tests.support.tiny import tiny_loaded, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

BUDGET, NEW, LENGTHS = 48, 13, (90, 61, 41)  # the last prompt fits, and is decoded past the budget
Key = tuple[str, str, str]
SMALL: Mapping[str, dict[str, Any]] = {  # what the defaults need to run on a tiny model
    "kivi": {"group": 8, "residual": 8},
    "retrieval_heads": {"sinks": 4, "recent": 32},
}
NEEDS: Mapping[str, dict[str, Any]] = {
    "streaming_llm": {"positions": "original"},
    "vatp": {"sinks": 4, "heavy_share": 0.8},
}


def names(folder: str = "") -> list[str]:
    return sorted(path.stem for path in (CONF / "policy" / folder).glob("[!_]*.yaml"))


@cache
def alone(policy: str) -> dict[str, Any]:
    return plain(policy_config({"name": policy, **NEEDS.get(policy, {})}))


@cache
def part(folder: str, name: str) -> dict[str, Any]:
    """A part's settings, as they are composed beside a policy (composing every pair would take most of the time)."""
    return {**plain(policy_config({"name": "recent", folder: name})[folder]), **SMALL.get(name, {})}


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def config(policy: str, allocate: str, store: str) -> dict[str, Any]:
    """As a sweep lists it; no part where its name is empty."""
    parts = {folder: part(folder, name) for folder, name in (("allocate", allocate), ("store", store)) if name}
    return {**alone(policy), **parts}


def ranked() -> list[str]:
    """Policies that rank the prompt's tokens, and bring no part of their own."""
    found = []
    for name in names():
        made = make_cell(alone(name), BUDGET).variant.policy
        if isinstance(made, RankedPolicy) and made.allocate is None and made.store is None:
            found.append(name)
    return found


PRODUCT = list(product(ranked(), ["", *names("allocate")], ["", *names("store")]))
REFUSED: dict[Key, list[str]] = {  # what the line must say
    ("tova", allocate, store): [f"allocate={kind}", "TOVA", "valid: "]
    for allocate, kind in (("retrieval_heads", "RetrievalHeads"), ("globally", "Globally"))
    for store in ("", *names("store"))
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded()


@pytest.fixture(scope="module")
def cells(loaded: LoadedModel) -> dict[Key, CellConfig]:
    keys = [key for key in PRODUCT if key not in REFUSED]
    return dict(zip(keys, bind([make_cell(config(*key), BUDGET) for key in keys], loaded), strict=True))


class Counts(Probe):
    """Notes how many entries every KV head of every layer holds, from the cut on, and that positions are sound."""

    def __init__(self) -> None:
        self.counts: dict[Generation, list[list[list[int]]]] = {}

    def on_cut(self, generation: Generation) -> None:
        self.counts[generation] = [[[len(held(head)) for head in layer] for layer in generation.kept_prompt]]

    def on_step(self, lane: LaneView) -> None:
        now = [layer.held(lane.row) for layer in lane.caches]
        if lane.t % 6 == 0:
            for of_layer, counts in zip(lane.caches, now, strict=True):
                heads = of_layer.kept(lane.row)
                assert counts == [len(head) for head in heads]
                for head in heads:
                    assert (head.sort().values.diff() > 0).all() and head.max() < lane.generation.request.first + lane.t
        self.counts[lane.generation].append(now)


def held(positions: torch.Tensor) -> torch.Tensor:
    """Of one head, without what pads it to the longest."""
    return positions[positions >= 0]


def request(length: int, **more: Any) -> Request:
    return Request(str(length), tokens(length, seed=length)[0].tolist(), frozenset(), NEW, **more)


def run(loaded: LoadedModel, variants: list[Variant], lanes: int = 1000, lengths: Any = LENGTHS) -> Iterator[Any]:
    """Every generation, and the counts of its heads after the cut and after each step."""
    probe = Counts()
    for done in Engine(loaded.model, lanes, [probe]).run([Job(request(n), variants) for n in lengths]):
        assert done.error is None, f"{done.variant.policy}: {done.error}"
        yield done, probe.counts[done]


@pytest.fixture(scope="module")
def together(loaded: LoadedModel, cells: dict[Key, CellConfig]) -> dict[tuple[Key, int], tuple[Generation, Any]]:
    of = {id(cell.variant): key for key, cell in cells.items()}
    done = run(loaded, [cell.variant for cell in cells.values()])
    return {(of[id(one.variant)], one.request.first): (one, counts) for one, counts in done}


def test_refused_before_anything_runs(loaded: LoadedModel) -> None:
    for key, words in REFUSED.items():
        with pytest.raises(InputError) as refused:
            bind([make_cell(config(*key), BUDGET)], loaded)
        for word in words:
            assert word in str(refused.value) and "\n" not in str(refused.value)


def test_it_holds_what_it_was_given(together: dict[tuple[Key, int], tuple[Generation, Any]]) -> None:
    assert len(together) == (len(PRODUCT) - len(REFUSED)) * len(LENGTHS)
    for (key, n), (got, counts) in together.items():
        check_counts(key, n, got.variant.policy, counts)


def check_counts(key: Key, n: int, policy: Policy, counts: list[list[list[int]]]) -> None:
    """Totals are the budget's; a policy that evicts never holds more than given, others one more per token."""
    assert len(counts) == NEW
    flat = [[count for heads in step for count in heads] for step in counts]
    cut, most = flat[0], len(flat[0]) * min(n, BUDGET)
    if policy.allocate is None or policy.allocate.exact:
        assert sum(cut) == most, key
    if n <= BUDGET and (policy.allocate is None or policy.allocate.uses_budget):
        assert cut == [n] * len(cut)
    assert min(cut) > (policy.least_budget() - 1 if n > BUDGET else 0)
    limit = policy.limit(BUDGET, 1)
    for step, now in enumerate(flat):
        if limit is None:
            assert now == [count + step for count in cut], key
        elif n > BUDGET or sum(cut) < most:
            assert now == cut, key
        else:
            assert now == [min(count + step, BUDGET) for count in cut], key


def test_its_bytes_are_the_entries(
    loaded: LoadedModel, together: dict[tuple[Key, int], tuple[Generation, Any]]
) -> None:
    dim, size = loaded.model.config.head_dim, loaded.dtype.itemsize
    formulas: dict[str, Callable[[int], int]] = {
        "": lambda k: 2 * k * dim * size,
        # k mod 8 exact; of the others 2 bits a number, and two float16 for 8 of them
        "kivi": lambda k: 2 * (k % 8 * dim * size + (k - k % 8) * dim * (2 + 4) // 8),
        # 10 of 16 channels but of the newest 32, and 16 bits that say which
        "think": lambda k: k * dim * size + min(k, 32) * dim * size + max(0, k - 32) * 10 * size + 2 * 10,
    }
    for (key, n), (got, counts) in together.items():
        if key[2] in formulas:
            assert got.kv_bytes == sum(formulas[key[2]](k) for heads in counts[0] for k in heads), key
        assert [[len(held(head)) for head in layer] for layer in got.kept_prompt] == counts[0]
        assert all((held(head).diff() > 0).all() for layer in got.kept_prompt for head in layer)
        if not key[2]:
            assert got.kv_bytes_peak == 2 * dim * size * max(sum(map(sum, step)) for step in counts), key
        else:  # a store changes no choice
            plain = together[(key[0], key[1], ""), n][0]
            assert [by_head(layer) for layer in got.kept_prompt] == [by_head(layer) for layer in plain.kept_prompt]


@pytest.mark.parametrize("allocate", ["", *names("allocate")])
def test_its_wave_changes_nothing(
    allocate: str, loaded: LoadedModel, cells: dict[Key, CellConfig], together: dict[tuple[Key, int], Any]
) -> None:
    """Alone, lane by lane, a cell gives what it gave among all others."""
    for store in ("", *names("store")):
        for key in [key for key in cells if key[1:] == (allocate, store)]:
            for single, counts in run(loaded, [cells[key].variant], 1, LENGTHS[::2]):
                shared, of_wave = together[key, single.request.first]
                assert single.tokens == shared.tokens and counts == of_wave, key
                assert (single.kv_bytes, single.kv_bytes_peak) == (shared.kv_bytes, shared.kv_bytes_peak)
                for one, other in zip(
                    single.kept_prompt + single.kept_end, shared.kept_prompt + shared.kept_end, strict=True
                ):
                    assert by_head(one) == by_head(other), key


def by_head(layer: torch.Tensor) -> list[list[int]]:
    return [held(head).tolist() for head in layer]
