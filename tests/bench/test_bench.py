"""The benchmarks measure what they say, on a tiny model; their seconds are nobody's business here."""

import json
from pathlib import Path
from typing import Any

import pytest

from policies.h2o import H2O
from src.bench.decode import in_turn, lane_steps
from src.engine.engine import Engine
from src.engine.request import Job, Request, Variant
from tests.support.cli import call
from tests.support.tiny import tiny, tokens
from tests.support.watch import Watch

ENTRY = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32


@pytest.fixture(scope="module")
def found(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = call(
        "bench",
        "model=local",
        f"model.path={model_folder}",
        "model.device=cpu",
        "policies=[full,h2o,ahakv]",
        "budgets=[40,48]",
        "prompt_tokens=[80,160]",
        "grid_tokens=90",
        "grid_prompts=2",
        "new_tokens=5",
        "repeats=2",
        f"output_root={tmp_path_factory.mktemp('bench')}",
    )
    assert done.code == 0, done.err
    return dict(json.loads(done.folder.read_text()))


def rows(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["part"] == part]


def test_the_file_says_where_and_how(found: dict[str, Any]) -> None:
    assert found["command"].startswith("python -m src.bench model=local")
    assert found["environment"]["device"] == "cpu" and found["random_weights"] is False


def test_prefill_is_compared_with_the_plain_model(found: dict[str, Any]) -> None:
    part = rows(found, "prefill")
    assert [r["what"] for r in part] == ["plain", "full", "h2o", "ahakv"] * 2
    assert [r["ratio_to_plain"] for r in part if r["what"] == "plain"] == [1, 1]
    assert all(r["runs"] == 2 and r["seconds"] > 0 and r["ratio_to_plain"] > 0 for r in part)


def test_decode_is_compared_over_prompt_lengths(found: dict[str, Any]) -> None:
    part = rows(found, "decode")
    assert [(r["what"], r["prompt_tokens"]) for r in part] == [
        (name, n) for name in ("plain", "full", "h2o", "ahakv") for n in (80, 160)
    ]
    assert all(r["ratio_to_shortest"] == 1 for r in part if r["prompt_tokens"] == 80)
    assert all(r["tokens"] == 10 and r["tokens_per_second"] > 0 for r in part)  # 5 in each of 2 turns


def test_tokens_are_taken_in_turn() -> None:
    order: list[str] = []
    seconds = in_turn([lambda: order.append("a"), lambda: order.append("b")], 3, warm_up=1)
    assert "".join(order) == "baabbaab"  # each leads every other time
    assert [len(taken) for taken in seconds] == [3, 3]


def test_a_stepped_lane_generates_what_the_engine_does() -> None:
    model, ids = tiny("llama"), tokens(60)[0].tolist()
    request = Request("x", ids, frozenset(), 12)
    (whole,) = Engine(model, 1).run([Job(request, [Variant(H2O(), 20)])])
    taken: list[list[int]] = []

    watch = Watch(lambda lane: taken.append(list(lane.generation.tokens)))
    step = lane_steps(Engine(model, 1, [watch]), Job(request, [Variant(H2O(), 20)]))
    for _ in range(8):
        step()
    assert taken[-1] == whole.tokens[:9]


def test_grid_against_its_cells_one_by_one(found: dict[str, Any]) -> None:
    grid, single = rows(found, "grid")
    assert (grid["what"], single["what"]) == ("grid", "cells one by one")
    assert grid["cells"] == 5 and grid["ratio"] == single["ratio"] > 0


def test_bytes_are_those_of_the_formula(found: dict[str, Any]) -> None:
    part = rows(found, "bytes")
    assert [(r["what"], r["budget"]) for r in part] == [
        ("full", None), ("h2o", 40), ("h2o", 48), ("ahakv", 40), ("ahakv", 48)
    ]  # fmt: skip
    for row in part:
        assert row["kv_bytes"] == row["formula"] == (row["budget"] or 160) * ENTRY


def test_peak_counts_what_a_sweep_has_to_hold(found: dict[str, Any]) -> None:
    part = rows(found, "peak")
    assert [r["what"] for r in part] == ["0.25 x budgets", "0.5 x budgets", "1 x budgets"]
    entries = [10 + 12 + 33 + 33, 20 + 24 + 33 + 33, 40 + 48 + 40 + 48]
    for row, held in zip(part, entries, strict=True):
        assert row["cells"] == 4 and row["cache_bytes"] == held * ENTRY
        assert row["one_layer_bytes"] == 160 * ENTRY // 2
        assert row["sweep_peak"] > row["cache_bytes"] and row["plain_prefill_peak"] > 160 * 96 * 4  # one MLP activation


REFUSED = {
    "parts=[foo]": ["parts=['foo']", "prefill, decode"],
    "parts=grid": ["parts=grid", "a list"],
    "repeats=0": ["repeats=0", "1 or more"],
    "new_tokens=1": ["new_tokens=1", "2 or more"],
    "prompt_tokens=4096": ["prompt_tokens=4096", "a list"],
    "policies=[nope]": ["nope", "snapkv"],
}


@pytest.mark.parametrize("setting", REFUSED)
def test_wrong_settings_are_one_line(setting: str, model_folder: Path) -> None:
    done = call("bench", "model=local", f"model.path={model_folder}", setting)
    shown = done.err.splitlines()
    assert done.code == 2 and shown[-1].startswith("error: ") and not done.out
    assert all(word in shown[-1] for word in REFUSED[setting]), shown[-1]
