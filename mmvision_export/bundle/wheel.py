"""The wheel of the package that is running, made from its files.

Neither a checkout nor a build tool is needed, and the same files give the same bytes: nothing is
compressed, and times are the same in every wheel.

References:
    https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mmvision_export.core.errors import MmvisionError, OutputError
from mmvision_export.kernels.compile import plugins_root

__all__ = ["own_wheel"]

_PACKAGE = Path(__file__).parents[1]
_DISTRIBUTION = "mmvision-export"
_TIME = (1980, 1, 1, 0, 0, 0)
_WHEEL = """\
Wheel-Version: 1.0
Generator: mmvision-export
Root-Is-Purelib: true
Tag: py3-none-any
"""
# What an installer writes, and not the maker of a wheel.
_OF_INSTALLATION = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL"}


def own_wheel() -> tuple[str, bytes]:
    """File name and content of this package's wheel, with the plugins' sources.

    Raises:
        OutputError: The package is not installed, or its files are not on the disk.
    """
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
        plugins = plugins_root()
    except (importlib.metadata.PackageNotFoundError, MmvisionError) as error:
        raise OutputError(
            f"the wheel of {_DISTRIBUTION} cannot be made: {error}",
            hint="install the package again",
        ) from error
    stem = f"{distribution.metadata['Name'].replace('-', '_')}-{distribution.version}"
    files = {f"{_PACKAGE.name}/{name}": path for name, path in _files(_PACKAGE)}
    files |= {f"{_PACKAGE.name}/_plugins/{name}": path for name, path in _files(plugins)}
    content = {name: path.read_bytes() for name, path in files.items()}
    info = f"{stem}.dist-info"
    for each in distribution.files or ():
        parts = each.parts
        if parts[0].endswith(".dist-info") and parts[1] not in _OF_INSTALLATION:
            content["/".join((info, *parts[1:]))] = Path(str(each.locate())).read_bytes()
    content[f"{info}/WHEEL"] = _WHEEL.encode()
    return f"{stem}-py3-none-any.whl", _archive(content, f"{info}/RECORD")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(
            part[0] == "." or part == "__pycache__" for part in name.parts
        ):
            yield name.as_posix(), path


def _archive(content: dict[str, bytes], record: str) -> bytes:
    lines = [
        f"{name},sha256={_url_safe(hashlib.sha256(data).digest())},{len(data)}"
        for name, data in sorted(content.items())
    ]
    content = {**content, record: "\n".join([*lines, f"{record},,", ""]).encode()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        # The metadata last, as the specification recommends.
        for name in sorted(content, key=lambda name: (".dist-info/" in name, name)):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # Unix, also where it is made on another system
            archive.writestr(entry, content[name])
    return out.getvalue()


def _url_safe(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
