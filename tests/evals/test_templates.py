"""Chat templates: the clock stands still, and a broken one is one line."""

import datetime
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from evals.errors import DataError
from evals.prompts import render
from evals.templates import DATE, is_date, read_template
from src.models.settings import model_settings
from tests.support.cli import call
from tests.support.tiny import tiny_tokenizer

MESSAGE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
DATED = {
    "plain": ("Today: {{ strftime_now('%d %b %Y') }}\n" + MESSAGE, "Today: 26 Jul 2024\n<user>Q\n"),
    # As Llama 3.2 has it.
    "asked for": (
        "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
        "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n"
        "        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
        "{{- 'Today Date: ' + date_string + '\\n' }}" + MESSAGE,
        "Today Date: 26 Jul 2024\n<user>Q\n",
    ),
    "in a macro": (
        "{% macro head(form) %}[{{ strftime_now(form) }}]{% endmacro %}{{ head('%Y-%m-%d %H:%M:%S') }}" + MESSAGE,
        "[2024-07-26 00:00:00]<user>Q\n",
    ),
    "leading blanks": ("\n  {{ strftime_now('%A') }}\n\n" + MESSAGE, "\n  Friday\n\n<user>Q\n"),
    "another name": ("{% set now = strftime_now %}{{ now('%B') }}" + MESSAGE, "July<user>Q\n"),
    "as a number": ("{{ strftime_now('%Y') | int - 1 }}" + MESSAGE, "2023<user>Q\n"),
}


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Tomorrow":
        return cls(2031, 12, 24, 18, 30)


def filled(template: str, date: str = DATE) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return render("Q", tokenizer, {}, date=date)


@pytest.mark.parametrize("name", DATED)
def test_the_clock_stands_still(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, expected = DATED[name]
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert filled(template) == expected
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert plain != expected  # transformers itself still reads the clock: nothing was left behind


def test_the_date_can_be_set() -> None:
    assert filled(DATED["plain"][0], "2025-01-02").startswith("Today: 02 Jan 2025\n")
    assert filled("{{ date_string }}" + MESSAGE, "2025-01-02").startswith("02 Jan 2025")
    assert is_date("2024-02-29") and not any(map(is_date, ["2023-02-29", "today", "20240726", None, 5, "2024-1-1"]))


def test_only_templates_with_a_date_depend_on_it() -> None:
    assert not read_template(MESSAGE).dated("2025-01-02")
    assert read_template(DATED["plain"][0]).dated(DATE)
    # Llama 3.1 has a fixed date of its own, and no clock.
    fixed = read_template("{% if date_string is not defined %}{% set date_string = 'x' %}{% endif %}{{ date_string }}")
    assert not fixed.dated(DATE) and fixed.dated("2025-01-02")
    assert model_settings("local")["date"] == DATE


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ bad", "not a Jinja template"),
        ("{% if %}", "not a Jinja template"),
        ("{{ messages | nofilter }}", "nofilter"),
        ("{{ raise_exception('no user, no answer') }}", "no user, no answer"),
        ("{{ messages[0].content.nothing.more }}", "cannot be filled in"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'] + 1 }}", "cannot be filled in"),
        ("{{ messages[7]['content'] | trim + 'x' }}", "chat template"),
        ("a fixed text", "does not contain the user's message"),
        (" ", "does not contain the user's message"),
        ("{{ messages[0]['content'] | upper }}", "does not contain the user's message"),
        ("{{ messages[0]['content'] }}{{ [1, 2] | random }}", "random"),
        ("{{ strftime_now('%d' ~ messages[0]['role']) }}", "cannot be foreseen"),
        ("{% include 'other' %}", "chat template"),
    ],
)
@pytest.mark.parametrize("place", ["setting", "folder"])
def test_a_broken_template_is_one_line(
    template: str, words: str, place: str, model_folder: Path, tmp_path: Path
) -> None:
    from src.errors import InputError
    from src.models.load import load_model

    settings = {"path": str(model_folder)}
    if place == "setting":
        settings["chat_template"] = template
    else:
        folder = tmp_path / "broken"
        folder.mkdir()
        for file in model_folder.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.jinja").write_text(template)
        settings["path"] = str(folder)
    with pytest.raises(InputError) as caught:
        load_model(model_settings("local", **settings))
    said = str(caught.value)
    assert said.startswith("model.chat_template: " if place == "setting" else "model broken: ") and "\n" not in said
    assert words in said


def test_a_message_lost_on_the_way() -> None:
    """A template that keeps a short message and cuts a long one."""
    from evals.prompts import wrap_in_chat

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'][:100] }}"
    with pytest.raises(DataError, match="changes the user's message"):
        wrap_in_chat("x" * 200, 0, tokenizer, {})


def test_on_the_command_line(base: list[str], tmp_path: Path) -> None:
    for wrong, words in [
        ("model.chat_template='{{ bad'", "model.chat_template: chat template: not a Jinja template"),
        ("+model.template_kwargs.messages=1", "model.template_kwargs={'messages': 1}"),
        ("model.thinking=on", "model.thinking=on: valid: off, keep"),
        ("model.date=tomorrow", "model.date=tomorrow: valid: a date as YYYY-MM-DD"),
    ]:
        done = call("run", *base, "policy=h2o", "budget=40", wrong)
        assert done.code == 2 and len(done.err.splitlines()) == 1 and words in done.err, done.err
    assert not (tmp_path / "results").exists()
