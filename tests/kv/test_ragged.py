"""Caches whose heads hold differing numbers of entries, against a list of tokens per lane and head."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from src.kv.cache import GROW, LayerCache
from src.kv.ragged import RaggedCache
from src.kv.rows import Codec, Exact
from src.kv.state import State, settle, stack_states
from tests.support import naive

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

HEADS, GROUP, DIM, PROMPT, SCALING = 3, 2, 8, 40, 0.4
COUNTS = [[7, 1, 12], [3, 3, 3], [9, 20, 2], [1, 6, 5]]  # by lane and head
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}


@dataclass
class Token:
    position: int
    key: Tensor
    value: Tensor


def layer(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, HEADS, PROMPT, DIM, generator=draw).to(dtype)
    return keys, values


def chosen(counts: Sequence[int], seed: int) -> list[Tensor]:
    """So many positions of every head, ascending."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randperm(PROMPT, generator=draw)[:count].sort().values for count in counts]


def lane(counts: Sequence[int], seed: int, grows: bool, dtype: torch.dtype = torch.float32) -> RaggedCache:
    keys, values = layer(seed, dtype)
    return RaggedCache.from_prompt(keys, values, chosen(counts, seed), None if grows else max(counts))


def tokens_of(counts: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> list[dict[int, Token]]:
    """By head: slot -> token."""
    keys, values = layer(seed, dtype)
    return [
        {s: Token(int(p), keys[h, p], values[h, p]) for s, p in enumerate(positions)}
        for h, positions in enumerate(chosen(counts, seed))
    ]


def incoming(lanes: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query `(lanes, heads, group, d)`, key and value `(lanes, heads, d)`."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(lanes, HEADS, GROUP + 2, DIM, generator=draw).to(dtype)
    return drawn[:, :, :GROUP], drawn[:, :, -2], drawn[:, :, -1]


def check_step(cache: LayerCache, heads: list[list[dict[int, Token]]], seed: int, dtype: torch.dtype) -> None:
    """Logits and mixed values of one step, one head after the other."""
    near = TOLERANCE[dtype]
    query, key, value = incoming(len(heads), seed, dtype)
    logits = cache.logits(query, key, SCALING)
    assert logits.shape == (len(heads), HEADS, GROUP, cache.slots + 1)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights = logits.softmax(-1)
    mixed = cache.mix(weights, value)
    for i, of_lane in enumerate(heads):
        for h, tokens in enumerate(of_lane):
            row = torch.full((GROUP, cache.slots + 1), -torch.inf, dtype=torch.float64)
            total = torch.zeros(GROUP, DIM, dtype=torch.float64)
            for slot, token in [*tokens.items(), (cache.slots, Token(-1, key[i, h], value[i, h]))]:
                row[:, slot] = query[i, h].double() @ token.key.double() * SCALING
                total += weights[i, h, :, slot, None].double() * token.value.double()
            assert torch.equal(logits[i, h].isinf(), row.isinf())
            there = ~row.isinf()
            assert torch.allclose(logits[i, h].double()[there], row[there], atol=near, rtol=near)
            assert torch.allclose(mixed[i, h].double(), total, atol=near, rtol=near)


def check_holds(cache: LayerCache, heads: list[list[dict[int, Token]]]) -> None:
    """What the cache says of itself."""
    keys = cache.keys_of(slice(None))
    for i, of_lane in enumerate(heads):
        assert cache.held(i) == [len(tokens) for tokens in of_lane] == cache.filled_by_head()[i].tolist()
        in_order = [[tokens[s].position for s in sorted(tokens)] for tokens in of_lane]
        assert [positions.tolist() for positions in cache.kept(i)] == in_order
        assert cache.used[i] <= cache.slots
        for h, tokens in enumerate(of_lane):
            expected = torch.full((cache.slots,), -1, dtype=torch.int32)
            for slot, token in tokens.items():
                expected[slot] = token.position
                assert torch.equal(keys[i, h, slot], token.key)
            assert torch.equal(cache.positions[i, h], expected)
            assert max(tokens) < cache.used[i]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_growing_against_one_list_per_head(dtype: torch.dtype) -> None:
    """Until the tail has grown twice; two lanes leave on the way, the one with the longest row among them."""
    cache = RaggedCache.stack([lane(counts, seed, True, dtype) for seed, counts in enumerate(COUNTS)])
    heads = [tokens_of(counts, seed, dtype) for seed, counts in enumerate(COUNTS)]
    longest = max(max(counts) for counts in COUNTS)
    assert cache.slots == longest
    check_holds(cache, heads)
    position = torch.tensor([PROMPT, 50, 60, 70])
    for step in range(GROW + 3):
        assert cache.ensure_room() == (GROW if step % GROW == 0 else 0)
        if step % 8 == 0 or step > GROW - 2:
            check_step(cache, heads, step, dtype)
        _, key, value = incoming(len(heads), step, dtype)
        slot = cache.place(None)
        assert slot.tolist() == [[longest + step] * HEADS] * len(heads)
        cache.write(slot, key, value, position)
        for i, of_lane in enumerate(heads):
            for h, tokens in enumerate(of_lane):
                tokens[longest + step] = Token(int(position[i]), key[i, h], value[i, h])
        position = position + 1
        if step == 20:
            cache.select(torch.tensor([1, 3]), [1, 3])
            heads, position = [heads[1], heads[3]], position[[1, 3]]
        if step % 8 == 0:
            check_holds(cache, heads)
    assert cache.used == cache.most_used == [longest + GROW + 3] * 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("may_refuse", [False, True])
def test_at_capacity_against_one_list_per_head(may_refuse: bool, dtype: torch.dtype) -> None:
    cache = RaggedCache.stack([lane(counts, seed, False, dtype) for seed, counts in enumerate(COUNTS)])
    heads = [tokens_of(counts, seed, dtype) for seed, counts in enumerate(COUNTS)]
    assert cache.full and cache.limit == cache.slots == 20
    before, draw = cache.nbytes, torch.Generator().manual_seed(0)
    position = torch.tensor([PROMPT, 50, 60, 70])
    for step in range(30):
        assert cache.ensure_room() == 0
        check_step(cache, heads, step, dtype)
        _, key, value = incoming(len(heads), step, dtype)
        counts = torch.tensor([[len(tokens) for tokens in of_lane] for of_lane in heads])
        victims = (torch.rand(counts.shape, generator=draw) * counts).long()
        if may_refuse:
            refused = torch.rand(counts.shape, generator=draw) < 0.3
            victims = victims.masked_fill(refused, cache.slots)
        lacking = cache.lacking()
        assert lacking is not None and torch.equal(lacking, torch.arange(cache.slots) >= counts[..., None])
        cache.write(cache.place(victims, cache.limit), key, value, position, cache.limit, may_refuse)
        for i, of_lane in enumerate(heads):
            for h, tokens in enumerate(of_lane):
                if victims[i, h] < cache.slots:
                    tokens[int(victims[i, h])] = Token(int(position[i]), key[i, h], value[i, h])
        position = position + 1
        check_holds(cache, heads)
        if step == 15:
            assert cache.nbytes == before
            cache.select(torch.tensor([0, 1, 3]), [0, 1, 3])
            heads, position = [heads[0], heads[1], heads[3]], position[[0, 1, 3]]
    item = torch.empty(0, dtype=dtype).element_size()
    assert cache.nbytes == 2 * DIM * item * sum(map(sum, COUNTS[:2] + COUNTS[3:]))


@pytest.mark.parametrize("grows", [False, True])
def test_equal_counts_are_a_layer_cache(grows: bool) -> None:
    """The same numbers at every step, and the same slots until the tail begins."""
    limit = None if grows else 6
    plain, ragged = list[LayerCache](), list[LayerCache]()
    for seed in range(3):
        (keys, values), kept = layer(seed), torch.stack(chosen([6] * HEADS, seed))
        plain.append(LayerCache.from_prompt(keys, values, kept, limit))
        ragged.append(RaggedCache.from_prompt(keys, values, kept, limit))
        assert ragged[-1].nbytes == plain[-1].nbytes
    dense, cache = LayerCache.stack(plain), RaggedCache.stack(ragged)
    position = torch.tensor([PROMPT, 50, 60])
    for step in range(30):
        dense.ensure_room(), cache.ensure_room()
        assert dense.slots == cache.slots
        query, key, value = incoming(3, step)
        logits = [one.logits(query, key, SCALING) for one in (dense, cache)]
        assert torch.allclose(*logits, atol=1e-6)
        assert torch.allclose(*(one.mix(logits[0].softmax(-1), value) for one in (dense, cache)), atol=1e-6)
        victims = None if grows else torch.full((3, HEADS), step % 6)
        for one in (dense, cache):
            slot = one.place(victims)
            one.write(slot, key, value, position + step)
        assert torch.equal(dense.positions, cache.positions)
        assert torch.equal(dense.filled_by_head(), cache.filled_by_head())
        assert dense.used == cache.used and dense.most_used == cache.most_used
        for i in range(3):
            assert dense.held(i) == cache.held(i) and dense.most_bytes(i) == cache.most_bytes(i)
            assert all(map(torch.equal, dense.kept(i), cache.kept(i)))


@pytest.mark.parametrize("grows", [False, True])
def test_a_policys_state_follows_the_slots(grows: bool) -> None:
    """A state that notes every slot's position must say what the cache says; lanes bring columns for their own K."""
    caches = [lane(counts, seed, grows) for seed, counts in enumerate(COUNTS)]
    states = [State(slots={"position": one.positions[0] + 1}, fixed={}) for one in caches]
    cache = RaggedCache.stack(caches)
    state = stack_states(states, cache.slots)
    for step in range(30):
        if added := cache.ensure_room():
            state.grow(added)
        _, key, value = incoming(len(COUNTS), step)
        state.slots["position"][..., -1] = 100 + step + 1
        slot = cache.place(None if grows else step % cache.filled)
        settle(state, slot)
        cache.write(slot, key, value, torch.full((len(COUNTS),), 100 + step))
        assert torch.equal(state.slots["position"][..., :-1] - 1, cache.positions)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("grows", [False, True])
def test_bytes_are_those_of_the_entries(grows: bool, dtype: torch.dtype) -> None:
    item = torch.empty(0, dtype=dtype).element_size()
    alone = [lane(counts, seed, grows, dtype) for seed, counts in enumerate(COUNTS)]
    for cache, counts in zip(alone, COUNTS, strict=True):
        assert cache.nbytes == 2 * DIM * item * sum(counts) == cache.most_bytes(0)
        assert cache.nbytes_by_device() == {"device": cache.nbytes}
        assert cache.entry_bytes == 2 * DIM * item * HEADS
    cache = RaggedCache.stack(alone)
    assert cache.nbytes == 2 * DIM * item * sum(map(sum, COUNTS))
    if grows:
        cache.ensure_room()
        assert cache.nbytes == 2 * DIM * item * (sum(map(sum, COUNTS)) + len(COUNTS) * HEADS * GROW)
        _, key, value = incoming(len(COUNTS), 0, dtype)
        cache.write(cache.place(None), key, value, torch.tensor([PROMPT] * len(COUNTS)))
        assert [cache.most_bytes(i) for i in range(4)] == [2 * DIM * item * (sum(c) + HEADS) for c in COUNTS]


def test_nothing_refers_to_the_prompt() -> None:
    keys, values = layer(0)
    whole = [torch.arange(PROMPT)] * HEADS
    cache = RaggedCache.from_prompt(keys, values, whole, None)
    keys.zero_()
    assert not (cache.keys_of(slice(None)) == 0).any()


def test_what_a_tensor_by_slot_says_of_each_head() -> None:
    cache = lane([2, 5, 1], 0, True)
    cache.ensure_room()
    _, key, value = incoming(1, 0)
    cache.write(cache.place(None), key, value, torch.tensor([PROMPT]))
    numbers = torch.arange(cache.slots).expand(HEADS, -1)
    assert [found.tolist() for found in cache.by_head(0, numbers)] == [[0, 1, 5], [0, 1, 2, 3, 4, 5], [0, 5]]


def test_a_slot_that_a_head_lacks_harms_no_other() -> None:
    """The engine reports it; until then it is the head's own last one that is overwritten."""
    cache = RaggedCache.stack([lane([2, 5, 1], 0, False), lane([4, 3, 2], 1, False)])
    heads = [tokens_of([2, 5, 1], 0), tokens_of([4, 3, 2], 1)]
    _, key, value = incoming(2, 0)
    cache.write(torch.full((2, HEADS), 4), key, value, torch.tensor([70, 80]))
    for i, position in enumerate((70, 80)):
        for h in range(HEADS):
            heads[i][h][max(heads[i][h])] = Token(position, key[i, h], value[i, h])
    check_holds(cache, heads)
    check_step(cache, heads, 1, torch.float32)


def test_only_a_lanes_own_numbers_are_checked() -> None:
    keys, values = layer(0)
    values[1, 5] = torch.nan
    sick = RaggedCache.from_prompt(keys, values, [torch.arange(3), torch.arange(4, 9), torch.arange(2)], None)
    cache = RaggedCache.stack([lane([2, 5, 1], 1, True), sick])
    assert cache.is_finite(0) and not cache.is_finite(1)
    cache.ensure_room()
    _, key, value = incoming(2, 0)
    key[0, 2, 3] = torch.inf
    cache.write(cache.place(None), key, value, torch.tensor([PROMPT] * 2))
    assert not cache.is_finite(0)


class Fixed(Exact):
    overwrites = False


@pytest.mark.parametrize(
    ("counts", "limit", "codec", "said"),
    [
        ([3, 5, 2], 6, None, r"limit=6 for \[3, 5, 2\] kept entries by KV head: valid: 5 \(at capacity\) or None"),
        ([3, 5, 2], 3, None, "limit=3"),
        ([3, 0, 2], None, None, r"kept=\[3, 0, 2\] entries by KV head: valid: 1 or more"),
        ([3, 5, 2], 5, Fixed(), "limit=5 with Fixed, which cannot overwrite: valid: None"),
    ],
)
def test_what_is_neither_growing_nor_at_capacity_is_refused(
    counts: list[int], limit: int | None, codec: Codec | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        RaggedCache.from_prompt(*layer(0), chosen(counts, 0), limit, codec)


def test_refuses_what_it_cannot_do() -> None:
    keys, values = layer(0)
    plain = LayerCache.from_prompt(keys, values, torch.arange(4).expand(HEADS, -1), None)
    for several in ([lane([2, 5, 1], 0, True), plain], [lane([2, 5, 1], 0, True), lane([2, 5, 1], 0, False)], []):
        with pytest.raises(ValueError, match="right after the cut"):
            RaggedCache.stack(several)
    full = lane([2, 5, 1], 0, False)
    for victims, room in ((None, 5), (torch.zeros(1, HEADS, dtype=torch.long), 4)):
        with pytest.raises(ValueError, match="at capacity, 5"):
            full.place(victims, room)
    with pytest.raises(NotImplementedError, match="cannot be pruned"):
        full.keep(torch.zeros(1, HEADS, 1, dtype=torch.long))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("grows", [False, True])
def test_a_step_does_not_wait_for_the_device(grows: bool) -> None:
    caches = []
    for seed, counts in enumerate(COUNTS):
        keys, values = (tensor.cuda() for tensor in layer(seed))
        kept = [positions.cuda() for positions in chosen(counts, seed)]
        caches.append(RaggedCache.from_prompt(keys, values, kept, None if grows else max(counts)))
    cache = RaggedCache.stack(caches)
    query, key, value = (tensor.cuda() for tensor in incoming(len(COUNTS), 0))
    position = torch.full((len(COUNTS),), PROMPT, device="cuda")
    victims = None if grows else torch.zeros(len(COUNTS), HEADS, dtype=torch.long, device="cuda")
    for step in range(3):
        cache.ensure_room()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # index tensors are made at the first write
        try:
            cache.mix(cache.logits(query, key, SCALING).softmax(-1), value)
            cache.write(cache.place(victims), key, value, position, may_refuse=not grows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
