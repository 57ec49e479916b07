"""LongBench (v1): 21 tasks by the official protocol.

Prompts and generation lengths are read from the benchmark's own `dataset2prompt.json` and
`dataset2maxlen.json`. The hub's repository has only the rows (data.zip); those two files live in the GitHub
repository, so a download takes them from there, at one fixed commit. What the project itself holds is only
what the official *code* fixes: the metric of each task, which tasks go without the chat template, and which
are scored on the first line.
"""

import os
from pathlib import Path

from evals.errors import DataError
from evals.longbench_files import CONFIG_URL, HUB_REPO, REVISION, config_files, row_folder
from evals.rows import read_longbench, to_sample
from evals.tasks import Sample, Task

METRIC_OF = {
    "narrativeqa": "qa_f1_score",
    "qasper": "qa_f1_score",
    "multifieldqa_en": "qa_f1_score",
    "multifieldqa_zh": "qa_f1_zh_score",
    "hotpotqa": "qa_f1_score",
    "2wikimqa": "qa_f1_score",
    "musique": "qa_f1_score",
    "dureader": "rouge_zh_score",
    "gov_report": "rouge_score",
    "qmsum": "rouge_score",
    "multi_news": "rouge_score",
    "vcsum": "rouge_zh_score",
    "trec": "classification_score",
    "triviaqa": "qa_f1_score",
    "samsum": "rouge_score",
    "lsht": "classification_score",
    "passage_count": "count_score",
    "passage_retrieval_en": "retrieval_score",
    "passage_retrieval_zh": "retrieval_zh_score",
    "lcc": "code_sim_score",
    "repobench-p": "code_sim_score",
}
TASKS = tuple(METRIC_OF)
CHINESE = frozenset({"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"})
NO_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})


def make_task(name: str, max_new_tokens: int) -> Task:
    """The task by the official rules. samsum alone stops at a newline, after at least one token."""
    return Task(
        name=name,
        suite="longbench",
        metric=METRIC_OF[name],
        max_new_tokens=max_new_tokens,
        chat=name not in NO_CHAT,
        first_line=name in FIRST_LINE,
        stop_at_newline=name == "samsum",
        min_new_tokens=1 if name == "samsum" else 0,
    )


def load(
    names: list[str],
    limit: int | None,
    data_dir: str | None,
    config_dir: str | None = None,
    config_url: str = CONFIG_URL,
    hub_repo: str = HUB_REPO,
    hub_revision: str = REVISION,
    broken: str = "refuse",
) -> list[Sample]:
    """The samples of the named tasks. Nothing is downloaded if data_dir (or LONGBENCH_DIR) has all."""
    place = data_dir or os.environ.get("LONGBENCH_DIR")
    root = Path(place).expanduser() if place else None
    if root is not None and not root.is_dir():
        setting = "tasks.data_dir" if data_dir else "LONGBENCH_DIR"
        raise DataError(f"{setting}={place}: no such folder; expected data/<task>.jsonl and config/*.json in it")
    rows = row_folder(root, hub_repo, hub_revision)
    prompts, lengths = config_files(root, config_dir, config_url)
    samples = []
    for name in names:
        path = rows / f"{name}.jsonl"
        if not path.is_file():
            raise DataError(f"tasks.data_dir: {path} is missing, which task {name} reads")
        if name not in prompts or name not in lengths:
            missing = "dataset2prompt.json" if name not in prompts else "dataset2maxlen.json"
            raise DataError(f"tasks.config_dir: {missing} has no entry for task {name}")
        task = make_task(name, lengths[name])
        dataset = read_longbench(path, broken)
        count = len(dataset) if limit is None else min(limit, len(dataset))
        samples += [to_sample(task, prompts[name], row) for row in dataset.select(range(count))]
    return samples
