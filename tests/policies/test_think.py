"""ThinK's channels and what a cache without them answers, against keys with zeroed channels."""

import pytest
import torch
from torch import Tensor

from policies.think import ThinK
from src.kv.prompt import PromptAttention
from src.kv.ragged import RaggedCache
from tests.support import naive

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

KV_HEADS, GROUP, DIM, PROMPT = 3, 3, 10, 60
KEPT = [torch.arange(3, 58), torch.tensor([0, 5, 7, 20, 41, 59]), torch.arange(0, 60, 2)]
STORE = ThinK(ratio=0.4, recent=8, rows=16)


def prompt(seed: int = 0, dtype: torch.dtype = torch.float64) -> PromptAttention:
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(KV_HEADS * GROUP, PROMPT, DIM, generator=draw).to(dtype)
    keys, values = torch.randn(2, KV_HEADS, PROMPT, DIM, generator=draw).to(dtype)
    return PromptAttention(queries, keys, values, DIM**-0.5, 0, 1)


def weakest(seen: PromptAttention, head: int, kept: Tensor, dropped: int, rows: int) -> set[int]:
    """One channel after the other, one number after the other."""
    scores = []
    for c in range(DIM):
        asked = [
            float(seen.queries[head * GROUP + g, PROMPT - rows + i, c]) ** 2 for g in range(GROUP) for i in range(rows)
        ]
        held = [float(seen.keys[head, p, c]) ** 2 for p in kept]
        scores.append(sum(asked) / len(asked) * sum(held) / len(held))
    return set(sorted(range(DIM), key=scores.__getitem__)[:dropped])


def with_zeros(seen: PromptAttention, store: ThinK) -> list[Tensor]:
    """By head, the kept keys whose weakest channels are zero, those of the newest excepted."""
    found = []
    for head, kept in enumerate(KEPT):
        keys = seen.keys[head, kept].clone()
        old = max(0, len(kept) - store.recent)
        for c in weakest(seen, head, kept, int(store.ratio * DIM), store.rows):
            keys[:old, c] = 0
        found.append(keys)
    return found


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_those_of_keys_with_zeroed_channels(dtype: torch.dtype, grows: bool) -> None:
    seen = prompt(0, dtype)
    cache = STORE.hold(seen, KEPT, None if grows else 55)
    keys = with_zeros(seen, STORE)
    query, key = torch.randn(1, KV_HEADS, GROUP, DIM, dtype=dtype), torch.randn(1, KV_HEADS, DIM, dtype=dtype)
    logits = cache.logits(query, key, 0.5)
    for head, expected in enumerate(keys):
        assert torch.allclose(logits[0, head, :, : len(expected)], query[0, head] @ expected.T * 0.5, atol=1e-5)
        assert (logits[0, head, :, len(expected) : -1] == -torch.inf).all()
        assert torch.equal(cache.keys_of(slice(None))[0, head, : len(expected)], expected)
    weights = logits.softmax(-1)
    mixed = cache.mix(weights, torch.zeros(1, KV_HEADS, DIM, dtype=dtype))
    for head, kept in enumerate(KEPT):
        assert torch.allclose(mixed[0, head], weights[0, head, :, : len(kept)] @ seen.values[head, kept], atol=1e-6)


def test_nothing_is_dropped_at_ratio_0() -> None:
    seen = prompt()
    cache, plain = ThinK(ratio=0).hold(seen, KEPT, None), RaggedCache.from_prompt(seen.keys, seen.values, KEPT, None)
    assert torch.equal(cache.keys_of(slice(None)), plain.keys_of(slice(None)))


def test_key_bytes_fall_by_the_ratio() -> None:
    seen = prompt(0, torch.float32)
    cache = STORE.hold(seen, KEPT, None)
    old = sum(max(0, len(kept) - STORE.recent) for kept in KEPT)  # one head has recent keys only
    whole = 2 * DIM * 4 * sum(map(len, KEPT))
    assert cache.nbytes == whole - old * 4 * 4 + KV_HEADS * 6 * 2  # 4 of 10 channels; 6 numbers of 16 bits a head
    assert cache.nbytes == cache.most_bytes(0)


def test_a_channel_that_decides_stays_and_one_that_is_not_asked_goes() -> None:
    seen = prompt()
    seen.queries[:, :, 7] *= 100
    seen.queries[:, -STORE.rows :, 2] = 0
    cache = STORE.hold(seen, KEPT, None)
    keys = cache.keys_of(slice(None))[0, 0]
    assert (keys[: -STORE.recent, 7] != 0).all() and (keys[: -STORE.recent, 2] == 0).all()


def test_lanes_keep_their_own_channels_and_new_tokens_all() -> None:
    prompts = [prompt(seed) for seed in range(3)]
    alone = [STORE.hold(seen, KEPT, None) for seen in prompts]
    expected = [cache.keys_of(slice(None))[0].clone() for cache in alone]
    cache = RaggedCache.stack(alone)
    assert cache.nbytes == sum(one.nbytes for one in alone)
    key = torch.randn(3, KV_HEADS, DIM, dtype=torch.float64)
    cache.ensure_room()
    cache.write(cache.place(None), key, key, torch.tensor([PROMPT] * 3))
    cache.select(torch.tensor([0, 2]), [0, 2])
    keys = cache.keys_of(slice(None))
    for i, was in enumerate((0, 2)):
        assert torch.equal(keys[i, :, :55], expected[was])
        assert torch.equal(keys[i, :, 55], key[was])


@pytest.mark.parametrize("victim", [3, 52])
def test_a_victims_slot_keeps_its_channels(victim: int) -> None:
    seen = prompt()
    cache = RaggedCache.stack([STORE.hold(seen, KEPT, 55), STORE.hold(prompt(1), KEPT, 55)])
    before, key = cache.keys_of(slice(None)).clone(), torch.randn(2, KV_HEADS, DIM, dtype=torch.float64)
    cache.write(cache.place(torch.tensor([[victim, 2, 29], [0, 2, 29]])), key, key, torch.tensor([PROMPT, PROMPT]))
    after = cache.keys_of(slice(None))
    gone = weakest(seen, 0, KEPT[0], 4, STORE.rows) if victim < 55 - STORE.recent else set()
    new = key[0, 0].clone()
    new[list(gone)] = 0
    assert torch.equal(after[0, 0, victim], new)
    assert torch.equal(after[:, 1, 2], key[:, 1])  # a head whose keys are all recent
    assert torch.equal(after[:, 2, 29], key[:, 2])  # a recent key of a head with others
    before[0, 0, victim], before[1, 0, 0] = after[0, 0, victim], after[1, 0, 0]
    before[:, 1, 2], before[:, 2, 29] = key[:, 1], key[:, 2]
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"ratio": 1.0}, "ratio=1.0: valid: a share"), ({"rows": 0}, "rows=0: valid"), ({"recent": -1}, "recent=-1")],
)
def test_settings_are_checked(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ThinK(**settings)  # type: ignore[arg-type]
