"""The graph that `build_engine` parses, as a file for everyone's tools, with the command that builds it.

trtexec, DeepStream, Triton and Torch-TensorRT parse the same file and get the same network.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.build_target import BuildTarget, TensorRTName, TensorRTVersion
from mmvision_export.artifacts.manifest import DATA, GRAPH, Manifest, flavour_graph
from mmvision_export.artifacts.profile import Profile, checked_profile
from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import EngineError, OutputError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.engine.attention import Lowering, choose_lowering, lowered_model
from mmvision_export.engine.choices import SLOT_WAYS, AttentionWay
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.engine.parser_support import parser_version
from mmvision_export.graph.files import save_graph

__all__ = ["Lowered", "lower", "trtexec_line"]

_PLUGIN_LIBRARY = "libmmvision_plugins.so"


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What was written.

    Attributes:
        graph: The ONNX file; its weights are beside it, in `<name>.data`.
        facts: The JSON file beside it: source, TensorRT, attention, shapes of the profiles, command.
        command: Builds an engine of the graph.
    """

    graph: Path
    facts: Path
    command: str


def lower(
    directory: Path,
    manifest: Manifest,
    output: Path,
    *,
    attention: AttentionWay,
    tensorrt: TensorRTVersion,
    backend: TensorRTName,
    profiles: Sequence[Profile],
    precision: str | None = None,
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Lowered:
    """Write the graph as a TensorRT's parser shall see it. Neither TensorRT nor a GPU is needed.

    Args:
        directory: The model directory.
        manifest: Its manifest.
        output: The `.onnx` file to write.
        attention: How; `auto` is not one: the file is for one way.
        tensorrt: The version whose parser reads the file.
        backend: Which TensorRT.
        profiles: Sizes, for the command.
        precision: Of the engine, the graph's own if None; see `build_engine`.
        check: Compare a float16 graph that is derived now.
        force: Replace the files.
        progress: Told about each step.

    Raises:
        EngineError: The way is not open there, or the sizes are of another form than the way's.
        ManifestError: Files of the directory are missing or damaged.
        OutputError: The output exists, has another suffix, or cannot be written.
    """
    progress = progress or Progress()
    facts_file = output.with_suffix(".json")
    if output.suffix != ".onnx":
        raise OutputError(f"{output}: the output must be an .onnx file")
    if output.resolve().parent == directory.resolve():
        raise OutputError(
            f"{output} lies in the model directory, whose graphs are listed in its manifest",
            hint="choose another folder",
        )
    for file in (output, facts_file):
        if file.exists() and not force:
            raise OutputError(
                f"{file} already exists", hint="replace it with --force", reason="exists"
            )
    for profile in profiles:
        checked_profile(profile, manifest.config)
        if (profile.slots is not None) != (attention in SLOT_WAYS):
            raise EngineError(
                f"{attention} attention does not take the sizes {profile}",
                hint="give slots as --buckets 1x1024,8x1024 for uniform and equal, patches for the others",
            )
    graph = _graph_for(directory, manifest, precision, check, progress)
    target = BuildTarget(
        backend=backend,
        tensorrt_version=tensorrt,
        platform="any",
        compute_capabilities=(),
        precision=precision or manifest.precision,
        opset=manifest.opset,
    )
    lowering = _lowering(attention, target, manifest, progress)
    progress.step("lowering the graph")
    model = lowered_model(directory / graph, lowering, parser_version(target))
    command = trtexec_line(output.name, profiles, manifest.config.patch_dim, attention, backend)
    facts: dict[str, Any] = {
        "kind": "lowered graph",
        "source": {"graph": graph, "sha256": manifest.record_of(graph).sha256},
        "backend": backend,
        "tensorrt": str(tensorrt),
        "attention": attention,
        "precision": target.precision,
        "profiles": [
            {name: [list(shape) for shape in shapes] for name, shapes in each.items()}
            for each in (profile.input_shapes(manifest.config.patch_dim) for profile in profiles)
        ],
        "command": command,
    }
    with new_files(output.parent, name=output.name, last=facts_file.name) as new:
        save_graph(model, new, output.name, progress)
        (new / facts_file.name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return Lowered(output, facts_file, command)


def trtexec_line(
    graph: str,
    profiles: Sequence[Profile],
    patch_dim: int,
    attention: AttentionWay,
    backend: TensorRTName,
) -> str:
    """The command that builds an engine of a lowered graph, run in the folder of the graph.

    Args:
        graph: Name of the file.
        profiles: Sizes.
        patch_dim: Values of a patch.
        attention: How; plugins need their library.
        backend: Which TensorRT: TensorRT-RTX's tool has another name and the same options.
    """
    tool = "tensorrt_rtx" if backend == "tensorrt-rtx" else "trtexec"
    words = [tool, f"--onnx={graph}", f"--saveEngine={Path(graph).stem}.engine"]
    if backend == "tensorrt":
        # TensorRT-RTX builds nothing but strongly typed networks.
        words.append("--stronglyTyped")
    if attention == "plugin":
        words.append(f"--staticPlugins={_PLUGIN_LIBRARY}")
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        shapes = profile.input_shapes(patch_dim)
        for place, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            pairs = (f"{name}:{'x'.join(map(str, three[place]))}" for name, three in shapes.items())
            words.append(f"{option}={','.join(pairs)}")
    return shlex.join(words)


def _graph_for(
    directory: Path, manifest: Manifest, precision: str | None, check: bool, progress: Progress
) -> str:
    if precision is not None and PRECISIONS[precision].is_quantized:
        graph = flavour_graph(precision)
        manifest.verify(directory, (graph, f"{graph}.data"))
        return graph
    if precision is not None and precision != manifest.precision:
        return derive_fp16(directory, manifest, check=check, progress=progress)
    manifest.verify(directory, (GRAPH, DATA))
    return GRAPH


def _lowering(
    attention: AttentionWay, target: BuildTarget, manifest: Manifest, progress: Progress
) -> Lowering:
    """As `build_engine` chooses; a library need not be there for a file that names its operators."""
    if attention == "auto":
        raise EngineError("a lowered graph is for one way of attention", hint="name it")
    if attention == "plugin":
        if target.backend == "tensorrt-rtx":
            raise EngineError("TensorRT-RTX takes no plugins", hint="--attention uniform or native")
        if not PRECISIONS[target.precision].has_half_attention:
            raise EngineError(
                f"the plugins' kernels are for fp16 and bf16, not for {target.precision}",
                hint="--fp16, or --attention uniform or native",
            )
        return Lowering(None)
    return choose_lowering(
        attention,
        target,
        config=manifest.config,
        library=Path(_PLUGIN_LIBRARY),
        is_named=False,
        progress=progress,
    )
