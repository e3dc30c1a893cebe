"""Fixtures shared by all tests, and the `gpu` and `slow` markers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Triton reads it once, when it is imported: the kernels' tests run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
import torch

from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.models.weights import WeightSource
from tests.support.command import mmvision  # noqa: F401 - a fixture
from tests.support.configs import HEAD_DIM_80

# Examples are searched anew on every run, but in CI, where the same ones are tried each time, so
# that a red run is the doing of a change. Times vary too much on shared machines for a deadline.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    # What the tests build and verify is remembered in folders of their own, and not in the user's.
    folder = tempfile.TemporaryDirectory(prefix="mmvision-tests-")
    config.add_cleanup(folder.cleanup)
    for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        os.environ[variable] = str(Path(folder.name) / variable.lower())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, rather than skip, tests marked gpu without one",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from mmvision_export.core.errors import BackendError
    from mmvision_export.runtime.backends.cuda import Cuda

    try:
        Cuda(0)
        no_gpu = ""
    except BackendError as error:
        no_gpu = f"no CUDA GPU here, never run: {error}"
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and no_gpu and not config.getoption("--require-gpu"):
            item.add_marker(pytest.mark.skip(reason=no_gpu))


@pytest.fixture(scope="session")
def encoder() -> VisionEncoderModule:
    """A small float32 encoder with the released head_dim."""
    return encoder_from_state_dict(
        HEAD_DIM_80, random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float32)
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of that encoder, which tests must not change."""
    directory = tmp_path_factory.mktemp("engines") / "small"
    export_model_directory(WeightSource(random_config=HEAD_DIM_80, seed=1), directory)
    return directory
