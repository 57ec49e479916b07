"""Thinking aloud: where a prediction's thought ends and the answer that is scored begins.

A model that thinks first writes its thought between marks. By the official rules the thought would be scored
as if it were the answer, so a right answer after a thought loses most of its F1. Here what follows the last
thought is scored; a thought that was never finished has no answer after it and scores 0. Predictions without
such marks are left exactly as they are.
"""

import re
from dataclasses import dataclass

# How known models begin and end a thought.
MARKS = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen3, GLM, SmolLM3, Hunyuan, MiniMax and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)
BARE_END = "assistantfinal"  # what is left of gpt-oss' marks where a decoder dropped the special tokens
# Sentences mark a thought only where the prediction begins with the first of them.
SENTENCES = (
    ("Here is my thought process:", "Here is my response:"),  # Granite 3
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
)
# Some put the answer itself between marks, after the thought.
WRAPPED = re.compile(
    r"\s*(?:<answer>|<response>|<\|begin_of_solution\|>|<\|START_RESPONSE\|>)(.*?)"
    r"(?:(?:</answer>|</response>|<\|end_of_solution\|>|<\|END_RESPONSE\|>|\[END FINAL RESPONSE\])\s*)?",
    re.DOTALL,
)
OPENING = frozenset(begin for begin, _ in MARKS)
ANY = re.compile("|".join(re.escape(mark) for pair in MARKS for mark in pair) + f"|{BARE_END}")


@dataclass(frozen=True)
class Thought:
    """What a prediction holds beside its answer.

    `state`: none | empty (marks with nothing between them) | finished | unfinished. `answer` is what is scored: all
    of the text without a thought, nothing after an unfinished one. `end`: characters up to and with the last mark.
    """

    state: str
    answer: str
    end: int


def find_thought(text: str, opened: bool = False) -> Thought:
    """Where the thought ends. `opened`: the prompt had begun it already, as DeepSeek R1's chat template does."""
    begun, end, inside = opened, 0, ""
    for begin, close in SENTENCES:
        if text.lstrip().startswith(begin):
            begun, (inside, found, _) = True, text.partition(close)
            end = len(inside) + len(found) if found else 0
            begun = not found
    for mark in ANY.finditer(text, end):
        if mark[0] in OPENING:
            begun = True
        else:
            begun, inside, end = False, text[: mark.start()], mark.end()
    if begun:
        return Thought("unfinished", "", len(text))
    if not end:
        return Thought("none", text, 0)
    # Blank lines go, the indentation of the first line stays: it may be code.
    answer = re.sub(r"\A\s*\n", "", text[end:])
    wrapped = WRAPPED.fullmatch(answer)
    state = "finished" if ANY.sub("", inside).strip() else "empty"
    return Thought(state, wrapped[1] if wrapped else answer, end)


def opens_thought(prompt: str) -> bool:
    """Does the prompt end in the middle of a thought, so that only its end will be in the prediction?"""
    return prompt.rstrip().endswith(tuple(OPENING))


def mentions_thoughts(template: str) -> bool:
    """Does a chat template know marks of thoughts?"""
    return ANY.search(template) is not None
