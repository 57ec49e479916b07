"""Asking a policy: its faults are one line each, and what is not its fault goes on as it was raised."""

from typing import Any

import pytest
import torch

from policies.h2o import H2O
from src.errors import InputError
from src.kv.faults import ContractError, Fault, ask


def fails(error: BaseException) -> Any:
    def question(*arguments: Any) -> None:
        raise error

    return question


def test_the_answer_comes_back() -> None:
    assert ask(H2O(), "room", 3, lambda a, b: a + b, 1, 2) == 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ContractError("gave 3; expected 4"), "policy H2O: room gave 3; expected 4 (layer 5)"),
        (ContractError("gave NaN", hook="score"), "policy H2O: score gave NaN (layer 5)"),
        (ValueError("two\nlines"), "policy H2O: room raised ValueError: two lines (layer 5, test_faults.py:"),
        (SystemExit(), "policy H2O: room raised SystemExit (layer 5, test_faults.py:"),
    ],
)
def test_a_fault_is_one_line_and_knows_its_cause(error: BaseException, line: str) -> None:
    with pytest.raises(Fault) as found:
        ask(H2O(), "room", 5, fails(error))
    assert str(found.value).startswith(line) and "\n" not in str(found.value)
    assert found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        InputError("the model is refused"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_is_not_the_policy_s_fault_goes_on(error: BaseException) -> None:
    with pytest.raises(type(error)) as found:
        ask(H2O(), "room", None, fails(error))
    assert found.value is error
