"""One sample on its way through a session: prompt -> request for the engine -> record for the folder."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from evals.metrics import extra_scores, score_sample
from evals.prompts import Prompt, encode
from evals.tasks import Sample, Task
from evals.thoughts import find_thought
from src.config.settings import SessionSettings
from src.engine.request import Generation, Request
from src.errors import InputError
from src.models.load import LoadedModel
from src.records.record import Record, reserved
from src.retention.store import Key


@dataclass(frozen=True)
class Prepared:
    """A sample with its prompt, as the engine will see it."""

    sample: Sample
    prompt: Prompt
    ids: list[int]
    key: Key


def prepare(sample: Sample, model: LoadedModel) -> Prepared:
    """Tokenise; the key names the prompt by its tokens, so that changed data never passes for old."""
    form = model.form
    prompt = encode(sample, model.tokenizer, model.max_prompt_tokens, model.chat, form.kwargs, form.thinking, form.date)
    ids = model.fit_ids(prompt.ids)
    digest = hashlib.sha256(json.dumps([ids, prompt.context_tokens]).encode()).hexdigest()[:16]
    return Prepared(sample, prompt, ids, (sample.task.name, sample.id, digest))


def to_request(one: Prepared, model: LoadedModel, cfg: SessionSettings) -> Request:
    """What the engine is asked."""
    task, prompt = one.sample.task, one.prompt
    cut = cfg.prompt_scope == "context" and 0 < prompt.context_tokens < len(one.ids)
    longest = cfg.max_new_tokens or task.max_new_tokens
    return Request(
        name="/".join(one.key),
        ids=one.ids,
        stop_ids=stop_ids(task, model),
        max_new_tokens=longest,
        min_new_tokens=min(task.min_new_tokens if cfg.min_new_tokens is None else cfg.min_new_tokens, longest),
        context_tokens=prompt.context_tokens if cut else None,
        reference=reference(one, model, longest) if cfg.fidelity else None,
    )


def stop_ids(task: Task, model: LoadedModel) -> frozenset[int]:
    """What ends an answer: the model's stop tokens, or as the task's own protocol has it."""
    end = model.tokenizer.eos_token_id
    if task.only_eos and end in model.stop_ids:
        return frozenset({end})
    return model.stop_ids | (model.newline_ids() if task.stop_at_newline else frozenset())


def reference(one: Prepared, model: LoadedModel, longest: int) -> list[int]:
    """The reference output as the model would write it, cut to `longest`; with an end token, where there is one."""
    glued = not one.prompt.chat and not one.sample.prompt[-1:].isspace()
    answer = (" " if glued else "") + one.sample.reference
    ids = model.tokenizer.encode(answer, add_special_tokens=False)
    end = model.tokenizer.eos_token_id
    ids += [] if end is None else [end]
    if not ids:
        name = f"task {one.sample.task.name}, sample {one.sample.id}"
        raise InputError(f"fidelity=true: {name}: the reference answer has no tokens; valid: fidelity=false")
    return model.fit_ids(ids[:longest])


def to_record(one: Prepared, result: Generation, model: LoadedModel, cfg: SessionSettings) -> Record:
    """What becomes of the sample: a line of predictions.jsonl."""
    context, needle = result.request.context_tokens, one.prompt.needle
    start = Record(
        **describe(one.sample),
        prompt_hash=one.key[2],
        prompt_tokens=len(one.ids),
        truncated=one.prompt.truncated,
        context_tokens=context,
        needle=list(needle) if needle and needle[1] <= (len(one.ids) if context is None else context) else None,
    )
    if result.error:
        return failed(start, result.error)
    if taken := reserved(result.extra):  # a policy's figure must not pass for the score
        name = type(result.variant.policy).__name__
        return failed(start, f"policy {name}: measures gave {taken[0]!r}; expected names that no record has")
    said = spoken(one, result, model)
    score = score_sample(one.sample.task, said.answer, one.sample.answers, one.sample.all_classes, cfg.edit_similarity)
    split = result.kv_bytes_by_device if len(result.kv_bytes_by_device) > 1 else {}
    return replace(
        start,
        prediction=said.text,
        **said.thought,
        new_tokens=len(result.tokens),
        beyond_context=beyond_context(one, result, model),
        finish=result.finish,
        score=0.0 if said.thought.get("thought") == "unfinished" else score,
        extra_scores=extra_scores(one.sample.task, said.answer, one.sample.answers),
        kept={"prompt": entries(result.kept_prompt), "end": entries(result.kept_end)},
        kv_bytes=result.kv_bytes,
        kv_bytes_device=split.get("device"),
        kv_bytes_host=split.get("host"),
        kv_bytes_peak=result.kv_bytes_peak,
        kv_byte_steps=result.kv_byte_steps,
        kv_bytes_cutting=result.kv_bytes_cutting or None,
        kv_bytes_full=result.kv_bytes_full,
        bookkeeping_bytes=result.bookkeeping_bytes,
        seconds=result.prefill_seconds + result.decode_seconds,
        prefill_seconds=result.prefill_seconds,
        decode_seconds=result.decode_seconds,
        decode_steps=result.decode_steps,
        lanes=result.lanes,
        fidelity=result.fidelity,
        measures=result.extra,
    )


@dataclass(frozen=True)
class Spoken:
    """A prediction's text, the part of it that is scored, and the record's fields about a thought in it."""

    text: str
    answer: str
    thought: dict[str, Any]


def spoken(one: Prepared, result: Generation, model: LoadedModel) -> Spoken:
    """Decode. Where the model thought, the marks of the thought stay in the text, although some are special tokens.

    The record says of a thought: `thinking` (what was done about it), `thought` (none, empty, finished, unfinished),
    `thought_tokens` and `answer` (what is scored). Nothing of it where neither model nor prediction has to do with it.
    """
    tokenizer, tokens = model.tokenizer, result.tokens
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    whole = tokens[:-1] if result.finish == "stop" else tokens  # without the token that ended it
    marked = str(tokenizer.decode(whole, skip_special_tokens=False))
    found = find_thought(marked, one.prompt.thought)
    fields: dict[str, Any] = {"thinking": model.form.thinking_note} if model.form.thinking_note else {}
    if found.state == "none":
        return Spoken(text, text, {**fields, "thought": "none"} if fields else {})
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    def plain(part: str) -> str:
        for token in special:
            part = part.replace(token, "")
        return part

    count = len(whole)
    if found.state != "unfinished":
        count = bisect_left(range(count), found.end, key=lambda n: len(tokenizer.decode(whole[:n])))
    answer = plain(found.answer)
    fields |= {"thought": found.state, "thought_tokens": count, "answer": answer}
    return Spoken(marked[: found.end] + plain(marked[found.end :]), answer, fields)


def beyond_context(one: Prepared, result: Generation, model: LoadedModel) -> int | None:
    """By how many tokens the text went beyond the positions that the model was made for; None: it did not."""
    beyond = len(one.ids) + len(result.tokens) - model.context_length
    return beyond if beyond > 0 else None


def malformed_record(sample: Sample) -> Record:
    """The record of a row that has no prompt."""
    assert sample.error
    return failed(Record(**describe(sample), prompt_hash="", prompt_tokens=0, truncated=False), sample.error)


def describe(sample: Sample) -> dict[str, Any]:
    """A record's fields that are the sample's own."""
    return {
        "task": sample.task.name,
        "metric": sample.task.metric,
        "id": sample.id,
        "answers": list(sample.answers),
        "all_classes": list(sample.all_classes) if sample.all_classes else None,
        "length": sample.length,
    }


def failed(start: Record, reason: str) -> Record:
    return replace(start, prediction="", new_tokens=0, score=None, error=reason)


def entries(kept: Sequence[Tensor]) -> int | list[int] | list[list[int]]:
    """Entries per KV head: one number when all layers hold equally many, a list of lists where heads differ.

    Args:
        kept: per layer, positions `(kv_heads, k)`, -1 where there is none.
    """
    heads = [(layer >= 0).sum(dim=-1).tolist() for layer in kept]
    if any(len(set(counts)) > 1 for counts in heads):
        return heads
    counts = [layer[0] for layer in heads]
    return counts[0] if len(set(counts)) == 1 else counts


def refuse_missing_references(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if not sample.error and not any(answer.strip() for answer in sample.answers[:1]):
            raise InputError(
                f"fidelity=true: task {sample.task.name}, sample {sample.id} has no reference answer; "
                "valid: fidelity=false, or tasks with answers"
            )
