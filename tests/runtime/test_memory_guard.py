"""What a launch needs is compared with what there is: of the host, of control groups, of a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.manifest import (
    CPU_GRAPH,
    GRAPH,
    OPENVINO_GRAPH,
    UNIFORM_GRAPH,
    Manifest,
)
from mmvision_export.core.errors import InputError
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.config import PRESETS, EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.models.minimax_m3_vl.memory import LaunchMemory, MemoryWay
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedGrid
from mmvision_export.models.weights import WeightSource
from mmvision_export.runtime.available_memory import host_available_bytes
from mmvision_export.runtime.memory_guard import MemoryGuard
from mmvision_export.runtime.planner import whole_layout
from mmvision_export.runtime.slot_planner import SlotPlanner
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, batch, copy_of
from tests.support.errors import refused
from tests.support.slots import with_openvino_graph

FULL = EncoderConfig()
GB = 10**9


class Machine:
    """Files as Linux has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("meminfo", "MemTotal: 9 kB\nMemAvailable:    8000000 kB\n")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")

    def group(self, folder: str, version: int, limit: object, used: int, cache: int = 0) -> None:
        if version == 2:
            names = ("memory.max", "memory.current", "inactive_file")
        else:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        self.write(f"groups/{folder}/{names[0]}", f"{limit}\n")
        self.write(f"groups/{folder}/{names[1]}", f"{used}\n")
        self.write(f"groups/{folder}/memory.stat", f"anon {used}\n{names[2]} {cache}\n")

    def available(self) -> int | None:
        return host_available_bytes(
            meminfo=self.folder / "meminfo",
            own_group=self.folder / "cgroup",
            groups=self.folder / "groups",
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_it_is_what_linux_says(machine: Machine) -> None:
    assert machine.available() == 8_192_000_000
    machine.write("cgroup", "0::/user\n")
    machine.group("user", 2, "max", 5 * GB)
    assert machine.available() == 8_192_000_000


def test_the_nearest_limit_counts_and_page_cache_does_not(machine: Machine) -> None:
    machine.write("cgroup", "0::/pod/container\n")
    machine.group("pod/container", 2, 4 * GB, 3 * GB, cache=2 * GB)
    assert machine.available() == 3 * GB
    machine.group("pod", 2, 2 * GB, 1 * GB)
    assert machine.available() == 1 * GB


def test_groups_of_version_1(machine: Machine) -> None:
    machine.write("cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/x\n")
    # In a container only its own group is there, as the root.
    machine.group("memory", 1, 3 * GB, 2 * GB, cache=1 * GB)
    assert machine.available() == 2 * GB
    machine.group("memory/docker/abc", 1, 3 * GB, 3 * GB)
    assert machine.available() == 0


def test_where_nothing_tells(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert host_available_bytes(meminfo=nowhere, own_group=nowhere, groups=nowhere) is None


def test_this_machine_tells() -> None:
    available = host_available_bytes()
    assert available is None or available > 0


def test_the_counts_of_one_photograph() -> None:
    """13,824 patches, 16 heads: the mask and the scores of the released encoder, as the issue has them."""
    dense = LaunchMemory(config=FULL, way="dense").of(13824)
    assert dense.scores >= 16 * 13824**2 * 4 > 12 * GB
    assert dense.mask >= 13824**2
    blocked = LaunchMemory(config=FULL, way="blocked")
    assert (blocked.of(13824).scores, blocked.of(13824).mask) == (0, 0)
    assert blocked.of(65536).total < 5 * blocked.of(13824).total  # linear
    uniform = LaunchMemory(config=FULL, way="uniform")
    assert uniform.of(16 * 256, slots=16).scores * 16 == uniform.of(16 * 256).scores


@pytest.mark.parametrize("way", ["blocked", "dense", "uniform"])
def test_the_size_that_would_fit_fits_and_no_larger_one(way: MemoryWay) -> None:
    memory = LaunchMemory(config=FULL, way=way)
    for patches in (4096, 16384):
        room = memory.image(patches).total
        guard = MemoryGuard(memory, lambda room=room: room)  # type: ignore[misc]
        assert guard.most_patches(room) == patches
        assert guard.most_patches(room - 1) == patches - 4


def guarded(guard: MemoryGuard, rows: list[tuple[int, int, int]], *, slots: bool = False) -> None:
    grid = PackedGrid(np.array(rows), 4)
    layouts = [whole_layout(grid)]
    if slots:
        layouts = list(SlotPlanner([], Costs(FULL, masked=False)).layouts(grid))
    with guard.watched(grid, layouts):
        pass


def test_an_image_beyond_the_memory_is_refused_with_what_would_fit() -> None:
    memory = LaunchMemory(config=FULL, way="dense")
    room = memory.of(4096).total
    guard = MemoryGuard(memory, lambda: room)
    guarded(guard, [(1, 64, 64)])
    need = memory.of(256 * 256).total
    with refused(InputError, "image 1", 65536, f"{need} bytes", "896 x 896 pixels"):
        guarded(MemoryGuard(memory, lambda: room), [(1, 2, 2), (1, 256, 256)])


def test_a_batch_beyond_the_memory_is_refused_as_a_batch() -> None:
    memory = LaunchMemory(config=FULL, way="blocked")
    guard = MemoryGuard(memory, lambda: memory.of(4096).total)
    guarded(guard, [(1, 64, 64)])
    with refused(InputError, 20480, "5 images", "host memory"):
        guarded(MemoryGuard(memory, lambda: memory.of(4096).total), [(1, 64, 64)] * 5)


def test_slots_are_launched_one_after_the_other() -> None:
    """What is compared is the largest launch, and not their sum."""
    memory = LaunchMemory(config=FULL, way="uniform")
    guard = MemoryGuard(memory, lambda: memory.image(6400).total)
    guarded(guard, [(1, 80, 80)] * 5, slots=True)
    with refused(InputError, "image 0", 10000):
        guarded(guard, [(1, 100, 100)], slots=True)


def test_what_a_runtime_keeps_of_a_launch_is_there_for_the_next() -> None:
    memory = LaunchMemory(config=FULL, way="blocked")
    left = [memory.of(4096).total]
    guard = MemoryGuard(memory, lambda: left[0])
    guarded(guard, [(1, 64, 64)])
    left[0] = 0
    guarded(guard, [(1, 64, 64)])
    with refused(InputError, "image 0", 4224):
        guarded(guard, [(1, 64, 66)])


def test_where_nothing_tells_nothing_is_refused() -> None:
    guarded(MemoryGuard(LaunchMemory(config=FULL, way="dense"), lambda: None), [(1, 256, 256)])


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
def test_backends_refuse_before_they_begin(
    exported: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    module = "onnxruntime" if backend == "onnxruntime-cpu" else backend
    place = f"mmvision_export.runtime.backends.{module}.host_available_bytes"
    monkeypatch.setattr("mmvision_export.runtime.memory_guard.NOT_ASKED_BYTES", 0)
    monkeypatch.setattr(place, lambda: 20 << 20)
    with VisionEncoder.open(exported, backend=backend) as encoder:
        pixels, rows = batch([(1, 60, 60)], HEAD_DIM_80)
        need = encoder.memory_for(3600)
        assert need is not None
        assert need.total > 20 << 20
        with refused(InputError, "image 0", 3600, f"{need.total} bytes", 20 << 20):
            encoder(pixels, rows)
        small, small_rows = batch([(1, 2, 2)], HEAD_DIM_80)
        assert len(encoder(small, small_rows)) == 1


def test_run_says_what_a_huge_image_needs(
    mmvision: Command, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmvision_export.run._HUGE_PATCHES", 100)
    model = ("run", "--model", str(exported), "--backend", "onnxruntime-cpu")
    said = mmvision(*model)
    assert said.code == 0
    assert "1024 patches" in said.err
    assert "available" in said.err
    monkeypatch.undo()
    assert mmvision(*model).err == ""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset `tiny`: wide enough for activations to be most of what a process takes."""
    directory = tmp_path_factory.mktemp("memory") / "tiny"
    export_model_directory(WeightSource(random_config=PRESETS["tiny"], seed=1), directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "graph", "side"),
    [
        ("onnxruntime-cpu", CPU_GRAPH, 64),
        ("onnxruntime-cpu", CPU_GRAPH, 96),
        ("onnxruntime-cpu", GRAPH, 48),
        ("openvino", OPENVINO_GRAPH, 64),
        ("openvino", UNIFORM_GRAPH, 64),
    ],
)
def test_no_launch_takes_more_than_was_counted(
    tiny: Path, backend: str, graph: str, side: int, tmp_path: Path
) -> None:
    """And at most a third of it is for safety alone: what fits must not be refused without need."""
    directory = tiny
    if backend == "openvino":
        pytest.importorskip("openvino")
        directory = (
            tiny
            if graph == UNIFORM_GRAPH and UNIFORM_GRAPH in Manifest.read(tiny).files
            else with_openvino_graph(tiny, tmp_path / "m", graph)
        )
    elif graph == GRAPH:
        directory = copy_of(tiny, tmp_path / "m")
        manifest = Manifest.read(directory)
        del manifest.files[CPU_GRAPH]
        manifest.write(directory)
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.peak_memory",
            backend,
            str(directory),
            json.dumps([[1, side, side]]),
        ],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    figures = json.loads(found.stdout)
    assert figures["graph"] == graph
    assert figures["tokens"] == side**2 // 4
    assert figures["peak_bytes"] <= figures["counted_bytes"] <= 3 * figures["peak_bytes"], figures
