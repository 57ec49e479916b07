"""What the harness does with one architecture, through the doors that a user takes: `load_model`, then `Engine`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies.ahakv import AhaKV
from policies.base import Policy
from policies.full import Full
from policies.h2o import H2O
from policies.snapkv import SnapKV
from policies.streaming_llm import StreamingLLM
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.engine.rotary import Rotary
from src.errors import InputError
from src.models.load import LoadedModel, load_model
from tests.support.architectures.build import build
from tests.support.architectures.table import Architecture
from tests.support.tiny import tiny_tokenizer

PROMPTS = (1, 40)  # tokens
NEW = 8
BUDGET = 16
FULL = Variant(Full(), None)
EVICTING: dict[str, Policy] = {
    "h2o": H2O(),
    "snapkv": SnapKV(window=8),
    "ahakv": AhaKV(window=8),
    "streaming_llm, original": StreamingLLM(positions="original"),
}


@dataclass
class Outcome:
    """What happened to one architecture.

    Attributes:
        refused: the line with which it was refused at load; empty: it was served.
        tokens: full's tokens are those of `generate`, for every prompt.
        logits: largest difference of full's logits from the plain model's.
        faults: per evicting policy, what went wrong; empty when it kept to its budget.
        in_cache: the line with which in-cache positions were refused; empty: they were served.
        turning: largest relative error of queries that were turned back, over all layers.
        half: in bfloat16, how far full's logits are from the plain model's, relative, median over tokens.
    """

    refused: str = ""
    tokens: bool = False
    logits: float = float("nan")
    faults: dict[str, str] = field(default_factory=dict)
    in_cache: str = ""
    turning: float = float("nan")
    half: float = float("nan")

    @property
    def exact(self) -> bool:
        """Full gives what transformers gives."""
        return self.tokens and self.logits < 1e-3


def prompt(length: int) -> Tensor:
    """Token ids `(1, length)`, above the special ones."""
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def outcome(of: Architecture, half: bool = False) -> Outcome:
    """Try it.

    Args:
        half: whether to try bfloat16 as well.
    """
    found = Outcome()
    try:
        loaded = saved_and_loaded(build(of), "float32")
    except InputError as error:
        found.refused = str(error)
        return found
    plain = build(of)  # set to the attention that transformers chooses
    compare_full(found, plain, loaded.model)
    try_eviction(found, loaded.model)
    try_in_cache(found, loaded.model)
    if half:
        found.half = half_precision(saved_and_loaded(build(of), "bfloat16").model, build(of))
    return found


def saved_and_loaded(model: PreTrainedModel, dtype: str) -> LoadedModel:
    """A folder as a user may have it, loaded as a run loads it.

    Raises:
        InputError: the model is refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        settings = {"path": folder, "name": "tiny", "device": "cpu", "dtype": dtype, "max_prompt_tokens": max(PROMPTS)}
        try:
            return load_model(settings | {"chat": False, "context_length": 64})
        except InputError as error:
            raise InputError(str(error).replace(f"{Path(folder)}: ", "")) from None


def compare_full(found: Outcome, plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Full against `generate`: each prompt's tokens in one wave, and logits one prompt at a time."""
    right = [generated(plain, n) for n in PROMPTS]
    wave = run(model, [(n, FULL) for n in PROMPTS])
    found.tokens = [each.tokens for each in wave] == right
    differences = []
    for n, tokens in zip(PROMPTS, right, strict=True):
        with last_logits(model) as ours:
            run(model, [(n, FULL)])
        with last_logits(plain) as theirs:
            text = torch.cat([prompt(n), torch.tensor([tokens[:-1]])], dim=1)
            plain(text, use_cache=False)
        differences.append(float((torch.cat(ours)[:, -1] - theirs[0][0, n - 1 :]).abs().max()))
    found.logits = max(differences)


def generated(model: PreTrainedModel, length: int) -> list[int]:
    ids = prompt(length)
    model.generation_config.eos_token_id = None  # to its full length
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    new: list[int] = out[0, length:].tolist()
    return new


def run(model: PreTrainedModel, wanted: list[tuple[int, Variant]]) -> list[Generation]:
    """Prompts of these lengths under these variants, all in one wave, in this order."""
    jobs = [Job(Request(str(i), prompt(n)[0].tolist(), frozenset(), NEW), [v]) for i, (n, v) in enumerate(wanted)]
    return sorted(Engine(model, len(jobs)).run(jobs), key=lambda g: int(g.request.name))


@contextmanager
def last_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The logits of every forward pass, `(1, tokens, vocabulary)`."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, given, out: seen.append(out.logits[:, -NEW - max(PROMPTS) :]))
    try:
        yield seen
    finally:
        hook.remove()


def try_eviction(found: Outcome, model: PreTrainedModel) -> None:
    """Every policy beside full in one wave: each keeps to its budget, and full is not disturbed."""
    length = max(PROMPTS)
    full, *others = run(model, [(length, FULL)] + [(length, Variant(p, BUDGET)) for p in EVICTING.values()])
    if full.tokens != run(model, [(length, FULL)])[0].tokens:
        found.faults["full"] = "differs when others share its wave"
    for (name, policy), result in zip(EVICTING.items(), others, strict=True):
        most = BUDGET if policy.evicts_while_decoding else BUDGET + NEW
        held = max(layer.shape[-1] for layer in result.kept_end)
        if result.error or len(result.tokens) != NEW:
            found.faults[name] = f"{len(result.tokens)} tokens, {result.error}"
        elif held > most or max(layer.shape[-1] for layer in result.kept_prompt) > BUDGET:
            found.faults[name] = f"holds {held} entries of {most}"


class Queries:
    """Lanes that only note every layer's queries, `(1, heads, n, head_dim)`."""

    longest = max(PROMPTS)

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, whole: Any) -> Tensor:
        self.seen[layer] = query
        return whole(query, key, value)


def try_in_cache(found: Outcome, model: PreTrainedModel) -> None:
    """Queries at p + 17, turned back by 17, against those at p; and one run."""
    length, shift = max(PROMPTS), 17
    try:
        (result,) = run(model, [(length, Variant(StreamingLLM(), BUDGET))])
    except InputError as error:
        found.in_cache = str(error)
        return
    if len(result.tokens) != NEW:
        found.faults["streaming_llm"] = str(result.error)
    rotary, near, far = Rotary(model), Queries(), Queries()
    for offset, watch in ((0, near), (shift, far)):
        model(prompt(length), position_ids=torch.arange(length)[None] + offset, use_cache=False, lanes=watch)
    errors = []
    for layer, right in near.seen.items():
        back = rotary.turn(far.seen[layer], torch.tensor([-shift]), layer)
        errors.append(float((back - right).norm() / right.norm()))
    found.turning = max(errors)


def half_precision(model: PreTrainedModel, plain: PreTrainedModel) -> float:
    """How far bfloat16's logits are from float32's when the same text is read through the cache."""
    length = max(PROMPTS)
    with last_logits(model) as ours:
        (result,) = run(model, [(length, FULL)])
    text = torch.cat([prompt(length), torch.tensor([result.tokens[:-1]])], dim=1)
    right = plain(text, use_cache=False).logits[0, length - 1 :]
    difference = (torch.cat(ours)[:, -1].float() - right).norm(dim=-1) / (right - right.mean(-1, keepdim=True)).norm(
        dim=-1
    )
    return float(difference.median())
