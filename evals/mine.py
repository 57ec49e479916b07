"""Tasks of your own: one JSON-lines file, a prompt and its answers a row.

    {"context": "Ada lives in Bonn. ...", "question": "Where does Ada live?", "answers": ["Bonn"]}
    {"prompt": "The colour of grass is", "answers": "green", "task": "colours", "id": "grass"}

A row has `prompt` (asked as it stands) or `context` and `question` (put into the template); `answers`, one text or
several, of which the best counts; and may have `task` (else the file's name), `id` (else its number in the file, from
0) and `choices`, the classes of `classification_score`. Other fields are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.errors import DataError
from evals.longgen_metrics import KINDS
from evals.metrics import METRICS
from evals.rows import Broken, check_field, is_text, parse_format, read_rows, some_texts, split_prompt
from evals.tasks import Sample, Task

TEMPLATE = "{context}\n\n{question}"
DECIDING = ("metric", "max_new_tokens", "template")  # what changes an outcome; `file` only says which samples there are
CLASSES = "classification_score"
NAME = re.compile(r"[A-Za-z0-9_.]{1,60}")  # without a dash: names of files are <task>-<id>


def check(options: Mapping[str, Any]) -> None:
    """Raise a DataError for a setting that cannot be used. Nothing is read for it."""
    metric, new, template = (options.get(name) for name in DECIDING)
    valid = (*METRICS, *KINDS)
    if "metric" in options and metric not in valid:
        raise DataError(f"tasks.metric={metric}: unknown; valid: {', '.join(valid)}")
    if "max_new_tokens" in options and (type(new) is not int or new < 1):
        raise DataError(f"tasks.max_new_tokens={new}: valid: 1 or more")
    if "template" in options:
        try:
            if not isinstance(template, str):
                raise ValueError("valid: a text with {context} and {question}")
            if "question" not in [field for _, field in parse_format(template, "question")]:
                raise ValueError("has no {question}; valid: {context} and {question}, and {{ or }} for a brace")
        except ValueError as error:
            raise DataError(f"tasks.template={template}: {error}") from None


def load(
    names: list[str],
    limit: int | None,
    file: str | None = None,
    metric: str = "qa_f1_score",
    max_new_tokens: int = 64,
    template: str = TEMPLATE,
    broken: str = "refuse",
) -> list[Sample]:
    """The samples of the named tasks (of all without names), in the order of the file, at most `limit` a task.

    Raises:
        DataError: a setting, a task that the file does not have, or a row; it names file and line.
    """
    check({"metric": metric, "max_new_tokens": max_new_tokens, "template": template})
    if not isinstance(file, str) or not file:
        raise DataError(f"tasks.file={file}: valid: a JSON-lines file with prompt (or context, question) and answers")
    path = Path(file).expanduser()
    usual = re.sub(r"[^A-Za-z0-9_.]", "_", path.stem)[:60]

    def task(name: str) -> Task:
        return Task(name, "mine", metric, max_new_tokens, chat=True, first_line=False, stop_at_newline=False)

    def make(place: str, index: int, row: dict[str, Any]) -> Sample:
        name = row.get("task", usual)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise DataError(f"{place}: field 'task' must be 1 to 60 of a-z, A-Z, 0-9, '_' and '.'")
        return to_sample(place, index, row, task(name), template)

    found: dict[str, list[Sample]] = {}
    for row in read_rows(path, make, broken, id_field="id"):
        if isinstance(row, Broken):
            row = Sample(task(usual), row.id, "", "", (), error=row.error)
        found.setdefault(row.task.name, []).append(row)
    if not found:
        raise DataError(f"{path}: holds no rows")
    for name in names:
        if name not in found:
            raise DataError(f"tasks.names={name}: no task of {path}; valid: {', '.join(found)}")
    return [sample for name in names or found for sample in found[name][:limit]]


def to_sample(place: str, index: int, row: Mapping[str, Any], task: Task, template: str) -> Sample:
    """One checked row. What it has been asked with stays out of the id: a prompt is told apart by its hash."""
    if "prompt" in row:
        if more := [name for name in ("context", "question") if name in row]:
            raise DataError(f"{place}: fields 'prompt' and '{more[0]}' exclude each other")
        before, after = check_field(place, row, "prompt", is_text, "a string"), ""
    elif "context" in row or "question" in row:
        context, question = (check_field(place, row, name, is_text, "a string") for name in ("context", "question"))
        before, after = split_prompt(template, context, question, "question")
    else:
        raise DataError(
            f"{place}: needs field 'prompt', or 'context' and 'question' (it has {', '.join(row) or 'none'})"
        )
    answers = row.get("answers")
    if not isinstance(answers, str):
        answers = check_field(place, row, "answers", some_texts, "a string or a list of one or more strings")
    name, choices = row.get("id"), row.get("choices")
    if name is not None and type(name) not in (str, int):
        raise DataError(f"{place}: field 'id' must be a string or a whole number, found {type(name).__name__}")
    if choices is not None:
        check_field(place, row, "choices", some_texts, "a list of one or more strings")
    answers = (answers,) if isinstance(answers, str) else tuple(answers)
    if task.metric == CLASSES:
        if choices is None:
            raise DataError(f"{place}: field 'choices' is missing, which tasks.metric={CLASSES} looks for")
        if wrong := [answer for answer in answers if answer not in choices]:
            raise DataError(f"{place}: answer {wrong[0]!r} is none of its choices: {', '.join(choices)}")
    return Sample(
        task=task,
        id=str(index) if name in (None, "") else str(name),
        before=before,
        after=after,
        answers=answers,
        all_classes=tuple(choices) if choices else None,
    )
