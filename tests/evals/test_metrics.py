"""The official metrics: every published score that lies beside the checkout, and each rule by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evals import longbench, longgenbench, metrics
from evals.longgen_metrics import answers_by_number, by_number, official
from evals.metrics import extra_scores, score_sample
from evals.score import score_file
from evals.tasks import Task

ORACLES = {
    "llama3-8b-instruct": ("difflib", longbench.TASKS),
    "mistral-7b-instruct-v0.2-full": (
        "levenshtein",
        tuple(name for name in longbench.TASKS if name not in longbench.CHINESE),
    ),
}
LONGGEN_RUNS = ("full", "h2o-512")
PUBLISHED = [(model, task) for model, (_, tasks) in ORACLES.items() for task in tasks]


def task_of(name: str) -> Task:
    return longbench.make_task(name, max_new_tokens=1)


@pytest.mark.parametrize(("model", "name"), PUBLISHED)
def test_published_longbench_score(model: str, name: str, shared: Callable[[str], Path]) -> None:
    folder = shared(f"oracles/longbench/{model}")
    published = json.loads((folder / "result.json").read_text())[name]
    scores = score_file(folder / f"{name}.jsonl", name, task_of(name), ORACLES[model][0])
    assert scores == {name: published}


def test_published_scores_are_37() -> None:
    assert len(PUBLISHED) == 37


def test_the_back_ends_differ_on_published_predictions(shared: Callable[[str], Path]) -> None:
    folder = shared("oracles/longbench/mistral-7b-instruct-v0.2-full")
    path, task = folder / "lcc.jsonl", task_of("lcc")
    assert score_file(path, "lcc", task, "levenshtein") == {"lcc": 55.33}
    assert score_file(path, "lcc", task, "difflib") == {"lcc": 53.47}


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("a cat", "the dog", 0.0),
        ("", "", 0.0),
        ("the", "a", 0.0),
        ("one two two", "two three", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("well-known", "well known", 0.0),  # punctuation is dropped, not turned into blanks
    ],
)
def test_qa_f1(prediction: str, reference: str, expected: float) -> None:
    assert metrics.qa_f1_score(prediction, reference) == pytest.approx(expected)


def test_chinese_f1_drops_punctuation_and_case() -> None:
    assert metrics.qa_f1_zh_score("答案是：北京大学。", "答案是北京大学") == 1.0
    assert metrics.qa_f1_zh_score("ABC", "abc") == 1.0
    assert metrics.qa_f1_zh_score("。！", "，") == 0.0


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "expected"),
    [
        ("count_score", "There are 7, or 8", "7", 0.5),
        ("count_score", "seven", "7", 0.0),
        ("count_score", "17", "7", 0.0),
        ("retrieval_score", "Paragraph 3", "Paragraph 3", 1.0),
        ("retrieval_score", "Paragraph 3 and 3 and 4", "Paragraph 3", 2 / 3),
        ("retrieval_score", "3", "no number", 0.0),
        ("retrieval_zh_score", "段落12", "段落12", 1.0),
    ],
)
def test_number_share(metric: str, prediction: str, reference: str, expected: float) -> None:
    assert metrics.METRICS[metric](prediction, reference, ()) == pytest.approx(expected)


def test_classification() -> None:
    classes = ["City", "Other location", "location", "Country"]
    score = metrics.classification_score
    assert score("Other location", "Other location", classes) == 1.0  # "location" is part of the right name
    assert score("City or Country", "City", classes) == 0.5
    assert score("nothing", "City", classes) == 0.0
    # The official loop removes while it walks: after "a" is removed, "b" is not looked at and stays.
    assert score("a b ab", "ab", ["a", "b", "ab"]) == 0.5


def test_code_similarity_takes_the_first_line_of_code() -> None:
    assert metrics.code_line("\n\n```python\n# comment\n// no\nx = 1\ny = 2") == "x = 1"
    assert metrics.code_line("`only`") == ""
    assert metrics.code_sim_score("x = 1\nmore", "x = 1") == 1.0
    assert metrics.code_sim_score("", "abc") == 0.0
    assert metrics.code_sim_score("", "") == 1.0
    # insertions and deletions only: "ab" -> "ba" costs 2 of 4
    assert metrics.code_sim_score("ab", "ba") == 0.5
    assert metrics.code_sim_difflib_score("abxcd", "cdab") == 0.44


def test_rouge_of_nothing_is_zero() -> None:
    assert metrics.rouge_score("", "a summary") == 0.0
    assert metrics.rouge_score("...", "a summary") == 0.0
    assert metrics.rouge_score("a summary", "a summary") == pytest.approx(1.0)
    assert metrics.rouge_zh_score("会议总结", "会议总结") == pytest.approx(1.0)


def test_score_sample_is_the_best_reference_in_per_cent() -> None:
    assert score_sample(task_of("qasper"), "blue", ["red", "blue"], None) == 100.0
    assert score_sample(task_of("qasper"), "blue", [], None) == 0.0
    with pytest.raises(ValueError, match="levenshtein, difflib"):
        score_sample(task_of("lcc"), "x", ["x"], None, "hamming")


def test_first_line_rule() -> None:
    assert score_sample(task_of("triviaqa"), "\n\nParis\nRome", ["Paris"], None) == 100.0
    assert score_sample(task_of("triviaqa"), " \nParis", ["Paris"], None) == 0.0  # a blank line is not a newline
    assert score_sample(task_of("qasper"), "Paris\nParis", ["Paris"], None) < 100.0


def test_rouge_extras_only_for_english_summaries() -> None:
    extras = extra_scores(task_of("gov_report"), "The cat sat.\nIt slept.", ["nothing", "the cat sat. it slept."])
    assert set(extras) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert extras["rouge1"] == pytest.approx(100.0)
    assert extra_scores(task_of("samsum"), "good\nbad", ["good"])["rouge1"] == pytest.approx(100.0)
    assert extra_scores(task_of("vcsum"), "会议", ["会议"]) == {}
    assert extra_scores(task_of("hotpotqa"), "a", ["a"]) == {}


NUMBERS = "longgen_number_score"
CHOICES = "longgen_choice_score"


def test_official_longgen_scorer_shifts_after_a_skipped_answer_and_the_other_does_not() -> None:
    golds = ["#### 1", "#### 2", "#### 3", "#### 4"]
    skipped = "Answer_9:\nThe answer is 1.\n\nAnswer_11:\nThe answer is 3.\n\nAnswer_12:\nThe answer is 4."
    assert official(NUMBERS, skipped, golds) == 0.25
    assert by_number(NUMBERS, skipped, golds) == 0.75


def test_longgen_numbers_with_signs() -> None:
    golds = ["#### 1,200", "#### 5", "#### 2"]
    text = "Answer_9: The answer is $1,200.\nAnswer_10: the answer is 5 apples.\nAnswer_11: The answer is 2/3."
    assert official(NUMBERS, text, golds) == 0.0  # reads 5 as the first answer
    assert by_number(NUMBERS, text, golds) == pytest.approx(2 / 3)  # 2/3 is not 2


def test_longgen_ignores_answers_to_the_examples_and_repeats() -> None:
    text = "Answer_1: The answer is (A)\nAnswer_6: The answer is (B)\nAnswer_6: The answer is (C)"
    assert by_number(CHOICES, text, ["B", "C"]) == 0.5
    assert by_number(CHOICES, "", ["B"]) == 0.0
    assert by_number(CHOICES, text, []) == official(CHOICES, text, []) == 0.0


def test_longgen_choice_is_a_letter_not_a_word() -> None:
    text = "Answer_6: The answer is a shop, so the answer is (B).\nAnswer_7: The answer is C."
    text += "\nAnswer_8: the answer is A car"
    assert answers_by_number(CHOICES, text) == {6: "B", 7: "C", 8: None}


@pytest.mark.parametrize("run", LONGGEN_RUNS)
def test_published_longgenbench_scores(run: str, shared: Callable[[str], Path]) -> None:
    folder = shared(f"oracles/longgenbench/{run}") / "meta-llama-3.1-8b-instruct_2048"
    names, row = (line.split(",")[1:] for line in (folder / "results.csv").read_text().split())
    for name, published in zip(names, row, strict=True):
        (path,) = (folder / name).glob("*.jsonl")
        task = longgenbench.TASKS["gsm8k_30" if name == "gsm8k" else "mmlu_30"]
        assert score_file(path, name, task, "levenshtein")[name] == float(published)


def test_all_published_scores_are_checked(shared: Callable[[str], Path]) -> None:
    """37 of 37 and 6 of 6: nothing that lies in the folders is passed over."""
    longbench_tables = [json.loads(path.read_text()) for path in shared("oracles/longbench").glob("*/result.json")]
    assert sum(map(len, longbench_tables)) == len(PUBLISHED) == 37
    tables = [path.read_text().split()[0] for path in shared("oracles/longgenbench").rglob("results.csv")]
    assert sum(len(line.split(",")) - 1 for line in tables) == 6 and len(tables) == len(LONGGEN_RUNS)
