"""One layer's cache, the state that follows its slots, and the memory that column sums take."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src.kv import prompt as prompt_attention
from src.kv.cache import GROW, LayerCache
from src.kv.prompt import PromptAttention
from src.kv.state import State, settle, stack_states
from tests.support import naive

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

HEADS, DIM = 2, 4


def layer(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, n, DIM, generator=draw), torch.randn(HEADS, n, DIM, generator=draw)


def cache(n: int, keep: int, limit: int | None, seed: int = 0) -> LayerCache:
    """The last `keep` tokens of a prompt of n."""
    keys, values = layer(n, seed)
    return LayerCache.from_prompt(keys, values, torch.arange(n - keep, n).expand(HEADS, -1), limit)


def token(lanes: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(lanes, HEADS, DIM, generator=draw), torch.randn(lanes, HEADS, DIM, generator=draw)


def test_compaction_copies_only_what_is_kept() -> None:
    keys, values = layer(100)
    kept = torch.tensor([[3, 50, 99], [0, 1, 2]])
    small = LayerCache.from_prompt(keys, values, kept, 3)
    assert small.nbytes == 2 * HEADS * 3 * DIM * 4
    assert small.entry_bytes == 2 * HEADS * DIM * 4
    for head in range(HEADS):
        assert torch.equal(small.keys[0, head], keys[head, kept[head]])
        assert torch.equal(small.values[0, head], values[head, kept[head]])
    whole = LayerCache.from_prompt(keys, values, torch.arange(100).expand(HEADS, -1), None)
    assert whole.keys.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()


def test_bytes_of_a_view_count_in_full() -> None:
    keys, values = layer(100)
    view = LayerCache(keys[None, :, :3], values[None, :, :3], torch.zeros(1, HEADS, 3), [3], 3)
    assert view.nbytes == 2 * HEADS * 100 * DIM * 4


@pytest.mark.parametrize("limit", [6, None])
def test_ragged_lanes_fill_up_evict_and_grow(limit: int | None) -> None:
    """Against one list of (position, key, value) per lane and head."""
    stacked = LayerCache.stack([cache(9, 6, limit, 1), cache(3, 3, limit, 2), cache(5, 5, limit, 3)])
    lists = [
        [
            [(int(p), stacked.keys[i, h, s].clone()) for s, p in enumerate(stacked.positions[i, h]) if p >= 0]
            for h in range(HEADS)
        ]
        for i in range(3)
    ]
    position = torch.tensor([9, 3, 5])
    steps = 8 if limit else GROW + 8
    for step in range(steps):
        key, value = token(3, step)
        stacked.ensure_room()
        query = token(3, 1000 + step)[0][:, :, None]
        logits = stacked.logits(query, key, 0.5)
        weights = logits.softmax(-1)
        assert stacked.mix(weights, value).isfinite().all()
        victims = torch.tensor([[0, step % 6], [step % 6, 1], [2, 2]]) if limit else None
        if limit is None or max(stacked.used) < limit:
            victims = None
        for i in range(3):
            for h in range(HEADS):
                seen = torch.stack([k for _, k in lists[i][h]] + [key[i, h]])
                expected = (seen @ query[i, h, 0]) * 0.5
                found = logits[i, h, 0][logits[i, h, 0].isfinite()]
                assert torch.allclose(found.sort().values, expected.sort().values, atol=1e-6)
                if limit is not None and len(lists[i][h]) == limit:
                    lists[i][h][int(victims[i, h])] = (int(position[i]), key[i, h])
                else:
                    lists[i][h].append((int(position[i]), key[i, h]))
        stacked.write(stacked.place(victims), key, value, position)
        position = position + 1
        for i in range(3):
            assert stacked.used[i] == len(lists[i][0]) == int(stacked.filled[i])
            for h in range(HEADS):
                assert stacked.positions[i, h, : stacked.used[i]].tolist() == [p for p, _ in lists[i][h]]
                assert (stacked.positions[i, h, stacked.used[i] :] == -1).all()
    assert (stacked.mask is None) == (limit is not None)
    if limit is not None:
        assert stacked.full and stacked.slots == limit
    kept = stacked.positions[[0, 2]]
    stacked.select(torch.tensor([0, 2]), [0, 2])
    assert torch.equal(stacked.positions, kept)
    assert stacked.used == [len(lists[0][0]), len(lists[2][0])]


def test_a_full_lane_alone_is_not_copied() -> None:
    one = cache(9, 6, 6)
    assert LayerCache.stack([one]) is one
    assert LayerCache.stack([cache(4, 4, 6)]).slots == 6
    assert LayerCache.stack([cache(4, 4, 1000)]).slots == 4 + GROW
    assert LayerCache.stack([cache(4, 4, None)]).slots == 4 + GROW


def test_only_a_lanes_own_numbers_are_checked() -> None:
    both = LayerCache.stack([cache(6, 6, 6), cache(4, 4, 6)])
    both.values[1, 0, 2, 1] = torch.nan
    assert both.is_finite(0) and not both.is_finite(1)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_state_follows_its_slots(lanes: int, kv_heads: int) -> None:
    states = [
        State(
            slots={"score": torch.rand(kv_heads, 4 + i), "rows": torch.rand(kv_heads, 2, 3, 4 + i)},
            fixed={"length": torch.tensor(i)},
        )
        for i in range(lanes)
    ]
    state = stack_states(states, slots=9)
    assert state.fixed["length"].tolist() == list(range(lanes))
    for name, shape in (("score", (lanes, kv_heads, 10)), ("rows", (lanes, kv_heads, 2, 3, 10))):
        tensor = state.slots[name]
        assert tensor.shape == shape
        for i in range(lanes):
            assert torch.equal(tensor[i, ..., : 4 + i], states[i].slots[name])
            assert (tensor[i, ..., 4 + i :] == 0).all()
        tensor[..., -1] = torch.rand(shape[:-1])
    before = {name: tensor.clone() for name, tensor in state.slots.items()}
    slot = torch.randint(0, 9, (lanes, kv_heads))
    settle(state, slot)
    for name, tensor in state.slots.items():
        for i in range(lanes):
            for h in range(kv_heads):
                expected = before[name][i, h].clone()
                expected[..., slot[i, h]] = expected[..., -1]
                expected[..., -1] = 0
                assert torch.equal(tensor[i, h], expected)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, and of the largest storage."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, tensor.numel(), stored)
        return out


@pytest.mark.parametrize("with_gain", [False, True])
def test_column_sums_need_memory_that_grows_linearly(monkeypatch: pytest.MonkeyPatch, with_gain: bool) -> None:
    """No n x n tensor: the largest is a block, or (16 rows at least) linear in the prompt."""
    limit = 2**15
    monkeypatch.setitem(prompt_attention.BLOCK_ELEMENTS, "cpu", limit)
    heads, dim = 4, 8
    for n in (256, 512, 1024, 2048):
        draw = torch.Generator().manual_seed(n)
        q, k, v = (torch.randn(h, n, dim, generator=draw) for h in (heads, HEADS, HEADS))
        prompt = PromptAttention(q, k, v, dim**-0.5, 0, 1)
        gain = torch.linspace(0, 2, n).expand(HEADS, 2, n) if with_gain else None
        with Largest() as largest:
            sums = prompt.column_sums(gain, key="gain" if with_gain else None)
        assert largest.elements <= max(limit, 16 * heads * n)
        assert largest.elements < n * n
        if n <= 512:
            logits = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(2, 0)) * dim**-0.5
            if with_gain:
                logits = logits * torch.linspace(0, 2, n)[:, None]
            square = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
            assert torch.allclose(sums.flatten(0, 1), square.sum(1), atol=1e-4)


def test_statistics_are_worked_out_once() -> None:
    q, (k, v) = torch.randn(4, 40, DIM), layer(40)
    prompt = PromptAttention(q, k, v, 0.5, 0, 1)
    assert prompt.column_sums() is prompt.column_sums()
    half = prompt.length // 2  # another question, another answer
    assert not torch.equal(prompt.column_sums(first_row=half), prompt.column_sums())
    assert prompt.window_logits(8) is prompt.window_logits(8)
    assert prompt.window_logits(100) is prompt.window_logits(40)
    assert prompt.value_norms("l1") is prompt.value_norms("l1")
    assert prompt.window_logits(8).shape == (HEADS, 2, 8, 40)
    assert torch.equal(prompt.window_logits(8)[..., -3:, :], prompt.window_logits(3))
