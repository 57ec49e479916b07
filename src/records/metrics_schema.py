"""The fields of metrics.json: what each means, and in which unit. docs/results.md is made from them.

Means are over samples, of `average` and `fidelity` over tasks; a failed sample is in no mean.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from src.records.kinds import About, schema
from src.retention.per_head import PER_HEAD

NAMES = ", ".join(f"`{name}`" for name in PER_HEAD)


class TaskFigures(TypedDict, total=False):
    """`tasks`: one object per task."""

    score: Annotated[float | None, About("mean score", "0 to 100")]
    n: Annotated[int, About("samples with a score", "samples")]
    stderr: Annotated[float | None, About("standard error of `score`; null below two samples", "0 to 100")]
    metric: Annotated[str | None, About("the task's metric")]
    failed: Annotated[int, About("samples without a score", "samples")]
    extra_scores: Annotated[dict[str, Any], About("mean of each score beside the official one", "0 to 100")]
    fidelity: Annotated[dict[str, Any], About("mean of each fidelity figure of a record, and of how many samples, `n`")]


class Memory(TypedDict, total=False):
    """`memory`: of the caches, and of the processes."""

    kv_bytes_mean: Annotated[float | None, About("keys and values right after the prompt was cut", "bytes per sample")]
    kv_bytes_full_mean: Annotated[float | None, About("the same of the full cache", "bytes per sample")]
    ratio: Annotated[float | None, About("`kv_bytes_mean` / `kv_bytes_full_mean`", "share")]
    kv_bytes_device_mean: Annotated[
        float | None, About("the part on the device, where some lies in host memory", "bytes per sample")
    ]
    kv_bytes_host_mean: Annotated[float | None, About("the part in host memory", "bytes per sample")]
    codebook_bytes: Annotated[float, About("what all samples of a model share beside the cache", "bytes")]
    device_ratio: Annotated[float, About("`kv_bytes_device_mean` / `kv_bytes_full_mean`", "share")]
    device_ratio_with_codebooks: Annotated[
        float, About("the same with `codebook_bytes` counted to one sample", "share")
    ]
    chosen_share_mean: Annotated[float | None, About("tokens attended to at a step, of all that were cached", "share")]
    kv_bytes_peak_mean: Annotated[float | None, About("the most that keys and values took", "bytes per sample")]
    kv_bytes_peak_max: Annotated[int | None, About("the same of the largest sample", "bytes")]
    bookkeeping_bytes_mean: Annotated[float | None, About("positions and the policy's own state", "bytes per sample")]
    total_bytes_mean: Annotated[float | None, About("`kv_bytes_mean` + `bookkeeping_bytes_mean`", "bytes per sample")]
    total_ratio: Annotated[float | None, About("`total_bytes_mean` / `kv_bytes_full_mean`", "share")]
    peak_bytes: Annotated[int | None, About("peak memory; on a CPU the whole process's", "bytes")]
    peak_prefill_bytes: Annotated[int | None, About("the same during prefills; null on a CPU", "bytes")]
    peak_decode_bytes: Annotated[int | None, About("the same while decoding; null on a CPU", "bytes")]


class Speed(TypedDict, total=False):
    """`speed`: of a shared batch; a single policy's is what `src.bench` says."""

    prefill_seconds: Annotated[
        float | None,
        About(
            "the one pass over the prompt, and a policy's own before it, but for a foreseen answer's",
            "seconds per sample",
        ),
    ]
    decode_tokens_per_second: Annotated[float | None, About("decoding steps / decoding seconds", "tokens per second")]
    lanes: Annotated[float | None, About("lanes that a sample shared its steps with", "lanes per sample")]


class Thoughts(TypedDict, total=False):
    """`thoughts`: only where predictions hold some."""

    empty: Annotated[int, About("marks with nothing between them", "samples")]
    finished: Annotated[int, About("thoughts that an answer follows", "samples")]
    unfinished: Annotated[int, About("thoughts that were cut; they score 0", "samples")]
    tokens_mean: Annotated[float | None, About("length of a thought", "tokens")]


class Retention(TypedDict, total=False):
    """`retention`: where in the prompt the kept entries lie; mean over samples, layers and KV heads.

    After `decile_shares` stand the measures of `src.retention.per_head` (`retention_fields` has them too).
    """

    samples: Annotated[int, About("samples whose kept positions are known", "samples")]
    only_counts: Annotated[int, About("of these with counts in bins only (`retention=bins`)", "samples")]
    kept_whole: Annotated[int, About("of these with the whole prompt kept", "samples")]
    kept_mean: Annotated[float, About("prompt entries kept", "entries per KV head")]
    recent_mean: Annotated[float | None, About("recent window that all heads kept", "entries per KV head")]
    generated_mean: Annotated[float, About("generated tokens held at the end", "entries per KV head")]
    decile_shares: Annotated[list[float], About("kept entries in each tenth of the prompt", "share of the kept")]
    kl_uniform: Annotated[float, About("KL of the histogram to an even one", "nats")]
    gini: Annotated[float, About("unevenness of the histogram: 0 even, 1 all in one place")]
    first_to_last_decile: Annotated[float | None, About("share in the first tenth / share in the last", "ratio")]
    drift: Annotated[float | None, About("kept entries that were gone when decoding ended", "share of the kept")]
    histogram: Annotated[
        list[float], About("kept entries in each of 64 equal parts of the prompt", "share of the kept")
    ]
    heavy: Annotated[
        Any, About("the measures above but `drift`, without the recent window; null: nothing else was kept")
    ]
    per_layer: Annotated[
        Any,
        About(f"{NAMES}, `kl_uniform`, `gini`, `drift`, `first_decile` and `last_decile`, lists over layers"),
    ]
    heavy_per_layer: Annotated[Any, About("the same of `heavy`")]
    per_head: Annotated[Any, About("the same, each a list over layers of lists over KV heads")]
    heavy_per_head: Annotated[Any, About("the same of `heavy`")]
    per_task: Annotated[Any, About("the same measures for each task")]
    needle: Annotated[
        Any, About("of the sentence that holds the answer: kept `after_prompt` and `at_end`; in how many samples a "
                   "head kept all of it (`whole_in_some_head`)", "share")
    ]  # fmt: skip
    score_slope: Annotated[
        Any, About("slope of ln(score) against ln(position): `mean`, and `theory` for exchangeable logits; 0: no "
                   "preference")
    ]  # fmt: skip
    chosen: Annotated[Any, About("the same measures of the tokens attended to, where a policy keeps all and chooses")]


def retention_fields() -> dict[str, About]:
    """Every field of `retention`, in the order of metrics.json."""
    fields: dict[str, About] = {}
    for name, about in schema(Retention).items():
        fields[name] = about
        if name == "decile_shares":
            fields |= {name: About(measure.what, measure.unit) for name, measure in PER_HEAD.items()}
    return fields


class Metrics(TypedDict, total=False):
    """metrics.json."""

    policy: Annotated[str, About("the policy's name")]
    model: Annotated[str, About("the model's name")]
    budget: Annotated[float | None, About("entries per layer and KV head, or share of the prompt (up to 1); null: all")]
    average: Annotated[float | None, About("mean of the tasks' scores", "0 to 100")]
    samples: Annotated[int, About("samples with a score", "samples")]
    failed: Annotated[int, About("samples without a score", "samples")]
    tasks: Annotated[dict[str, TaskFigures], About("figures of each task")]
    fidelity: Annotated[
        dict[str, Any] | None, About("mean of the tasks' fidelity figures; `n`: samples; null: not measured")
    ]
    memory: Annotated[Memory, About("bytes of the caches and of the processes")]
    speed: Annotated[Speed, About("seconds and steps")]
    truncated_prompts: Annotated[int, About("prompts cut in the middle to fit", "samples")]
    stopped_by_length: Annotated[int, About("answers that ended at the token limit", "samples")]
    thoughts: Annotated[Thoughts, About("predictions that hold a thought; only where some do")]
    retention: Annotated[dict[str, Any], About("where the kept entries lie; empty with `retention=off`")]
    comparability: Annotated[dict[str, Any], About("what must be equal for two runs' numbers to be comparable")]
    missing: Annotated[list[list[str]], About("task and id of samples that an interrupted run still lacks")]
    reconstruction: Annotated[str, About("where the policy's formulas come from, if it is our reconstruction")]
    settings_hash: Annotated[str, About("of settings.json, as in the folder's name", "8 hex digits")]
