"""Reading what policies ask for after a prompt, without and with the rest of a run."""

from typing import Any

import torch

from policies.kvzip import Words
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.engine.sequels import Seen, SequelReader
from tests.support.tiny import tokens

WORDS = Words((5, 6, 7), (8, 9), (3,))


def ask(n: int, **more: Any) -> Request:
    return Request(f"{n}", tokens(n, seed=n)[0].tolist(), frozenset(), more.pop("max_new_tokens", 4), **more)


def read(model: Any, request: Request, *policies: Any) -> Seen:
    engine = Engine(model, 64)
    with torch.inference_mode():
        reader = SequelReader(model, engine.memory, engine._full_answer, engine.lengths.refusal)
        return reader.read(Job(request, [Variant(policy, 12) for policy in policies]))


def run(model: Any, request: Request, *variants: Variant) -> list[Generation]:
    done = {generation.variant: generation for generation in Engine(model, 64).run([Job(request, variants)])}
    return [done[variant] for variant in variants]
