"""How a model's chat template will be filled in: checked once, before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from evals.errors import DataError
from evals.prompts import PLACEHOLDER, render, wrap_in_chat
from evals.templates import DATE, ChatTemplate, read_template, template_settings
from evals.thoughts import mentions_thoughts
from src.errors import InputError
from src.models.settings import ModelSettings


@dataclass(frozen=True)
class ChatForm:
    """What is put around a prompt.

    Attributes:
        kwargs: what the chat template is filled in with, the switch that `thinking` sets included.
        thinking: off | keep.
        date: today, for templates that ask.
        thinking_note: what becomes of thinking, for people; empty: nothing shows that the model thinks.
        settings: what else changes prompts or scores, for the results folder's hash.
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    thinking: str = "off"
    date: str = DATE
    thinking_note: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def chat_form(tokenizer: Tokenizer, model: ModelSettings, name: str) -> ChatForm:
    """Fill the template in once.

    Args:
        name: what messages call the model.

    Raises:
        InputError: the template is broken, or loses the user's message.
    """
    thinking, date, given = model.thinking, model.date, dict(model.template_kwargs)
    try:
        wrap_in_chat("a question", 0, tokenizer, given, thinking, date)
        template = read_template(tokenizer.get_chat_template())
    except DataError as error:
        where = "model.chat_template" if model.chat_template else f"model {name}"
        filled = f" filled in with model.template_kwargs={given}" if given else ""
        raise InputError(
            f"{where}: {error}{filled}; valid: model.chat_template=<a Jinja template that writes the user's message>"
        ) from None
    kwargs = template_settings(template, given, thinking)
    note = thinking_note(template, kwargs, thinking)
    settings = {"date": date} if template.dated(date) else {}
    if note and (thinking == "keep" or not set(template.off_switch) & set(kwargs)):
        settings["thinking"] = thinking  # else the switch among the template's settings tells
    return ChatForm(kwargs, thinking, date, note, settings)


def after_message(tokenizer: Tokenizer, form: ChatForm) -> str:
    """What stands between a user's message and the answer."""
    return render(PLACEHOLDER, tokenizer, form.kwargs, form.thinking, form.date).rpartition(PLACEHOLDER)[2]


def thinking_note(template: ChatTemplate, kwargs: Mapping[str, Any], thinking: str) -> str:
    """What is done about thinking; empty where the template shows nothing of it."""
    if not template.off_switch and not mentions_thoughts(template.text):
        return ""
    switches = [f"{name}={str(kwargs[name]).lower()}" for name in template.off_switch if name in kwargs]
    return f"{thinking}: {', '.join(switches) or 'no switch passed'}"
