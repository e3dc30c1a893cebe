"""A builder's configuration: sizes, GPUs and options, through Polygraphy's loaders where they have them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.build_target import BuildTarget
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import EngineError

if TYPE_CHECKING:
    import tensorrt

__all__ = ["config_from_target", "set_options"]


class _Timings(io.BytesIO):
    """The content of a timing cache as the file that Polygraphy asks for: it looks at its mode."""

    mode = "rb"


def config_from_target(
    trt: Any,
    target: BuildTarget,
    *,
    profiles: Sequence[Profile],
    patch_dim: int,
    monitor: Any,
    timings: bytes,
) -> Any:
    """Polygraphy's loader of a configuration.

    Args:
        trt: The TensorRT module.
        target: What to build with and for, with its options.
        profiles: Accepted sizes, one optimization profile for each entry.
        patch_dim: Values in one patch row.
        monitor: TensorRT's progress monitor.
        timings: Content of a timing cache; empty for none.
    """
    from polygraphy.backend.trt import CreateConfig

    chosen = target.options
    options: dict[str, Any] = {
        "profiles": _tensor_profiles(profiles, patch_dim),
        "progress_monitor": monitor,
        "version_compatible": chosen.version_compatible,
        "strip_plan": chosen.strip_weights,
        "refittable": chosen.refit,
        "weight_streaming": chosen.weight_streaming,
        "builder_optimization_level": chosen.optimization_level,
    }
    if timings:
        options["load_timing_cache"] = _Timings(timings)
    if chosen.workspace_bytes is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: chosen.workspace_bytes}
    if chosen.hardware is not None:
        options["hardware_compatibility_level"] = _hardware_level(trt, chosen)
    if target.backend == "tensorrt":
        return CreateConfig(**options)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    pairs = [(gpu.major, gpu.minor) for gpu in target.compute_capabilities]
    return CreateConfigRTX(compute_capabilities=pairs, **options)


def set_options(trt: Any, config: tensorrt.IBuilderConfig, options: BuildOptions) -> None:
    """Set what Polygraphy's loader does not, and compare all with what TensorRT took.

    TensorRT logs an option that it does not take, and builds without it.

    Args:
        trt: The TensorRT module.
        config: The configuration, as the loader made it.
        options: What was asked for.

    Raises:
        EngineError: TensorRT did not take an option.
    """
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "STRIP_PLAN": options.strip_weights,
        "REFIT": options.refit,
        "REFIT_IDENTICAL": options.strip_weights and not options.refit,
        "WEIGHT_STREAMING": options.weight_streaming,
    }
    if flags["REFIT_IDENTICAL"]:
        # Newer releases set it for a stripped plan by themselves; NvInfer.h of 10.14 does not say so.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    for name, is_wanted in flags.items():
        if is_wanted and not config.get_flag(getattr(trt.BuilderFlag, name)):
            raise EngineError(f"TensorRT {trt.__version__} did not take the builder flag {name}")
    wanted = {
        "builder_optimization_level": options.optimization_level,
        "hardware_compatibility_level": (
            None if options.hardware is None else _hardware_level(trt, options)
        ),
    }
    for name, value in wanted.items():
        if value is not None and (taken := getattr(config, name)) != value:
            raise EngineError(
                f"TensorRT {trt.__version__} did not take {name} {value}: it has {taken}"
            )
    if (workspace := options.workspace_bytes) is not None:
        taken = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        if taken != workspace:
            raise EngineError(
                f"TensorRT {trt.__version__} did not take a workspace of {workspace} bytes: it has {taken}",
                hint="give less than the GPU's memory, or leave --workspace out",
            )


def _hardware_level(trt: Any, options: BuildOptions) -> Any:
    name = str(options.hardware).upper().replace("-", "_")
    return getattr(trt.HardwareCompatibilityLevel, name)


def _tensor_profiles(sizes: Sequence[Profile], patch_dim: int) -> list[Any]:
    """Polygraphy's profiles, of which all but the first keep no weights of their own.

    References:
        NvInfer.h, `IOptimizationProfile::setExtraMemoryTarget`: by default (1.0) a profile may keep
        weights once more, in the layout of its own kernels; at 0.0 the builder "attempts to create
        the new optimization profile without allocating any additional weight memory". It is a hint,
        and left aside for the first profile.
    """
    from polygraphy.backend.trt import Profile as TensorProfile

    class SharingProfile(TensorProfile):  # type: ignore[misc]
        def to_trt(self, builder: Any, network: Any) -> Any:
            profile = super().to_trt(builder, network)
            profile.extra_memory_target = 0.0
            return profile

    profiles: list[Any] = []
    for profile in sizes:
        tensors = SharingProfile() if profiles else TensorProfile()
        for name, shapes in profile.input_shapes(patch_dim).items():
            tensors.add(name, *shapes)
        profiles.append(tensors)
    return profiles
