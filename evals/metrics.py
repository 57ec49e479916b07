"""The official LongBench metrics, and what is reported beside them.

Published numbers can only be compared when every oddity of the official scorer is kept, so the oddities are
kept: an element is dropped from a list while the list is walked (`classification_score`), the code metric
is an integer per cent, ROUGE is the `rouge` package 1.0.1 (0.3.2 gives other numbers). Each metric takes
one prediction and one reference and returns 0..1; `score_sample` takes the best over the references, in per
cent.
"""

from __future__ import annotations

import difflib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import jieba
from rapidfuzz.distance import Indel
from rouge import Rouge

from evals import longgen_metrics
from evals.tasks import Task

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

EDIT_SIMILARITIES = ("levenshtein", "difflib")
ROUGE_EXTRAS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# The CJK punctuation that the official Chinese F1 removes, beside ASCII's.
CJK_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
DROP_ASCII = str.maketrans("", "", string.punctuation)
DROP_ASCII_AND_CJK = str.maketrans("", "", string.punctuation + CJK_PUNCTUATION)

Metric = Callable[[str, str, Sequence[str]], float]

jieba.setLogLevel(logging.WARNING)  # its dictionary message would otherwise go to stderr at the first use


def token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two token multisets; 0 when they share nothing (also when both are empty)."""
    common = (Counter(prediction) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision = common / len(prediction)
    recall = common / len(reference)
    return 2 * precision * recall / (precision + recall)


def english_tokens(text: str) -> list[str]:
    """Lower case, without ASCII punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(DROP_ASCII)).split()


def chinese_tokens(text: str) -> list[str]:
    """jieba's words, lower case, without punctuation and blanks; empty words are dropped."""
    words = ("".join(word.lower().translate(DROP_ASCII_AND_CJK).split()) for word in jieba.cut(text))
    return [word for word in words if word]


def qa_f1_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    return token_f1(english_tokens(prediction), english_tokens(reference))


def qa_f1_zh_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    return token_f1(chinese_tokens(prediction), chinese_tokens(reference))


def rouge_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    """ROUGE-L F of `rouge` 1.0.1. What that package cannot score (an empty text, for one) counts as 0."""
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_zh_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    return rouge_score(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference)))


def number_share(prediction: str, gold: str) -> float:
    """The share of all digit runs in the prediction that are the gold number; 0 without any digits."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def count_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    return number_share(prediction, str(reference))


def retrieval_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    return number_share(prediction, paragraph_number(reference, "Paragraph "))


def retrieval_zh_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    return number_share(prediction, paragraph_number(reference, "段落"))


def paragraph_number(reference: str, word: str) -> str:
    """The number in a reference like "Paragraph 7". A reference without one matches no number."""
    found = re.search(word + r"(\d+)", reference)
    return found.group(1) if found else ""


def classification_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    """1 / (class names found in the prediction) if the right one is among them.

    Names that are only a part of the right name are removed, but from the list that is being walked, so the
    name after a removed one is never looked at. That is the official behaviour and published scores contain
    it.
    """
    found = [name for name in all_classes if name in prediction]
    for name in found:
        if name in reference and name != reference:
            found.remove(name)
    return 1 / len(found) if reference in found else 0.0


def code_line(prediction: str) -> str:
    """The first line that is neither fenced nor a comment; "" if there is none."""
    for line in prediction.lstrip("\n").split("\n"):
        if "`" not in line and "#" not in line and "//" not in line:
            return line
    return ""


def code_sim_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    """Edit similarity as the official code metric gives it where python-Levenshtein is installed."""
    line = code_line(prediction)
    if line == reference:
        return 1.0
    total = len(line) + len(reference)
    return round(100 * ((total - Indel.distance(line, reference)) / total)) / 100


def code_sim_difflib_score(prediction: str, reference: str, all_classes: Sequence[str] = ()) -> float:
    """The same where it is not: difflib's ratio, which is up to 2.4 points lower on published predictions."""
    line = code_line(prediction)
    if line == reference:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: dict[str, Metric] = {
    "qa_f1_score": qa_f1_score,
    "qa_f1_zh_score": qa_f1_zh_score,
    "rouge_score": rouge_score,
    "rouge_zh_score": rouge_zh_score,
    "count_score": count_score,
    "retrieval_score": retrieval_score,
    "retrieval_zh_score": retrieval_zh_score,
    "classification_score": classification_score,
    "code_sim_score": code_sim_score,
}


def score_sample(
    task: Task,
    prediction: str,
    answers: Sequence[str],
    all_classes: Sequence[str] | None,
    edit_similarity: str = "levenshtein",
) -> float:
    """The official score of one prediction, 0..100, not rounded: the best over the references.

    The mean over a task's samples, rounded to two places, is the published number (LongGenBench: four
    places).
    """
    return 100 * unit_score(task, prediction, answers, all_classes, edit_similarity)


def unit_score(
    task: Task,
    prediction: str,
    answers: Sequence[str],
    all_classes: Sequence[str] | None,
    edit_similarity: str = "levenshtein",
) -> float:
    """`score_sample` as 0..1, which is what the official scorer adds up before it rounds."""
    if edit_similarity not in EDIT_SIMILARITIES:
        raise ValueError(f"edit_similarity={edit_similarity!r}: one of {', '.join(EDIT_SIMILARITIES)}")
    if task.metric in longgen_metrics.KINDS:
        return longgen_metrics.official(task.metric, prediction, answers)
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = METRICS[task.metric]
    if task.metric == "code_sim_score" and edit_similarity == "difflib":
        metric = code_sim_difflib_score
    return max((metric(prediction, answer, all_classes or ()) for answer in answers), default=0.0)


def extra_scores(task: Task, prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """What is reported beside the official score, 0..100; empty for most tasks.

    English summaries: rouge1, rouge2, rougeL and rougeLsum of Google's `rouge-score` (with stemming, as
    usual in papers). Chinese has none: that package keeps only a-z and 0-9. LongGenBench: `by_number`.
    """
    if task.metric in longgen_metrics.KINDS:
        return {"by_number": 100 * longgen_metrics.by_number(task.metric, prediction, answers)}
    if task.metric != "rouge_score":
        return {}
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    rows = [google_rouge().score(answer, prediction) for answer in answers]
    return {name: max((100 * row[name].fmeasure for row in rows), default=0.0) for name in ROUGE_EXTRAS}


@lru_cache(maxsize=1)
def google_rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # brings NLTK and scikit-learn: seconds

    return RougeScorer(list(ROUGE_EXTRAS), use_stemmer=True)
