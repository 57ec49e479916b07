"""What a chat template asks for beside the messages: a switch for thinking, and today's date.

Both are read off the template's syntax tree, so a template that has neither is filled in as ever. Thinking is
switched off where the template can, and the clock stands still: a prompt that held today's date would be another
one tomorrow, and no finished sample would count any more.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from evals.errors import DataError

THINKING = ("off", "keep")
DATE = "2024-07-26"  # the date that Llama 3's templates fall back to
CLOCK = "strftime_now"  # the only clock that transformers hands to a template
FORMATS = "kvbench_dates"  # date formats -> the fixed date in them
# `enable_thinking` (Qwen3, GLM, SmolLM3), `thinking` (DeepSeek V3.1, Granite), `reasoning` (Command A), and the like.
SWITCH = re.compile(
    r"(?:(enable|use|with)_|(disable|no|skip)_)?(?:think|thinking|thoughts?|reason|reasoning)(?:_enabled)?"
)
# Written before the template: its own function of this name, in place of the real clock.
STOPPED_CLOCK = (
    f"{{%- macro {CLOCK}(format) -%}}"
    f"{{%- if format in {FORMATS} -%}}{{{{ {FORMATS}[format] }}}}"
    "{%- else -%}{{ raise_exception('it writes the date in a form that cannot be foreseen: ' ~ format) }}{%- endif -%}"
    "{%- endmacro %}\n"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, the variables that it is given from outside, and its constant strings."""

    text: str
    variables: frozenset[str]
    strings: frozenset[str]

    @property
    def off_switch(self) -> dict[str, Any]:
        """The settings of this template that switch thinking off; empty where it has no such switch."""
        found: dict[str, Any] = {}
        for name in sorted(self.variables):
            if match := SWITCH.fullmatch(name):
                found[name] = bool(match[2])
        if "thinking_budget" in self.variables:  # Seed-OSS
            found["thinking_budget"] = 0
        if "reasoning_effort" in self.variables and "none" in self.strings:  # gpt-oss has only low, medium and high
            found["reasoning_effort"] = "none"
        return found

    @property
    def reads_clock(self) -> bool:
        return CLOCK in self.variables

    def dated(self, date: str) -> bool:
        """Does the prompt depend on `date`? A `date_string` has its template's own default, which does not change."""
        return self.reads_clock or ("date_string" in self.variables and date != DATE)

    def with_date(self, date: str) -> tuple[str, dict[str, Any]]:
        """The template with its clock stopped at midnight of the date, and what it is filled in with for that."""
        if not self.dated(date):
            return self.text, {}
        day = datetime.fromisoformat(date)
        extra: dict[str, Any] = {"date_string": day.strftime("%d %b %Y")} if "date_string" in self.variables else {}
        if not self.reads_clock:
            return self.text, extra
        # A NUL is no format, and would end the text for the C library.
        extra[FORMATS] = {text: day.strftime(text) for text in self.strings if "%" in text and "\0" not in text}
        return STOPPED_CLOCK + self.text, extra


class Generation(Extension):
    """transformers' `{% generation %}` tag: as if it were not there."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def read_template(text: str) -> ChatTemplate:
    """The template, read but not filled in.

    Raises:
        DataError: it is not Jinja, or draws random numbers.
    """
    try:
        tree = Environment(extensions=[Generation, loopcontrols]).parse(text)
        strings = strings_of(tree)
        variables = frozenset(meta.find_undeclared_variables(tree))
        strings |= strings_of(tree)  # by now those that were put together of constants are one
    except (TemplateError, RecursionError) as error:
        raise DataError(f"chat template: not a Jinja template ({' '.join(str(error).split())})") from None
    drawn = {node.name for node in tree.find_all(nodes.Filter)} & {"random"}
    drawn |= {node.name for node in tree.find_all(nodes.Name)} & {"lipsum"}
    if drawn:
        raise DataError(f"chat template: draws random text ({drawn.pop()}), so no two prompts would be the same")
    return ChatTemplate(text, variables, strings)


def strings_of(tree: nodes.Template) -> frozenset[str]:
    return frozenset(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))


def template_settings(template: ChatTemplate, given: Mapping[str, Any], thinking: str) -> dict[str, Any]:
    """What the template is filled in with: its switch where thinking is off, and what the user gives."""
    if thinking not in THINKING:
        raise DataError(f"thinking={thinking}: valid: {', '.join(THINKING)}")
    return {**(template.off_switch if thinking == "off" else {}), **given}


def is_date(value: Any) -> bool:
    """YYYY-MM-DD, a day that exists."""
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True
