"""The backend `onnxruntime-amx`: used only where it is named, with a verified library."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mmvision_export import VisionEncoder, run
from mmvision_export.core.errors import BackendError, ManifestError, ParityError
from mmvision_export.core.trust import UntrustedError
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.weights import WeightSource
from mmvision_export.parity.check import check_parity
from mmvision_export.runtime.backends import AUTO_BACKENDS
from mmvision_export.runtime.backends.onnxruntime_amx import AMX_LIBRARY, library_in
from tests.support.amx import put_into_directory, put_library
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, batch
from tests.support.tools import tool

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the AMX kernels are for x86-64"
)

AMX = "mmvision_export.runtime.backends.onnxruntime_amx.cpu_has_amx"
BATCH = batch([(1, 4, 6), (1, 2, 2)], HEAD_DIM_80)


@pytest.fixture
def directory(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that says it has AMX."""
    monkeypatch.setattr(AMX, lambda: True)


@pytest.fixture
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that says it has none."""
    monkeypatch.setattr(AMX, lambda: False)


@pytest.fixture
def telltale(tmp_path: Path) -> tuple[Path, Path]:
    """A library that writes a file when it is loaded, and that file."""
    written = tmp_path / "loaded"
    source, library = tmp_path / "telltale.c", tmp_path / "telltale.so"
    source.write_text(
        f"""#include <stdio.h>
        __attribute__((constructor)) static void tell(void) {{ fclose(fopen("{written}", "w")); }}
        """
    )
    subprocess.run([tool("gcc", "gcc"), "-shared", "-fPIC", "-o", library, source], check=True)
    return library, written


@pytest.mark.usefixtures("amx")
def test_opening_a_directory_loads_no_library_that_came_with_it(
    directory: Path, telltale: tuple[Path, Path]
) -> None:
    library, loaded = telltale
    put_into_directory(library, directory)
    for name in (AMX_LIBRARY, "libmmvision_cpu.so"):  # beside it too, where it was once looked for
        put_library(library, directory.parent / "plugins" / "x86_64" / name)
    for backend in ("auto", "onnxruntime-cpu"):
        with VisionEncoder.open(directory, backend=backend) as encoder:
            assert np.isfinite(encoder(*BATCH)).all()
    check_parity(directory)
    assert not loaded.exists()
    # Nor does the backend that wants one take a library that was not built here.
    with pytest.raises(UntrustedError):
        VisionEncoder.open(directory, backend="onnxruntime-amx")
    assert not loaded.exists()
    # The control: trusted, it is loaded, and is none of ours.
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(directory, backend="onnxruntime-amx", trust=True)
    assert str(library_in(directory)) in str(refused.value)
    assert loaded.exists()


def test_auto_never_takes_it() -> None:
    assert "onnxruntime-amx" not in AUTO_BACKENDS
    assert "onnxruntime-cpu" in AUTO_BACKENDS


@pytest.mark.usefixtures("no_amx")
def test_without_amx_one_refusal_wherever_it_is_named(
    directory: Path,
    telltale: tuple[Path, Path],
    mmvision: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library, loaded = telltale
    put_into_directory(library, directory)
    with pytest.raises(BackendError) as opened:
        VisionEncoder.open(directory, backend="onnxruntime-amx")
    with pytest.raises(BackendError) as compared:
        check_parity(directory, kernel_library=library_in(directory))
    assert str(opened.value) == str(compared.value)
    assert "AMX" in str(opened.value)
    result = mmvision(
        "parity", "--model", str(directory), "--kernel-library", str(library_in(directory))
    )
    assert result.code == 1
    assert result.errors[0] == f"error: {opened.value.message}"
    arguments = ["--model", str(directory), "--backend", "onnxruntime-amx"]
    assert run.main([*arguments, "--kernel-library", str(library_in(directory))]) == 1
    assert f"error: {opened.value.message}" in capsys.readouterr().err
    assert not loaded.exists()


@pytest.mark.usefixtures("amx")
def test_the_folder_beside_the_directory_is_not_looked_in(
    directory: Path, telltale: tuple[Path, Path]
) -> None:
    library, loaded = telltale
    beside = put_library(library, directory.parent / "plugins" / "x86_64" / AMX_LIBRARY)
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(directory, backend="onnxruntime-amx")
    assert str(library_in(directory)) in str(refused.value)
    assert "--kernel-library" in str(refused.value.hint)
    assert not loaded.exists()
    with pytest.raises(BackendError):  # the control: named, it is opened
        VisionEncoder.open(directory, backend="onnxruntime-amx", kernel_library=beside)
    assert loaded.exists()


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("damage", ["changed", "no record", "another machine"])
def test_a_library_that_is_not_its_record_s_is_not_loaded(
    directory: Path, telltale: tuple[Path, Path], damage: str
) -> None:
    source, loaded = telltale
    library = put_into_directory(source, directory)
    record = library.with_suffix(".json")
    if damage == "changed":
        library.write_bytes(library.read_bytes() + b"x")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text().replace("x86_64", "riscv64"))
    with pytest.raises(ManifestError) as refused:
        VisionEncoder.open(directory, backend="onnxruntime-amx")
    assert AMX_LIBRARY.removesuffix(".so") in str(refused.value)
    assert not loaded.exists()


@pytest.mark.usefixtures("amx")
def test_something_else_of_that_name_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no library")
    library = put_into_directory(tmp_path / "text", directory)
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(directory, backend="onnxruntime-amx", trust=True)
    assert str(library) in str(refused.value)


@pytest.mark.usefixtures("amx")
def test_a_graph_that_it_has_no_operators_for_is_refused(
    tmp_path: Path, telltale: tuple[Path, Path]
) -> None:
    """The float16 graph's operators have the kernels' names and another type."""
    library, loaded = telltale
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "half", precision="fp16"
    )
    put_into_directory(library, tmp_path / "half")
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(tmp_path / "half", backend="onnxruntime-amx", trust=True)
    assert "model.cpu.onnx" in str(refused.value)
    assert "fp16" in str(refused.value)
    with pytest.raises(ParityError) as compared:
        check_parity(tmp_path / "half", kernel_library=library_in(tmp_path / "half"))
    assert "model.cpu.onnx" in str(compared.value)
    assert not loaded.exists()


@pytest.mark.parametrize("backend", ["auto", "onnxruntime-cpu", "onnxruntime-cuda"])
def test_other_backends_take_no_kernel_library(exported: Path, backend: str) -> None:
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(exported, backend=backend, kernel_library="libmmvision_amx.so")
    assert backend in str(refused.value)
    assert "onnxruntime-amx" in str(refused.value.hint)
