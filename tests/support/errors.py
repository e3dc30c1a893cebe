"""What a refusal must tell, whatever its words are."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from mmvision_export.core.errors import MmvisionError, Reason


@contextlib.contextmanager
def refused(
    kind: type[MmvisionError], *facts: object, reason: Reason | None = None
) -> Iterator[pytest.ExceptionInfo[MmvisionError]]:
    """The block must raise an error of exactly this class that names these facts.

    The English between the facts may be improved; a refusal for another reason has other facts, or
    another class.

    Args:
        kind: Class of the error.
        *facts: What its message must name: fields, files, tensors, options, values. Each stands by itself, so that 7
            is not found in 17, nor `model.onnx` in `model.onnx.data`.
        reason: The error's own `reason`.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind
    for fact in facts:
        assert is_named(str(fact), str(error)), f"{fact} is not named in: {error}"
    assert error.reason == reason


def is_named(fact: str, text: str) -> bool:
    """Whether a text has a fact as whole words."""
    return bool(re.search(rf"(?<!\w)(?<!\d\.){re.escape(fact)}(?!\w|\.\w)", text))
