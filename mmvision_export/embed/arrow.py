"""pyarrow and its file systems, with their errors in words."""

from __future__ import annotations

from typing import Any

from mmvision_export.core.errors import BackendError, InputError
from mmvision_export.core.install import install_command

__all__ = ["file_system", "required_pyarrow"]


def required_pyarrow() -> Any:
    """The package, with its modules for Parquet and file systems loaded.

    Raises:
        BackendError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError(
            f"pyarrow, which reads and writes Parquet, is not installed: {error}",
            hint=install_command("embed"),
        ) from error
    return pyarrow


def file_system(uri: str | None) -> tuple[Any, str]:
    """The file system of a URI, and the path in it; that of this machine if None.

    Raises:
        InputError: pyarrow has none for it, or it cannot be reached.
    """
    arrow = required_pyarrow()
    if uri is None:
        return arrow.fs.LocalFileSystem(), ""
    try:
        system, path = arrow.fs.FileSystem.from_uri(uri)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{uri}: cannot be opened: {error}",
            hint="give a path, or a URI of file://, s3://, gs:// or hdfs://",
            reason="unreadable",
        ) from error
    return system, path
