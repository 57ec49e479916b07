"""The kept set over time: what is noted is what was cached, and the picture is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies.full import Full
from policies.h2o import H2O
from policies.oracle import Oracle
from policies.scope import Scope
from src.engine.engine import Engine
from src.engine.request import Job, Request, Variant
from src.kv.budget import SplitBudget
from src.retention.trace import Trace, trace_path
from src.session.trace_probe import TraceProbe
from tests.support import naive
from tests.support.tiny import tiny, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)


ENTRIES = {
    "full": lambda t: 40 + t,
    "h2o": lambda t: 20,
    "scope_slide": lambda t: 12 + min(t, 8),
    "oracle": lambda t: 20 + t,
}


@pytest.fixture(scope="module")
def traces() -> dict[str, tuple[Any, Trace]]:
    variants = {
        "full": Variant(Full(), None),
        "h2o": Variant(H2O(), 20),
        "scope_slide": Variant(Scope(), SplitBudget(12, 8)),
        "oracle": Variant(Oracle(), 20),  # a run with the full cache comes first and leaves no trace
    }
    probe = TraceProbe(every=5)
    engine = Engine(tiny("llama", torch.float64), 10, [probe])
    asked = Request("x", tokens(40)[0].tolist(), frozenset(), 61)
    found = {}
    for result in engine.run([Job(asked, list(variants.values()))]):
        name = next(n for n, v in variants.items() if v is result.variant)
        trace = probe.take(result)
        assert trace is not None
        found[name] = (result, trace)
    assert not probe.traces  # nothing of a sample stays
    return found


def test_shares_are_of_what_was_cached(traces: dict[str, tuple[Any, Trace]]) -> None:
    for name, (result, trace) in traces.items():
        assert (trace.prompt_tokens, trace.width) == (40, 1)
        assert trace.steps == list(range(0, 61, 5))
        entries = {
            "full": lambda t: 40 + t,
            "h2o": lambda t: 20,
            "scope_slide": lambda t: 12 + min(t, 8),
            "oracle": lambda t: 20 + t,
        }[name]
        for step, shares in zip(trace.steps, trace.shares, strict=True):
            assert np.isclose(shares.sum(), entries(step))
            assert not shares[40 + step :].any()
        last = torch.cat(result.kept_end).flatten().bincount(minlength=256) / 4  # layers x KV heads
        assert np.allclose(trace.shares[-1], last)
    shares = np.stack(traces["scope_slide"][1].shares)
    assert (shares[:, :40] == shares[0, :40]).all()  # the prompt pool never changes
    assert (np.stack(traces["h2o"][1].shares)[-1, :40] != shares[0, :40]).any()


def test_stored(tmp_path: Path, traces: dict[str, tuple[Any, Trace]]) -> None:
    path = trace_path(tmp_path, "gsm8k_30", "a/0")
    assert path.name.startswith("gsm8k_30-a_0~")  # the plain name is that of the id a_0
    traces["h2o"][1].save(path)
    again = Trace.load(path)
    assert again.steps == traces["h2o"][1].steps and np.allclose(again.shares, traces["h2o"][1].shares)
