"""The helper by which tests see that a refusal is the one that was meant.

Each case is one that it must not take.
"""

from __future__ import annotations

import pytest

from mmvision_export.core.errors import (
    ConfigError,
    InputError,
    MmvisionError,
    print_error,
    printable,
)
from tests.support.errors import is_named, refused


def test_an_error_that_names_the_facts_is_the_one_that_was_meant() -> None:
    with refused(InputError, "grid_thw row 2", 7, "h") as caught:
        raise InputError("grid_thw row 2: h must be a multiple of 2, got 7", hint="resize it")
    assert caught.value.hint == "resize it"
    with refused(InputError, "x.npy", reason="missing"):
        raise InputError("x.npy: no such file", reason="missing")


@pytest.mark.parametrize(
    "error",
    [
        InputError("grid_thw row 1: h must be a multiple of 2, got 7"),  # another row
        InputError("grid_thw row 2: h must be a multiple of 2, got 17"),  # another value
        InputError("grid_thw row 2 is not positive"),  # another rule
        InputError("grid_thw row 2: h must be a multiple of 2, got 7", reason="malformed"),
        ConfigError("grid_thw row 2: h must be a multiple of 2, got 7"),  # another class
        MmvisionError("grid_thw row 2: h must be a multiple of 2, got 7"),  # its base class
    ],
)
def test_an_error_for_another_reason_is_not(error: MmvisionError) -> None:
    def check() -> None:
        with refused(InputError, "grid_thw row 2", 7, "h"):
            raise error

    with pytest.raises((AssertionError, MmvisionError)):
        check()


def test_no_error_is_none() -> None:
    with pytest.raises(pytest.fail.Exception), refused(InputError):
        pass


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ("7", "got 17"),
        ("7", "got 7.5"),
        ("5", "got 7.5"),
        ("model.onnx", "model.onnx.data is missing"),
        ("max", "max_pixels must be positive"),
    ],
)
def test_a_fact_stands_by_itself(fact: str, text: str) -> None:
    assert not is_named(fact, text)
    assert is_named(fact, f"{text}, and {fact}.")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("photo \u00e9\u4e2d\U0001f600.jpg", "photo \u00e9\u4e2d\U0001f600.jpg"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b[2Jcleared", r"\x1b[2Jcleared"),
        ("\udcff.jpg", r"\udcff.jpg"),  # a byte that is no UTF-8, as Python names it
        ("gpj\u202e.exe", r"gpj\u202e.exe"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(
    text: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable(text) == printed
    print_error(text, text)
    assert capsys.readouterr().err == f"error: {printed}\nhint: {printed}\n"


def test_the_hint_is_part_of_the_text() -> None:
    error = InputError("x is 3", hint="make it 2")
    assert (str(error), error.message, error.hint) == (
        "x is 3\nhint: make it 2",
        "x is 3",
        "make it 2",
    )
    assert str(InputError("x is 3")) == "x is 3"


def test_an_error_that_quotes_another_says_the_hint_once() -> None:
    error = InputError("x is 3", hint="make it 2")
    quoting = InputError(f"file: {error}", hint=error.hint)
    assert str(quoting) == "file: x is 3\nhint: make it 2"
    assert str(InputError(f"file: {error}")) == "file: x is 3\nhint: make it 2"
    assert str(InputError(f"file: {error}", hint="copy it")) == "file: x is 3\nhint: copy it"
