"""Compute capabilities: read in every spelling, written in two, ordered as numbers."""

from __future__ import annotations

from typing import Any

import pytest

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError, ManifestError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("89", (8, 9)),
        ("8.9", (8, 9)),
        ("sm89", (8, 9)),
        ("sm_89", (8, 9)),
        ("SM120", (12, 0)),
        ("12.0", (12, 0)),
        ("100", (10, 0)),
        (" 7.5 ", (7, 5)),
    ],
)
def test_every_spelling(text: str, expected: tuple[int, int]) -> None:
    capability = ComputeCapability.parse(text)
    assert (capability.major, capability.minor) == expected
    assert ComputeCapability.parse(str(capability)) == capability
    assert ComputeCapability.from_sm(capability.sm) == capability
    assert ComputeCapability.from_json(capability.to_json()) == capability


@pytest.mark.parametrize("text", ["", "8", "ada", "8.9a", "-8.9", "8,9"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        ComputeCapability.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("value", [8.9, 89, None, ["8.9"]])
def test_json_holds_strings(value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        ComputeCapability.from_json(value)
    assert repr(value) in str(caught.value)


def test_order_is_that_of_the_numbers() -> None:
    """As text, 10.0 and 12.0 would come before 8.9."""
    ascending = [ComputeCapability.parse(text) for text in ("7.5", "8.0", "8.9", "10.0", "12.0")]
    descending = list(reversed(ascending))
    assert sorted(descending) == ascending
    assert [str(capability) for capability in ascending] != sorted(map(str, ascending))
    assert [capability.sm for capability in ascending] == [75, 80, 89, 100, 120]
