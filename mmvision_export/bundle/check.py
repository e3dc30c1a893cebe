"""Run the patches of a bundle on this machine, and compare with the embeddings that it brings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmvision_export.artifacts.deployment import DEPLOYMENTS
from mmvision_export.artifacts.manifest import DATA, Manifest, flavour_graph
from mmvision_export.bundle.record import BUNDLE_MODEL, SAMPLE_FILES, BundleRecord
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import array_from_file
from mmvision_export.core.metrics import Metrics, metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.core.trust import UntrustedError
from mmvision_export.runtime.available_memory import host_available_bytes
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["SampleResult", "check_sample", "estimated_build_bytes"]

# Of host memory that a build takes, from two of TensorRT-RTX 1.7: 0.42 GB for 14 MB of float16 weights, 2.26 GB
# for 629 MB.
_BUILD_BYTES, _BUILD_PER_WEIGHTS = 400e6, 3


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """What this machine made of the stored patches.

    Attributes:
        backend: What ran.
        runs: The graph or engine.
        precision: Of it.
        images: Of the sample.
        tokens: Of the sample.
        seconds: Of the second call, as the first also warms up.
        distance: From the stored embeddings.
        gate: What it must reach, in words.
        failures: The gates that it did not pass.
    """

    backend: str
    runs: str
    precision: str
    images: int
    tokens: int
    seconds: float
    distance: Metrics
    gate: str
    failures: list[str]


def estimated_build_bytes(directory: Path, precision: str) -> int:
    """Host memory that `build-engine` takes: an estimate from the size of its graph's weights."""
    manifest = Manifest.read(directory)
    own = f"{flavour_graph(precision)}.data"
    weights = manifest.files.get(own) or manifest.record_of(DATA)
    return int(_BUILD_BYTES + _BUILD_PER_WEIGHTS * weights.size_bytes)


def check_sample(
    folder: Path,
    record: BundleRecord,
    *,
    backend: str | None = None,
    trust: bool | None = None,
    build: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> SampleResult:
    """Encode the stored patches, and compare.

    Args:
        folder: The unpacked bundle.
        record: Its record; its files are verified.
        backend: What shall run; by default the target's.
        trust: Whether engines that this user has not built are loaded.
        build: Builds an engine. Called where none fits; None to fail there.
        progress: Told about each step.

    Raises:
        ManifestError: No engine fits, and none is built; or it is not trusted.
        BackendError: The runtime is not installed, or does not work here.
        InputError: The sample's files are none.
    """
    progress = progress or Progress()
    model = folder / BUNDLE_MODEL
    pixel_values, grid_thw, stored = (array_from_file(folder / name) for name in SAMPLE_FILES)
    name = backend or DEPLOYMENTS[record.target].tensorrt or "onnxruntime-cpu"

    def opened() -> VisionEncoder:
        progress.step(f"opening {name}")
        return VisionEncoder.open(
            model, backend=name, trust=trust, refuse_non_finite=False, progress=progress
        )

    try:
        encoder = opened()
    except UntrustedError:
        raise
    except ManifestError as error:
        if build is None:
            raise
        need = estimated_build_bytes(model, record.precision)
        available = host_available_bytes()
        room = "" if available is None else f"; {available / 1e9:.1f} GB are available"
        progress.note(
            f"{error.message}: building one takes about {need / 1e9:.1f} GB of memory, an estimate{room}"
        )
        build()
        encoder = opened()
    with encoder:
        encoder(pixel_values, grid_thw)
        began = time.perf_counter()
        image_embeds = np.asarray(encoder(pixel_values, grid_thw))
        seconds = time.perf_counter() - began
        facts = encoder.facts
    distance = metrics(image_embeds, stored)
    gate = PRECISIONS[facts.precision].gate
    runs = Path(facts.engine).name if facts.engine else str(facts.graph)
    return SampleResult(
        name,
        runs,
        facts.precision,
        len(grid_thw),
        len(stored),
        seconds,
        distance,
        gate.describe(),
        gate.failures(distance, None),
    )
