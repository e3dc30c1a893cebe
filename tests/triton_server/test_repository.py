"""A repository's files, and what its configuration says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.companion_file import CompanionFile
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import InputError, ManifestError, OutputError
from mmvision_export.core.files import FileRecord
from mmvision_export.triton_server.config import warm_ups
from mmvision_export.triton_server.repository import write_repository
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.engines import write_engine
from tests.support.errors import refused
from tests.support.triton_settings import settings


def parsed(path: Path) -> Any:
    """The configuration as the server's clients read it: an unknown or misspelt field is an error."""
    protocol = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), protocol.ModelConfig())


def test_the_repository_is_a_model_directory_and_a_graph_on_one_copy_of_the_weights(
    tmp_path: Path, exported: Path
) -> None:
    output = tmp_path / "models"
    written = write_repository(exported, output, settings())
    assert (written.model, written.raw_model) == ("vision_encoder", "vision_encoder_graph")
    inside = output / "vision_encoder" / "1" / "model"
    with VisionEncoder.open(inside, backend="onnxruntime-cpu") as encoder:
        assert encoder.facts.graph == "model.cpu.onnx"
    graph = output / "vision_encoder_graph" / "1"
    assert sorted(path.name for path in graph.iterdir()) == ["model.cpu.onnx", "model.onnx.data"]
    inodes = {(folder / "model.onnx.data").stat().st_ino for folder in (exported, inside, graph)}
    assert len(inodes) == 1
    compile((output / "vision_encoder" / "1" / "model.py").read_text(), "model.py", "exec")


def test_where_files_cannot_be_linked_they_are_copied(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another device")

    monkeypatch.setattr("os.link", refuse)
    write_repository(exported, tmp_path / "models", settings())
    copy = tmp_path / "models" / "vision_encoder" / "1" / "model" / "model.onnx.data"
    assert copy.read_bytes() == (exported / "model.onnx.data").read_bytes()


def test_the_configuration(tmp_path: Path, exported: Path) -> None:
    given = settings(threads=3, instances=2, max_delay_ms=2.5, max_requests=32, resize_to_fit=True)
    write_repository(exported, tmp_path / "models", given, name="eyes")
    config = parsed(tmp_path / "models" / "eyes" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("eyes", "python", 32)
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_CPU")
    inputs = {
        each.name: (list(each.dims), each.optional, each.allow_ragged_batch)
        for each in config.input
    }
    assert inputs == {
        "image": ([-1], True, True),
        "pixel_values": ([-1, 1176], True, True),
        "grid_thw": ([-1, 3], True, True),
    }
    assert {each.name: list(each.dims) for each in config.output} == {
        "image_embeds": [-1, HEAD_DIM_80.text_hidden_size],
        "image_grid_thw": [-1, 3],
        "tokens_per_image": [-1],
    }
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters["threads"] == "3"
    assert json.loads(parameters["warm_up"]) == [[[1, 16, 16]], [[1, 32, 32]]]
    raw = parsed(tmp_path / "models" / "eyes_graph" / "config.pbtxt")
    assert (raw.platform, raw.default_model_filename) == ("onnxruntime_onnx", "model.cpu.onnx")
    assert raw.max_batch_size == 0


def test_a_backend_of_gpus_has_instances_on_them_and_the_portable_graph(
    tmp_path: Path, exported: Path
) -> None:
    write_repository(exported, tmp_path / "models", settings(backend="onnxruntime-cuda"))
    for name in ("vision_encoder", "vision_encoder_graph"):
        (group,) = parsed(tmp_path / "models" / name / "config.pbtxt").instance_group
        assert group.Kind.Name(group.kind) == "KIND_GPU"
    assert (tmp_path / "models" / "vision_encoder_graph" / "1" / "model.onnx").is_file()


def engine_in(directory: Path, **changes: Any) -> Path:
    profiles = [
        Profile(min_patches=size, opt_patches=size, max_patches=size, min_images=9, max_images=9)
        for size in (256, 1024)
    ]
    return write_engine(directory / "plans", profiles=tuple(profiles), **changes)


def test_an_engine_of_tensorrt_lies_beside_it_for_the_servers_own_backend(
    tmp_path: Path, exported: Path
) -> None:
    engine = engine_in(copy_of(exported, tmp_path / "m"), backend="tensorrt")
    written = write_repository(engine, tmp_path / "models", settings(backend="tensorrt"))
    assert written.raw_model == "vision_encoder_engine"
    raw = tmp_path / "models" / "vision_encoder_engine"
    assert (raw / "1" / "model.plan").read_bytes() == engine.read_bytes()
    config = parsed(raw / "config.pbtxt")
    assert config.platform == "tensorrt_plan"
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert {each.name: each.data_type for each in config.input}["pixel_values"] == 10  # TYPE_FP16
    config = parsed(tmp_path / "models" / "vision_encoder" / "config.pbtxt")
    assert config.parameters["engine"].string_value == f"plans/{engine.name}"
    assert config.output[0].data_type == 10
    assert config.instance_group[0].kind == 1  # KIND_GPU
    inside = tmp_path / "models" / "vision_encoder" / "1" / "model" / "plans"
    assert (inside / engine.name).read_bytes() == engine.read_bytes()
    assert json.loads(config.parameters["warm_up"].string_value) == [[[1, 16, 16]], [[1, 32, 32]]]


def test_a_stripped_engine_brings_the_graph_by_which_it_gets_its_weights(
    tmp_path: Path, exported: Path
) -> None:
    """And is no model of the server's own backend, which puts no weights in."""
    directory = copy_of(exported, tmp_path / "m")
    graph = CompanionFile("x.refit.onnx", FileRecord.of(b"graph"))
    engine = engine_in(
        directory, backend="tensorrt", options=BuildOptions(strip_weights=True), refit_graph=graph
    )
    (engine.parent / graph.name).write_bytes(b"graph")
    written = write_repository(engine, tmp_path / "models", settings(backend="tensorrt"))
    assert written.raw_model is None
    inside = tmp_path / "models" / "vision_encoder" / "1" / "model" / "plans"
    assert (inside / graph.name).read_bytes() == b"graph"
    (engine.parent / graph.name).write_bytes(b"grape")
    with refused(ManifestError, engine.parent / graph.name, "sha256"):
        write_repository(engine, tmp_path / "models2", settings(backend="tensorrt"))


def test_the_server_has_no_backend_for_an_engine_of_tensorrt_rtx(
    tmp_path: Path, exported: Path
) -> None:
    engine = engine_in(copy_of(exported, tmp_path / "m"))
    written = write_repository(engine, tmp_path / "models", settings(backend="tensorrt-rtx"))
    assert written.raw_model is None
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [
        "vision_encoder"
    ]
    engine.write_bytes(b"another")
    with refused(ManifestError, engine.name):
        write_repository(engine, tmp_path / "models2", settings(backend="tensorrt-rtx"))


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ((), [(1, 256), (1, 1024)]),
        ([Profile(min_patches=4, opt_patches=64, max_patches=120, max_images=8)], [(1, 120)]),
        (
            [
                Profile(
                    min_patches=2048, opt_patches=2048, max_patches=2048,
                    min_images=16, max_images=16, slots=8,
                )
            ],
            [(8, 256)],
        ),
    ],
)  # fmt: skip
def test_each_bucket_is_warmed_up_with_what_fills_it(
    profiles: list[Profile], expected: list[tuple[int, int]]
) -> None:
    warm = warm_ups(profiles, HEAD_DIM_80)
    assert [(len(each.rows), each.num_patches // len(each.rows)) for each in warm] == expected
    for t, h, w in (row for each in warm for row in each.rows):
        assert (t, h % 2, w % 2) == (1, 0, 0)


def test_what_is_refused(tmp_path: Path, exported: Path) -> None:
    output = tmp_path / "models"
    for name in ("", "a/b", "..", "a b"):
        with refused(InputError):
            write_repository(exported, output, settings(), name=name)
    with refused(InputError, "nothing"):
        write_repository(exported, output, settings(backend="nothing"))
    for wrong in ({"instances": 0}, {"max_requests": 0}, {"max_delay_ms": -1.0}):
        with refused(InputError, next(iter(wrong))):
            settings(**wrong)
    damaged = copy_of(exported, tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:-1])
    with refused(ManifestError, "model.onnx"):
        write_repository(damaged, output, settings())
    assert not output.exists()
    write_repository(exported, output, settings())
    with refused(OutputError, str(output), reason="exists"):
        write_repository(exported, output, settings())
    write_repository(exported, output, settings(), name="other", force=True)
    assert (output / "other").is_dir()
    assert not (output / "vision_encoder").exists()
    shutil.rmtree(output / "other")


def test_the_command(mmvision: Command, tmp_path: Path, exported: Path) -> None:
    command = ["triton-repository", "--model", str(exported), "--output", "models"]
    result = mmvision(*command, "--backend", "onnxruntime-cpu", "--json")
    assert result.code == 0, result.err
    printed = json.loads(result.out)
    assert (printed["kind"], printed["model"]) == ("triton repository", "vision_encoder")
    again = mmvision(*command)
    assert again.code == 1
    assert "--force" in again.errors[1]
    assert mmvision(*command, "--force").code == 0
