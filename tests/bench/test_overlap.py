"""What is kept here and by the peer: settings alike, positions recovered, shares right. Stand-ins play kvpress."""

import contextlib
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from policies.snapkv import SnapKV, pool
from src.bench.overlap import METHODS, Agreement, KeyNorm, mean
from src.bench.peers import WORKER
from src.kv.prompt import PromptAttention
from tests.support.cli import Result, call
from tests.support.tiny import tiny, tokens

NAMES = ("SnapKVPress", "StreamingLLMPress", "ObservedAttentionPress", "TOVAPress", "PyramidKVPress", "KnormPress")

# Answers as the worker does, and keeps the same everywhere: four sinks and the latest tokens.
STAND_IN = """#!{python}
import json, sys
print(json.dumps({{"ready": True, "version": "9.9"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    open({log!r}, "a").write(line)
    n = len(request["ids"])
    kept = [[[*range(4), *range(n - one["budget"] + 4, n)]] * 2 for one in request["presses"]]
    print(json.dumps({{"kept": [[heads] * 2 for heads in kept]}}), flush=True)
"""


class Pruning:
    """As a press: hooks around the prefill, then one `compress` a layer. Keeps what a random score says."""

    def __init__(self, compression_ratio: float, by_head: bool = False, seed: int = 0) -> None:
        self.compression_ratio, self.by_head = compression_ratio, by_head
        self.generator, self.kept = torch.Generator().manual_seed(seed), []  # type: ignore[var-annotated]

    def compress(self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        heads, n = keys.shape[1:3]
        budget = int(n * (1 - self.compression_ratio))
        score = torch.rand(heads, n, generator=self.generator)
        if self.by_head:
            cut = score.flatten().argsort()[: heads * (n - budget)]
            module.masked_key_indices = torch.zeros_like(cut), cut // n, cut % n
            gone = torch.zeros(heads * n, dtype=torch.bool).index_fill_(0, cut, True).view(heads, n)
            self.kept.append([[p for p in range(n) if not head[p]] for head in gone.tolist()])
            return keys, values
        best = score.topk(budget).indices
        self.kept.append([sorted(head) for head in best.tolist()])
        index = best[None, :, :, None].expand(-1, -1, -1, keys.shape[-1])
        return keys.gather(2, index), values.gather(2, index)

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def hook(module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            layer.keys, layer.values = self.compress(module, None, layer.keys, layer.values, output[1], kwargs)

        hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
        yield
        for one in hooks:
            one.remove()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The worker's module beside a kvpress whose presses are `Pruning`."""
    kvpress = ModuleType("kvpress")
    for name in NAMES:
        setattr(kvpress, name, Pruning)
    kvpress.AdaKVPress = lambda press, alpha_safeguard: (press, alpha_safeguard)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    spec = importlib.util.spec_from_file_location("kvpress_worker", WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_positions_are_recovered_from_pruned_caches_and_from_masks(worker: Any) -> None:
    presses = [Pruning(0.75), Pruning(0.5, by_head=True, seed=1), Pruning(0.25, seed=2)]
    found = worker.kept(tiny("llama"), tokens(64)[0].tolist(), presses)
    assert found == [press.kept for press in presses]
    assert [[len(head) for head in layer] for layer in found[0]] == [[16, 16]] * 2
    assert all(sum(map(len, layer)) == 2 * 32 for layer in found[1])
    assert {len(head) for layer in found[1] for head in layer} != {32}  # heads differ


def test_answers_come_in_the_order_asked(worker: Any) -> None:
    budgets = {"snapkv": 8, "observed": 5, "knorm": 11, "tova": 7}
    asked = [{"press": press, "settings": {}, "budget": budget} for press, budget in budgets.items()]
    models = {"sdpa": tiny("llama"), "eager": tiny("llama")}
    found = worker.kept_by_all(models, tokens(64)[0].tolist(), asked)
    assert [len(one[0][0]) for one in found] == [8, 5, 11, 7]


def test_a_press_keeps_the_whole_budget(worker: Any) -> None:
    drawn = random.Random(0)
    pairs = [(drawn.randrange(2, n), n) for n in range(10, 2000)]
    assert any(int(n * (1 - (1 - budget / n))) < budget for budget, n in pairs)  # a plain ratio loses one
    for budget, n in pairs:
        press = worker.press_of("snapkv", {}, budget, n)
        assert int(n * (1 - press.compression_ratio)) == round(n * (1 - press.compression_ratio)) == budget
    inner, floor = worker.press_of("adakv", {"by_head": True, "alpha_safeguard": 0.3}, 20, 100)
    assert inner.by_head and floor == 0.3 and int(100 * (1 - inner.compression_ratio)) == 20


def test_shares_by_hand() -> None:
    ours = [[[0, 1, 2, 3], [0, 1, 2, 3]], [[4, 5], [6, 7]]]
    theirs = [[[0, 1, 2, 9], [0, 1, 2, 3, 4]], [[4, 8, 9], [7]]]
    found = Agreement.of(ours, theirs, set())
    assert found.shared == [(0.75 + 1) / 2, (0.5 + 0.5) / 2] and found.counts == [0.5, 1.0]
    assert found.unexplained == [0.5, 0.5]  # 3 for 9, 5 for 8 or 9; what one side has more of is in the counts
    assert Agreement.of(ours, theirs, {3, 8}).unexplained == [0.0, 0.5]
    assert Agreement.of(ours, theirs, {9, 5}).unexplained == [0.0, 0.0]
    row = mean([found, Agreement([1.0, 0.7], [0.0, 0.5], [0.0, 0.0])])
    assert row == {
        "overlap": pytest.approx((0.875 + 0.5 + 1.7) / 4),
        "lowest_layer": pytest.approx(0.6),
        "layer": 1,
        "count_difference": 0.5,
        "unexplained": 0.25,
    }


def test_shares_of_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Agreement.of([[[0]], [[0]]], [[[0]]], set())


def test_the_smallest_keys_stay() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 40, 16, generator=generator) for _ in range(3))
    found = KeyNorm().keep_prompt(PromptAttention(q, k, v, 0.25, 0, 1), 9)
    for head in range(2):
        norms = [sum(x * x for x in k[head, j].tolist()) for j in range(40)]
        assert found[head].tolist() == sorted(sorted(range(40), key=norms.__getitem__)[:9])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.peer)
def test_settings_are_alike_on_both_sides(method: Any) -> None:
    policy, theirs = method.cell(200).variant.policy, dict(method.settings)
    if isinstance(policy, SnapKV):
        assert (policy.window, policy.kernel, policy.pooling, policy.group) == (
            theirs.pop("window_size"), theirs.pop("kernel_size"), "avg", "mean",
        )  # fmt: skip
    if method.press == "pyramidkv":
        assert (policy.allocate.beta, policy.allocate.rounding) == (theirs.pop("beta"), "kvpress")
    if method.press == "adakv":
        ours = policy.allocate
        assert (ours.floor, ours.floor_rule, ours.rounding) == (theirs.pop("alpha_safeguard"), "protect", "official")
    if method.press == "streaming_llm":
        assert policy.sinks == theirs.pop("n_sink")
    if method.press in ("tova", "observed"):
        assert "last token" in method.by_design and method.touched(100) == {99}
    assert not theirs and (policy.allocate is None or method.press in ("pyramidkv", "adakv"))


def test_padding_touches_the_ends_only() -> None:
    """Averages over zeros, too: those of positions that are not touched are the same."""
    n, window, kernel = 60, 8, 5
    (method,) = [m for m in METHODS if m.settings == {"window_size": 64, "kernel_size": kernel}]
    assert method.touched(100) == {0, 1, 34, 35}
    scores = torch.rand(1, n - window, generator=torch.Generator().manual_seed(0))
    ours = pool(scores, kernel, "avg")
    padded = torch.nn.functional.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    assert torch.where(~torch.isclose(ours, padded))[1].tolist() == [0, 1, n - window - 2, n - window - 1]


@pytest.fixture(scope="module")
def asked(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[dict[str, Any]]]:
    """A run of the part beside the stand-in, and what that was asked."""
    folder = tmp_path_factory.mktemp("overlap")
    (script := folder / "peer").write_text(STAND_IN.format(python=sys.executable, log=str(folder / "log")))
    script.chmod(0o755)
    done = call("bench", *arguments(model_folder, script), f"output_root={folder}")
    assert done.code == 0, done.err
    return done, [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def arguments(model_folder: Path, peer: Path, *, budgets: str = "[90,120]", dtype: str = "float32") -> list[str]:
    model = ["model=local", f"model.path={model_folder}", "model.device=cpu", f"model.dtype={dtype}"]
    lengths = ["overlap_tokens=[200,260,230]", f"overlap_budgets={budgets}"]
    return ["parts=[overlap]", *model, f"peer_python={peer}", *lengths]


def test_every_method_has_a_row_per_budget(asked: tuple[Result, list[dict[str, Any]]]) -> None:
    rows = json.loads(asked[0].folder.read_text())["rows"]
    assert [(row["kvpress"], row["budget"]) for row in rows] == [
        (f"9.9 {method.peer}", budget) for method in METHODS for budget in (90, 120)
    ]
    assert all(row["part"] == "overlap" and row["prompts"] == 3 for row in rows)
    for row in rows:
        same = row["what"].startswith("streaming_llm")  # what the stand-in always answers
        assert (row["overlap"] == row["lowest_layer"] == 1) is same
        assert 0 < row["lowest_layer"] <= row["overlap"] <= 1 and row["layer"] in (0, 1)
        assert (row["count_difference"] > 0) is row["what"].startswith(("pyramidkv", "adakv"))


def test_the_peer_is_asked_once_per_prompt(asked: tuple[Result, list[dict[str, Any]]]) -> None:
    done, requests = asked
    lengths = [len(request["ids"]) for request in requests]
    assert len(requests) == 3 and lengths[0] < lengths[2] < lengths[1]
    assert json.loads(done.folder.read_text())["rows"][0]["prompt_tokens"] == round(sum(lengths) / 3)
    assert len({tuple(request["ids"]) for request in requests}) == 3
    expected = [method.asked(budget) for method in METHODS for budget in (90, 120)]
    assert all(request["presses"] == expected for request in requests)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"budgets": "[90,250]"}, "overlap_budgets"),
        ({"budgets": "[60]"}, "65 or more"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_one_line(
    given: dict[str, str], why: str, model_folder: Path, tmp_path: Path
) -> None:
    (script := tmp_path / "peer").write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "log")))
    script.chmod(0o755)
    done = call("bench", *arguments(model_folder, script, **given))
    last = done.err.splitlines()[-1]
    assert done.code == 2 and last.startswith("error: ") and why in last and not done.out
    assert not (tmp_path / "log").exists()
