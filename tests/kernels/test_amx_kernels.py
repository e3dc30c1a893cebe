"""The kernels for CPUs with AMX: each against float64, the whole graph, and the build."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import BackendError, OutputError, PluginError
from mmvision_export.kernels.amx_library import build_amx_library
from mmvision_export.kernels.cmake import cmake_build
from mmvision_export.kernels.compile import plugins_root
from mmvision_export.kernels.headers import onnxruntime_headers
from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.parity.check import check_parity
from mmvision_export.parity.samples import samples_from_grids
from mmvision_export.runtime.backends import onnxruntime_amx
from mmvision_export.runtime.backends.onnxruntime import create_session
from mmvision_export.runtime.backends.onnxruntime_amx import AMX_LIBRARY, cpu_has_amx
from tests.support.amx import put_library
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, arrays, batch, grids, relative_l2
from tests.support.tools import once, tool

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the AMX kernels are for x86-64")
AMX = pytest.mark.skipif(not cpu_has_amx(), reason="this CPU has no AMX: only emulated")
ON_AMX = "mmvision_export.runtime.backends.onnxruntime_amx.cpu_has_amx"

UNIT = 2.0**-24
SPLIT = (
    2.0**-21
)  # of a product, what three bfloat16 pieces leave out at most (plugins/amx/bf16x3.h)

LINEAR = "g (float[m, k] x, float[n, k] w, float[n] b) => (float[m, n] y) {{ y = mmvision.Linear (x, w{bias}) }}"
ATTENTION = """g (float[n, h, d] q, float[n, h, d] k, float[n, h, d] v, int32[s] bounds) => (float[n, h, d] out) {{
  out = mmvision.VarlenAttention <scale: float = {scale}> (q, k, v, bounds)
}}"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as users get it."""
    if platform.machine() != "x86_64":
        pytest.skip("the AMX kernels are for x86-64")
    return _built(tmp_path_factory, "amx-kernels", lambda new: build_amx_library(output=new))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kernels on a plain C++ model of the instructions, which every CPU runs."""

    def build(new: Path) -> None:
        cmake_build(new / "build", {"MMVISION_EMULATE_AMX": "ON"}, project="amx")
        put_library(new / "build" / AMX_LIBRARY, new / AMX_LIBRARY)

    return _built(tmp_path_factory, "amx-emulated", build)


def _built(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    tool("cmake", "cmake")
    tool("g++", "g++")
    base = factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    return once(root, build) / AMX_LIBRARY


@pytest.fixture(
    scope="session", params=["emulated", pytest.param("library", marks=[X86, AMX])], ids=str
)
def operators(request: pytest.FixtureRequest) -> Path:
    """The kernels emulated, and on AMX itself where the CPU has it."""
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="session")
def run_op(operators: Path) -> Callable[..., np.ndarray]:
    """Runs a graph of one operator, which has no definition here but the kernel."""
    sessions: dict[str, Any] = {}

    def run(graph: str, *inputs: np.ndarray) -> np.ndarray:
        if graph not in sessions:
            model = onnx.parser.parse_model(
                f'<ir_version: 10, opset_import: ["": 18, "mmvision": 1]> {graph}'
            )
            content = model.SerializeToString()
            sessions[graph] = create_session(
                content, provider="CPUExecutionProvider", operators=operators
            )
        names = [value.name for value in sessions[graph].get_inputs()]
        (out,) = sessions[graph].run(None, dict(zip(names, inputs, strict=True)))
        return np.asarray(out)

    return run


def values(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Of many magnitudes, so that every piece of a split matters."""
    return (generator.standard_normal(shape) * 2.0 ** generator.integers(-6, 7, shape)).astype(
        np.float32
    )


def linear_error(
    run_op: Callable[..., np.ndarray], rows: int, k: int, n: int, *, bias: bool, spoil: float = 0
) -> float:
    """Largest error of y = x w^T + b, in units of what is allowed."""
    generator = np.random.default_rng(rows * 10007 + k * 101 + n)
    x, w, b = values(generator, rows, k), values(generator, n, k), values(generator, n)
    spoilt = (x * np.float32(1 + spoil)).astype(np.float32)
    out = run_op(LINEAR.format(bias=", b" if bias else ""), spoilt, w, b)
    exact = x.astype(np.float64) @ w.astype(np.float64).T + (b if bias else 0)
    size = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T + (
        np.abs(b) if bias else 0
    )
    # Six sums of k products, each step rounded: errors of independent signs grow with the root of their number
    # (Higham and Mary, 2019), here with a factor of four for the worst of many results.
    allowed = (SPLIT + (2 if k == 1 else 4 * np.sqrt(6 * k)) * UNIT) * size
    return float((np.abs(out - exact) / allowed).max())


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), k=st.integers(1, 100), n=st.integers(1, 70), bias=st.booleans())
def test_linear_of_any_shape(
    run_op: Callable[..., np.ndarray], rows: int, k: int, n: int, bias: bool
) -> None:
    assert linear_error(run_op, rows, k, n, bias=bias) <= 1


@pytest.mark.parametrize(
    ("rows", "k", "n"),
    # One product alone shows each piece; more than a block of inputs (1024), of outputs (160), of rows for each worker.
    [
        (300, 1, 300),
        (33, 1024, 160),
        (64, 1025, 161),
        (520, 2100, 31),
        (1, 3000, 1),
        (1024, 40, 330),
        (2, 5000, 500),
    ],
)
def test_linear_of_several_blocks(
    run_op: Callable[..., np.ndarray], rows: int, k: int, n: int
) -> None:
    assert linear_error(run_op, rows, k, n, bias=True) <= 1
    # The control: what would be lost without the third pieces, 2^-16, shows in a single product.
    if k == 1:
        assert linear_error(run_op, rows, k, n, bias=False, spoil=2.0**-16) > 10


def test_linear_refuses_shapes_that_do_not_match(run_op: Callable[..., np.ndarray]) -> None:
    x, w, b = np.ones((4, 8), np.float32), np.ones((6, 9), np.float32), np.ones(5, np.float32)
    with pytest.raises(Exception, match=r"Linear: x .*\[m, k\].* weight .*\[n, k\]"):
        run_op(LINEAR.format(bias="").replace("float[n, k] w", "float[n, j] w"), x, w, b)
    with pytest.raises(Exception, match=r"Linear: bias .*\[n\]"):
        run_op(LINEAR.format(bias=", b").replace("float[n] b", "float[i] b"), x, w[:, :8].copy(), b)


def attention_errors(
    run_op: Callable[..., np.ndarray],
    lengths: list[int],
    heads: int,
    head_dim: int,
    *,
    behind: int = 0,
) -> tuple[float, float, np.ndarray]:
    """The kernel's largest error, what is allowed, and what stands behind the last segment.

    Allowed are twice the error of float32 NumPy, and what the split leaves out: 8 times `SPLIT` where a score
    is a sum, whose errors average. A score of one product, `head_dim` 1, may be wrong by `SPLIT` of itself. To
    first order this moves an output by `sum_j w_j |score_j| |v_j - out|`, with the weights `w`, and the
    product with v adds `SPLIT` of itself.
    """
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    generator = np.random.default_rng(sum(lengths) + heads * head_dim)
    shape = (int(bounds[-1]) + behind, heads, head_dim)
    q, k, v = (generator.standard_normal(shape).astype(np.float32) * 2 for _ in range(3))
    q[bounds[-1] :] = k[bounds[-1] :] = v[bounds[-1] :] = np.nan  # no business of any segment
    scale = float(np.float32(head_dim**-0.5))
    out = run_op(ATTENTION.format(scale=scale), q, k, v, bounds)

    def attention(dtype: type[np.floating]) -> np.ndarray:
        pieces = []
        for start, end in itertools.pairwise(bounds):
            a, b, c = (part[start:end].astype(dtype).transpose(1, 0, 2) for part in (q, k, v))
            scores = a @ b.transpose(0, 2, 1) * dtype(scale)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
            pieces.append((weights / weights.sum(axis=-1, keepdims=True) @ c).transpose(1, 0, 2))
        return np.concatenate(pieces)

    exact = attention(np.float64)
    inside = slice(0, int(bounds[-1]))
    kernel = float(np.abs(out[inside] - exact).max(initial=0))
    eager = float(np.abs(attention(np.float32) - exact).max(initial=0))
    split = 8 * SPLIT if head_dim > 1 else SPLIT * one_product_moves(q, k, v, exact, bounds)
    return kernel, 2 * eager + split, out[bounds[-1] :]


def one_product_moves(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, exact: np.ndarray, bounds: np.ndarray
) -> float:
    """How far outputs move at most, in units of the products' relative error; heads of one channel."""
    furthest = 0.0
    for start, end in itertools.pairwise(bounds):
        a, b, c, out = (
            part[start:end, :, 0].astype(np.float64).T[..., None] for part in (q, k, v, exact)
        )
        scores = a @ b.transpose(0, 2, 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        moved = np.abs(scores) * np.abs(c.transpose(0, 2, 1) - out) + np.abs(c.transpose(0, 2, 1))
        furthest = max(furthest, float((weights * moved).sum(axis=-1).max(initial=0)))
    return furthest


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 8, 16, 24, 32, 40, 80, 128]),
    behind=st.integers(0, 3),
)
@example(lengths=[18, 70], heads=2, head_dim=1, behind=2)  # large scores, each of one product
def test_attention_of_any_segments(
    run_op: Callable[..., np.ndarray], lengths: list[int], heads: int, head_dim: int, behind: int
) -> None:
    kernel, allowed, rest = attention_errors(run_op, lengths, heads, head_dim, behind=behind)
    assert kernel <= allowed
    assert np.all(rest == 0)


@pytest.mark.parametrize("lengths", [[256], [257, 255], [129, 1, 128], [1000, 20], [600, 3, 511]])
def test_attention_of_several_blocks(run_op: Callable[..., np.ndarray], lengths: list[int]) -> None:
    kernel, allowed, _ = attention_errors(run_op, lengths, 2, 80)
    assert kernel <= allowed
    # The control: one key of another segment.
    moved = [lengths[0] - 1, *lengths[1:]]
    other, _, _ = attention_errors(run_op, moved, 2, 80, behind=1)
    assert other <= allowed
    generator = np.random.default_rng(0)
    q, k, v = (
        generator.standard_normal((sum(lengths), 2, 80)).astype(np.float32) for _ in range(3)
    )
    text = ATTENTION.format(scale=0.1)
    whole, cut = (
        run_op(text, q, k, v, np.array(b, np.int32)) for b in ([0, len(q)], [0, 1, len(q)])
    )
    assert np.abs(whole - cut).max() > 1e-3


def test_attention_whose_weights_nearly_vanish(run_op: Callable[..., np.ndarray]) -> None:
    """Weights down to and below the smallest float32, each beside one that counts."""
    generator = np.random.default_rng(0)
    scores = np.where(np.arange(64) % 2, -np.linspace(60, 110, 64), 0).astype(
        np.float32
    )  # e^-87 is 2^-126
    k, q = scores.reshape(64, 1, 1), np.ones((64, 1, 1), np.float32)
    v = generator.standard_normal((64, 1, 1)).astype(np.float32)
    out = run_op(ATTENTION.format(scale=1.0), q, k, v, np.array([0, 64], np.int32))
    np.testing.assert_allclose(out, v[::2].astype(np.float64).mean(), atol=8 * SPLIT)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 4], [0, 3, 2, 4], []])
def test_attention_refuses_bounds_that_are_none(
    run_op: Callable[..., np.ndarray], bounds: list[int]
) -> None:
    q = np.ones((4, 1, 8), np.float32)
    with pytest.raises(Exception, match="VarlenAttention: cu_seqlens "):
        run_op(ATTENTION.format(scale=1.0), q, q, q, np.array(bounds, np.int32))


@settings(max_examples=15, deadline=None)
@given(grid=grids())
def test_the_graph_against_float64(
    run_graph_with_kernels: VisionEncoder,
    float64_state: dict[str, np.ndarray],
    grid: list[tuple[int, int, int]],
) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80)
    expected = reference.vision_encoder(float64_state, pixels, rows, HEAD_DIM_80)
    assert (
        relative_l2(run_graph_with_kernels(pixels, rows), expected) <= 2e-6
    )  # as test_onnx_cpu.py without


@pytest.fixture(scope="module")
def float64_state() -> dict[str, np.ndarray]:
    return arrays(random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float64))


@pytest.fixture(scope="module")
def run_graph_with_kernels(operators: Path, exported: Path) -> Iterator[VisionEncoder]:
    with (
        pytest.MonkeyPatch.context() as patch,
        VisionEncoder.open(exported, backend="onnxruntime-cpu") as plain,
    ):
        patch.setattr(ON_AMX, lambda: True)
        with VisionEncoder.open(
            exported, backend="onnxruntime-amx", kernel_library=operators
        ) as encoder:
            assert encoder.info["kernel_library"] == str(operators)
            # The control: it is another function than ONNX Runtime's own, to the last bits.
            pixels, rows = batch([(1, 4, 6), (1, 2, 2)], HEAD_DIM_80)
            assert 0 < relative_l2(encoder(pixels, rows), plain(pixels, rows)) <= 2e-6
            yield encoder


def test_parity_compares_them_where_it_is_told_to(
    operators: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ON_AMX, lambda: True)
    directory = Path(shutil.copytree(exported, tmp_path / "model"))
    samples = samples_from_grids(Manifest.read(directory).config)[:1]
    result = check_parity(directory, samples=samples, kernel_library=operators)
    runners = {row.runner for row in result.rows if row.subject == "model.cpu.onnx"}
    assert runners == {"model.cpu.onnx", "model.cpu.onnx (AMX kernels)"}
    assert result.passed
    result = check_parity(directory, samples=samples)
    assert "model.cpu.onnx (AMX kernels)" not in {row.runner for row in result.rows}


@X86
def test_building(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(library.with_suffix(".json").read_text())
    assert record["machine"] == "x86_64"
    assert record["versions"]["compiler"]
    with pytest.raises(OutputError) as exists:
        build_amx_library(output=library.parent)
    assert str(library) in str(exists.value)
    monkeypatch.setattr("mmvision_export.kernels.amx_library._MACHINE", "riscv64")
    with pytest.raises(PluginError) as foreign:
        build_amx_library(output=tmp_path)
    assert "riscv64" in str(foreign.value)
    assert "x86_64" in str(foreign.value)
    assert not list(tmp_path.iterdir())


@X86
@pytest.mark.skipif(cpu_has_amx(), reason="this CPU has AMX")
def test_the_library_itself_refuses_a_cpu_without_amx(library: Path, exported: Path) -> None:
    """Rather than leave the graph to its definitions, which would be slow and look right."""
    with pytest.raises(BackendError) as refused:
        create_session(
            exported / "model.cpu.onnx", provider="CPUExecutionProvider", operators=library
        )
    assert str(library) in str(refused.value)
    assert "this CPU has no AMX" in str(refused.value)


@X86
def test_only_its_entry_point_is_visible(library: Path) -> None:
    shown = subprocess.run(
        [tool("nm", "binutils"), "-D", "--defined-only", str(library)],
        capture_output=True,
        text=True,
    )
    names = {line.split()[-1] for line in shown.stdout.splitlines() if " T " in line}
    assert names == {"RegisterCustomOps"}


@X86
def test_the_table_is_the_published_header_s(tmp_path: Path) -> None:
    """Only where the header is at hand: no package registry has it."""
    headers = onnxruntime_headers()
    if headers is None:
        pytest.skip("no onnxruntime_c_api.h here: name its folder in ONNXRUNTIME_INCLUDE_DIR")
    library, record = build_amx_library(output=tmp_path, onnxruntime_include=headers)
    assert library.is_file()
    assert int(record.versions["onnxruntime header"]) >= 17
    # The control: a header whose functions are in another order does not compile.
    moved = Path(shutil.copytree(headers, tmp_path / "moved"))
    header = moved / "onnxruntime_c_api.h"
    text = header.read_text()
    assert text.count("ORT_API2_STATUS(GetDimensionsCount,") == 1
    extra = "void* another_function;\n  ORT_API2_STATUS(GetDimensionsCount,"
    header.write_text(text.replace("ORT_API2_STATUS(GetDimensionsCount,", extra))
    with pytest.raises(PluginError) as refused:
        build_amx_library(output=tmp_path / "other", onnxruntime_include=moved)
    assert "static assertion failed" in str(refused.value)
    assert not (tmp_path / "other" / AMX_LIBRARY).exists()


@X86
def test_the_command_says_how_to_use_what_it_built(mmvision: Command) -> None:
    tool("cmake", "cmake")
    result = mmvision("build-plugins", "--cpu", "--output", "here")
    assert result.code == 0
    assert Path("here", AMX_LIBRARY).is_file()
    said = " ".join(result.out.split())
    assert f"--backend onnxruntime-amx --kernel-library here/{AMX_LIBRARY}" in said
    assert ("no AMX" in said) != onnxruntime_amx.cpu_has_amx()


@X86
def test_a_folder_without_the_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError) as refused:
        build_amx_library(output=tmp_path / "out", onnxruntime_include=tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "onnxruntime_c_api.h" in str(refused.value)
    assert "releases" in str(refused.value.hint)


@X86
@pytest.mark.slow
def test_clang_tidy(tmp_path: Path) -> None:
    clang_tidy = tool("clang-tidy", "clang-tidy")
    folder = plugins_root() / "amx"
    subprocess.run(["cmake", "-S", folder, "-B", tmp_path], check=True, capture_output=True)
    # It reads GCC's command line, of whose warnings it does not know all.
    options = ["--quiet", "--extra-arg=-Wno-unknown-warning-option", "-p", str(tmp_path)]
    # The check of the table needs ONNX Runtime's header, which is nowhere to be installed from.
    checked = {file for file in folder.glob("*.cpp") if file.stem != "onnxruntime_table_check"}
    sources = sorted(map(str, checked))
    assert len(sources) == 4
    done = subprocess.run([clang_tidy, *options, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_no_access_is_out_of_bounds(exported: Path, tmp_path: Path) -> None:
    """The whole graph with the kernels under the address and undefined-behaviour sanitizers."""
    settings: dict[str, str | Path] = {"MMVISION_SANITIZE": "ON"}
    if not cpu_has_amx():
        settings["MMVISION_EMULATE_AMX"] = "ON"
    cmake_build(tmp_path / "build", settings, project="amx")
    asan = subprocess.run(
        [tool("g++", "g++"), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    script = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = False  # so that each tensor has bounds of its own
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
rows = np.array([[1, 4, 6], [1, 2, 2], [2, 10, 14]])
pixels = np.ones((int(rows.prod(axis=1).sum()), session.get_inputs()[0].shape[1]), np.float32)
print(session.run(None, {"pixel_values": pixels, "grid_thw": rows})[0].shape)
"""
    environment = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "build" / AMX_LIBRARY),
        str(exported / "model.cpu.onnx"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("(")
