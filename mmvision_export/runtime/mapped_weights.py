"""Files of weights that a runtime has mapped, and whether somebody writes into them meanwhile.

A runtime reads mapped weights when it needs them. Another content of the file is then another model under
the old hash, and a file that becomes shorter ends the process by SIGBUS. A file that is replaced by
renaming another one over it changes nothing: the mapping keeps the old one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mmvision_export.core.errors import BackendError

__all__ = ["MappedWeights"]


class MappedWeights:
    """The files as they were when they were opened. To look at them costs some microseconds a file.

    Args:
        files: Before they are verified, so that no write between the two passes unseen.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {path: stat for path in files if (stat := _stat(path)) is not None}

    def refuse_changed(self) -> None:
        """Refuse to compute with weights that are not those that were opened.

        Raises:
            BackendError: A file has been written into, or has become shorter, since.
        """
        for path, opened in self._files.items():
            now = _stat(path)
            if now is None or (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino):
                continue
            if (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
                raise BackendError(
                    f"{path} was changed while the encoder was using it",
                    hint="open the encoder again; to replace a file in use, rename another file over it",
                )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
