"""The AMX library as tests need it: built once, and in a model directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmvision_export.artifacts.library_record import LibraryRecord
from mmvision_export.core.files import file_record
from mmvision_export.runtime.backends.onnxruntime_amx import library_in


def put_library(file: Path, library: Path) -> Path:
    """Copy a file to where a library is looked for, with a record that fits it."""
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, library)
    record = LibraryRecord(library=file_record(library), machine="x86_64", versions={})
    record.write(library.with_suffix(".json"))
    return library


def put_into_directory(file: Path, directory: Path) -> Path:
    """As `put_library`, into a model directory."""
    return put_library(file, library_in(directory))
