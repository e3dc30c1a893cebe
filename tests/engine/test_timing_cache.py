"""Timings of kernels in a file: whose they are, what is done with those of another GPU, and two builds at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmvision_export.core.errors import EngineError, InputError, OutputError
from mmvision_export.core.trust import UntrustedError
from mmvision_export.engine.timing_cache import TimingCache
from tests.support.errors import refused
from tests.support.fake_timings import Builder
from tests.support.notes import Notes


@pytest.fixture(params=[True, False], ids=["named", "default"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> TimingCache:
    if not request.param:  # it lies in a folder that is there
        (tmp_path / "timings").mkdir()
    return TimingCache(tmp_path / "timings" / "x", is_named=request.param)


def build(cache: TimingCache, *timed: bytes, builder: Builder | None = None) -> Notes:
    builder = builder or Builder()
    notes = Notes()
    cache.refuse_unsafe()
    cache.keep(builder.build(cache.content_for(builder, notes), *timed), notes)
    return notes


def test_timings_are_made_read_and_added_to(cache: TimingCache) -> None:
    assert build(cache, b"gemm").notes == []
    assert cache.path.read_bytes() == b"10.13/sm89:gemm"
    assert cache.content_for(Builder(), Notes()) == b"10.13/sm89:gemm"
    assert build(cache, b"mha").notes == []
    assert cache.path.read_bytes() == b"10.13/sm89:gemm,mha"
    assert list(cache.path.parent.iterdir()) == [cache.path]


def test_what_another_build_wrote_meanwhile_stays(cache: TimingCache) -> None:
    build(cache, b"gemm")
    builder, notes = Builder(), Notes()
    config = builder.build(cache.content_for(builder, notes), b"mha")
    build(cache, b"norm")
    cache.keep(config, notes)
    assert cache.path.read_bytes() == b"10.13/sm89:gemm,mha,norm"


@pytest.mark.parametrize("content", [b"10.13/sm86:gemm", b"10.3/sm89:gemm", b"no cache at all"])
def test_timings_of_another_gpu_or_release(cache: TimingCache, content: bytes) -> None:
    """Where the user named the file, they are not silently thrown away."""
    cache.path.parent.mkdir(exist_ok=True)
    cache.path.write_bytes(content)
    if cache.is_named:
        with refused(EngineError, cache.path):
            build(cache, b"gemm")
        assert cache.path.read_bytes() == content
    else:
        notes = build(cache, b"mha")
        assert [str(cache.path) in note for note in notes.notes] == [True]
        assert cache.path.read_bytes() == b"10.13/sm89:mha"


def test_timings_of_nothing_are_taken(cache: TimingCache) -> None:
    build(cache)
    assert cache.path.read_bytes() == b"10.13/sm89:"
    assert build(cache, b"gemm").notes == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_timings_that_others_can_write_are_not_read(cache: TimingCache) -> None:
    """They hold compiled kernels."""
    build(cache, b"gemm")
    cache.path.chmod(0o666)
    with refused(UntrustedError, cache.path, reason="unsafe"):
        cache.refuse_unsafe()
    with refused(UntrustedError, cache.path, reason="unsafe"):
        cache.content_for(Builder(), Notes())
    cache.path.chmod(0o600)
    cache.refuse_unsafe()


def test_what_is_no_file(tmp_path: Path) -> None:
    with refused(InputError, tmp_path, reason="unsafe"):
        TimingCache(tmp_path, is_named=True).refuse_unsafe()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_build(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with refused(OutputError, tmp_path):
        TimingCache(tmp_path / "x", is_named=True).refuse_unsafe()


def test_timings_that_cannot_be_kept_cost_no_engine(
    cache: TimingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OutputError("no space left")

    build(cache, b"gemm")
    monkeypatch.setattr("mmvision_export.engine.timing_cache.new_files", fail)
    notes = build(cache, b"mha")
    assert any("no space left" in note for note in notes.notes)
    assert cache.path.read_bytes() == b"10.13/sm89:gemm"
