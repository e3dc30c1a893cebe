"""ONNX Runtime's CPU provider with float32 operators of ours on AMX, Intel's matrix unit.

Xeons have it from Sapphire Rapids on. The operators are in a library that `mmvision build-plugins
--cpu` makes. A library is executable content, so this backend is used only where it is named, and
`auto` never takes it.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from mmvision_export.artifacts.library_record import LIBRARIES, LibraryRecord
from mmvision_export.artifacts.manifest import CPU_GRAPH, Manifest
from mmvision_export.core.errors import BackendError
from mmvision_export.core.processor import processor_flags
from mmvision_export.core.trust import refuse_untrusted
from mmvision_export.runtime.backends.backend import BackendOptions
from mmvision_export.runtime.backends.onnxruntime import PROVIDERS, CpuBackend, create_session

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["AMX_LIBRARY", "AmxBackend", "cpu_has_amx", "library_in", "verified_library"]

AMX_LIBRARY = "libmmvision_amx.so"


class AmxBackend(CpuBackend):
    """`model.cpu.onnx`, or what is quantised from it, with operators of ours. See `Backend`.

    The library is the one that `BackendOptions.kernel_library` names, or lies in the model
    directory's own `plugins/`. It is verified once and opened once, by ONNX Runtime.

    Raises:
        BackendError: The CPU has no AMX, there is no library, or ONNX Runtime cannot use it.
        ManifestError: The library is not the file of its record, or files of the directory are not
            the manifest's.
    """

    name = "onnxruntime-amx"

    def __init__(self, directory: Path, options: BackendOptions) -> None:
        named = options.kernel_library is not None or bool(options.trust)
        self._library = verified_library(
            Path(options.kernel_library or library_in(directory)), named=named
        )
        super().__init__(directory, options)
        self.info.kernel_library = str(self._library)

    def _graph_name(self, manifest: Manifest) -> str:
        graph = super()._graph_name(manifest)
        if graph != CPU_GRAPH:
            # The portable graph's operators have the same names, and other types or layouts.
            raise BackendError(
                f"{self.name} runs {CPU_GRAPH}, which a {manifest.precision} directory does not have",
                hint="export with --fp32, or choose --backend onnxruntime-cpu",
            )
        return graph

    def _new_session(self, graph: Path, options: BackendOptions) -> onnxruntime.InferenceSession:
        if self._masked:
            raise BackendError(
                f"{self.name} runs {CPU_GRAPH} and what is quantised from it, not {graph.name}",
                hint="choose --backend onnxruntime-cpu",
            )
        return create_session(
            graph,
            provider=PROVIDERS[self.name],
            threads=options.threads,
            operators=self._library,
        )


def library_in(directory: Path) -> Path:
    """The one place where a model directory's library is looked for: its own `plugins/<CPU>/`."""
    return directory / LIBRARIES / platform.machine() / AMX_LIBRARY


def verified_library(library: Path, *, named: bool) -> Path:
    """A library that is the file of its record, on a CPU that it is for. It has not been opened.

    Args:
        library: The file.
        named: Whether the user named it: any other must have been built here (see `core.trust`).

    Raises:
        BackendError: The CPU has no AMX, or there is no such file.
        ManifestError: It has no record, or is not the file of its record.
    """
    if not cpu_has_amx():
        raise BackendError(
            "this CPU has no AMX, which onnxruntime-amx needs",
            hint="choose --backend onnxruntime-cpu, which needs no AMX",
        )
    if not library.is_file():
        raise BackendError(
            f"onnxruntime-amx needs {AMX_LIBRARY}, and {library} does not exist",
            hint=f"{LibraryRecord.BUILD} --output {library.parent}, or name one with "
            "--kernel-library",
        )
    record = LibraryRecord.read(library)
    refuse_untrusted(library, record.library.sha256, named=named)
    return library


def cpu_has_amx() -> bool:
    """Whether Linux says of this CPU that it has AMX for bfloat16."""
    return "amx_bf16" in processor_flags()
