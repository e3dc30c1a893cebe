"""The cache: bounds, damage, processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from mmvision_export.core.errors import ConfigError, InputError, OutputError
from mmvision_export.integrations.disk_embeds import DiskEmbeds
from mmvision_export.integrations.embeds_cache import CacheCounts, EmbedsCache
from mmvision_export.integrations.image_embeds import ImageEmbeds
from tests.support.errors import refused

ENTRY_BYTES = 8 + 32 + 32 + 20 + 2 * 4 * 8


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def embeds_of(number: int) -> ImageEmbeds:
    """4 tokens of width 8: 64 bytes of values."""
    values = np.random.default_rng(number).integers(0, 1 << 16, (4, 8), dtype=np.uint16)
    return ImageEmbeds(values, (1, 4, 4))


def is_same(found: ImageEmbeds | None, number: int) -> bool:
    wanted = embeds_of(number)
    return (
        found is not None
        and np.array_equal(found.bits, wanted.bits)
        and found.grid_thw == wanted.grid_thw
    )


def test_memory_is_bounded_and_drops_what_was_not_used_for_longest() -> None:
    cache = EmbedsCache(memory_bytes=3 * 64)
    for number in range(3):
        cache.put({key_of(number): embeds_of(number)})
    assert is_same(cache.get(key_of(0)), 0)
    cache.put({key_of(3): embeds_of(3)})
    assert cache.held_bytes == 3 * 64
    assert cache.get(key_of(1)) is None
    assert all(is_same(cache.get(key_of(number)), number) for number in (0, 2, 3))


def test_replacing_an_entry_counts_its_bytes_once() -> None:
    cache = EmbedsCache(memory_bytes=3 * 64)
    for _ in range(5):
        cache.put({key_of(0): embeds_of(0)})
    assert cache.held_bytes == 64


def test_what_is_larger_than_memory_is_left_out() -> None:
    cache = EmbedsCache(memory_bytes=63)
    cache.put({key_of(0): embeds_of(0)})
    assert cache.get(key_of(0)) is None
    assert cache.held_bytes == 0


def test_the_disk_is_bounded_and_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    disk = DiskEmbeds(tmp_path, max_bytes=3 * ENTRY_BYTES)
    for number in range(3):
        disk.write({key_of(number): embeds_of(number)})
        os.utime(disk.path(key_of(number)), ns=(number, number))
    assert is_same(disk.read(key_of(0)), 0)  # used now
    disk.write({key_of(3): embeds_of(3)})
    assert disk.size_bytes() == 3 * ENTRY_BYTES
    assert disk.read(key_of(1)) is None
    assert all(is_same(disk.read(key_of(number)), number) for number in (0, 2, 3))


def test_a_batch_larger_than_the_bound_keeps_what_fits(tmp_path: Path) -> None:
    disk = DiskEmbeds(tmp_path, max_bytes=2 * ENTRY_BYTES + 1)
    disk.write({key_of(number): embeds_of(number) for number in range(5)})
    assert disk.size_bytes() == 2 * ENTRY_BYTES
    DiskEmbeds(tmp_path / "small", max_bytes=ENTRY_BYTES - 1).write({key_of(0): embeds_of(0)})
    assert not list((tmp_path / "small").iterdir())


def test_the_folder_is_private_and_nothing_else_is_left_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    DiskEmbeds(folder, max_bytes=1 << 20).write({key_of(0): embeds_of(0)})
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in folder.iterdir()] == [f"{key_of(0)}.embeds"]


def damaged(content: bytes) -> dict[str, bytes]:
    flipped = {
        f"byte {at} flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        for at in range(len(content))
    }
    cut = {f"cut to {size}": content[:size] for size in range(len(content))}
    return {**flipped, **cut, "longer": content + b"\0"}


def test_every_flipped_byte_and_every_length_is_found(tmp_path: Path) -> None:
    disk = DiskEmbeds(tmp_path, max_bytes=1 << 20)
    disk.write({key_of(0): embeds_of(0)})
    path = disk.path(key_of(0))
    content = path.read_bytes()
    for what, other in damaged(content).items():
        path.write_bytes(other)
        with pytest.raises(InputError) as caught:
            disk.read(key_of(0))
        assert caught.value.reason == "malformed", what
        assert not path.exists(), what
    path.write_bytes(content)  # the control: the same steps without damage
    assert is_same(disk.read(key_of(0)), 0)


def test_an_entry_under_another_name_is_found(tmp_path: Path) -> None:
    disk = DiskEmbeds(tmp_path, max_bytes=1 << 20)
    disk.write({key_of(0): embeds_of(0)})
    disk.path(key_of(0)).rename(disk.path(key_of(1)))
    with refused(InputError, "another key", reason="malformed"):
        disk.read(key_of(1))


def test_a_shape_that_would_take_all_memory_is_found(tmp_path: Path) -> None:
    disk = DiskEmbeds(tmp_path, max_bytes=1 << 20)
    disk.write({key_of(0): embeds_of(0)})
    path = disk.path(key_of(0))
    content = bytearray(path.read_bytes())
    content[72:80] = b"\xff" * 8  # tokens and width
    path.write_bytes(content)
    with refused(InputError, len(content), reason="malformed"):
        disk.read(key_of(0))


def test_what_is_no_file_is_found(tmp_path: Path) -> None:
    disk = DiskEmbeds(tmp_path, max_bytes=1 << 20)
    os.mkfifo(disk.path(key_of(0)))
    with refused(InputError, reason="malformed"):
        disk.read(key_of(0))
    assert not disk.path(key_of(0)).exists()


def test_damage_counts_as_a_miss_and_is_made_anew(tmp_path: Path) -> None:
    cache = EmbedsCache(memory_bytes=0, folder=tmp_path)
    cache.put({key_of(0): embeds_of(0)})
    path = tmp_path / f"{key_of(0)}.embeds"
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get(key_of(0)) is None
    assert cache.counts == CacheCounts(misses=1, damaged=1)
    cache.put({key_of(0): embeds_of(0)})
    assert is_same(cache.get(key_of(0)), 0)
    assert cache.counts == CacheCounts(disk_hits=1, misses=1, damaged=1)


def test_memory_is_filled_from_the_disk(tmp_path: Path) -> None:
    EmbedsCache(folder=tmp_path).put({key_of(0): embeds_of(0)})
    cache = EmbedsCache(folder=tmp_path)
    assert is_same(cache.get(key_of(0)), 0)
    assert is_same(cache.get(key_of(0)), 0)
    assert cache.counts == CacheCounts(memory_hits=1, disk_hits=1)


def test_a_folder_that_is_gone_is_counted_and_stops_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    cache = EmbedsCache(folder=folder)
    folder.rmdir()
    folder.write_text("a file in its place")
    cache.put({key_of(0): embeds_of(0)})
    assert cache.counts.unwritten == 1
    assert is_same(cache.get(key_of(0)), 0)  # from memory


def test_bounds_that_keep_nothing_are_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "memory_bytes"):
        EmbedsCache(memory_bytes=-1)
    with refused(ConfigError, "memory_bytes"):
        EmbedsCache(memory_bytes=0)
    with refused(ConfigError, "max_bytes"):
        EmbedsCache(folder=tmp_path, disk_bytes=0)
    (tmp_path / "file").touch()
    with refused(OutputError):
        EmbedsCache(folder=tmp_path / "file")


def test_an_entry_that_another_process_wrote_meanwhile_costs_no_other_its_place(
    tmp_path: Path,
) -> None:
    disk = DiskEmbeds(tmp_path, max_bytes=2 * ENTRY_BYTES)
    late = DiskEmbeds(tmp_path, max_bytes=2 * ENTRY_BYTES)
    assert late.read(key_of(1)) is None
    disk.write({key_of(0): embeds_of(0)})
    disk.write({key_of(1): embeds_of(1)})
    late.write({key_of(1): embeds_of(1)})
    assert is_same(disk.read(key_of(0)), 0)
    assert is_same(disk.read(key_of(1)), 1)
    late.write({key_of(2): embeds_of(2)})  # the control: a new entry does
    assert disk.read(key_of(0)) is None


def _work(folder: str, seed: int) -> None:
    """Write and read 12 entries in a folder that has room for 8, in an order of its own."""
    disk = DiskEmbeds(Path(folder), max_bytes=8 * ENTRY_BYTES)
    for number in np.random.default_rng(seed).integers(0, 12, 60).tolist():
        found = disk.read(key_of(number))  # raises if another process's entry is half there
        if found is None:
            disk.write({key_of(number): embeds_of(number)})
        elif not is_same(found, number):
            raise AssertionError(number)
        if disk.size_bytes() > 8 * ENTRY_BYTES:
            raise AssertionError("beyond the bound")


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(str(tmp_path), seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    disk = DiskEmbeds(tmp_path, max_bytes=8 * ENTRY_BYTES)
    there = [number for number in range(12) if disk.read(key_of(number)) is not None]
    assert len(there) == 8
    assert all(is_same(disk.read(key_of(number)), number) for number in there)
    assert not list(tmp_path.glob(".new.*"))
