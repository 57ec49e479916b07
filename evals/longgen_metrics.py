"""LongGenBench: one prediction answers K questions, and the references are those K answers, in order.

`official` is the scorer of the reference code: it collects what looks like an answer, in the order of
appearance, and compares the i-th with the i-th reference. One skipped, repeated or unreadable answer shifts
all that follow. `by_number` is the corrected scorer, reported beside it: "Answer_17" is compared with
question 17, an answer ends where the next begins, and "$1,200" is the number 1200 on both sides.
"""

import re
from collections.abc import Sequence

# metric name -> how many worked examples the prompt shows; the first question has the next number.
KINDS = {"longgen_number_score": 8, "longgen_choice_score": 5}

OFFICIAL_NUMBER = re.compile(r"Answer_\d+:\s*.*?answer is (\d+)", re.DOTALL)
OFFICIAL_CHOICE = re.compile(r"Answer_\d+:\s*.*?answer is \((.*?)\)")
OFFICIAL_GOLD = re.compile(r"####\s*(\d+)")

ANSWER_HEAD = re.compile(r"Answer_(\d+):")
# A whole answer only: "2/3" is not 2, and "the answer is a shop" is not A.
NUMBER = re.compile(r"[Aa]nswer is[^\d\n.-]{0,12}(-?(?:\d[\d,]*+(?:\.\d++)?+|\.\d++))(?!\s*/\s*\d)")
CHOICE = re.compile(r"[Aa]nswer is:? (?:\(([A-Z])\)|([A-Z])(?=[.\s]*$))")
GOLD_NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def official(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Share of right answers, paired by order of appearance, as published scores are made."""
    if not answers:
        return 0.0
    if metric == "longgen_number_score":
        found = OFFICIAL_NUMBER.findall(prediction)
        golds = [match.group(1) if (match := OFFICIAL_GOLD.search(answer)) else None for answer in answers]
    else:
        found = OFFICIAL_CHOICE.findall(prediction)
        golds = list(answers)
    return sum(gold == answer for gold, answer in zip(golds, found, strict=False)) / len(answers)


def by_number(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Share of right answers, each question paired with the answer that bears its number.

    Of several answers with one number the first counts. Answers to the worked examples are ignored.
    """
    if not answers:
        return 0.0
    given = answers_by_number(metric, prediction)
    first = KINDS[metric] + 1
    golds = [gold_value(metric, answer) for answer in answers]
    right = sum(gold is not None and given.get(first + i) == gold for i, gold in enumerate(golds))
    return right / len(answers)


def answers_by_number(metric: str, prediction: str) -> dict[int, str | float | None]:
    """Question number -> the value given for it (None: the answer states none)."""
    heads = list(ANSWER_HEAD.finditer(prediction))
    ends = [head.start() for head in heads[1:]] + [len(prediction)]
    given: dict[int, str | float | None] = {}
    for head, end in zip(heads, ends, strict=False):  # without any answer there is one end too many
        given.setdefault(int(head.group(1)), read_value(metric, prediction[head.end() : end]))
    return given


def read_value(metric: str, text: str) -> str | float | None:
    if metric == "longgen_number_score":
        match = NUMBER.search(text)
        return as_number(match.group(1)) if match else None
    match = CHOICE.search(text)
    return (match.group(1) or match.group(2)) if match else None


def gold_value(metric: str, answer: str) -> str | float | None:
    if metric != "longgen_number_score":
        return answer.strip()
    match = GOLD_NUMBER.search(answer)
    return as_number(match.group(1)) if match else None


def as_number(text: str) -> float:
    return float(text.replace(",", ""))
