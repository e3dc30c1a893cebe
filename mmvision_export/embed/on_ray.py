"""A run on Ray Data: CPU tasks decode, actors hold an encoder each and write their parts.

A part is decoded by one task, and encoded and written by one actor, in the same order and packing as
in one process. What Ray does again after an actor or a node has died gives the same file, in one
rename. Errors come back as values: Ray would try again what is wrong with the input or the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmvision_export.core.ahead import worker_threads
from mmvision_export.core.errors import BackendError, InputError, MmvisionError
from mmvision_export.core.install import install_command
from mmvision_export.core.progress import Progress
from mmvision_export.embed.decoding import Decoded, decoded_rows
from mmvision_export.embed.listing import Part
from mmvision_export.embed.output import Done, write_part
from mmvision_export.embed.packing import embedded_rows
from mmvision_export.embed.settings import EmbedSettings, identity_of_run, table_facts
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["OpenedOnRay", "RayWorkers", "embed_parts_on_ray", "opened_on_ray", "ray_session"]

# A cell of an Arrow table holds 2 GB.
_MOST_PART_BYTES = 1_900_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayWorkers:
    """Who embeds.

    Attributes:
        count: Actors, each with an encoder.
        gpus_each: GPUs that Ray reserves for each; with none, it reserves one CPU.
        address: A cluster's, `auto` for the one of this machine; None for a Ray of this run's own.

    Raises:
        InputError: A number is out of range.
    """

    count: int = 1
    gpus_each: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.gpus_each < 0:
            raise InputError(
                f"workers must be at least 1 with at least 0 GPUs each, got {self.count} with "
                f"{self.gpus_each}"
            )

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each."""
        return {"num_gpus": self.gpus_each} if self.gpus_each else {"num_cpus": 1}

    def options_of(self, options: BackendOptions) -> BackendOptions:
        """How each opens the model: on one machine, CPU backends share its CPUs."""
        threads = options.threads
        if threads is None and self.address is None:
            threads = max(1, worker_threads() // self.count)
        return dataclasses.replace(options, threads=threads, progress=None)


@contextlib.contextmanager
def ray_session(workers: RayWorkers) -> Iterator[Any]:
    """Ray for the block: started for it, or the cluster that was named.

    Raises:
        BackendError: Ray is not installed, or the cluster does not answer.
    """
    # Read when Ray is imported. What it logs is in the files of its session.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendError(f"ray is not installed: {error}", hint=install_command("ray")) from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if workers.address is None:
            # Actors wait for CPUs that tasks hold: room for all of them, and for one task more.
            room = workers.count + worker_threads()
            ray.init(num_cpus=room, include_dashboard=False, **quiet)
        else:
            ray.init(address=workers.address, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"Ray does not start or answer: {error}", hint="see: ray status"
        ) from error
    try:
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself
            signal.signal(number, handler)
        logging.getLogger("ray").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield ray
    finally:
        ray.shutdown()


@dataclasses.dataclass(frozen=True)
class OpenedOnRay:
    """What a worker has found when it opened the model.

    Attributes:
        identity: See `identity_of_run`.
        preprocessor: What makes pictures.
    """

    identity: dict[str, Any]
    preprocessor: PreprocessorConfig


def opened_on_ray(
    ray: Any, model: Path, options: BackendOptions, settings: EmbedSettings, workers: RayWorkers
) -> OpenedOnRay:
    """Open the model once where workers run: the driver may have no GPU.

    Raises:
        MmvisionError: It does not open.
    """
    remote = ray.remote(max_retries=0, **workers.resources)(_opened)
    opened: OpenedOnRay = _or_raise(ray.get(remote.remote(model.absolute(), options, settings)))
    return opened


def embed_parts_on_ray(
    ray: Any,
    parts: Sequence[Part],
    output: Path,
    model: Path,
    options: BackendOptions,
    settings: EmbedSettings,
    workers: RayWorkers,
    preprocessor: PreprocessorConfig,
    *,
    progress: Progress,
) -> Iterator[Done]:
    """Embed parts, several at a time.

    Args:
        ray: From `ray_session`.
        parts: Those that are not done yet.
        output: Folder of the tables; every worker sees it under this path, and the model.
        model: A model directory or an engine.
        options: How each worker opens it.
        settings: How.
        workers: Who.
        preprocessor: From `opened_on_ray`.
        progress: Advanced by the rows of each part.

    Yields:
        Each part when it is in place, in any order.

    Raises:
        InputError: What holds the rows cannot be read any more.
        OutputError: A part cannot be written.
        BackendError: The runtime failed.
    """
    if not parts:
        return
    part_bytes = _most_bytes(parts, preprocessor)
    rows = ray.data.from_items(
        [{"part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts)
    )
    arguments = {
        "model": model.absolute(),
        "options": options,
        "settings": settings,
        "output": output.absolute(),
    }
    pictures = rows.map(
        _pictures_of_part,
        fn_kwargs={"preprocessor": preprocessor, "settings": settings},
        num_cpus=1,
        # What it holds at the end. A step that reserves other things is not fused into the actors.
        memory=part_bytes,
    )
    done = pictures.map(
        _Worker,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(size=workers.count),
        **workers.resources,
    )
    for row in done.iter_rows():
        part: Done = _or_raise(pickle.loads(row["done"]))  # noqa: S301 - our own workers'
        progress.advance(part.num_rows)
        yield part


def _opened(
    model: Path, options: BackendOptions, settings: EmbedSettings
) -> OpenedOnRay | MmvisionError:
    try:
        with VisionEncoder.open(model, options) as encoder:
            return OpenedOnRay(
                identity_of_run(encoder, settings),
                encoder.preprocessor_for(resize_to_fit=settings.resize_to_fit),
            )
    except MmvisionError as error:
        return error


def _pictures_of_part(
    row: dict[str, Any], *, preprocessor: PreprocessorConfig, settings: EmbedSettings
) -> dict[str, Any]:
    """The task: a part's pictures, as bytes of 8-bit RGB, a sixth of what patches would take."""
    part: Part = pickle.loads(row["part"])  # noqa: S301 - from the driver
    result: Any
    try:
        result = [
            (one.id, one.picture and (one.picture.size, one.picture.tobytes()), one.error)
            for one in decoded_rows(part.rows(), settings.decoder(preprocessor), threads=1)
        ]
    except MmvisionError as error:
        result = error
    return {"part": row["part"], "pictures": pickle.dumps(result)}


class _Worker:
    """The actor: holds an encoder, and writes the parts that it is given."""

    def __init__(
        self, model: Path, options: BackendOptions, settings: EmbedSettings, output: Path
    ) -> None:
        self._settings, self._output = settings, output
        self._encoder = VisionEncoder.open(model, options)
        self._facts = table_facts(self._encoder, settings)
        self._preprocessor = self._encoder.preprocessor_for(resize_to_fit=settings.resize_to_fit)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part: Part = pickle.loads(row["part"])  # noqa: S301 - from the driver
        result: Done | MmvisionError
        try:
            pictures = _or_raise(pickle.loads(row["pictures"]))  # noqa: S301 - our own task's
            results = embedded_rows(
                self._encoder,
                map(_decoded, pictures),
                self._preprocessor,
                patches_per_call=self._settings.budget(self._encoder),
            )
            result = write_part(self._output, part, results, self._facts)
        except MmvisionError as error:
            result = error
        return {"done": pickle.dumps(result)}


def _decoded(given: tuple[str, tuple[tuple[int, int], bytes] | None, str | None]) -> Decoded:
    name, picture, error = given
    return Decoded(name, None if picture is None else Image.frombytes("RGB", *picture), error)


def _or_raise(result: Any) -> Any:
    if isinstance(result, MmvisionError):
        raise result
    return result


def _most_bytes(parts: Sequence[Part], preprocessor: PreprocessorConfig) -> int:
    """Bytes of the largest part's pictures, if each is as large as pictures can be.

    Raises:
        InputError: They are more than Ray passes on.
    """
    image_bytes = 3 * preprocessor.most_patches * preprocessor.patch_size**2
    rows = max(part.num_rows for part in parts)
    if rows * image_bytes > _MOST_PART_BYTES:
        raise InputError(
            f"a part of {rows} images of up to {image_bytes} bytes is more than Ray passes on, "
            f"{_MOST_PART_BYTES} bytes",
            hint="choose a smaller --rows-per-part; row groups of Parquet must be as small too",
        )
    return rows * image_bytes
