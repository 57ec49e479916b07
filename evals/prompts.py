"""From a sample to token ids: the official truncation, the chat form, and where the context ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evals.errors import DataError
from evals.tasks import Sample
from evals.templates import DATE, read_template, template_settings
from evals.thoughts import opens_thought
from evals.visible import reason

# Stands for the user's message while the chat form around it is looked up. Plain letters: left alone.
PLACEHOLDER = "kvbenchplaceholdermessage"


@dataclass(frozen=True)
class Prompt:
    """`context_tokens`: how many leading ids belong to the chat form's beginning and to `before`."""

    ids: list[int]
    context_tokens: int
    truncated: bool
    chat: bool = False  # was the chat template applied?
    needle: tuple[int, int] | None = None  # ids start .. stop - 1 of the sentence that holds the answer, if known
    thought: bool = False  # does it end in the middle of a thought?


def encode(
    sample: Sample,
    tokenizer: Any,
    max_prompt_tokens: int,
    chat: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
    thinking: str = "off",
    date: str = DATE,
) -> Prompt:
    """The prompt by the official steps.

    The bare prompt is tokenised; above the limit its first and last half are decoded and joined; then the
    chat form is put around it, where the task and the tokenizer have one (`chat=False` never does); then
    all is tokenised again, so the final length may differ from the limit by the chat form and by a token at
    the seam. `thinking` and `date`: see `render`.
    """
    if not sample.prompt:
        raise DataError(f"task {sample.task.name}, sample {sample.id}: the prompt is empty")
    if max_prompt_tokens < 2:
        raise DataError(f"max_prompt_tokens={max_prompt_tokens}: must be 2 or more")
    text, boundary, truncated = truncate(sample, tokenizer, max_prompt_tokens)
    wrap = chat and sample.task.chat and bool(getattr(tokenizer, "chat_template", None))
    if wrap:
        try:
            text, boundary = wrap_in_chat(text, boundary, tokenizer, template_kwargs or {}, thinking, date)
        except DataError as error:
            raise DataError(f"task {sample.task.name}, sample {sample.id}: {error}") from None
    # A chat template writes its own special tokens; adding the tokenizer's would double the BOS.
    ids, context_tokens = tokenize(text, boundary, tokenizer, add_special_tokens=not wrap)
    needle = find(sample.extra.get("needle", ""), text, tokenizer, add_special_tokens=not wrap)
    thought = wrap and opens_thought(text)
    return Prompt(ids, context_tokens, truncated, chat=wrap, needle=needle, thought=thought)


def truncate(sample: Sample, tokenizer: Any, limit: int) -> tuple[str, int, bool]:
    """(text, characters of it that belong to `before`, was it cut?)"""
    text, boundary = sample.prompt, len(sample.before)
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return text, boundary, False
    half = limit // 2
    head = tokenizer.decode(ids[:half], skip_special_tokens=True)
    tail = tokenizer.decode(ids[-half:], skip_special_tokens=True)
    # The question is near the end, so its place is counted from there. One longer than the tail has lost
    # its beginning to the cut, or even reaches into the head: there the place is the one from the beginning.
    whole_question = len(sample.after) <= len(tail)
    place = len(head) + len(tail) - len(sample.after) if whole_question else min(boundary, len(head))
    return head + tail, place, True


def wrap_in_chat(
    text: str,
    boundary: int,
    tokenizer: Any,
    kwargs: Mapping[str, Any],
    thinking: str = "off",
    date: str = DATE,
) -> tuple[str, int]:
    """The text as a user's message in the model's chat form, and the boundary in it.

    Some templates strip the message; the boundary then moves with the blanks lost at its beginning.

    Raises:
        DataError: a template that cannot be filled in, or that loses or changes the message.
    """
    form = render(PLACEHOLDER, tokenizer, kwargs, thinking, date)
    start = form.find(PLACEHOLDER)
    if start < 0:
        raise DataError("chat template: does not contain the user's message")
    wrapped = render(text, tokenizer, kwargs, thinking, date)
    if wrapped.startswith(text, start):
        return wrapped, start + boundary
    stripped = text.strip()
    if wrapped.startswith(stripped, start):
        lost = len(text) - len(text.lstrip())
        return wrapped, start + min(max(boundary - lost, 0), len(stripped))
    raise DataError("chat template: changes the user's message by more than outer blanks")


def render(message: str, tokenizer: Any, kwargs: Mapping[str, Any], thinking: str = "off", date: str = DATE) -> str:
    """The chat form of one user's message, up to where the model answers.

    Args:
        kwargs: passed to the template; they win over what `thinking` passes.
        thinking: `off` passes the template's own switch, where it has one; `keep` passes none.
        date: YYYY-MM-DD, today's date for templates that ask for it.

    Raises:
        DataError: the template cannot be filled in.
    """
    try:
        template = read_template(tokenizer.get_chat_template())
        settings = template_settings(template, kwargs, thinking)
        text, dates = template.with_date(date)
        if text != template.text:
            settings = {"chat_template": text, **settings}
        messages = [{"role": "user", "content": message}]
        form = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **{**dates, **settings}
        )
    except DataError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise DataError(f"chat template: cannot be filled in ({reason(error)})") from None
    return str(form)


def tokenize(text: str, boundary: int, tokenizer: Any, add_special_tokens: bool) -> tuple[list[int], int]:
    """(ids, how many leading ids lie wholly before the boundary). A token across it is the question's."""
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    if not tokenizer.is_fast:
        # Without offsets: the tokens that the text up to the boundary shares with the whole.
        ids = list(tokenizer(text, **options)["input_ids"])
        part = list(tokenizer(text[:boundary], **options)["input_ids"])
        pairs = enumerate(zip(part, ids, strict=False))
        return ids, next((i for i, (a, b) in pairs if a != b), min(len(part), len(ids)))
    encoding = tokenizer(text, return_offsets_mapping=True, **options)
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    if boundary >= len(text):
        return ids, len(ids)
    return ids, next((i for i, (_, end) in enumerate(offsets) if end > boundary), len(ids))


def find(piece: str, text: str, tokenizer: Any, add_special_tokens: bool) -> tuple[int, int] | None:
    """Which ids of the text hold any character of its one `piece`, as start and stop.

    None: there is no such piece, or the tokenizer does not tell where its tokens stand.
    """
    if not piece or text.count(piece) != 1 or not tokenizer.is_fast:
        return None
    begin = text.index(piece)
    end = begin + len(piece)
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens, verbose=False)
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < end and b > begin]
    return (inside[0], inside[-1] + 1) if inside else None
