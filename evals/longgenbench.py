"""LongGenBench in the form SCOPE (arXiv 2412.13649) evaluates it: K questions, one long generation.

Files: gsm8k_30, gsm8k_60, mmlu_30, mmlu_60, csqa_40, csqa_80 of github.com/Linking-ai/SCOPE, folder
data/LongGenBench (MIT), from a folder or downloaded once. They are never part of this project. The protocol is
that repository's runner:

- the prompt is its instruction inside "<<SYS>>" marks, a blank line, then the row's own text (worked
  examples and questions); no chat template. The runner means to add the subject to the MMLU instruction,
  but fills the text in before it does so: the published predictions were made without a subject, and so is
  this prompt;
- greedy, at least one new token, end only at the end-of-sequence token or after 4,096 new tokens (K = 30)
  or 7,950 (all others: also csqa_40, because K is no longer 30 when CSQA's turn comes);
- of MMLU, rows 21, 30, 31 and 48 are left out (they did not fit the authors' GPU). `reference_rows=false`
  keeps them.

The context ends before "Following Question": what a policy with prompt_scope=context compresses are the
examples.
"""

import json
import re
from pathlib import Path
from typing import Any

from evals.downloads import cache_folder, download, intact
from evals.errors import DataError
from evals.longgen_metrics import KINDS
from evals.rows import Broken, check_field, is_text, read_rows, some_texts
from evals.tasks import Sample, Task

SOURCE = "github.com/Linking-ai/SCOPE, folder data/LongGenBench"
# A fixed commit (28 May 2025): prompts must not change under a comparison.
COMMIT = "8cbae48042e34da630c7a044f535de7a991c2999"
SOURCE_URL = f"https://raw.githubusercontent.com/Linking-ai/SCOPE/{COMMIT}/data/LongGenBench"
SHA256 = {  # of the files at that commit
    "gsm8k/gsm8k_30.jsonl": "bc056d62137f87dec862de9e512d3644220a6e1a043edbaf8aa264274a5391bd",
    "gsm8k/gsm8k_60.jsonl": "227b4bc4b3bc0f3ec446405178911ef59ca1903e6e62a20d1b6452b704cc32ff",
    "mmlu/mmlu_30.jsonl": "d366a549e59f6266618e4590032e7eca1d8a0c0e0418deec4f6585e60f21127d",
    "mmlu/mmlu_60.jsonl": "e04703b9e873dc1ad59f10a12129b67e3e55c49dbae0f026e1510ee54c6b43b4",
    "csqa/csqa_40.jsonl": "1c5eaa3b202b4dc1a6858f5ef02f5c5e1779ba556210b4d882a13e5983b6096d",
    "csqa/csqa_80.jsonl": "7590db0348b4b64d7aa3b6630b22332f63a6e5987e30aca9f6887c8dfd0c58e9",
}
LARGEST = 1 << 24
LEFT_OUT = frozenset({21, 30, 31, 48})  # of the mmlu files, counted from 0
QUESTIONS_BEGIN = "Following Question"

# The instruction of the SCOPE runner (MIT licence), word for word: it is part of the benchmark.
INSTRUCTION = (
    "Answer each question step by step, adhering to the format shown in the examples provided. "
    "Start each response with 'Answer_' and introduce the final response with 'The answer is'. "
    "Do not repeat the question. "
    "Ensure that you respond to all the questions presented, regardless of their number."
)
MMLU_TAIL = " The following are multiple choice questions (with answers) about "


def make_task(name: str) -> Task:
    return Task(
        name=name,
        suite="longgenbench",
        metric="longgen_number_score" if name.startswith("gsm8k") else "longgen_choice_score",
        max_new_tokens=4096 if name.endswith("_30") else 7950,
        chat=False,
        first_line=False,
        stop_at_newline=False,
        only_eos=True,
        version=2,
        min_new_tokens=1,
    )


TASKS = {name: make_task(name) for name in ("gsm8k_30", "mmlu_30", "csqa_40", "gsm8k_60", "mmlu_60", "csqa_80")}


def load(
    names: list[str],
    limit: int | None,
    data_dir: str | None,
    reference_rows: bool = True,
    broken: str = "refuse",
    source_url: str = SOURCE_URL,
) -> list[Sample]:
    """The samples of the named tasks from data_dir/<dataset>/<task>.jsonl; without a folder, downloaded once."""
    samples = []
    for name in names:
        path = file_of(name, data_dir, source_url)
        samples += read_task(TASKS[name], path, reference_rows, broken)[:limit]
    return samples


def file_of(name: str, data_dir: str | None, source_url: str) -> Path:
    """The task's file in the folder, else in the cache."""
    part = Path(name.split("_")[0]) / f"{name}.jsonl"
    if data_dir:
        path = Path(data_dir).expanduser() / part
        if not path.is_file():
            raise DataError(f"tasks.data_dir={data_dir}: {path} is missing; it comes from {SOURCE}")
        return path
    path = cache_folder("longgenbench") / re.sub(r"[^\w.-]", "_", source_url) / part
    known = SHA256[part.as_posix()] if source_url == SOURCE_URL else None
    if not intact(path, known):
        advice = f"Set tasks.data_dir to a folder with gsm8k/, mmlu/ and csqa/ from {SOURCE}"
        url = f"{source_url.rstrip('/')}/{part.as_posix()}"
        download(url, path, "tasks.source_url", check_rows, LARGEST, advice, known)
    return path


def check_rows(content: bytes) -> None:
    """One or more rows, one per line; not a page, nor a message, that says what went wrong."""
    rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    if not rows or not all(isinstance(row, dict) and {"prompt", "questions", "answers"} <= set(row) for row in rows):
        raise ValueError("not LongGenBench's rows")


def read_task(task: Task, path: Path, reference_rows: bool, broken: str = "refuse") -> list[Sample]:
    left_out = LEFT_OUT if reference_rows and task.name.startswith("mmlu") else frozenset()

    def make(place: str, index: int, row: dict[str, Any]) -> Sample:
        return make_sample(task, place, index, row)

    samples = []
    for index, row in enumerate(read_rows(path, make, broken)):
        if index not in left_out:
            samples.append(Sample(task, row.id, "", "", (), error=row.error) if isinstance(row, Broken) else row)
    if not samples:
        raise DataError(f"{path}: holds no rows")
    return samples


def make_sample(task: Task, place: str, index: int, row: dict[str, Any]) -> Sample:
    text = check_field(place, row, "prompt", is_text, "a string")
    questions = check_field(place, row, "questions", some_texts, "a list of one or more strings")
    answers = check_field(place, row, "answers", some_texts, "a list of one or more strings")
    if len(questions) != len(answers):
        raise DataError(f"{place}: {len(questions)} questions, but {len(answers)} answers")
    before, after = split(full_prompt(task.name, text))
    extra = {"questions": questions, "first_number": first_number(task, text)}
    extra["reference"] = reference(task, extra["first_number"], answers)
    if "task" in row:
        extra["subject"] = row["task"]
    return Sample(task, str(index), before, after, tuple(answers), extra=extra)


def reference(task: Task, first: int, answers: list[str]) -> str:
    """All reference answers as one output in the form of the worked examples, for measures that read one along."""
    parts = []
    for number, answer in enumerate(answers, first):
        if (
            task.metric == "longgen_number_score"
        ):  # GSM8K's own notes: <<2*3=6>> for a calculator, #### before the result
            text = re.sub(r"\s*####\s*(.+)", r"\nThe answer is \1.", re.sub(r"<<.*?>>", "", answer))
        else:
            text = f"The answer is ({answer})."
        parts.append(f"Answer_{number}:\n{text}\n\n")
    return "".join(parts)


def full_prompt(name: str, text: str) -> str:
    system = INSTRUCTION + (MMLU_TAIL if name.startswith("mmlu") else "")
    return f"<<SYS>>\n {system} \n<</SYS>>\n\n{text}"


def split(prompt: str) -> tuple[str, str]:
    at = prompt.find(QUESTIONS_BEGIN)
    return (prompt[:at], prompt[at:]) if at >= 0 else (prompt, "")


def first_number(task: Task, text: str) -> int:
    """The number of the first question to answer (the worked examples have the numbers before it)."""
    found = re.search(QUESTIONS_BEGIN + r".{0,20}?Question_(\d+)", text, re.DOTALL)
    return int(found.group(1)) if found else KINDS[task.metric] + 1
