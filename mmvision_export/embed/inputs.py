"""An input as the command line names it, to its rows: a folder, Parquet, or a URI of either."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mmvision_export.core.errors import InputError
from mmvision_export.embed.arrow import file_system
from mmvision_export.embed.files import files_of_folder, files_of_uri
from mmvision_export.embed.listing import Listing
from mmvision_export.embed.tables import Columns, rows_of_tables
from mmvision_export.runtime.folder_files import files_below

__all__ = ["listed_input"]

_TABLE = ".parquet"
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


def listed_input(name: str, *, rows_per_part: int, columns: Columns) -> Listing:
    """What an input holds.

    A folder with `.parquet` files is a table of all of them, any other a folder of images.

    Args:
        name: A folder or a `.parquet` file of this machine, or a URI of either that pyarrow opens.
        rows_per_part: Rows of a part.
        columns: Which columns of Parquet are read.

    Raises:
        InputError: It is missing, neither of these, or both; or nothing is in it.
    """
    if "://" in name:
        return _listed_uri(name, rows_per_part, columns)
    path = Path(name)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder", reason="missing")
    if path.is_dir():
        files = files_below([path]).files
        tables = [file for file in files if file.name.suffix == _TABLE]
        if not tables:
            return files_of_folder(path, rows_per_part=rows_per_part)
        _refuse_mixed(name, [file.name.suffix for file in files])
        named = [(str(file.source.absolute()), file.name.as_posix()) for file in tables]
    elif path.suffix == _TABLE:
        named = [(str(path.absolute()), path.name)]
    else:
        raise InputError(
            f"{path} is neither a folder nor a {_TABLE} file",
            hint="for single images use mmvision run",
        )
    return rows_of_tables(name, named, None, columns, rows_per_part=rows_per_part)


def _listed_uri(uri: str, rows_per_part: int, columns: Columns) -> Listing:
    _, path = file_system(uri)
    if path.endswith(_TABLE):
        named = [(path, PurePosixPath(path).name)]
        return rows_of_tables(uri, named, uri, columns, rows_per_part=rows_per_part)
    listing = files_of_uri(uri, rows_per_part=rows_per_part)
    names = [name for part in listing.parts for name in part.names]  # type: ignore[attr-defined]
    suffixes = [PurePosixPath(name).suffix for name in names]
    if _TABLE not in suffixes:
        return listing
    _refuse_mixed(uri, suffixes)
    folder = path.rstrip("/")
    named = [(f"{folder}/{name}", name) for name in names if name.endswith(_TABLE)]
    return rows_of_tables(uri, named, uri, columns, rows_per_part=rows_per_part)


def _refuse_mixed(name: str, suffixes: list[str]) -> None:
    if any(suffix.lower() in _IMAGES for suffix in suffixes):
        raise InputError(
            f"{name} holds {_TABLE} files and images",
            hint="name a folder that holds one kind",
        )
