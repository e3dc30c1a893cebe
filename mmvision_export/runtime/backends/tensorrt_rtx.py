"""TensorRT-RTX engines.

As TensorRT's, with kernels compiled where they run and kept in a runtime cache file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from mmvision_export.artifacts.build_target import TensorRTName
from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import BackendError, OutputError
from mmvision_export.core.trust import UntrustedError, refuse_untrusted
from mmvision_export.core.user_folders import cache_folder
from mmvision_export.runtime.backends.backend import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend

__all__ = [
    "KERNEL_STRATEGIES",
    "KernelStrategy",
    "TensorRTRTXBackend",
    "default_runtime_cache",
]

KernelStrategy = Literal["lazy", "eager", "none"]
"""When kernels are specialised to a shape.

In the background while general ones run, before the first run, or never.
"""

KERNEL_STRATEGIES: tuple[KernelStrategy, ...] = get_args(KernelStrategy)


def default_runtime_cache(engine: Path) -> Path | None:
    """Where the kernels of an engine are kept, or None for a user without a home folder.

    They are executable content: so they are in the user's own folder, where nobody else can put
    any, and not beside an engine that may have come from somebody.
    """
    folder = cache_folder()
    if folder is None:
        return None
    sha256 = EngineRecord.read(engine).engine.sha256
    return folder / "tensorrt-rtx" / f"{sha256[:32]}.rtxcache"


class TensorRTRTXBackend(TensorRTBackend):
    """See `TensorRTBackend`.

    CUDA graphs are TensorRT-RTX's own: it captures a shape once the shape's kernels are compiled,
    which a caller cannot see
    (https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-cuda-graphs.html).
    """

    name = "tensorrt-rtx"
    kind: ClassVar[TensorRTName] = "tensorrt-rtx"

    def __init__(
        self,
        engine: Path,
        options: BackendOptions,
        *,
        module: Any,
        cuda: Cuda,
        manifest: Manifest | None,
    ) -> None:
        if options.kernels is not None and options.kernels not in KERNEL_STRATEGIES:
            raise BackendError(
                f"kernels must be one of {', '.join(KERNEL_STRATEGIES)}, got {options.kernels!r}"
            )
        self._kernels: KernelStrategy | None = options.kernels
        # Read if it is there and fits, written on closing.
        self._cache_file = (
            default_runtime_cache(engine)
            if options.runtime_cache is None
            else Path(options.runtime_cache)
        )
        self._cache: Any = None
        self._cached = b""
        super().__init__(engine, options, module=module, cuda=cuda, manifest=manifest)

    @property
    def _captures(self) -> bool:
        return False

    def _new_context(self, module: Any) -> Any:
        assert self._engine is not None
        config = self._checked(
            self._engine.create_runtime_config(), "create a runtime configuration"
        )
        config.set_execution_context_allocation_strategy(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        kernels = self._kernels or (
            "eager" if any(profile.is_bucket for profile in self.profiles) else "lazy"
        )
        strategies = module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, kernels.upper())
        if self._cuda_graphs:
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is None:
            self._cache = self._checked(config.create_runtime_cache(), "create a runtime cache")
            self._read_cache()
        self._checked(config.set_runtime_cache(self._cache), "use the runtime cache")
        self.info.kernels = kernels
        return self._checked(self._engine.create_execution_context(config), "create a context")

    def _read_cache(self) -> None:
        if self._cache_file is None:
            self.info.runtime_cache = "none: this user has no home folder"
            return
        try:
            if self._cache_file.is_file():
                # The default is in the user's own folder, any other was named.
                refuse_untrusted(self._cache_file, "", named=True)
            self._cached = self._cache_file.read_bytes()
        except FileNotFoundError:
            self.info.runtime_cache = f"{self._cache_file}: new"
            return
        except OSError as error:
            self.info.runtime_cache = f"{self._cache_file}: not readable, {error.strerror}"
            return
        except UntrustedError as error:
            self.info.runtime_cache = f"not used: {error.message}"
            return
        # TensorRT-RTX checks that it fits this GPU, driver and version.
        fits = self._cache.deserialize(self._cached)
        self._logger.errors.clear()
        self.info.runtime_cache = (
            f"{self._cache_file}: {'read' if fits else 'of another machine or version, not used'}"
        )
        if not fits:
            self._cached = b""

    def close(self) -> None:
        """See `Backend.close`.

        Keeps the runtime cache, if there is anything new in it and it can be written.
        """
        cache, self._cache = self._cache, None
        super().close()
        # The cache has to outlive the contexts that use it.
        blob = None if cache is None else cache.serialize()
        file = self._cache_file
        if blob is not None and file is not None and (content := bytes(blob)) != self._cached:
            # Written in one piece, so that processes which share the directory never read half of
            # one. Where it cannot be written, on a read-only disk, the next process compiles again.
            try:
                with new_files(file.parent, name=file.name) as new:
                    (new / file.name).write_bytes(content)
            except OutputError as error:
                self.info.runtime_cache = error.message
