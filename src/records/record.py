"""One sample's outcome in one run: a line of predictions.jsonl. Nothing else writes such a line, or reads one.

A line is one flat JSON object: the fields below, then the policy's own measures, then the check value. A name that is
no field's is a measure's, so that what a later version adds is kept, too. docs/results.md is made from this schema.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from src.records.kinds import AMOUNT, ANY, FIGURES, FLAG, GRID, NAME, SCORE, TEXT, TEXTS, About, schema
from src.records.seal import CHECK, as_json, open_sealed, read_object, sealed, why_unreadable
from src.retention.store import Key

VERSION = 2  # of the schema: it grows when a field is added; a field never changes its meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one sample: who it is, what was said, what it cost. Numbers that are not known are None.

    `measures` are the policy's own figures, in a namespace of their own: none of them can pass for a field.

    Raises:
        ValueError: a measure has a field's name.
    """

    task: Annotated[str, About("task; with `id` and `prompt_hash` it names the sample", kind=NAME)]
    metric: Annotated[str | None, About("metric behind `score`", kind=TEXT)] = None
    id: Annotated[str, About("the sample's id within its task", kind=TEXT)]
    answers: Annotated[list[str] | None, About("reference answers", kind=TEXTS)] = None
    all_classes: Annotated[list[str] | None, About("valid classes, of a classification task", null=True)] = None
    length: Annotated[int | None, About("length that the data set names", "as the data set has it", null=True)] = None
    prompt_hash: Annotated[
        str, About("of the prompt's tokens: changed data is another sample; empty: no prompt", kind=TEXT)
    ]
    prompt_tokens: Annotated[int | None, About("length of the prompt", "tokens", AMOUNT)] = None
    truncated: Annotated[bool | None, About("the prompt was cut in the middle to fit", kind=FLAG)] = None
    context_tokens: Annotated[
        int | None,
        About("what the policy chose from, where that is not the whole prompt (`prompt_scope`)", "tokens", AMOUNT),
    ] = None
    needle: Annotated[
        list[int] | None, About("start and stop of the sentence that holds the answer, if known", "tokens", GRID)
    ] = None
    prediction: Annotated[str | None, About("generated text; empty where the sample failed", kind=TEXT)] = None
    thinking: Annotated[Any, About("what was done about the model's thoughts")] = None
    thought: Annotated[
        str | None, About("thought in the prediction: none, empty, finished or unfinished (scores 0)")
    ] = None
    thought_tokens: Annotated[int | None, About("length of the thought", "tokens")] = None
    answer: Annotated[str | None, About("part of the prediction that was scored, where it holds a thought")] = None
    new_tokens: Annotated[int | None, About("generated tokens, the stop token included", "tokens", AMOUNT)] = None
    beyond_context: Annotated[
        int | None, About("how far the text went beyond the positions that the model was made for", "tokens")
    ] = None
    finish: Annotated[str | None, About("what ended the answer: stop or length", kind=TEXT)] = None
    score: Annotated[float | None, About("by the task's official metric; null: failed", "0 to 100", SCORE, True)] = None
    extra_scores: Annotated[
        dict[str, Any] | None, About("scores beside the official one, by name", "0 to 100", FIGURES)
    ] = None
    kept: Annotated[
        dict[str, Any] | None,
        About("entries held after the `prompt` and at the `end`; a list where layers differ", "entries per KV head"),
    ] = None
    kv_bytes: Annotated[float | None, About("keys and values right after the prompt was cut", "bytes", AMOUNT)] = None
    kv_bytes_device: Annotated[
        float | None, About("the part on the device, where some lies in host memory", "bytes", AMOUNT)
    ] = None
    kv_bytes_host: Annotated[float | None, About("the part in host memory", "bytes", AMOUNT)] = None
    kv_bytes_peak: Annotated[float | None, About("the most that keys and values took", "bytes", AMOUNT)] = None
    kv_byte_steps: Annotated[
        float | None,
        About("keys and values held after each decoding step, summed over the steps", "bytes x steps", AMOUNT),
    ] = None
    kv_bytes_cutting: Annotated[
        float | None,
        About(
            "the most that keys and values took while the prompt was cut, where layers shrank again", "bytes", AMOUNT
        ),
    ] = None
    kv_bytes_full: Annotated[float | None, About("what the full cache takes at the cut", "bytes", AMOUNT)] = None
    bookkeeping_bytes: Annotated[float | None, About("positions and the policy's own state", "bytes", AMOUNT)] = None
    seconds: Annotated[float | None, About("prefill and decode together", "seconds", AMOUNT)] = None
    prefill_seconds: Annotated[
        float | None,
        About(
            "the one pass over the prompt, and a policy's own before it, but for a foreseen answer's", "seconds", AMOUNT
        ),
    ] = None
    decode_seconds: Annotated[
        float | None, About("the sample's share of its batch's steps (step time / lanes, summed)", "seconds", AMOUNT)
    ] = None
    decode_steps: Annotated[float | None, About("tokens read one by one", "steps", AMOUNT)] = None
    lanes: Annotated[float | None, About("lanes decoded together when the sample began", "lanes", AMOUNT)] = None
    peak_bytes: Annotated[float | None, About("peak memory; of earlier versions", "bytes", AMOUNT)] = None
    peak_prefill_bytes: Annotated[float | None, About("the same, of the prefill", "bytes", AMOUNT)] = None
    peak_decode_bytes: Annotated[float | None, About("the same, of decoding", "bytes", AMOUNT)] = None
    fidelity: Annotated[
        dict[str, Any] | None,
        About(
            "with `fidelity=true`, along the reference answer: `nll`, `kl` to the full cache, `top1` agreement, "
            "`output_error` by layer, `tokens`",
            "nats per token; nats per token; share; relative; tokens", FIGURES, True,
        ),
    ] = None  # fmt: skip
    error: Annotated[str | None, About("why there is no score; such a sample runs again", kind=TEXT, null=True)] = None
    schema_version: Annotated[
        int, About("version of this schema; a line without is from before there were any", kind=AMOUNT)
    ] = field(default=VERSION, compare=False)
    measures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := reserved(self.measures):
            raise ValueError(f"{taken[0]} is a record's own field, no measure")

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Record:
        """The record in a line's fields, without the check value. Raises ValueError: what is wrong, in half a line."""
        if why := fault(line):
            raise ValueError(why)
        own = {name: line[name] for name in FIELDS if name in line}
        measures = {name: value for name, value in line.items() if name not in FIELDS}
        return cls(**{"schema_version": 0, **own}, measures=measures)

    def as_dict(self) -> dict[str, Any]:
        """The fields of its line, without the check value."""
        values = {name: getattr(self, name) for name in FIELDS}
        if not self.schema_version:
            del values["schema_version"]
        own = {name: value for name, value in values.items() if value is not None or FIELDS[name].null}
        return {**own, **self.measures}

    def line(self) -> bytes:
        """Its line, with the check value and the line end. Raises ValueError: a number that is not finite."""
        return (as_json(sealed(self.as_dict())) + "\n").encode()

    @property
    def key(self) -> Key:
        """What makes two runs' samples the same sample."""
        return self.task, self.id, self.prompt_hash

    @property
    def scored(self) -> str:
        """What the score is of: the prediction, or what follows its thought."""
        return (self.prediction if self.answer is None else self.answer) or ""

    @property
    def succeeded(self) -> bool:
        """It ran to its end. A failed sample keeps its reason in `error` and is tried again by the next run."""
        return not self.error and self.score is not None

    @property
    def cut(self) -> int:
        """Tokens that the policy chose from; kept positions are of these. Raises ValueError: not known."""
        tokens = self.prompt_tokens if self.context_tokens is None else self.context_tokens
        if tokens is None:
            raise ValueError(f"{self.task} {self.id}: lacks prompt_tokens")
        return int(tokens)

    @property
    def steps(self) -> float:
        """Decoding steps; before `decode_steps` was recorded, all new tokens but the first. Raises ValueError."""
        if self.decode_steps is not None:
            return self.decode_steps
        if self.new_tokens is None:
            raise ValueError(f"{self.task} {self.id}: lacks new_tokens")
        return max(self.new_tokens - 1, 0)


FIELDS = schema(Record)  # name -> what it is about, in the order of a line

# Measures that something in this project shows or computes from. A policy may record others.
MEASURES = {
    "score_slope": About(
        "slope of ln(score) against ln(position) when the prompt was cut, by layer and KV head; 0: no preference",
        kind=GRID,
    ),
    "score_slope_theory": About("the same for exchangeable logits (H2O's sums), by layer", kind=GRID),
    "score_by_octave": About(
        "score at positions 1, 2-3, 4-7, ..., by layer, mean over KV heads", "relative to its mean", GRID
    ),
    "codebook_bytes": About("what all samples of a model share beside the cache", "bytes", AMOUNT),
    "chosen_share": About("tokens attended to at a step, of all that were cached; mean", "share", AMOUNT),
    "chosen_by_layer": About("tokens attended to at a step, by layer, mean over query heads", "tokens", GRID),
    "chosen_by_step": About("the same, by step", "tokens"),
    "chosen_positions": About(
        "where in the prompt those stood that were held to the end, in 64 equal parts", "share of all chosen", GRID
    ),
}

NEEDED = ("task", "id", "prompt_hash")
CHECKED = {name: about.kind for name, about in {**FIELDS, **MEASURES}.items() if about.kind is not ANY}


def reserved(names: Collection[str]) -> list[str]:
    """Those of the names that no measure may have, sorted."""
    return sorted(name for name in names if name in FIELDS or name == CHECK)


def fault(line: Mapping[str, Any]) -> str | None:
    """What is wrong with a line's fields, in half a line; None: nothing. All but `NEEDED` may be missing or null."""
    for name, kind in CHECKED.items():
        value = line.get(name)
        if (value is not None or name in NEEDED) and not kind.sound(value):
            return f"{name} should be {kind.wanted}"
    return None


def read_line(line: bytes) -> tuple[Record | None, bool, str]:
    """The record in a line, whether the line carries a check value, and what is wrong with it."""
    try:
        content, has_check = open_sealed(read_object(line))
    except ValueError as error:
        return None, b'"check"' in line, why_unreadable(error)
    try:
        return Record.of(content), has_check, ""
    except ValueError as error:
        return None, has_check, str(error)
