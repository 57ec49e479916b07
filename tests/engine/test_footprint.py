"""What a lane has held over its steps, against a probe that looks at every one of them."""

from collections import Counter

import pytest
import torch

from policies.adakv import AdaKV
from policies.base import Policy
from policies.cake import CAKE, Cascade
from policies.full import Full
from policies.h2o import H2O
from policies.scope import Scope
from policies.snapkv import SnapKV
from src.engine.engine import Engine
from src.engine.probes import LaneView, Probe
from src.engine.request import Generation, Job, Request, Variant
from tests.support.tiny import tiny_loaded, tokens

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "snapkv": SnapKV(window=8),
    "h2o": H2O(),
    "h2o+adakv": H2O(allocate=AdaKV()),
    "adakv": SnapKV(window=8, allocate=AdaKV()),
    "cake": CAKE(window=8, allocate=Cascade(window=8)),
    "scope": Scope(strategy="discontinuous"),
}


class Footprint(Probe):
    """Bytes of every lane, summed over its steps; entries by hand, not off the caches' own sums."""

    def __init__(self) -> None:
        self.found: Counter[Generation] = Counter()

    def on_step(self, lane: LaneView) -> None:
        for cache in lane.caches:
            there = int((cache.positions[lane.row] >= 0).sum())
            self.found[lane.generation] += there * 2 * cache.keys.shape[-1] * cache.keys.element_size()


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_over_all_steps(name: str) -> None:
    """Two prompts, one shorter than the budget, leave at different steps."""
    loaded, probe = tiny_loaded(), Footprint()
    policy = POLICIES[name]
    variant = Variant(policy, 32 if policy.uses_budget else None)
    requests = [
        Request(f"{n}", tokens(n, seed=n)[0].tolist(), frozenset(), new, min_new_tokens=new)
        for n, new in ((90, 24), (24, 15))
    ]
    with torch.inference_mode():
        done = list(Engine(loaded.model, 8, [probe]).run([Job(r, [variant]) for r in requests]))
    assert len(done) == 2 and not any(g.error for g in done)
    for got in done:
        assert got.kv_byte_steps == probe.found[got] > 0
        revised = name == "cake" and got.request.name == "90"
        assert (got.kv_bytes_cutting >= got.kv_bytes) == revised and bool(got.kv_bytes_cutting) == revised
