"""Allocators and stores through the commands: chosen by name, refused in one line, resumed, in half precision."""

from pathlib import Path
from typing import Any

import pytest

from tests.commands.test_bad_input import refused
from tests.support.cli import call, folders, lines, predictions

RUNS: dict[str, list[str]] = {
    # overrides: what the line must name
    "policy=snapkv policy/allocate=nomod": ["policy/allocate=nomod", "valid: ada_pyramid, adakv", "retrieval_heads"],
    "policy=snapkv policy/store=nomod": ["policy/store=nomod", "valid: kivi, think"],
    "policy=snapkv policy/store=null": ["policy/store=null", "valid: kivi, think"],
    "policy=snapkv policy/store=[kivi,think]": ["policy/store=[kivi,think]", "one name"],
    "policy=full policy/allocate=adakv": ["policy=full", "allocate=AdaKV", "does not rank", "valid: null"],
    "policy=scope_slide policy/allocate=adakv": ["policy=scope_slide", "allocate=AdaKV", "valid: null"],
    "policy=scope_slide policy/store=kivi": ["store=KIVI", "a cache of its own", "valid: null"],
    "policy=snapkv policy/read=nomod": ["policy/read=nomod", "valid: mass"],
    "policy=snapkv policy/read=mass policy.read.tau=0": ["read: tau=0", "(0, 1]"],
    "policy=snapkv +policy.read=3": ["read=3", "valid: a reader", "null"],
    "policy=hcattention policy/read=mass": ["read=SmallestSet", "its tau", "valid: null"],
    "policy=hcattention policy/store=kivi": ["store=KIVI", "a cache of its own", "valid: null"],
    "policy=streaming_llm policy/allocate=adakv": ["positions=cache", "original"],
    "policy=tova policy/allocate=retrieval_heads": ["allocate=RetrievalHeads", "TOVA", "e.g. adakv"],
    "policy=snapkv policy/store=kivi policy.store.bits=3": ["store: bits=3", "2, 4, 8"],
    "policy=snapkv policy/store=kivi": ["snapkv+kivi", "group=32", "head size 16", "valid: 1, 2, 4, 8, 16"],
    "policy=snapkv policy/store=think policy.store.ratio=1": ["store: ratio=1", "less than 1"],
    "policy=snapkv policy/allocate=adakv policy.allocate.floor=2": ["allocate: floor=2", "from 0 to 1"],
    "policy=snapkv policy/allocate=pyramid policy.allocate.beta=0.5": ["allocate: beta=0.5", "1 or more"],
    "policy=snapkv policy/allocate=adakv policy.allocate.flor=1": ["policy.allocate.flor", "base, floor, floor_rule"],
    "policy=snapkv policy/allocate=adakv +policy.allocate.flor=1": ["AdaKV has no option 'flor'", "valid: floor"],
    "policy=pyramidkv policy/allocate=adakv policy.allocate.beta=3": ["AdaKV has no option 'beta'", "valid: floor"],
    "policy=snapkv policy/allocate=retrieval_heads": ["budget=40", "layer 0, head 0", "valid: 65 or more"],
    "policy=h2o policy/allocate=retrieval_heads policy.allocate.recent=4 budget=60": [
        "30 tokens that always stay",
        "31",
    ],
    "policy=snapkv +policy.allocate=3": ["allocate=3", "valid: an allocator", "null"],
    "policy=snapkv +policy.allocate={floor:1}": ["allocate={'floor': 1}", "valid: an allocator", "null"],
    "policy=snapkv +policy.allocate={_target_:policies.kivi.KIVI}": ["allocate=KIVI", "valid: an allocator"],
    "policy=snapkv +policy.store={_target_:policies.adakv.AdaKV}": ["store=AdaKV", "valid: a store"],
    "policy=snapkv +policy.allocate={_target_:policies.h2o.H2O}": ["allocate=H2O", "valid: an allocator"],
    "policy=snapkv +policy.allocate={_target_:torch.load,f:x}": ["torch.load is not", "policies.parts.Part"],
    "policy=snapkv policy/allocate=adakv policy.allocate.base={_target_:policies.cake.Cascade}": [
        "base=Cascade",
        "shrinks earlier layers",
        "e.g. Pyramid",
    ],
    "policy=snapkv policy/allocate=adakv policy.allocate.base={_target_:policies.kivi.KIVI}": ["base=KIVI", "Pyramid"],
}
GRIDS: dict[str, list[str]] = {
    "{name: snapkv, allocate: nomod}": ["policy/allocate=nomod", "valid: ada_pyramid, adakv"],
    "{name: snapkv, store: {name: nomod, bits: 4}}": ["policy/store=nomod", "valid: kivi, think"],
    "{name: snapkv, allocate: {floor: 0.5}}": ["snapkv: allocate={'floor': 0.5}", "{name: ..., option: value}"],
    "{name: snapkv, allocate: 3}": ["snapkv: allocate=3", "the name of a file of conf/policy/allocate"],
    "{name: snapkv, allocate: [adakv]}": ["allocate=['adakv']", "the name of a file"],
    "{name: snapkv, allocate: a/../adakv}": ["allocate=a/../adakv", "the name of a file"],
    "{name: snapkv, alocate: adakv}": ["no option 'alocate'", "pooling, window, allocate, store, read"],
    "{name: adakv, allocate: {flor: 1}}": ["AdaKV has no option 'flor'", "valid: floor"],
    "{name: full, allocate: adakv}": ["policy=full", "allocate=AdaKV", "valid: null"],
    "{name: snapkv, allocate: {name: adakv, floor: 2}}": ["allocate: floor=2", "from 0 to 1"],
}


@pytest.mark.parametrize("overrides", RUNS)
def test_refused(base: list[str], tmp_path: Path, overrides: str) -> None:
    refused(call("run", *base, "budget=40", *overrides.split()), *RUNS[overrides])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("cell", GRIDS)
def test_refused_in_a_sweep(base: list[str], tmp_path: Path, cell: str) -> None:
    refused(call("sweep", *base, "budgets=[40]", f"policies=[{cell}]"), *GRIDS[cell])
    assert not (tmp_path / "results").exists()


KIVI = "store: {name: kivi, group: 8, residual: 8}"
CELLS = {
    "h2o": "h2o",
    "h2o+pyramid": "{name: h2o, allocate: pyramid}",
    "ahakv+adakv+kivi": f"{{name: ahakv, allocate: adakv, {KIVI}}}",
    "cake+adakv": "{name: cake, allocate: adakv}",
    "snapkv+cascade+think": "{name: snapkv, allocate: cascade, store: {name: think, ratio: 0.5}}",
    "tova+mass": "{name: tova, allocate: mass}",
}
GRID = [f"policies=[{','.join(CELLS.values())}]", "budgets=[40]"]


def named(root: Path) -> dict[str, Path]:
    """A cell's label -> its folder."""
    return {name.rpartition("-40-")[0]: path for name, path in folders(root).items()}


@pytest.mark.parametrize("more", [[], ["model.dtype=bfloat16"], ["prompt_scope=context"]], ids=str)
def test_a_sweep_is_its_cells_alone(base: list[str], tmp_path: Path, more: list[str]) -> None:
    """Named by its parts; with fidelity, and kept positions over time; and resumed, nothing is done twice."""
    base = [*base, "fidelity=true", "kept_over_time=4", *more]
    done = call("sweep", *base, *GRID, "max_lanes=32")
    assert done.code == 0, done.err
    together = named(tmp_path / "results")
    assert set(together) == set(CELLS)
    before = {name: lines(folder) for name, folder in together.items()}
    assert call("sweep", *base, *GRID, "limit=1").code == 0
    assert before == {name: lines(folder) for name, folder in together.items()}
    for name, cell in CELLS.items():
        root = f"output_root={tmp_path / name}"
        assert call("sweep", *base, f"policies=[{cell}]", "budgets=[40]", "max_lanes=1", root).code == 0
        (folder,) = folders(tmp_path / name).values()
        assert folder.name == together[name].name
        if not more or "context" in more[0]:  # in bfloat16 sums differ with a batch's shape
            assert predictions(folder) == predictions(together[name])
        for line in lines(folder):
            assert line["fidelity"] and line["error"] is None


def test_cut_off_and_resumed(base: list[str], tmp_path: Path) -> None:
    for root, limits in (("once", (2,)), ("twice", (1, 2))):
        for limit in limits:
            done = call("sweep", *base, *GRID, f"limit={limit}", f"output_root={tmp_path / root}")
            assert done.code == 0, done.err
    once, twice = folders(tmp_path / "once"), folders(tmp_path / "twice")
    assert set(once) == set(twice)
    assert all(predictions(once[name]) == predictions(twice[name]) for name in once)


def test_another_allocator_than_the_policys_own(base: list[str], tmp_path: Path) -> None:
    """`policy/allocate=` replaces what the policy's file brings, as in a sweep; both are the same cell."""
    done = call("run", *base, "policy=cake", "policy/allocate=adakv", "budget=40")
    assert done.code == 0, done.err
    before = lines(done.folder)
    assert call("sweep", *base, "policies=[{name: cake, allocate: adakv}]", "budgets=[40]").code == 0
    assert lines(done.folder) == before
    assert done.folder.name.startswith("cake+adakv-40-")
    assert len(folders(tmp_path / "results")) == 1


def test_a_share_of_the_prompt_that_is_too_little_fails_its_sample(base: list[str], tmp_path: Path) -> None:
    """What a budget of a share comes to is known with the prompt; the others go on."""
    cells = "policies=[{name: snapkv, allocate: retrieval_heads},snapkv]"
    done = call("sweep", *base, cells, "budgets=[0.2]")
    found: dict[str, Any] = {path.name.split("-")[0]: lines(path) for path in folders(tmp_path / "results").values()}
    assert all(
        "policy SnapKV: allocate raised ValueError: budget=" in one["error"] for one in found["snapkv+retrieval_heads"]
    )
    assert all("valid: 65 or more" in one["error"] for one in found["snapkv+retrieval_heads"])
    assert [one["error"] for one in found["snapkv"]] == [None, None] and "Traceback" not in done.err
