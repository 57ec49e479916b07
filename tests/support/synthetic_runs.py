"""Finished run folders without a model: scores, answers and kept positions that look like a real study's."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from src.records.files import run_path
from src.records.folder import RunFolder
from src.records.record import Record
from src.retention.store import Kept

COMPARABILITY = {
    "max_prompt_tokens": 7500,
    "chat_template": True,
    "rouge": "rouge 1.0.1",
    "edit_similarity": "levenshtein",
    "prompt_scope": "whole prompt",
    "random_weights": False,
    "dtype": "float32",
    "task_versions": {"qasper": 1, "trec": 1, "needle": 1},
}
METRICS = {"qasper": "qa_f1", "trec": "classification", "needle": "exact"}
LAYERS, HEADS = 6, 2
STRENGTH = {"full": 1.0, "snapkv": 0.9, "ahakv": 0.88, "h2o": 0.75, "streaming_llm": 0.5}
Score = Callable[[str, int], float | None]


def record(task: str, number: int, score: float | None, budget: float, n: int = 400, **more: Any) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    kept = n if budget >= n else int(budget if budget > 1 else budget * n)
    size = LAYERS * HEADS * 64 * 2 * 4
    line = {
        "task": task,
        "id": f"{task}-{number:03d}",
        "prompt_hash": hashlib.sha256(f"{task}{number}".encode()).hexdigest()[:16],
        "prompt_tokens": n,
        "new_tokens": 8,
        "prediction": f"answer {number}" if score else "something else",
        "answers": [f"answer {number}"],
        "all_classes": None,
        "length": n,
        "score": score,
        "extra_scores": {},
        "kept": {"prompt": kept, "end": kept + 7},
        "kv_bytes": kept * size,
        "kv_bytes_peak": (kept + 7) * size,
        "bookkeeping_bytes": kept * 8,
        "kv_bytes_full": n * size,
        "seconds": 1.0,
        "prefill_seconds": 0.8,
        "decode_seconds": 0.2,
        "lanes": 3,
        "truncated": False,
        "finish": "stop",
        "fidelity": None,
        "error": None if score is not None else "out of memory",
    }
    return {**line, **more}


def write_run(
    root: Path,
    policy: str = "snapkv",
    budget: float | int = 64,
    records: Iterable[dict[str, Any]] = (),
    *,
    options: dict[str, Any] | None = None,
    model: str = "tiny",
    comparability: dict[str, Any] | None = None,
    kept: Callable[[dict[str, Any]], Kept | None] = lambda _: None,
    finish: bool = True,
    **config: Any,
) -> Path:
    """A folder as src.run writes it, by the same code."""
    policy_settings = {"name": policy, **(options or {})}
    settings = {"policy": policy_settings, "model": {"name": model}, "budget": budget, "seed": 0, **config}
    path = run_path(root, model, policy, budget, settings)
    environment = {
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "git": {"commit": "abc123"},
    }
    with RunFolder(path, settings, yaml.safe_dump({**settings, "limit": None}), environment) as folder:
        for line in records:
            folder.append(Record.of(line), kept(line))
        if finish:
            folder.finish(
                policy=policy,
                model=model,
                budget=budget,
                comparability={**COMPARABILITY, **(comparability or {})},
                task_metrics=METRICS,
                plot=False,
            )
    return path


def scores(policy: str, budget: float, seed: int = 0) -> Score:
    """Deterministic scores: a sample's difficulty is shared by all policies, a small budget loses more."""

    def score(task: str, number: int) -> float:
        generator = np.random.default_rng([seed, number, *map(ord, task)])
        level = 100 * generator.beta(1.2, 0.8)
        share = 1.0 if policy == "full" else STRENGTH.get(policy, 0.7) ** (1 + 256 / max(budget, 1) / 2)
        return float(np.round(level * share, 2)) if task != "needle" else 100.0 * (generator.random() < share)

    return score


def kept_positions(policy: str, budget: int, seed: int = 0) -> Callable[[dict[str, Any]], Kept]:
    """A recent window, and the rest where this policy likes it."""

    def keep(line: dict[str, Any]) -> Kept:
        n = line["prompt_tokens"]
        generator = np.random.default_rng([seed, n, len(policy)])
        x = np.arange(n) / n
        taste = {"h2o": np.exp(-3 * x), "streaming_llm": np.exp(20 * (x - 1))}.get(policy, np.ones(n))
        layers = []
        for layer in range(LAYERS):
            weights = taste * (1 + layer * 0.2 * x) + 1e-9
            free = n - 16
            picks = [
                generator.choice(free, min(budget, n) - 16, replace=False, p=weights[:free] / weights[:free].sum())
                for _ in range(HEADS)
            ]
            layers.append(np.array([[*sorted(p), *range(free, n)] for p in picks]))
        return Kept(layers)

    return keep


def write_study(
    root: Path,
    policies: Iterable[str] = ("streaming_llm", "h2o", "snapkv", "ahakv"),
    budgets: Iterable[int] = (64, 128, 256),
    per_task: int = 8,
    retention: bool = False,
    fidelity: bool = False,
) -> list[Path]:
    """The full cache and a grid of cells over three tasks."""
    cells = [("full", 400), *((policy, budget) for policy in policies for budget in budgets)]
    paths = []
    for policy, budget in cells:
        score = scores(policy, budget)
        lines = []
        for task in METRICS:
            for number in range(per_task):
                line = record(task, number, score(task, number), budget)
                if fidelity:
                    loss = 0.0 if policy == "full" else (1.05 - STRENGTH[policy]) * 20 / budget * (1 + number % 3)
                    line["fidelity"] = {"nll": 2.4 + loss / 2, "kl": loss, "top1": 1 - loss / 3}
                lines.append(line)
        kept = kept_positions(policy, budget) if retention else (lambda _: None)
        paths.append(write_run(root, policy, budget, lines, kept=kept))  # type: ignore[arg-type]
    return paths
