"""KIVI: codes against a loop over groups, the schedule on which tokens are coded, and eviction from coded groups."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from policies.kivi import KIVI
from src.kv.bits import CodedRows, pack, unpack
from src.kv.prompt import PromptAttention
from src.kv.ragged import RaggedCache
from tests.support import naive

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

KV_HEADS, DIM, PROMPT = 2, 8, 60
GROUP, RESIDUAL = 4, 8
COUNTS = [21, 5]  # 16 coded and 5 exact; none coded


def store(bits: int = 8) -> KIVI:
    return KIVI(bits, GROUP, RESIDUAL)  # type: ignore[arg-type]


def prompt(seed: int = 0, dtype: torch.dtype = torch.float32) -> PromptAttention:
    draw = torch.Generator().manual_seed(seed)
    queries, keys, values = torch.randn(3, KV_HEADS, PROMPT, DIM, generator=draw).to(dtype)
    return PromptAttention(queries, keys, values, DIM**-0.5, 0, 1)


def first(counts: Sequence[int]) -> list[Tensor]:
    return [torch.arange(count) for count in counts]


def half(number: float) -> float:
    return float(torch.tensor(number).half())


def coded(numbers: Sequence[float], bits: int) -> list[float]:
    """One group, naively."""
    low = half(min(numbers))
    step = half(max(0.0, max(numbers) - low) / (2**bits - 1))
    codes = [min(2**bits - 1, max(0, round((x - low) / step))) if step else 0 for x in numbers]
    return [code * step + low for code in codes]


def coded_keys(keys: Tensor, bits: int) -> Tensor:
    """`(n, d)`, groups of tokens, the last one may be shorter."""
    out = keys.clone()
    for start in range(0, len(keys), GROUP):
        for c in range(DIM):
            out[start : start + GROUP, c] = torch.tensor(coded(keys[start : start + GROUP, c].tolist(), bits))
    return out


def coded_values(values: Tensor, bits: int) -> Tensor:
    out = values.clone()
    for j in range(len(values)):
        for start in range(0, DIM, GROUP):
            out[j, start : start + GROUP] = torch.tensor(coded(values[j, start : start + GROUP].tolist(), bits))
    return out


def values_of(cache: RaggedCache) -> Tensor:
    """All slots' values, `(lanes, kv_heads, slots, d)`: what weights of 1 mix."""
    lanes, heads, slots = cache.positions.shape
    weights = torch.eye(slots, slots + 1).expand(lanes, heads, -1, -1)
    return cache.mix(weights, torch.zeros(lanes, heads, DIM, dtype=cache.values.dtype))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_goes_round(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3, 16), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 3, 2 * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack(unpack(every, bits), bits), every)
    assert packed[0, 0, 0] == sum(int(c) << i * bits for i, c in enumerate(codes[0, 0, : 8 // bits]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_a_loop_over_groups(bits: int) -> None:
    seen = prompt()
    cache = store(bits).hold(seen, first(COUNTS), None)
    keys, values = cache.keys_of(slice(None)), values_of(cache)
    for head, count in enumerate(COUNTS):
        whole = count - count % RESIDUAL
        for found, given, code in ((keys, seen.keys, coded_keys), (values, seen.values, coded_values)):
            expected = torch.cat([code(given[head, :whole], bits), given[head, whole:count]])
            assert torch.allclose(found[0, head, :count], expected, atol=1e-5)
            assert torch.equal(found[0, head, whole:count], given[head, whole:count])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eight_bits_are_within_half_a_step(dtype: torch.dtype) -> None:
    """And what float16 rounds off the range, and the model's type off the result."""
    seen = prompt(1, dtype)
    cache = store(8).hold(seen, first([24, 16]), None)
    found = cache.keys_of(slice(None))
    assert found.dtype == dtype
    for head, count in enumerate((24, 16)):
        given = seen.keys[head, :count].view(-1, GROUP, DIM).double()
        step = (given.amax(1) - given.amin(1)) / 255
        error = (found[0, head, :count].view(-1, GROUP, DIM).double() - given).abs()
        rounding = given.abs().amax(1) * 2**-10 + given.abs().amax(1) * torch.finfo(dtype).eps
        assert (error <= (step / 2 + rounding)[:, None]).all()


@pytest.mark.parametrize("number", [0.0, 1.5, -3.0, 0.1, 0.7, 1e-9])
@pytest.mark.parametrize("bits", [2, 8])
def test_groups_without_a_range(bits: int, number: float) -> None:
    seen = prompt()
    seen.keys.fill_(number), seen.values.fill_(number)
    cache = store(bits).hold(seen, first([16, 8]), None)
    for found in (cache.keys_of(slice(None)), values_of(cache)):
        assert torch.allclose(found[0, 0, :16], torch.full((16, DIM), number), atol=1e-8, rtol=2**-11)
    assert (cache.parts[0].keys.planes["steps"] >= 0).all()


@pytest.mark.parametrize(("at_once", "rows"), [(1, [16, 16, 16, 40, 8]), (36, [32, 16, 40, 8]), (None, [96])])
def test_rows_are_decoded_block_by_block(
    monkeypatch: pytest.MonkeyPatch, at_once: int | None, rows: Sequence[int]
) -> None:
    """Of several segments as long as `at_once` allows; where a block ends changes nothing."""
    counts = [COUNTS, [16, 16], [40, 8]]
    caches = [store(4).hold(prompt(seed), first(c), None) for seed, c in enumerate(counts)]
    query, key = torch.randn(3, KV_HEADS, 2, DIM), torch.randn(3, KV_HEADS, DIM)
    monkeypatch.setattr(CodedRows, "at_once", at_once)
    cache = RaggedCache.stack(caches)
    logits = cache.logits(query, key, 0.3)
    assert [b.rows.stop - b.rows.start for b in cache.parts[0].keys.blocks] == rows
    mixed = cache.mix(logits.softmax(-1), key)
    for i, alone in enumerate(caches):
        expected = alone.logits(query[i : i + 1], key[i : i + 1], 0.3)
        assert torch.allclose(logits[i, ..., : alone.slots], expected[0, ..., :-1], atol=1e-5)
        assert torch.allclose(mixed[i], alone.mix(expected.softmax(-1), key[i : i + 1])[0], atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(bits: int, dtype: torch.dtype) -> None:
    """`bits + 32 / group` a number, for coded ones."""
    item = torch.empty(0, dtype=dtype).element_size()
    cache = store(bits).hold(prompt(0, dtype), first(COUNTS), None)
    assert cache.nbytes == 2 * 16 * DIM * (bits + 32 / GROUP) / 8 + 2 * (5 + 5) * DIM * item
    assert cache.nbytes == cache.most_bytes(0)
    long = KIVI(2, 8, 8).hold(prompt(0, dtype), first([56, 56]), None)
    assert long.nbytes == 2 * 2 * 56 * DIM * (2 + 32 / 8) / 8


@pytest.mark.parametrize("bits", [2, 8])
def test_tokens_are_coded_once_the_residual_is_full(bits: int) -> None:
    """Three times, the rest of the prompt with the first; slots stay what they are. A lane leaves on the way."""
    prompts, counts = [prompt(seed) for seed in range(3)], [COUNTS, [8, 3], [17, 30]]
    cache = RaggedCache.stack([store(bits).hold(seen, first(c), None) for seen, c in zip(prompts, counts, strict=True)])
    longest, lanes = 30, [0, 1, 2]
    new: list[Tensor] = []  # keys, and values twice as large, (3, kv_heads, d)
    for step in range(3 * RESIDUAL + 2):
        added, sealed = cache.ensure_room(), step // RESIDUAL * RESIDUAL
        assert added == (RESIDUAL if step % RESIDUAL == 0 else 0)
        assert cache.sealed == sealed and cache.tail == step - sealed
        assert cache.slots == longest + sealed + RESIDUAL
        keys, values = cache.keys_of(slice(None)), values_of(cache)
        for row, i in enumerate(lanes):
            for h in range(KV_HEADS):
                count = counts[i][h]
                whole = count if sealed else count - count % RESIDUAL
                late = torch.stack([key[i, h] for key in new]) if new else torch.zeros(0, DIM)
                for found, given, code, times in (
                    (keys, prompts[i].keys, coded_keys, 1),
                    (values, prompts[i].values, coded_values, 2),
                ):
                    rows = [code(given[h, : count - count % RESIDUAL], bits)]
                    rest = given[h, count - count % RESIDUAL : count]
                    rows.append(code(rest, bits) if whole == count else rest)
                    assert torch.allclose(found[row, h, :count], torch.cat(rows), atol=1e-5)
                    told = torch.cat([code(late[:sealed] * times, bits), late[sealed:] * times])
                    assert torch.allclose(found[row, h, longest : longest + step], told, atol=1e-5)
        assert [cache.held(row) for row in range(len(lanes))] == [[c + step for c in counts[i]] for i in lanes]
        query, key = torch.randn(len(lanes), KV_HEADS, 2, DIM), torch.randn(3, KV_HEADS, DIM)
        logits = cache.logits(query, key[lanes], 0.3)
        there = cache.positions >= 0
        assert torch.equal(logits[..., :-1].isfinite(), there[:, :, None].expand(-1, -1, 2, -1))
        expected = (query @ keys.transpose(2, 3) * 0.3).masked_fill(~there[:, :, None], -torch.inf)
        assert torch.allclose(logits[..., :-1], expected, atol=1e-5)
        cache.write(cache.place(None), key[lanes], 2 * key[lanes], torch.tensor([PROMPT + step] * len(lanes)))
        new.append(key)
        if step == RESIDUAL + 3:
            cache.select(torch.tensor([0, 2]), [0, 2])
            lanes = [0, 2]
    late, groups = 3 * RESIDUAL, sum(-(-c // GROUP) for i in lanes for c in counts[i])
    tail = 2 * len(lanes) * KV_HEADS * RESIDUAL * DIM * 4
    rows = sum(map(sum, (counts[i] for i in lanes)))
    in_codes = 2 * (rows + len(lanes) * KV_HEADS * late) * DIM * bits / 8
    key_ranges = (groups + len(lanes) * KV_HEADS * late // GROUP) * DIM * 4
    value_ranges = (rows + len(lanes) * KV_HEADS * late) * DIM // GROUP * 4
    assert cache.nbytes == in_codes + key_ranges + value_ranges + tail
    assert cache.most_bytes(0) >= cache.footprint.peaks[0] > 0


def test_the_peak_is_just_before_tokens_are_coded() -> None:
    cache = store(2).hold(prompt(), first([16, 16]), None)
    for step in range(RESIDUAL):
        cache.ensure_room()
        key = torch.randn(1, KV_HEADS, DIM)
        cache.write(cache.place(None), key, key, torch.tensor([PROMPT + step]))
    full = cache.most_bytes(0)
    assert full == cache.nbytes
    cache.ensure_room()
    assert cache._lane_bytes(0) < full == cache.most_bytes(0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("may_refuse", [False, True])
def test_eviction_codes_the_victims_group_anew(bits: int, may_refuse: bool) -> None:
    """30 steps against decoded copies in which one group at a time is replaced and coded."""
    counts = [COUNTS, [3, 16], [24, 9]]
    caches = [store(bits).hold(prompt(seed), first(c), max(c)) for seed, c in enumerate(counts)]
    cache = RaggedCache.stack(caches)
    held, lanes, draw = cache.nbytes, [0, 1, 2], torch.Generator().manual_seed(bits)
    keys, values = cache.keys_of(slice(None)).clone(), values_of(cache)
    for step in range(30):
        assert cache.ensure_room() == 0
        key = torch.randn(len(lanes), KV_HEADS, DIM, generator=draw)
        limits = torch.tensor([counts[i] for i in lanes])
        victims = (torch.rand(limits.shape, generator=draw) * limits).long()
        if may_refuse:
            victims = victims.masked_fill(torch.rand(limits.shape, generator=draw) < 0.3, cache.slots)
        cache.write(cache.place(victims), key, 2 * key, torch.tensor([PROMPT + step] * len(lanes)), None, may_refuse)
        for row, i in enumerate(lanes):
            for h in range(KV_HEADS):
                victim = int(victims[row, h])
                if victim == cache.slots:
                    continue
                assert cache.positions[row, h, victim] == PROMPT + step
                keys[row, h, victim], values[row, h, victim] = key[row, h], 2 * key[row, h]
                if victim < counts[i][h] - counts[i][h] % RESIDUAL:
                    mates = slice(victim // GROUP * GROUP, victim // GROUP * GROUP + GROUP)
                    keys[row, h, mates] = coded_keys(keys[row, h, mates], bits)
                    values[row, h, victim] = coded_values(values[row, h, victim][None], bits)[0]
        assert torch.allclose(values_of(cache), values, atol=1e-5)
        # A number in the middle between two codes may go either way, so each step starts from what is held.
        found = cache.keys_of(slice(None))
        steps = (keys.amax() - keys.amin()) / (2**bits - 1)
        near = (found - keys).abs() > 1e-5
        assert near.float().mean() < 0.01 and (found - keys).abs().max() <= steps
        keys = found.clone()
        if step == 15:
            assert cache.nbytes == held
            cache.select(torch.tensor([0, 2]), [0, 2])
            lanes, keys, values = [0, 2], keys[[0, 2]], values[[0, 2]]


def test_a_key_that_changes_no_range_leaves_its_mates_alone() -> None:
    seen = prompt()
    seen.keys[:, 4:8] = torch.tensor([-1.0, 2.0, 0.3, 0.4])[:, None]
    cache = store(4).hold(seen, first([16, 16]), 16)
    before, key = cache.keys_of(slice(None)), torch.full((1, KV_HEADS, DIM), 1.2)
    cache.write(torch.full((1, KV_HEADS), 6), key, key, torch.tensor([PROMPT]))
    after = cache.keys_of(slice(None))
    mates = [slot for slot in range(16) if slot != 6]
    assert torch.allclose(after[:, :, mates], before[:, :, mates], atol=1e-6)
    assert torch.allclose(after[:, :, 6], key, atol=0.11)  # half a step of 3 / 15


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "bits=3: valid: 2, 4, 8"),
        ({"group": 0}, "group=0: valid"),
        ({"residual": 48}, "residual=48: valid: a multiple of group=32"),
        ({"residual": 0}, "residual=0"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KIVI(**settings)  # type: ignore[arg-type]


def test_a_head_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="group=32: does not divide the head size 8; valid: 1, 2, 4, 8"):
        KIVI().hold(prompt(), first(COUNTS), None)
    odd = torch.randn(3, KV_HEADS, 10, 6)
    with pytest.raises(ValueError, match="bits=2: a key of 6 numbers does not fill bytes; valid: 8"):
        KIVI(2, 3, 3).hold(PromptAttention(*odd, 1.0, 0, 1), first([10, 10]), None)
