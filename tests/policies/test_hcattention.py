"""HCAttention against naive references: quantised scores, the chosen set, values on the host, bytes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.full import Full
from policies.h2o import H2O
from policies.hcattention import HCAttention
from policies.smallest_set import SmallestSet, smallest_set
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.kv.cache import LayerCache
from src.kv.codebooks import Codebooks
from src.kv.product import SplitCache, encode, look_up, tables, weighted_sum
from src.kv.step import DecodeStep
from src.models.codebooks import fit_codebooks, sample_keys
from tests.support import naive
from tests.support.tiny import tiny, tokens
from tests.support.watch import logits_of

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

LAYERS, KV_HEADS, GROUP, DIM, N, NEW = 2, 2, 2, 16, 50, 90
OFF: dict[str, Any] = {"quantise_keys": False, "tau": 1.0, "offload_values": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", torch.float64)


def request(n: int = N, new: int = NEW, seed: int = 0) -> Request:
    return Request(f"{n}-{seed}", tokens(n, seed=seed)[0].tolist(), frozenset(), new)


def watched(model: Any, variant: Variant) -> tuple[Generation, list[Tensor]]:
    """A lane alone, and the logits of its prompt and of every step."""
    found: list[Generation] = []
    logits = logits_of(model, lambda: found.extend(Engine(model, 100).run([Job(request(), [variant])])))
    return found[0], logits


@pytest.fixture(scope="module")
def fitted(model: Any) -> Codebooks:
    """Four groups of 16 centroids: a coarse codebook."""
    keys = sample_keys(model, [tokens(300, seed=9)[0].tolist()])
    return Codebooks(fit_codebooks(keys, 4, 16, seed=0).to(torch.float64), "coarse")


@pytest.fixture(scope="module")
def lossless(model: Any) -> Codebooks:
    """One group per dimension, and a centroid for every value that any key of the full run has there."""
    full = next(Engine(model, 1).run([Job(request(), [Variant(Full(), None)])]))
    text = request().ids + full.tokens
    model.set_attn_implementation("sdpa")
    layers = model(torch.tensor([text]), use_cache=True).past_key_values.layers
    keys = torch.stack([layer.keys[0] for layer in layers])  # (layers, kv_heads, n, head_dim)
    return Codebooks(keys.transpose(2, 3)[..., None].contiguous(), "lossless")


def test_lossless_codebooks_and_all_mass_are_the_full_cache(model: Any, lossless: Codebooks) -> None:
    count = lossless.centroids.shape[3]
    policy = HCAttention(groups=DIM, centroids=count, tau=1.0, loaded=lossless)
    expected, full = watched(model, Variant(Full(), None))
    got, hc = watched(model, Variant(policy, None))
    assert got.tokens == expected.tokens
    assert len(hc) == len(full) == NEW
    assert max(float((a - b).abs().max()) for a, b in zip(hc, full, strict=True)) < 1e-4


@pytest.mark.parametrize("part", [{}, {"offload_values": True}, {"tau": 1 - 1e-12}])
def test_with_all_parts_off_it_is_the_full_cache(model: Any, part: dict[str, Any]) -> None:
    """And with those on that lose nothing."""
    _, full = watched(model, Variant(Full(), None))
    _, hc = watched(model, Variant(HCAttention(**{**OFF, **part}), None))
    assert len(hc) == len(full) == NEW
    assert max(float((a - b).abs().max()) for a, b in zip(hc, full, strict=True)) < 1e-9


def naive_logits(query: list[float], key: list[float], centroids: Tensor, scaling: float) -> float:
    """Product quantisation by hand: every group's nearest centroid in place of the key."""
    groups, count, size = centroids.shape
    total = 0.0
    for i in range(groups):
        part = key[i * size : (i + 1) * size]
        table = centroids[i].tolist()
        nearest = min(range(count), key=lambda m: sum((a - b) ** 2 for a, b in zip(part, table[m], strict=True)))
        total += sum(a * b for a, b in zip(query[i * size : (i + 1) * size], table[nearest], strict=True))
    return total * scaling


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_scores_are_those_of_a_naive_product_quantisation(groups: int) -> None:
    draw = torch.Generator().manual_seed(groups)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    lanes, n = 2, 20
    keys, values = randn(lanes, KV_HEADS, n, DIM), randn(lanes, KV_HEADS, n, DIM)
    centroids = randn(KV_HEADS, groups, 8, DIM // groups)
    positions = torch.arange(n, dtype=torch.int32).expand(lanes, KV_HEADS, -1)
    plain = LayerCache(keys, values, positions, [n, n], None)
    cache = SplitCache.split(plain, centroids)
    query, own = randn(lanes, KV_HEADS, GROUP, DIM), randn(lanes, KV_HEADS, DIM)
    got = cache.logits(query, own, 0.25)
    assert got.shape == (lanes, KV_HEADS, GROUP, n + 1)
    for lane in range(lanes):
        for h in range(KV_HEADS):
            for g in range(GROUP):
                row = query[lane, h, g].tolist()
                expected = [naive_logits(row, keys[lane, h, j].tolist(), centroids[h], 0.25) for j in range(n)]
                expected.append(float(query[lane, h, g] @ own[lane, h]) * 0.25)
                assert torch.allclose(got[lane, h, g], torch.tensor(expected, dtype=torch.float64))


def test_tables_do_not_depend_on_the_number_of_tokens() -> None:
    centroids, query = torch.randn(KV_HEADS, 4, 8, 4), torch.randn(3, KV_HEADS, GROUP, DIM)
    table = tables(query, centroids)
    assert table.shape == (3, KV_HEADS, GROUP, 4, 8)
    keys = torch.randn(3, KV_HEADS, 40, DIM)
    codes = encode(keys, centroids)
    rebuilt = torch.stack(
        [torch.cat([centroids[h, i][codes[:, h, :, i]] for i in range(4)], -1) for h in range(KV_HEADS)], 1
    )
    assert torch.allclose(look_up(table, codes), query @ rebuilt.transpose(2, 3), atol=1e-4)


class Noted(SmallestSet):
    """Notes the weights that it chooses from."""

    def choose(self, step: DecodeStep) -> Tensor | None:
        before.append(step.weights.clone())
        return super().choose(step)


class Checked(HCAttention):
    """Checks the chosen set at every step and layer against the definition."""

    @property
    def reader(self) -> Noted:
        return Noted(self.tau, renormalise=self.renormalise)

    def observe(self, step: DecodeStep, state: Any) -> None:
        seen.append(step.layer)
        for row, new in zip(before.pop().flatten(0, 2), step.weights.flatten(0, 2), strict=True):
            chosen = new > 0
            mass = float(row[chosen].sum())
            assert mass >= self.tau - 1e-12
            assert mass - float(row[chosen].min()) < self.tau + 1e-12  # no smaller set has the mass
            assert chosen.all() or row[~chosen].max() <= row[chosen].min()
            expected = row / mass if self.renormalise else row
            assert torch.allclose(new[chosen], expected[chosen])


seen: list[int] = []
before: list[Tensor] = []


@pytest.mark.parametrize("tau", [0.3, 0.9])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_chosen_set_has_the_mass_and_is_minimal(
    model: Any, fitted: Codebooks, tau: float, renormalise: bool
) -> None:
    seen.clear()
    policy = Checked(groups=4, centroids=16, tau=tau, renormalise=renormalise, loaded=fitted)
    result = next(Engine(model, 1).run([Job(request(), [Variant(policy, None)])]))
    assert seen == [0, 1] * (NEW - 1)  # every layer at every step
    extra = result.extra
    assert len(extra["chosen_by_step"]) == NEW - 1 and len(extra["chosen_by_layer"]) == LAYERS
    assert 0 < extra["chosen_share"] < 0.6
    assert len(extra["chosen_positions"]) == 64 and abs(sum(extra["chosen_positions"]) - 1) < 1e-3


def test_smallest_set_by_hand() -> None:
    row = torch.tensor([[0.1, 0.4, 0.0, 0.3, 0.2]])
    assert smallest_set(row, 0.4).tolist() == [[False, True, False, False, False]]
    assert smallest_set(row, 0.41).tolist() == [[False, True, False, True, False]]
    assert smallest_set(row, 0.95).tolist() == [[True, True, False, True, True]]


def test_bytes(model: Any, fitted: Codebooks) -> None:
    """Device: n x g x index bytes of keys, nothing of the values; the codebooks apart."""
    base = HCAttention(groups=4, centroids=16, loaded=fitted)
    policies = {
        "all": base,
        "8 bits": replace(base, key_bits=8),
        "values on the device": replace(base, offload_values=False),
        "exact keys": replace(base, quantise_keys=False, loaded=None),
    }
    variants = {name: Variant(policy, None) for name, policy in policies.items()}
    found = {
        name: g
        for g in Engine(model, 100).run([Job(request(), list(variants.values()))])
        for name, variant in variants.items()
        if variant is g.variant
    }
    keys = N * 4 * KV_HEADS * LAYERS
    values = N * DIM * 8 * KV_HEADS * LAYERS
    assert found["all"].kv_bytes_by_device == {"device": keys * 2, "host": values}
    assert found["8 bits"].kv_bytes_by_device == {"device": keys, "host": values}
    assert found["values on the device"].kv_bytes_by_device == {"device": keys * 2 + values, "host": 0}
    assert found["exact keys"].kv_bytes_by_device == {"device": values, "host": values}
    for g in found.values():
        assert g.kv_bytes == sum(g.kv_bytes_by_device.values())
        assert g.kv_bytes_full == 2 * values
    assert found["all"].kv_bytes_peak == (keys * 2 + values) // N * (N + NEW - 1)
    assert found["all"].extra["codebook_bytes"] == LAYERS * KV_HEADS * 16 * DIM * 8
    assert "codebook_bytes" not in found["exact keys"].extra


def test_the_papers_percentages() -> None:
    """Values off the device: 50 %; 64 or 32 indices of 16 bits for 128 numbers of 16 bits: 25 and 12.5 %."""
    keys, values = torch.zeros(1, 1, 10, 128, dtype=torch.bfloat16), torch.zeros(1, 1, 10, 128, dtype=torch.bfloat16)
    plain = LayerCache(keys, values, torch.zeros(1, 1, 10, dtype=torch.int32), [10], None)
    for groups, share in ((None, 0.5), (64, 0.25), (32, 0.125)):
        centroids = None if groups is None else torch.zeros(1, groups, 4, 128 // groups, dtype=torch.bfloat16)
        assert SplitCache.split(plain, centroids).nbytes_by_device()["device"] == share * plain.nbytes


def test_lanes_of_other_policies_and_lengths_are_untouched(model: Any, fitted: Codebooks) -> None:
    """All together, and each alone."""
    base = HCAttention(groups=4, centroids=16, loaded=fitted)
    policies = [base, replace(base, tau=0.5), replace(base, offload_values=False), replace(base, **OFF)]
    variants = [Variant(p, None) for p in policies] + [Variant(H2O(), 20), Variant(Full(), None)]
    requests = [request(40, 70, 1), request(45, 50, 2), request(90, 80, 3)]
    together = {
        (g.request.name, id(g.variant)): g for g in Engine(model, 100).run([Job(r, variants) for r in requests])
    }
    for r in requests:
        for variant in variants:
            alone = next(Engine(model, 1).run([Job(r, [variant])]))
            other = together[r.name, id(variant)]
            assert alone.tokens == other.tokens
            assert [p.tolist() for p in alone.kept_end] == [p.tolist() for p in other.kept_end]
            assert alone.extra == other.extra


def test_weights_meet_values_on_the_host() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 50, 4, generator=draw, dtype=torch.float64)
    for most in (1, 7, 50):
        weights = torch.zeros(2, 3, 2, 50, dtype=torch.float64)
        for row in weights.flatten(0, 2):
            row[torch.randperm(50, generator=draw)[:most]] = torch.rand(most, generator=draw, dtype=torch.float64)
        assert torch.allclose(weighted_sum(weights, values), weights @ values)


def test_fidelity_lanes(model: Any, fitted: Codebooks) -> None:
    """Measured like every policy; a coarse codebook is not the full cache."""
    policy = HCAttention(groups=4, centroids=16, loaded=fitted)
    asked = replace(request(new=5), reference=tokens(20, seed=4)[0].tolist())
    (result,) = Engine(model, 1).run([Job(asked, [Variant(policy, None)])])
    assert result.fidelity is not None and result.fidelity["kl"] > 1e-3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"tau": 0.0}, "tau=0"),
        ({"tau": 1.5}, "tau=1.5"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"groups": 0}, "groups=0"),
        ({"centroids": 2**15 + 1}, "centroids=32769"),
        ({"centroids": 257, "key_bits": 8}, "centroids=257"),
        ({"key_bits": 4}, "key_bits=4"),
    ],
)
def test_refused_settings(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=f"{names}.*valid"):
        HCAttention(**settings)


def test_unbound() -> None:
    result = next(Engine(tiny("llama"), 1).run([Job(request(), [Variant(HCAttention(), None)])]))
    assert "bound to a model" in str(result.error)


def test_finished_lanes_leave(model: Any) -> None:
    """A finished lane leaves; the others' values stay theirs."""
    policy = HCAttention(**{**OFF, "offload_values": True})
    requests = [request(30, new, seed=new) for new in (3, 40, 80)]
    results = {g.request.name: g for g in Engine(model, 10).run([Job(r, [Variant(policy, None)]) for r in requests])}
    for r in requests:
        alone = next(Engine(model, 1).run([Job(r, [Variant(Full(), None)])]))
        assert results[r.name].tokens == alone.tokens


def test_no_cached_token_was_chosen() -> None:
    """The incoming token alone may carry the mass; then there is nothing to fetch from the host."""
    weights, values = torch.zeros(2, 3, 2, 5), torch.randn(2, 3, 5, 8)
    assert torch.equal(weighted_sum(weights, values), torch.zeros(2, 3, 2, 8))
