"""Tasks of the user's own: what a row is taken for, what is refused, and which settings make another folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals.errors import DataError
from evals.metrics import METRICS
from evals.suites import check_choice, load_samples
from tests.support.cli import call, folders, lines, unchanged

QA = {"context": "Ada {x} lives in Bonn.", "question": "Where?", "answers": ["Bonn", "in Bonn"]}
PLAIN = {"prompt": "Grass is {context}", "answers": "green", "task": "colours", "id": "grass", "source": "anywhere"}


def file(folder: Path, *rows: Any) -> str:
    path = folder / "my-own.jsonl"
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")
    return str(path)


def load(path: str, names: list[str] | None = None, limit: int | None = None, **more: Any) -> list[Any]:
    return load_samples("mine", names, limit, None, 0, file=path, **more)


def test_rows_become_samples(tmp_path: Path) -> None:
    asked, plain = load(file(tmp_path, QA, "", PLAIN), metric="count_score", max_new_tokens=5)
    assert (asked.before, asked.after) == ("Ada {x} lives in Bonn.", "\n\nWhere?")
    assert (asked.task.name, asked.id, asked.answers) == ("my_own", "0", ("Bonn", "in Bonn"))
    assert (plain.before, plain.after) == ("Grass is {context}", "")  # no template in what is asked as it stands
    assert (plain.task.name, plain.id, plain.answers) == ("colours", "grass", ("green",))
    assert {(s.task.metric, s.task.max_new_tokens, s.task.suite) for s in (asked, plain)} == {
        ("count_score", 5, "mine")
    }
    (asked,) = load(file(tmp_path, QA), template="Q: {question} {{}} {context}!")
    assert (asked.before, asked.after) == ("Q: Where? {} Ada {x} lives in Bonn.", "!")


def test_names_and_limit_choose_by_task_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, *({**PLAIN, "task": "ab"[i % 2], "id": i} for i in range(6)), {**PLAIN, "task": "b", "id": 5})
    ids = {"a": ["0", "2", "4"], "b": ["1", "3", "5", "5#2"]}
    assert [s.id for s in load(path)] == ids["a"] + ids["b"]
    assert [s.id for s in load(path, ["b", "a"], 2)] == ids["b"][:2] + ids["a"][:2]
    with pytest.raises(DataError, match=r"tasks\.names=c: no task of .*my-own\.jsonl; valid: a, b"):
        load(path, ["c"])


CHOICES = {"prompt": "x", "answers": ["b"], "choices": ["a", "b"]}
MALFORMED = {
    "no answers": ({"prompt": "x", "answer": "y"}, "field 'answers' is missing"),
    "empty answers": ({"prompt": "x", "answers": []}, "field 'answers' must be a string or a list"),
    "no prompt": ({"answers": "y"}, "needs field 'prompt', or 'context' and 'question' (it has answers)"),
    "no question": ({"context": "x", "answers": "y"}, "field 'question' is missing"),
    "both": ({"prompt": "x", "question": "x", "answers": "y"}, "fields 'prompt' and 'question' exclude each other"),
    "no text": ({"prompt": 7, "answers": "y"}, "field 'prompt' must be a string, found int"),
    "empty": ({"prompt": "", "answers": "y"}, "the prompt is empty"),
    "task": ({**PLAIN, "task": "a-b"}, "field 'task' must be"),
    "id": ({**PLAIN, "id": 1.5}, "field 'id' must be"),
    "choices": ({**PLAIN, "choices": "x"}, "field 'choices' must be"),
    "json": ('{"prompt": ', "broken JSON"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_row_is_named_or_recorded(tmp_path: Path, what: str) -> None:
    row, problem = MALFORMED[what]
    path = file(tmp_path, QA, row)
    with pytest.raises(DataError) as refused:
        load(path)
    assert problem in str(refused.value) and (f"{path}, line 2: " in str(refused.value) or what == "empty")
    first, second = load(path, broken="record")
    assert first.error is None and problem in second.error


def test_classes_are_needed_where_the_metric_looks_for_them(tmp_path: Path) -> None:
    (sample,) = load(file(tmp_path, CHOICES), metric="classification_score")
    assert sample.all_classes == ("a", "b")
    with pytest.raises(DataError, match=r"line 1: field 'choices' is missing, which tasks\.metric=classification"):
        load(file(tmp_path, PLAIN), metric="classification_score")
    with pytest.raises(DataError, match=r"line 1: answer 'c' is none of its choices: a, b"):
        load(file(tmp_path, {**CHOICES, "answers": "c"}), metric="classification_score")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"metric": "f2"}, "tasks.metric=f2: unknown; valid: " + ", ".join(METRICS)),
        ({"max_new_tokens": 0}, "tasks.max_new_tokens=0: valid: 1 or more"),
        ({"max_new_tokens": True}, "tasks.max_new_tokens=True: valid: 1 or more"),
        ({"template": "{context}"}, "tasks.template={context}: has no {question}; valid: {context} and {question}"),
        ({"template": "{question}"}, "tasks.template={question}: has no {context}; valid: {context} and {question}"),
        ({"template": "{context}{question}{input}"}, "{input} is no field; valid: {context} and {question}"),
        ({"template": "{context}{question}{"}, "tasks.template={context}{question}{: "),
        ({"template": 3}, "tasks.template=3: valid: a text with {context} and {question}"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_read(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as refused:
        check_choice("mine", None, options)
    assert problem in str(refused.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.file=None: valid: a JSON-lines file"):
        load_samples("mine", None, None, None, 0)
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read"):
        load(str(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match="holds no rows"):
        load(file(tmp_path))


def test_one_file_one_command(base: list[str], tmp_path: Path) -> None:
    """What decides an outcome begins another folder, what only chooses samples does not."""
    mine = [*base, "policy=h2o", "budget=40", "tasks=mine", f"tasks.file={file(tmp_path, QA, PLAIN)}", "limit=null"]
    done = call("run", *mine)
    assert done.code == 0, done.err
    assert {(line["task"], line["id"]) for line in lines(done.folder)} == {("my_own", "0"), ("colours", "grass")}
    assert json.loads((done.folder / "settings.json").read_text())["tasks"] == {
        "metric": "qa_f1_score", "max_new_tokens": 64, "template": "{context}\n\n{question}",
    }  # fmt: skip
    moved = tmp_path / "moved.jsonl"
    moved.write_text(json.dumps({**PLAIN, "id": "more"}) + "\n")
    assert call("run", *mine, f"tasks.file={moved}", "tasks.names=[colours]").folder == done.folder
    others = ["tasks.metric=rouge_score", "tasks.max_new_tokens=3", "tasks.template='{context} {question}'"]
    assert len({call("run", *mine, other).folder for other in others} - {done.folder}) == 3
    assert "tasks" not in json.loads((call("run", *base, "policy=h2o").folder / "settings.json").read_text())
    assert len(folders(tmp_path / "results")) == 5
    for wrong, line in (("tasks.metric=f2", "error: tasks.metric=f2: unknown; "), ("tasks.file=null", "error: tasks.")):
        with unchanged(tmp_path / "results"):
            done = call("run", *mine, wrong)
        assert done.code == 2 and done.err.startswith(line) and done.err.count("\n") == 1
    file(tmp_path, QA, {"prompt": "x"})
    done = call("run", *mine)
    assert done.code == 2 and done.err.startswith(f"error: {tmp_path / 'my-own.jsonl'}, line 2: field 'answers' is")


def test_other_choices_are_scored_anew(base: list[str], tmp_path: Path) -> None:
    """They stand in no prompt."""
    mine = [*base, "policy=full", "tasks=mine", "tasks.metric=classification_score"]
    call("run", *mine, f"tasks.file={file(tmp_path, CHOICES)}")
    done = call("run", *mine, f"tasks.file={file(tmp_path, {**CHOICES, 'choices': ['b', 'c']})}")
    assert "1 finished samples ran again" in done.err and len(lines(done.folder)) == 2
