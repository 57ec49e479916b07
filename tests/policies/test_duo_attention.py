"""Retrieval heads: which they are, and what they hold, beside loops."""

import random

import pytest
import torch

from policies.duo_attention import RetrievalHeads
from policies.streaming_llm import StreamingLLM
from src.kv.plan import Allotment
from src.kv.prompt import PromptAttention
from tests.support.allotting import counts_of, prompt, prompts, random_scores


def naive_reach(p: PromptAttention, sinks: int, recent: int, window: int) -> list[float]:
    found = []
    for head in range(p.kv_heads):
        lost = []
        for query_head in range(head * p.group, (head + 1) * p.group):
            for i in range(max(0, p.length - window), p.length):
                row = torch.tensor(
                    [float(p.queries[query_head, i] @ p.keys[head, j]) * p.scaling for j in range(i + 1)]
                )
                row = row.softmax(-1)
                lost.append(sum(float(row[j]) for j in range(i + 1) if j >= sinks and i - j >= recent))
        found.append(sum(lost) / len(lost))
    return found


@pytest.mark.parametrize(("sinks", "recent", "window"), [(2, 5, 4), (0, 1, 8), (4, 0, 1), (3, 30, 60)])
def test_reach_is_what_a_streaming_head_would_lose(sinks: int, recent: int, window: int) -> None:
    p = prompt(40, seed=1)
    found = RetrievalHeads(sinks, recent, window).reach(p)
    assert found == pytest.approx(naive_reach(p, sinks, recent, window), abs=1e-6)


def naive_counts(reach: list[list[float]], near: int, a: Allotment) -> list[list[int]]:
    """The fewest far heads that can hold all that is left, and equal parts of it."""
    heads = a.layers * a.kv_heads
    far = 1
    while far * a.length + (heads - far) * near < a.total:
        far += 1
    order = sorted(((-x, layer, head) for layer, row in enumerate(reach) for head, x in enumerate(row)))
    counts = [[near] * a.kv_heads for _ in range(a.layers)]
    for i in range(a.total - heads * near):
        _, layer, head = order[i % far]
        counts[layer][head] += 1
    return counts


def allotments(count: int, near: int) -> list[Allotment]:
    draw = random.Random(0)
    found = [Allotment(near + 1, 60, 1, 1, 0), Allotment(near + 1, near + 2, 3, 2, near - 1)]
    while len(found) < count:
        budget = near + draw.randint(1, 20)
        found.append(
            Allotment(budget, budget + draw.randint(1, 60), draw.randint(1, 6), draw.randint(1, 4), draw.randint(0, 5))
        )
    return found


@pytest.mark.parametrize("a", allotments(20, 8), ids=str)
def test_found_on_the_prompt(a: Allotment) -> None:
    """As of all layers at once, though they come one by one; `counts_of` asserts the total and that heads only lose."""
    allocator, seen = RetrievalHeads(2, 6, 8), prompts(a)
    reach = [allocator.reach(p) for p in seen]
    assert counts_of(allocator, a, random_scores(a), seen) == naive_counts(reach, 8, a)


@pytest.mark.parametrize("a", allotments(20, 8), ids=str)
def test_a_given_pattern(a: Allotment) -> None:
    """Known beforehand: each layer has its counts at once."""
    draw = random.Random(a.total)
    pattern = [[draw.choice([0.0, 0.25, 1.0]) for _ in range(a.kv_heads)] for _ in range(a.layers)]
    allocator = RetrievalHeads(2, 6, pattern=pattern)
    assert counts_of(allocator, a) == naive_counts(pattern, 8, a)
    plan = allocator.plan(a)
    assert all(list(plan.cut(p, s)) == [p.layer] for p, s in zip(prompts(a), random_scores(a), strict=True))
    hash(allocator)


def test_by_hand() -> None:
    """Four heads, 30 entries each on average, 8 for a near one: 88 are left; two far heads hold 52 of 60 each."""
    a = Allotment(30, 60, 2, 2)
    assert counts_of(RetrievalHeads(2, 6, pattern=[[0, 1], [0.5, 0.25]]), a) == [[8, 52], [52, 8]]
    exact = Allotment(34, 60, 2, 2)  # 2 x 60 + 2 x 8 = 136: two whole prompts
    assert counts_of(RetrievalHeads(2, 6, pattern=[[0, 1], [0.5, 0.25]]), exact) == [[8, 60], [60, 8]]
    one_more = Allotment(35, 60, 2, 2)
    assert counts_of(RetrievalHeads(2, 6, pattern=[[0, 1], [0.5, 0.25]]), one_more) == [[8, 44], [44, 44]]


def test_streaming_heads_beside_streaming_llm() -> None:
    """Best of a score by position, first tokens protected: sinks and the latest tokens, as in the paper."""
    n, near = 60, StreamingLLM(sinks=2)
    scores = torch.arange(n, dtype=torch.float32).expand(2, -1).clone()
    scores[:, :2] = torch.inf
    a = Allotment(30, n, 1, 2, 2)
    (counts,) = counts_of(RetrievalHeads(2, 6, pattern=[[0, 1]]), a, [scores])
    assert counts == [8, 52]
    kept = scores[0].topk(counts[0]).indices.sort().values
    assert torch.equal(kept, near.keep_prompt(prompt(n), 8)[0])


@pytest.mark.parametrize("length", [1, 10, 12])
def test_a_short_prompt_is_kept_whole(length: int) -> None:
    a = Allotment(12, length, 3, 2, 4)
    assert counts_of(RetrievalHeads(), a, [torch.zeros(2, length)] * 3) == [[length] * 2] * 3


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"window=0, .* valid: a window of 1 or more"):
        RetrievalHeads(window=0)
    with pytest.raises(ValueError, match=r"sinks=0, recent=0: valid: .* 1 or more together"):
        RetrievalHeads(0, 0)
    for pattern in ("duo.tsv", [], [1.0, 2.0], [[1.0], ["a"]], [[1.0], [float("nan")]], 3):
        with pytest.raises(ValueError, match=r"pattern=.*: valid: a list for every layer"):
            RetrievalHeads(pattern=pattern)  # type: ignore[arg-type]
    for shape in ([[1.0, 2.0]], [[1.0], [2.0], [3.0]], [[1.0, 2.0], [1.0], [2.0, 3.0]]):
        with pytest.raises(ValueError, match=r"pattern of \d layers.*: valid: 3 lists of 2 numbers"):
            RetrievalHeads(pattern=shape).plan(Allotment(100, 200, 3, 2))
    with pytest.raises(ValueError, match=r"budget=64: layer 0, head 0 .* valid: 65 or more"):
        RetrievalHeads().plan(Allotment(64, 200, 3, 2))
    with pytest.raises(
        ValueError, match=r"sinks=4, recent=28: layer 0, head 0 .* the 32 tokens .* 33 or more together"
    ):
        RetrievalHeads(4, 28).plan(Allotment(64, 200, 3, 2, 32))
