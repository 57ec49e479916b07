"""What holds on tiny random models holds on real weights: SmolLM2, float32, real text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evals import pocket
from evals.prompts import encode
from src.config.cells import make_cell, policy_config
from src.engine.engine import Engine
from src.engine.request import Job, Request
from src.models.load import LoadedModel, load_model
from src.models.settings import model_settings
from src.session import model
from tests.support.cli import call, lines

pytestmark = pytest.mark.slow

PROMPTS = ("needle", "few_shot", "kv_lookup")  # the chat form, a list, a table
CELLS = (
    ("full", None),
    ("streaming_llm", 64),
    ("h2o", 64),
    ("h2o", 256),
    ("snapkv", 64),
    ("ahakv", 64),
    ("ahakv", 256),
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    yield load_model(model_settings("smollm2-135m", device="cpu"))


def request(name: str, loaded: LoadedModel, new_tokens: int) -> Request:
    """A pocket prompt, at most 600 tokens of it: its end, so that it still asks something."""
    (sample,) = pocket.load([name], 1, seed=0)
    return Request(name, encode(sample, loaded.tokenizer, 8000).ids[-600:], frozenset(), new_tokens)


@pytest.mark.parametrize("name", PROMPTS)
def test_full_cache_is_greedy_generate(name: str, loaded: LoadedModel) -> None:
    wanted = request(name, loaded, 40)
    ids = torch.tensor([wanted.ids])
    loaded.model.set_attn_implementation("sdpa")
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    variants = [make_cell(policy_config(name, 0), budget).variant for name, budget in CELLS]
    full = next(
        g
        for g in Engine(loaded.model, 32).run([Job(never_ending(wanted, loaded), variants)])
        if g.variant is variants[0]
    )
    assert full.tokens == expected


def never_ending(wanted: Request, loaded: LoadedModel) -> Request:
    """The same request; its stop tokens are known but may not be chosen, as with `generate`'s min_new_tokens."""
    return Request(
        wanted.name, wanted.ids, loaded.stop_ids, wanted.max_new_tokens, min_new_tokens=wanted.max_new_tokens
    )


def test_cells_together_are_the_cells_alone(loaded: LoadedModel) -> None:
    variants = [make_cell(policy_config(name, 0), budget).variant for name, budget in CELLS]
    jobs = [Job(request(name, loaded, 24), variants) for name in PROMPTS[:2]]
    together = {(g.request.name, id(g.variant)): g for g in Engine(loaded.model, 32).run(jobs)}
    alone = Engine(loaded.model, 1)
    for job in jobs:
        for variant in variants:
            (single,) = alone.run([Job(job.request, [variant])])
            shared = together[job.request.name, id(variant)]
            assert single.tokens == shared.tokens, (job.request.name, variant)
            for a, b in zip(single.kept_end, shared.kept_end, strict=True):
                assert torch.equal(a, b)


def test_a_run_finds_the_needle(tmp_path: Path) -> None:
    done = call("run", "policy=full", "tasks=needle", "limit=1", "wandb.mode=disabled", f"output_root={tmp_path}")
    assert done.code == 0, done.err
    (record,) = lines(done.folder)
    assert record["score"] == 100 and record["finish"] == "stop" and record["answers"][0] in record["prediction"]
    model.loaded.cache_clear()  # half a gigabyte that no other test needs
