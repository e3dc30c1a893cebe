"""Modules of servers' wheels, run by themselves where the wheel is unpacked.

The wheels are large and need a GPU's packages. `MMVISION_VLLM`, `MMVISION_SGLANG` and
`MMVISION_DYNAMO` name folders that they were unpacked into; without them these tests skip.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest


def unpacked(variable: str) -> Path:
    """The folder that a variable of the environment names, or a skip."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no folder with the unpacked wheel (docs/integrations.md)")
    return Path(folder)


def stub(patch: pytest.MonkeyPatch, name: str, **members: Any) -> types.ModuleType:
    """Stand a module with these members in `sys.modules`, and as a member of its package."""
    module = types.ModuleType(name)
    module.__path__ = []  # a package, so that modules below it can be imported
    vars(module).update(members)
    patch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            stub(patch, parent)
        patch.setattr(sys.modules[parent], last, module, raising=False)
    return module


def real(patch: pytest.MonkeyPatch, root: Path, name: str) -> Any:
    """Run one module of a wheel's own source under its own name."""
    path = root / (name.replace(".", "/") + ".py")
    package = root / name.replace(".", "/") / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path if path.is_file() else package)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        stub(patch, parent)
    spec.loader.exec_module(module)
    if parent:
        patch.setattr(sys.modules[parent], last, module, raising=False)
    return module
