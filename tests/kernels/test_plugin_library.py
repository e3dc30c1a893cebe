"""`libmmvision_plugins.so`: built, held against its contract on two CPUs, and loaded into a real TensorRT-RTX."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, ManifestError, OutputError, PluginError
from mmvision_export.kernels.cmake import cmake_build
from mmvision_export.kernels.compile import compile_kernels, plugins_root
from mmvision_export.kernels.embed import write_embedded_kernels
from mmvision_export.kernels.headers import cuda_headers, tensorrt_header_version, tensorrt_headers
from mmvision_export.kernels.tensorrt_library import build_plugins
from mmvision_export.runtime.backends import plugin_library
from mmvision_export.runtime.backends.plugin_library import load_plugin_library
from tests.support.errors import refused
from tests.support.records import content_of
from tests.support.tools import once, tool

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def library(shared: Path) -> Path:
    """A library for Orin, built as the command does."""
    tool("cmake", "cmake")
    root = shared / "plugin-library"
    once(
        root,
        lambda new: build_plugins(
            compute_capabilities=[ComputeCapability(8, 7)], head_dims=[80], output=new
        ),
    )
    return root / "libmmvision_plugins.so"


@pytest.fixture(scope="session")
def settings(shared: Path) -> dict[str, str | Path]:
    """What CMake needs for the contract tests, which expect these architectures and head sizes."""
    tool("cmake", "cmake")
    include = Path("/usr/include/doctest/doctest.h")
    if not include.is_file():
        tool("doctest.h", "doctest-dev")
    kernels = once(
        shared / "embedded-kernels",
        lambda new: write_embedded_kernels(
            list(
                compile_kernels(list(map(ComputeCapability.from_sm, (80, 87, 90, 110))), [64, 80])
            ),
            new,
        ),
    )
    return {
        "MMVISION_KERNELS": kernels,
        "TENSORRT_INCLUDE_DIR": tensorrt_headers(),
        "CUDA_INCLUDE_DIR": cuda_headers(),
        "MMVISION_TESTS": "ON",
        "DOCTEST_INCLUDE_DIR": "/usr/include",
    }


def output(*command: str | Path) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_library_is_complete_and_needs_only_libc(library: Path) -> None:
    record = PluginLibraryRecord.read(library)
    assert (record.sms, record.head_dims, record.dtypes) == ([80, 87], [80], ["fp16", "bf16"])
    assert int(record.versions["tensorrt headers"].split(".")[0]) >= 10
    assert (
        "| varlen_attention | 87 (Jetson Orin) | fp16 | 80 |"
        in (library.parent / "kernels.md").read_text()
    )

    dynamic = output("readelf", "--dynamic", "--wide", library)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    assert needed <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    symbols = output("readelf", "--dyn-syms", "--wide", library)
    exported = {
        line.split()[-1]
        for line in symbols.splitlines()
        if re.search(r"GLOBAL +DEFAULT +\d+ ", line)
    }
    assert exported == {"getCreators", "setLoggerFinder"}
    # Ubuntu 22.04, which JetPack 6 is, has glibc 2.35.
    versions = [tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", symbols)]
    assert max(versions) <= (2, 35)


def test_two_cubins_ptx_and_nothing_of_the_machine_inside(library: Path) -> None:
    content = library.read_bytes()
    assert (
        content.count(b"\x7fELF") == 1 + 2 * 2 * 2
    )  # itself; two architectures, two types, two kernels
    assert content.count(b".target sm_80") == 2 * 2
    assert str(Path.home()).encode() not in content
    assert str(plugins_root()).encode() not in content


@pytest.mark.slow
def test_contract_under_sanitizers(settings: dict[str, str | Path], tmp_path: Path) -> None:
    cmake_build(tmp_path, {**settings, "MMVISION_SANITIZE": "ON"})
    log = output("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert "100% tests passed, 0 tests failed out of 4" in log
    cases = output(tmp_path / "tests" / "contract_test", "--list-test-cases")
    assert (
        int(re.findall(r"unskipped test cases passing the current filters: (\d+)", cases)[0]) >= 19
    )


@pytest.mark.slow
def test_contract_on_aarch64(settings: dict[str, str | Path], tmp_path: Path) -> None:
    tool("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    tool("qemu-aarch64", "qemu-user")
    toolchain = plugins_root() / "cmake" / "aarch64-linux-gnu.cmake"
    cmake_build(tmp_path, {**settings, "CMAKE_TOOLCHAIN_FILE": toolchain})
    assert "AArch64" in output("readelf", "--file-header", tmp_path / "libmmvision_plugins.so")
    # Built with optimisation and no sanitizer: here the test counts the allocations of enqueue too.
    log = output("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert "100% tests passed, 0 tests failed out of 4" in log


def test_contract_finds_a_wrong_argument(settings: dict[str, str | Path], tmp_path: Path) -> None:
    """The control: k and q change places in the launch, and the contract test says so."""
    root = tmp_path / "plugins"
    shutil.copytree(plugins_root(), root)
    source = root / "varlen_attention" / "varlen_attention.cpp"
    wrong = re.sub(r"\{&qPtr,\s*&kPtr,", "{&kPtr, &qPtr,", source.read_text())
    assert wrong != source.read_text()
    source.write_text(wrong)
    variables = [f"-D{name}={value}" for name, value in settings.items()]
    output("cmake", "-S", root, "-B", tmp_path / "build", *variables)
    output("cmake", "--build", tmp_path / "build", "--parallel", "2")
    test = tmp_path / "build" / "tests" / "contract_test"
    result = subprocess.run([str(test)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "argument<uintptr_t>(launch, i) == 0x1000 * (i + 1)" in result.stdout


@pytest.mark.slow
def test_clang_tidy(settings: dict[str, str | Path], tmp_path: Path) -> None:
    clang_tidy = tool("clang-tidy", "clang-tidy")
    variables = [f"-D{name}={value}" for name, value in settings.items()]
    output("cmake", "-S", plugins_root(), "-B", tmp_path, *variables)
    sources = sorted(
        p for p in plugins_root().glob("*/*.cpp") if p.parent.name not in ("amx", "tests")
    )
    assert len(sources) == 7
    output(clang_tidy, "--quiet", "-p", tmp_path, *sources)


RTX = """
import json, sys
import onnx
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        print(message, flush=True)

logger = Logger()
builder = trt.Builder(logger)
if sys.argv[1] != "none":
    assert trt.get_plugin_registry().load_library(sys.argv[1]) is not None
found = [(c.name, c.plugin_version, c.plugin_namespace) for c in trt.get_plugin_registry().all_creators]
print("creators", json.dumps(sorted(c for c in found if c[2] == "mmvision")), flush=True)
model = onnx.parser.parse_model('''
<ir_version: 10, opset_import: ["": 23, "mmvision": 1]>
graph (float16[N,16,80] q, float16[N,16,80] k, float16[N,16,80] v, int32[S] cu_seqlens) => (float16[N,16,80] out) {
  out = mmvision.VarlenAttention
    <scale = 0.5, plugin_namespace = "mmvision", plugin_version = "1"> (q, k, v, cu_seqlens)
}''')
next(a for a in model.graph.node[0].attribute if a.name == "scale").f = float(sys.argv[2])
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
print("parsed", parser.parse(model.SerializeToString()))
"""


def rtx(library: Path | str, scale: str) -> str:
    command = [sys.executable, "-c", RTX, str(library), scale]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_tensorrt_rtx_lists_both_and_its_parser_finds_ours(library: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    log = rtx(library, "0.5")
    both = [["QKRotaryEmbedding", "1", "mmvision"], ["VarlenAttention", "1", "mmvision"]]
    assert f"creators {json.dumps(both)}" in log
    assert (
        "Searching for plugin: VarlenAttention, plugin_version: 1, plugin_namespace: mmvision"
        in log
    )
    # What it does next with the layer ends the process: TensorRT-RTX takes no plugins.
    assert "Successfully created plugin: VarlenAttention" in log
    # The node's attribute arrives: the plugin refuses this one by its value, and the parser gives up.
    log = rtx(library, "inf")
    assert "mmvision::VarlenAttention: attribute scale must be finite, got inf" in log
    assert "parsed False" in log
    # The control: without the library it finds none.
    log = rtx("none", "0.5")
    assert "creators []" in log
    assert "Plugin not found" in log


def test_what_build_plugins_refuses(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(OutputError, library) as caught:
        build_plugins(output=library.parent)
    assert "--force" in str(caught.value.hint)
    with refused(PluginError, "--sm", 75, 80, 121):
        build_plugins(compute_capabilities=[ComputeCapability(7, 5)], output=tmp_path)
    with refused(PluginError, "--head-dim", 72, 16, 32):
        build_plugins(head_dims=[72], output=tmp_path)
    with refused(PluginError, tmp_path):
        build_plugins(tensorrt_include=tmp_path, output=tmp_path)
    with refused(PluginError, "riscv64"):
        build_plugins(machine="riscv64", output=tmp_path)
    other = "aarch64" if PluginLibraryRecord.read(library).machine == "x86_64" else "x86_64"
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused(PluginError, "cmake"):
        build_plugins(machine=other, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_headers_of_an_older_tensorrt_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "NvInferRuntime.h").write_text("")
    (tmp_path / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 8 //!< major\n#define NV_TENSORRT_MINOR 6\n"
    )
    with refused(PluginError, "TensorRT", "8.6", "10.0"):
        tensorrt_header_version(tmp_path)
    (tmp_path / "NvInferVersion.h").write_text(
        "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n"
    )
    assert tensorrt_header_version(tmp_path) == "11.1"
    (tmp_path / "NvInferVersion.h").write_text("")
    with refused(PluginError, tmp_path / "NvInferVersion.h"):
        tensorrt_header_version(tmp_path)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    assert tensorrt_headers() == tmp_path


def test_cpp_that_does_not_compile_is_reported(tmp_path: Path) -> None:
    tool("cmake", "cmake")
    with refused(PluginError, "cmake -S", "MMVISION_KERNELS"):
        cmake_build(tmp_path, {})


def test_damaged_or_foreign_libraries_are_refused(library: Path, tmp_path: Path) -> None:
    copy = tmp_path / library.name
    shutil.copyfile(library, copy)
    with refused(ManifestError, copy.with_suffix(".json")):
        PluginLibraryRecord.read(copy)
    record = content_of(library.with_suffix(".json"))
    copy.with_suffix(".json").write_text(json.dumps({**record, "machine": "riscv64"}))
    with refused(ManifestError, copy, "riscv64"):
        PluginLibraryRecord.read(copy)
    copy.with_suffix(".json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ManifestError) as caught:
        PluginLibraryRecord.read(copy)
    facts = (str(copy.with_suffix(".json")), "plugin library", "format 1", "99")
    assert all(fact in str(caught.value) for fact in facts)
    assert "mmvision build-plugins" in str(caught.value.hint)
    copy.with_suffix(".json").write_text(json.dumps(record))
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    with refused(ManifestError, copy, "sha256"):
        PluginLibraryRecord.read(copy)


class Registry:
    """Of a TensorRT: takes a library whose creators are not there yet."""

    def __init__(self, *, works: bool = True) -> None:
        self.all_creators: list[Any] = []
        self.loaded: list[str] = []
        self._works = works

    def load_library(self, path: str) -> object | None:
        if not self._works:
            return None
        self.loaded.append(path)
        self.all_creators.append(SimpleNamespace(plugin_namespace="mmvision", plugin_version="1"))
        return object()


def test_a_process_loads_one_library_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_library, "_loaded", {})
    registry = Registry()
    trt = SimpleNamespace(get_plugin_registry=lambda: registry)
    library = tmp_path / "a.so"
    load_plugin_library(trt, library, "aa")
    load_plugin_library(trt, library, "aa")
    assert registry.loaded == [str(library)]
    with refused(BackendError, "mmvision", "a.so"):
        load_plugin_library(trt, tmp_path / "b.so", "bb")
    broken = SimpleNamespace(get_plugin_registry=lambda: Registry(works=False))
    with refused(BackendError, "TensorRT", "plugin library"):
        load_plugin_library(broken, tmp_path / "c.so", "cc")
