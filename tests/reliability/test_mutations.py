"""No damage to a file of a model directory changes a result without an error that names the file."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from tests.reliability.mutations import (
    ARTIFACTS,
    Artifact,
    Tried,
    encoded,
    make_directory,
    try_mutations,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("mutations") / "model")


def not_held(tried: list[Tried]) -> list[Tried]:
    return [each for each in tried if not each.is_held]


def test_damage_is_refused_or_harmless(directory: Path) -> None:
    tried = list(try_mutations(directory, count=30 * len(ARTIFACTS), seed=1))
    assert not not_held(tried)
    # Nearly all damage to files that a hash vouches for is refused: it is not that nothing was read.
    refused = collections.Counter(each.artifact for each in tried if each.outcome == "refused")
    assert all(refused[artifact.name] >= 15 for artifact in ARTIFACTS)


@pytest.mark.slow
def test_more_damage(directory: Path) -> None:
    assert not not_held(list(try_mutations(directory, count=2000, seed=2)))


def test_damage_that_nothing_checks_is_seen_here(directory: Path) -> None:
    """The control: weights whose hash is not compared change the embeddings, or do worse."""
    unchecked = Artifact("model.onnx.data", encoded("onnxruntime-cpu", verify="never"))
    tried = list(try_mutations(directory, count=40, seed=1, artifacts=[unchecked]))
    assert "different" in {each.outcome for each in not_held(tried)}
