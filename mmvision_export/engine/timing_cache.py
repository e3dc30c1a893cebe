"""Timings of kernels that a TensorRT took on one GPU, kept in a file for its next build.

A timing cache holds compiled kernels too (NvInfer.h, `BuilderFlag::kDISABLE_COMPILATION_CACHE`), so that
it is code. The default one lies in the user's own folder, where nobody else can put any; another one
is read only where the user named it, and nobody else can write to it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from mmvision_export.artifacts.build_target import BuildTarget
from mmvision_export.core.atomic import locked_folder, new_files, refuse_unwritable
from mmvision_export.core.errors import EngineError, OutputError
from mmvision_export.core.progress import Progress
from mmvision_export.core.regular_file import opened_regular_file
from mmvision_export.core.trust import refuse_untrusted
from mmvision_export.core.user_folders import cache_folder, private_folder

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["TimingCache", "timing_cache_for"]


@dataclasses.dataclass(frozen=True)
class TimingCache:
    """A file of timings.

    Attributes:
        path: It may be missing: then it will be made.
        is_named: Whether the user named it. Such a file is refused where TensorRT does not take it; the
            default one is begun anew.
    """

    path: Path
    is_named: bool

    def refuse_unsafe(self) -> None:
        """Refuse, before any work, a file that cannot be read or written, or that others can write to.

        Raises:
            InputError: It cannot be read.
            OutputError: Nothing can be written there.
            UntrustedError: Others can write to it.
        """
        self._content()
        if self.is_named:
            refuse_unwritable(self.path.parent)
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def content_for(self, builder: trt.Builder, progress: Progress) -> bytes:
        """The timings, if this TensorRT takes them for this GPU; nothing for a file to be begun.

        Args:
            builder: TensorRT's.
            progress: Told where the default file is of no use.

        Raises:
            EngineError: TensorRT does not take the file that was named.
            InputError: See `refuse_unsafe`.
            UntrustedError: See `refuse_unsafe`.
        """
        content = self._content()
        if not content or _is_taken(builder, content):
            return content
        if self.is_named:
            raise EngineError(
                f"{self.path}: TensorRT does not take these timings: they are of another release or "
                "GPU, or damaged",
                hint="name another file; one that is missing is made",
            )
        progress.note(f"{self.path} is of no use here, and is begun anew")
        return b""

    def keep(self, config: trt.IBuilderConfig, progress: Progress) -> None:
        """Write what a build has timed, together with what another one has written meanwhile.

        Args:
            config: The configuration that the build used.
            progress: Told where it cannot be written: the next build then takes longer, and this one's
                engine is as good.
        """
        try:
            folder = self.path.parent
            with locked_folder(folder), new_files(folder, name=self.path.name) as new:
                (new / self.path.name).write_bytes(self._merged(config))
        except OutputError as error:
            progress.note(f"the timings were not kept: {error.message}")

    def _content(self) -> bytes:
        if not self.path.exists():
            return b""
        refuse_untrusted(self.path, "", named=True)
        with opened_regular_file(self.path) as file:
            return file.read()

    def _merged(self, config: trt.IBuilderConfig) -> bytes:
        timings = config.get_timing_cache()
        content = self._content()
        if content:
            other = config.create_timing_cache(content)
            # One that does not fit is what is begun anew.
            if other is not None:
                timings.combine(other, False)
        return bytes(timings.serialize())


def _is_taken(builder: trt.Builder, content: bytes) -> bool:
    # On a configuration of its own: the build's may not be given a second cache.
    config = builder.create_builder_config()
    cache = config.create_timing_cache(content)
    # Without strict verification TensorRT would take the timings of another GPU.
    if cache is None or not config.set_timing_cache(cache, False):
        return False
    # Of what is damaged or of another release TensorRT makes an empty cache, and logs a warning.
    empty = bytes(builder.create_builder_config().create_timing_cache(b"").serialize())
    return content == empty or bytes(cache.serialize()) != empty


def timing_cache_for(target: BuildTarget, named: Path | None) -> TimingCache | None:
    """The file of a TensorRT's timings on one GPU, or None where nothing is timed or can be kept.

    TensorRT itself refuses the timings of another compute capability only.

    Args:
        target: What is built with and for.
        named: The file that the user named, if one was.
    """
    if target.gpu is None:
        return None
    if named is not None:
        return TimingCache(named, is_named=True)
    folder = cache_folder()
    if folder is None:
        return None
    try:
        folder = private_folder(folder / "timing")
    except OSError:
        return None
    name = f"{target.backend}-{target.tensorrt_version}-{target.gpu.file_name}"
    return TimingCache(folder / name, is_named=False)
