"""What a policy has read after the prompt, with the full cache, before it is cut (`Policy.sequel`)."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.full import Full
from policies.kvzip import Globally, KVzip, Repetition
from policies.oracle import Oracle
from policies.snapkv import SnapKV
from src.engine.engine import Engine
from src.engine.memory import allocated_peak
from src.engine.request import Job, Variant
from src.engine.sequels import Seen, attend_after
from src.kv.prompt import BLOCK_ELEMENTS, PromptAttention
from src.kv.sequel import Sequel
from tests.support import naive
from tests.support.allotting import prompt
from tests.support.sequels import WORDS, ask, read, run
from tests.support.tiny import tiny
from tests.support.watch import logits_of

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", torch.float64)


def test_the_last_rows_of_a_text_attend_to_all_before_them() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 30, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    whole = attend_after(q, k, v, 0.3)
    for new in (1, 7, 30):
        assert torch.allclose(attend_after(q[:, :, -new:], k, v, 0.3), whole[:, -new:])
    rows = torch.einsum("hid,hjd->hij", q[0] * 0.3, k[0].repeat_interleave(2, 0))
    rows = rows.masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert torch.allclose(whole[0].transpose(0, 1), rows @ v[0].repeat_interleave(2, 0))


def test_statistics_of_the_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries than keys: as the whole prompt's, of those rows; in one block or in many."""
    whole = prompt(40)
    for elements in (1, 2_400_000):
        monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", elements)
        last = PromptAttention(whole.queries[:, 15:], whole.keys, whole.values, whole.scaling, 0, 1)
        weights = whole.window_weights(25)
        assert torch.allclose(last.column_max(), weights.amax(dim=2))
        assert torch.allclose(last.column_sums(first_row=15), weights.sum(dim=2))
        assert torch.allclose(last.column_sums(first_row=20), weights[:, :, 5:].sum(dim=2))
        assert torch.equal(last.window_logits(9), prompt(40).window_logits(9))


def test_equal_sequels_are_read_once(llama: Any) -> None:
    """Three texts after the prompt: three passes for all cells that ask the same, whatever they keep."""
    policy, request = KVzip(chunk=12, words=WORDS), ask(40)
    cells = [Variant(policy, 8), Variant(policy, 12), Variant(replace(policy, allocate=Globally()), 12)]
    steps = len(logits_of(llama, lambda: run(llama, request, Variant(Full(), None))))
    assert len(logits_of(llama, lambda: run(llama, request, *cells))) == 3 + steps
    other = Variant(replace(policy, chunk=36), 8)
    assert len(logits_of(llama, lambda: run(llama, request, *cells, other))) == 3 + 1 + steps


def test_cells_beside_it_are_what_they_are_alone(llama: Any) -> None:
    cells = [Variant(SnapKV(window=4), 12), Variant(Oracle(), 12), Variant(KVzip(chunk=12), 12), Variant(Full(), None)]
    request = ask(40, max_new_tokens=8)
    for together, cell in zip(run(llama, request, *cells), cells, strict=True):
        (alone,) = run(llama, request, cell)
        assert alone.tokens == together.tokens
        assert all(map(torch.equal, alone.kept_prompt, together.kept_prompt))


def test_what_it_costs_is_its_own(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to the seconds of who asked for it, and of no other; what nobody could know is not counted."""
    cells = [Variant(SnapKV(window=4), 12), Variant(Oracle(), 12), Variant(KVzip(chunk=12), 12)]
    monkeypatch.setattr(Seen, "cost", lambda seen, policy, own=Seen.cost: 1000 * bool(own(seen, policy)))
    snap, oracle, zipped = (generation.prefill_seconds for generation in run(llama, ask(40), *cells))
    assert snap == oracle < 1000 and zipped == snap + 1000


def test_memory_stays_linear() -> None:
    """No n x n: with 8 times the chunk's tokens, less than one head's matrix, and not much for more chunks."""
    model = tiny("llama", num_hidden_layers=1)
    policy, n = KVzip(chunk=512), 4096

    def peak(n: int) -> int:
        request = ask(n)
        return allocated_peak(lambda: read(model, request, policy))

    assert peak(n) < n * n * 4
    assert peak(n) < 2.5 * peak(n // 2)


@dataclass(frozen=True)
class Odd(Repetition):
    """Gives way where `where` says."""

    where: str = ""

    def texts(self, prompt: Any, rest: Any) -> Any:
        return [[1] * 70] if self.where == "long" else 1 / 0 if self.where == "texts" else super().texts(prompt, rest)

    def see(self, read: PromptAttention, n: int, text: int) -> Tensor:
        if self.where == "see" and read.layer == 1:
            raise ValueError("nothing to see")
        return super().see(read, n, text)


@dataclass(frozen=True)
class OddZip(KVzip):
    where: str = ""

    @property
    def sequel(self) -> Sequel:
        return Odd(self.sinks, self.chunk, self.tail, self.words, self.where)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("texts", "policy OddZip: sequel raised ZeroDivisionError: division by zero"),
        ("see", "policy OddZip: sequel raised ValueError: nothing to see (layer 1"),
        ("long", "policy OddZip: sequel asks for a text of 70 tokens after 40: model type gpt2 has a table of 100 pos"),
    ],
)
def test_what_it_does_wrong_is_its_own(llama: Any, where: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(llama, 64)
    if where == "long":
        limit = "model type gpt2 has a table of 100 positions"
        monkeypatch.setattr(type(engine.lengths), "refusal", lambda self, n, last: limit if last > 100 else None)
    good, bad = Variant(KVzip(chunk=12), 12), Variant(OddZip(where=where), 12)
    done = {g.variant: g for g in engine.run([Job(ask(40), [bad, good])])}
    assert (done[bad].error or "").startswith(said)
    (alone,) = run(llama, ask(40), good)
    assert not done[good].error and done[good].tokens == alone.tokens
