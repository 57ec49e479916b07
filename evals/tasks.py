"""What a task and a sample are."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """How one task is asked and scored. `version` is raised whenever its scores are no longer comparable."""

    name: str
    suite: str
    metric: str  # a name of evals.metrics.METRICS or evals.longgen_metrics.KINDS
    max_new_tokens: int
    chat: bool  # wrap the prompt in the model's chat template
    first_line: bool  # only the prediction's first line is scored (leading newlines are skipped)
    stop_at_newline: bool
    only_eos: bool = False  # the end-of-sequence token ends it, none of the model's other stop tokens
    min_new_tokens: int = 0
    version: int = 1


@dataclass(frozen=True)
class Sample:
    """One prompt. `before` ends with the context; `after` is the question part and what follows it.

    `error` says why there is no prompt: the row was malformed, and `broken="record"` was asked for.
    """

    task: Task
    id: str
    before: str
    after: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None = None
    length: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def prompt(self) -> str:
        return self.before + self.after

    @property
    def reference(self) -> str:
        """What measures that read a reference output along read: the first answer, unless the suite says otherwise."""
        return self.extra.get("reference") or self.answers[0]
