"""SGLang's side: by stand-ins for its base class here, by its own code where its wheel is unpacked."""

from __future__ import annotations
import __future__

import ast
import importlib
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import ConfigError, InputError
from mmvision_export.integrations.image_embedder import ImageEmbedder
from mmvision_export.integrations.sglang import features_of_items, segments_of_rows
from tests.support.configs import HEAD_DIM_80, batch
from tests.support.errors import refused
from tests.support.wheels import real, stub, unpacked

PACKAGE = "mmvision_export.integrations.sglang_models"
ARCHITECTURE = "MiniMaxM3SparseForConditionalGeneration"


@pytest.fixture(scope="module")
def embedder(exported: Path) -> Iterator[ImageEmbedder]:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        yield ImageEmbedder(encoder)


def item(grid_name: str, rows: list[tuple[int, int, int]], seed: int = 0) -> Any:
    pixels, grid = batch(rows, HEAD_DIM_80, seed=seed)
    fields = {"feature": torch.from_numpy(pixels), grid_name: torch.from_numpy(grid)}
    return types.SimpleNamespace(**fields)


def functions(module: str, *names: str) -> dict[str, Any]:
    """Functions and methods of SGLang's own source, which need nothing of it but each other."""
    tree = ast.parse((unpacked("MMVISION_SGLANG") / module).read_text())
    wanted: list[ast.stmt] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    scope: dict[str, Any] = {"torch": torch}
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(wanted, []), module, "exec", flags=flags), scope)
    return scope


def test_features_are_the_embeddings_of_all_items(embedder: ImageEmbedder) -> None:
    items = [item("image_grid_thw", [(1, 4, 6), (1, 2, 2)]), item("image_grid_thw", [(1, 6, 4)], 1)]
    features = features_of_items(embedder, items, "image_grid_thw")
    pixels = np.concatenate([each.feature.numpy() for each in items])
    grid = np.concatenate([each.image_grid_thw.numpy() for each in items])
    wanted = torch.from_numpy(embedder.encoder(pixels, grid)).to(torch.bfloat16)
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, wanted)
    swapped = features_of_items(embedder, items[::-1], "image_grid_thw")
    assert not torch.equal(swapped, wanted)  # the control


def test_a_long_video_is_cut_into_segments(embedder: ImageEmbedder) -> None:
    most = HEAD_DIM_80.segment_max_frames
    rows = [(1, 4, 4)] * (2 * most + 1)
    long = item("video_grid_thw", rows)
    long.video_grid_thw = torch.tensor([[2 * most + 1, 4, 4]])
    features = features_of_items(embedder, [long], "video_grid_thw")
    cut = np.array([[most, 4, 4], [most, 4, 4], [1, 4, 4]])
    wanted = torch.from_numpy(embedder.encoder(long.feature.numpy(), cut)).to(torch.bfloat16)
    assert torch.equal(features, wanted)
    other = np.array([[1, 4, 4], [most, 4, 4], [most, 4, 4]])
    wrong = torch.from_numpy(embedder.encoder(long.feature.numpy(), other)).to(torch.bfloat16)
    assert not torch.equal(features, wrong)  # the control


def test_no_items_are_refused(embedder: ImageEmbedder) -> None:
    with refused(InputError, reason="missing"):
        features_of_items(embedder, [], "image_grid_thw")


@pytest.fixture
def model_class(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our class over a stand-in for theirs: a module with what ours leaves as it is."""
    theirs = type(ARCHITECTURE, (torch.nn.Module,), {"preprocess_mm_for_encoder": None})
    stub(monkeypatch, "sglang.srt.models.minimax_m3_vl", **{ARCHITECTURE: theirs})
    stub(
        monkeypatch, "sglang.srt.managers.tokenizer_manager", get_processor_wrapper=lambda: "theirs"
    )
    monkeypatch.setenv("MMVISION_MODEL", str(exported))
    monkeypatch.setenv("MMVISION_BACKEND", "onnxruntime-cpu")
    sys.modules.pop(f"{PACKAGE}.minimax_m3_vl", None)
    module = importlib.import_module(f"{PACKAGE}.minimax_m3_vl")
    yield module.EntryClass
    sys.modules.pop(f"{PACKAGE}.minimax_m3_vl", None)


def config(*, encoder_only: bool = True, width: int = HEAD_DIM_80.text_hidden_size) -> Any:
    text = types.SimpleNamespace(hidden_size=width)
    return types.SimpleNamespace(encoder_only=encoder_only, text_config=text)


def test_the_model_class_encodes_and_reads_no_checkpoint(
    model_class: Any, embedder: ImageEmbedder
) -> None:
    model = model_class(config())
    assert next(model.parameters()).dtype == torch.bfloat16  # as the server asks for the type
    assert model.encoder_processor == "theirs"

    def weights() -> Iterator[Any]:
        raise AssertionError("the checkpoint was read")
        yield

    model.load_weights(weights())
    for kind in ("image", "video"):
        given = [item(f"{kind}_grid_thw", [(1, 4, 6)])]
        features = getattr(model, f"get_{kind}_feature")(given)
        assert torch.equal(features, features_of_items(embedder, given, f"{kind}_grid_thw"))  # type: ignore[arg-type]


def test_other_uses_of_the_model_class_are_refused(
    model_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(ConfigError):
        model_class(config(encoder_only=False))
    with refused(ConfigError, HEAD_DIM_80.text_hidden_size, 6144):
        model_class(config(width=6144))
    monkeypatch.delenv("MMVISION_MODEL")
    with refused(ConfigError, "MMVISION_MODEL"):
        model_class(config())


def test_sglangs_own_registry_finds_the_class(
    model_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = unpacked("MMVISION_SGLANG")
    value = types.SimpleNamespace(get=lambda: PACKAGE)
    envs = types.SimpleNamespace(
        SGLANG_EXTERNAL_MODEL_PACKAGE=value,
        SGLANG_DISABLED_MODEL_ARCHS=types.SimpleNamespace(get=set),
    )
    stub(monkeypatch, "sglang.srt.environ", envs=envs)
    registry = real(monkeypatch, root, "sglang.srt.models.registry").ModelRegistry
    found, architecture = registry.resolve_model_cls([ARCHITECTURE])
    assert architecture == ARCHITECTURE
    assert found is model_class
    assert set(registry.models) == {ARCHITECTURE}


def test_sglangs_own_functions_give_the_same_features(embedder: ImageEmbedder) -> None:
    theirs = functions(
        "sglang/srt/models/minimax_vl_common.py",
        *("get_image_feature", "get_video_feature", "_stack_pixel_values", "_run_vision_tower"),
    )

    class Tower:
        """Stands for their tower: what it is called with goes to the encoder."""

        dtype = torch.float32
        embeddings = types.SimpleNamespace(
            patch_embedding=types.SimpleNamespace(weight=torch.zeros(1))
        )
        vision_model = types.SimpleNamespace(embeddings=embeddings)

        def __call__(self, pixel_values: torch.Tensor, grid_thw: list[list[int]]) -> torch.Tensor:
            values: torch.Tensor = embedder.encoder(pixel_values, np.array(grid_thw))
            return values.to(torch.bfloat16)

    for kind in ("image", "video"):
        items = [
            item(f"{kind}_grid_thw", [(1, 4, 6), (1, 2, 2)]),
            item(f"{kind}_grid_thw", [(1, 6, 4)]),
        ]
        wanted = theirs[f"get_{kind}_feature"](Tower(), items, False)
        assert torch.equal(features_of_items(embedder, items, f"{kind}_grid_thw"), wanted)  # type: ignore[arg-type]


def test_segments_are_those_of_sglangs_own_function() -> None:
    theirs = functions("sglang/srt/models/minimax_vl_common.py", "_apply_max_frames_limit")
    generator = random.Random(0)
    rows = [(generator.randint(1, 40), 2, 2 * generator.randint(1, 9)) for _ in range(500)]
    tower = types.SimpleNamespace(vision_segment_max_frames=4)
    wanted = [tuple(row) for row in theirs["_apply_max_frames_limit"](tower, rows)]
    assert segments_of_rows(rows, 4) == wanted
    assert segments_of_rows(rows, 5) != wanted  # the control


def test_what_the_class_leaves_to_sglang_is_there() -> None:
    source = unpacked("MMVISION_SGLANG") / "sglang/srt/models/minimax_m3_vl.py"
    theirs = next(
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == ARCHITECTURE
    )
    methods = {node.name for node in theirs.body if isinstance(node, ast.FunctionDef)}
    wanted = {"get_image_feature", "get_video_feature", "load_weights", "preprocess_mm_for_encoder"}
    assert wanted <= methods
    assert "encode_images" not in methods  # the control
