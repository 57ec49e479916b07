"""KVzip's scores beside loops over the whole attention matrix of prompt and repetition."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.full import Full
from policies.kvzip import Globally, KVzip, Words
from src.config.binding import shape_of
from src.engine.request import Variant
from tests.support import naive
from tests.support.cli import call, lines
from tests.support.naive import Naive, softmax
from tests.support.sequels import WORDS, ask, read, run
from tests.support.tiny import tiny, tiny_loaded

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

Scores = list[list[list[float]]]  # [layer][KV head][token]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", torch.float64)


def naive_scores(model: Any, ids: list[int], policy: KVzip, everything: bool = False) -> Scores:
    """Every chunk's repetition written out after the prompt, all of it read anew.

    Args:
        everything: the softmax is over all tokens and not over the chunk's part of them.
    """
    n, sinks, words = len(ids), policy.sinks, policy.words
    found: Scores = []
    for start in range(sinks, n, policy.chunk):
        stop = min(start + policy.chunk, n)
        text = list(words.first if start == sinks else words.later)
        text += [ids[j] for j in range(start - policy.tail, start) if j >= sinks] + list(words.turn) + ids[start:stop]
        reader = Naive(model, Full(), 0)
        reader.run([*ids, *text], 1)
        for layer in range(reader.layers):
            found += [[[0.0] * n for _ in range(reader.kv_heads)]] if start == sinks else []
            for head, rows in enumerate(reader.rows[layer]):
                best = found[layer][head // reader.group]
                for row in rows[n:]:
                    part = {j: x for j, x in row.items() if everything or j < sinks or start <= j < stop or j >= n}
                    weights = softmax(part)
                    for j in range(start, stop):
                        best[j] = max(best[j], weights[j])
    return found


CASES = [
    (KVzip(chunk=64, words=WORDS), 40),  # one chunk
    (KVzip(chunk=12, words=WORDS), 40),  # 12 + 12 + 12 of the 36
    (KVzip(chunk=16, tail=3, words=WORDS), 37),  # the last one shorter, one token
    (KVzip(chunk=10, sinks=0, tail=0, words=WORDS), 25),
    (KVzip(chunk=3, sinks=2, words=WORDS), 12),  # tail reaches beyond the chunk before
    (KVzip(chunk=16), 40),  # no instruction
]


@pytest.mark.parametrize(("policy", "n"), CASES)
def test_scores(llama: Any, policy: KVzip, n: int) -> None:
    request = ask(n)
    seen = read(llama, request, policy)
    expected = torch.tensor(naive_scores(llama, request.ids, policy), dtype=torch.float64)
    for layer, found in enumerate(seen.layers):
        assert torch.allclose(found[policy.sequel], expected[layer][:, policy.sinks :], rtol=1e-9, atol=1e-12)


def test_the_softmax_is_over_the_chunk_its_text_and_the_first_tokens(llama: Any) -> None:
    """With several chunks that is another score than attention itself, and chooses others; with one it is the same."""
    request, policy = ask(40), KVzip(chunk=12, words=WORDS)
    part, whole = (torch.tensor(naive_scores(llama, request.ids, policy, all_)) for all_ in (False, True))
    assert (part >= whole).all() and not torch.allclose(part, whole, rtol=0.05)
    one = replace(policy, chunk=36)
    assert naive_scores(llama, request.ids, one) == naive_scores(llama, request.ids, one, everything=True)


def test_group_and_heads_alone() -> None:
    """No groups, and one KV head."""
    for heads in (4, 1):
        model = tiny("qwen3", torch.float64, num_key_value_heads=heads)
        policy, request = KVzip(chunk=11, words=WORDS), ask(30)
        expected = torch.tensor(naive_scores(model, request.ids, policy), dtype=torch.float64)
        for layer, found in enumerate(read(model, request, policy).layers):
            assert torch.allclose(found[policy.sequel], expected[layer][:, 4:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("context", [None, 30])
def test_kept(llama: Any, context: int | None) -> None:
    """Uniform, and of all layers and heads together; also where the question is not among what is repeated."""
    request, policy, budget = ask(40, context_tokens=context), KVzip(chunk=12, words=WORDS), 10
    n = context or 40
    scores = naive_scores(llama, request.ids[:n], policy)
    uniform, together = run(llama, request, Variant(policy, budget), Variant(replace(policy, allocate=Globally()), 10))
    order = [sorted(range(4, n), key=lambda j, s=head: -s[j]) for layer in scores for head in layer]
    kept = [head.tolist() for layer in uniform.kept_prompt for head in layer]
    assert kept == [[0, 1, 2, 3, *sorted(best[: budget - 4])] for best in order]

    flat = [head for layer in scores for head in layer]
    least = {(h, best[0]) for h, best in enumerate(order)}
    rest = [(h, j) for h, best in enumerate(order) for j in best[1:]]
    rest.sort(key=lambda at: -flat[at[0]][at[1]])
    chosen = least | set(rest[: budget * len(flat) - 5 * len(flat)])
    kept = [[j for j in head.tolist() if j >= 0] for layer in together.kept_prompt for head in layer]
    assert kept == [[0, 1, 2, 3, *sorted(j for h, j in chosen if h == head)] for head in range(len(flat))]
    assert sum(map(len, kept)) == budget * len(flat) and len(set(map(len, kept))) > 1


def test_a_prompt_that_is_all_first_tokens_is_not_repeated(llama: Any) -> None:
    for n in (1, 4):
        assert read(llama, ask(n), KVzip()).layers == []
        assert not run(llama, ask(n), Variant(KVzip(), 5))[0].error
    assert [len(text) for text in KVzip(words=WORDS).sequel.texts([1] * 5, [])] == [3 + 1 + 1]


# --- words and settings ---


def test_the_instruction_is_of_the_model_s_tokens() -> None:
    loaded = tiny_loaded()
    bound = KVzip().bind(shape_of(loaded))
    text = loaded.tokenizer.decode
    assert text(list(bound.words.first)) == "\n\nRepeat the previous context exactly."
    assert text(list(bound.words.later)).endswith("exactly, starting with ")
    assert text(list(bound.words.turn)) == "\n<assistant>"
    assert bound == KVzip() and bound.sequel != KVzip().sequel
    bare = KVzip(instruction="").bind(shape_of(replace(loaded, chat=False)))
    assert bare.words.first == () and text(list(bare.words.turn)) == "\n"
    assert KVzip().bind(replace(shape_of(loaded), encode=None)).words == Words()


@pytest.mark.parametrize("policy", ["kvzip", "snapkv policy/allocate=globally", "kvzip policy.allocate=null"])
def test_from_the_command_line(base: list[str], tmp_path: Path, policy: str) -> None:
    """The question is not repeated with `prompt_scope=context`; budgets add up over layers and heads."""
    options = ["budget=48", "limit=2", "prompt_scope=context", f"output_root={tmp_path}"]
    done = call("run", *base, *f"policy={policy}".split(), *options)
    assert done.code == 0, done.err
    for record in lines(done.folder):
        kept = torch.tensor(record["kept"]["prompt"]).float()
        assert record["context_tokens"] > 48 and kept.mean() == 48
        assert (kept.dim() == 0) == ("null" in policy)


def test_bad_settings() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"chunk": 0}, "chunk=0: valid: 1 or more"),
        ({"sinks": -1}, "sinks=-1: valid: a whole number, 0 or more"),
        ({"instruction": 3}, "instruction=3: valid: a text, '' for none"),
        ({"later": None}, "later=None: valid: a text"),
    ]
    for settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            KVzip(**settings)
