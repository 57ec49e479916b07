"""What holds for every policy of conf/policy, whatever its idea: a new one is covered on the day its file is there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.base import Policy
from src.config.binding import bind
from src.config.cells import CellConfig, make_cell, policy_config
from src.config.compose import CONF
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request
from src.models.load import LoadedModel
from tests.support import naive
from tests.support.cli import call, folders, predictions
from tests.support.tiny import tiny_loaded, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

NAMES = sorted(path.stem for path in (CONF / "policy").glob("[!_]*.yaml"))
LENGTHS, BUDGET, NEW = (90, 61), 48, 20
Options = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def options(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Name -> the policy as a sweep lists it, with what it needs beside its defaults to run on a tiny model."""
    file = tmp_path_factory.mktemp("codebooks") / "tiny.safetensors"
    fit = ["groups=4", "centroids=8", "samples=1", "sample_tokens=200", "jobs=1", f"output={file}"]
    done = call("calibrate", "model=local", f"model.path={model_folder}", "model.max_prompt_tokens=200", *fit)
    assert done.code == 0, done.err
    needs: Mapping[str, dict[str, Any]] = {
        "hcattention": {"groups": 4, "centroids": 8, "codebooks": str(file)},
        "kivi": {"store": {"group": 8, "residual": 8}},
        "duo_attention": {"allocate": {"sinks": 4, "recent": 20}},
    }
    return lambda name: {"name": name, **needs.get(name, {})}


def make(names: list[str], options: Options, loaded: LoadedModel, seed: int = 0) -> list[CellConfig]:
    return bind([make_cell(policy_config(options(name), seed), BUDGET) for name in names], loaded)


def run(loaded: LoadedModel, cells: list[CellConfig], lanes: int = 64) -> dict[tuple[str, str], Generation]:
    """(policy, prompt) -> what it came to; the prompts are of two lengths and may share waves."""
    requests = [
        Request(f"{n}", tokens(n, seed=n)[0].tolist(), frozenset(), NEW, reference=tokens(5, seed=1)[0].tolist())
        for n in LENGTHS
    ]
    done = Engine(loaded.model, lanes).run([Job(r, [c.variant for c in cells]) for r in requests])
    labels = {id(cell.variant): cell.label for cell in cells}
    found = {(labels[id(g.variant)], g.request.name): g for g in done}
    assert not [g.error for g in found.values() if g.error]
    return found


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded()


@pytest.fixture(scope="module")
def together(loaded: LoadedModel, options: Options) -> dict[tuple[str, str], Generation]:
    return run(loaded, make(NAMES, options, loaded))


@pytest.mark.parametrize("name", NAMES)
def test_its_wave_changes_nothing(
    name: str, loaded: LoadedModel, options: Options, together: dict[tuple[str, str], Generation]
) -> None:
    """Alone, lane by lane, it gives what it gave among all the others."""
    for key, alone in run(loaded, make([name], options, loaded), lanes=1).items():
        shared = together[key]
        assert alone.tokens == shared.tokens and alone.kv_bytes == shared.kv_bytes
        for one, other in zip(alone.kept_prompt + alone.kept_end, shared.kept_prompt + shared.kept_end, strict=True):
            assert torch.equal(one, other)
        assert alone.fidelity and shared.fidelity
        for measure in ("nll", "kl", "top1", "tokens", "output_error"):
            assert alone.fidelity[measure] == pytest.approx(shared.fidelity[measure], rel=1e-4, abs=1e-6)


def check_kept(got: Generation, n: int) -> None:
    """Positions of the text, each once, ascending after the prompt, never more than the budget or its own limit."""
    variant, steps = got.variant, got.decode_steps
    assert len(got.tokens) == NEW and steps == NEW - 1
    policy, budget = (cell := variant.cell(n, NEW)).policy, cell.budget
    heads = [
        (cut, end) for pair in zip(got.kept_prompt, got.kept_end, strict=True) for cut, end in zip(*pair, strict=True)
    ]
    for cut, end in ((held(cut), held(end)) for cut, end in heads):
        assert 1 <= len(cut) <= (min(n, BUDGET) if policy.uses_budget and not policy.allocate else n)
        assert (cut.diff() > 0).all() and cut.max() < n
        limit = policy.limit(budget, len(cut)) if policy.evicts_while_decoding else None
        if policy.allocate and limit is not None:
            limit = len(cut) if n > budget else budget  # a head evicts within what it was given
        assert len(end) <= (len(cut) + steps if limit is None else limit)
        assert limit is None or policy.uses_decode_budget or policy.allocate or limit <= BUDGET  # SCOPE: its docstring
        assert (end.sort().values.diff() > 0).all() and end.max() < n + steps
    if policy.allocate:
        assert sum(len(held(cut)) for cut, _ in heads) == min(n, BUDGET) * len(heads)


def held(positions: torch.Tensor) -> torch.Tensor:
    """Of one head, without what pads it to the longest."""
    assert positions.min() >= -1
    return positions[positions >= 0]


@pytest.mark.parametrize("name", NAMES)
def test_it_stays_within_its_budget(name: str, together: dict[tuple[str, str], Generation]) -> None:
    for n in LENGTHS:
        check_kept(together[name, str(n)], n)


@pytest.mark.parametrize("name", NAMES)
def test_its_bytes_are_those_of_its_storages(
    name: str, loaded: LoadedModel, options: Options, together: dict[tuple[str, str], Generation]
) -> None:
    config, got = loaded.model.config, together[name, str(LENGTHS[0])]
    entries = sum(int((layer >= 0).sum()) for layer in got.kept_prompt)
    policy = got.variant.policy
    if type(policy).make_cache is Policy.make_cache and policy.store is None:
        assert got.kv_bytes == entries * 2 * config.head_dim * loaded.dtype.itemsize
    else:  # a storage of its own: never more than plain entries, and said apart by device
        assert 0 < got.kv_bytes <= entries * 2 * config.head_dim * loaded.dtype.itemsize
        assert sum(got.kv_bytes_by_device.values()) == got.kv_bytes
    assert got.kv_bytes_full == LENGTHS[0] * config.num_key_value_heads * config.num_hidden_layers * 2 * (
        config.head_dim * loaded.dtype.itemsize
    )


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: str, options: Options) -> None:
    half = tiny_loaded(dtype=torch.bfloat16)
    for (_, n), got in run(half, make([name], options, half)).items():
        check_kept(got, int(n))
        assert got.kv_bytes < got.kv_bytes_full or not got.variant.policy.uses_budget


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_what_is_drawn_and_nothing_else(
    name: str, loaded: LoadedModel, options: Options, together: dict[tuple[str, str], Generation]
) -> None:
    """The run's seed reaches a policy that has one, and the same seed draws the same."""
    first, again, other = (run(loaded, make([name], options, loaded, seed)) for seed in (0, 0, 1))
    draws = "seed" in make([name], options, loaded)[0].settings
    for key in first:
        assert first[key].tokens == again[key].tokens == together[key].tokens
        same = all(torch.equal(a, b) for a, b in zip(first[key].kept_prompt, other[key].kept_prompt, strict=True))
        assert same != draws


def test_cut_off_and_resumed(base: list[str], options: Options, tmp_path: Path) -> None:
    """A sweep of all that ran one sample, and then two, holds what one that ran two at once holds."""
    policies = ",".join(str(options(name)).replace("'", "") for name in NAMES)
    grid = [*base, f"policies=[{policies}]", f"budgets=[{BUDGET}]"]
    for root, limits in (("once", (2,)), ("twice", (1, 2))):
        for limit in limits:
            done = call("sweep", *grid, f"limit={limit}", f"output_root={tmp_path / root}")
            assert done.code == 0, done.err
    once, twice = folders(tmp_path / "once"), folders(tmp_path / "twice")
    assert len(once) == len(NAMES) and set(once) == set(twice)
    for name in once:
        assert predictions(once[name]) == predictions(twice[name])
