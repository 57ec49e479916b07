"""Score anyone's predictions by the official rules: `python -m evals.score DIR [--edit-similarity ...]`.

DIR holds one <task>.jsonl per LongBench task with `pred`, `answers`, `all_classes` (and `length`), as the
official runner writes them; or, for LongGenBench, <dataset>/<method>.json(l) or <task>.jsonl with `pred`
and `answers`. Prints one JSON object task -> score: rounded to 2 places, LongGenBench to 4 as its own
scorer does, where `<task>_by_number` is the corrected score (see longgen_metrics). What follows a thought
(`<think>...</think>` and its like) is scored, and a line on stderr counts them. Exit code 2 and one line on
stderr for bad input.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import longbench, longgenbench, pocket
from evals.arguments import OneLineParser
from evals.errors import DataError
from evals.metrics import EDIT_SIMILARITIES, extra_scores, unit_score
from evals.rows import check_field, is_text, read_lines, texts
from evals.tasks import Task
from evals.thoughts import Thought, find_thought

LONGGEN_FOLDERS = {"gsm8k": "gsm8k_30", "mmlu": "mmlu_30", "csqa": "csqa_40"}


def score_folder(folder: Path, edit_similarity: str = "levenshtein") -> dict[str, float]:
    """Task -> score, over every prediction file of the folder."""
    if not folder.is_dir():
        raise DataError(f"DIR={folder}: no such folder")
    scores: dict[str, float] = {}
    for path in sorted(folder.glob("*.jsonl")):
        task = find_task(path)
        scores |= score_file(path, path.stem, task, edit_similarity)
    for name, task_name in LONGGEN_FOLDERS.items():
        files = [path for path in sorted((folder / name).glob("*.json*")) if path.suffix in (".json", ".jsonl")]
        files = [path for path in files if path.stem != "metrics"]
        if len(files) > 1:
            raise DataError(f"{folder / name}: {len(files)} prediction files, cannot tell which one to score")
        for path in files:
            scores |= score_file(path, name, longgenbench.TASKS[task_name], edit_similarity)
    if not scores:
        raise DataError(f"DIR={folder}: holds no <task>.jsonl (nor gsm8k/, mmlu/ or csqa/ with predictions)")
    return scores


def find_task(path: Path) -> Task:
    """The task that a file is named after. How long a task generates does not matter for its score."""
    name = path.stem
    if name in longbench.TASKS:
        return longbench.make_task(name, max_new_tokens=0)
    if name in pocket.TASKS:
        return pocket.TASKS[name]
    name = LONGGEN_FOLDERS.get(name, name)
    if name in longgenbench.TASKS:
        return longgenbench.TASKS[name]
    valid = ", ".join([*longbench.TASKS, *pocket.TASKS, *longgenbench.TASKS])
    raise DataError(f"{path}: '{path.stem}' is no task; valid names: {valid}")


def score_file(path: Path, name: str, task: Task, edit_similarity: str) -> dict[str, float]:
    rows = [prediction_row(f"{path}, line {line}", row) for line, row in read_lines(path)]
    if not rows:
        raise DataError(f"{path}: holds no predictions")
    classes = rows[-1]["all_classes"]  # the official scorer uses the last row's for all rows
    thoughts = [find_thought(row["pred"]) for row in rows]
    note_thoughts(path, thoughts)
    units = [
        0.0
        if thought.state == "unfinished"
        else unit_score(task, thought.answer, row["answers"], classes, edit_similarity)
        for row, thought in zip(rows, thoughts, strict=True)
    ]
    if task.suite != "longgenbench":
        return {name: round(100 * sum(units) / len(units), 2)}
    extras = [
        extra_scores(task, thought.answer, row["answers"])["by_number"]
        for row, thought in zip(rows, thoughts, strict=True)
    ]
    return {
        name: round(100 * sum(units) / len(units), 4),
        f"{name}_by_number": round(sum(extras) / len(extras), 4),
    }


def note_thoughts(path: Path, thoughts: Sequence[Thought]) -> None:
    """One line on stderr where thoughts were left out of the scores."""
    found = [thought.state for thought in thoughts if thought.state != "none"]
    if found:
        print(
            f"{path.name}: {len(found)} of {len(thoughts)} predictions hold a thought, which is not scored; "
            f"{found.count('unfinished')} are cut in the middle of it and score 0",
            file=sys.stderr,
        )


def prediction_row(place: str, row: dict[str, Any]) -> dict[str, Any]:
    classes = row.get("all_classes")
    if classes is not None and not texts(classes):
        raise DataError(f"{place}: field 'all_classes' must be a list of strings or null")
    return {
        "pred": check_field(place, row, "pred", is_text, "a string"),
        "answers": check_field(place, row, "answers", texts, "a list of strings"),
        "all_classes": classes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m evals.score", DataError, (__doc__ or "").split("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with one <task>.jsonl per task")
    parser.add_argument(
        "--edit-similarity",
        choices=EDIT_SIMILARITIES,
        default="levenshtein",
        help="back-end of the code metric; published numbers use either (default: %(default)s)",
    )
    try:
        options = parser.parse_args(arguments)
        scores = score_folder(options.folder, options.edit_similarity)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
