"""What vLLM reads: by its format here, and by the connector's own code where its wheel is unpacked."""

from __future__ import annotations

import ast
import contextlib
import logging
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mmvision_export.core.errors import InputError
from mmvision_export.integrations.image_embeds import ImageEmbeds
from mmvision_export.integrations.vllm import embeds_prompt, write_encoder_cache
from tests.support.errors import refused
from tests.support.wheels import real, stub, unpacked

START, END, IMAGE = 200029, 200030, 200025


def embeds_of(seed: int, tokens: int, width: int = 16) -> ImageEmbeds:
    values = np.random.default_rng(seed).normal(size=(tokens, width)).astype(np.float32)
    return ImageEmbeds.of(values, (1, 2, 2 * tokens))


def test_the_cache_file_has_the_names_and_bits(tmp_path: Path) -> None:
    embeds = embeds_of(0, 5)
    path = write_encoder_cache(tmp_path, "0123abcd", embeds)
    assert path == tmp_path / "0123abcd" / "encoder_cache.safetensors"
    loaded = safetensors.torch.load_file(path)
    assert list(loaded) == ["ec_cache"]
    assert loaded["ec_cache"].dtype == torch.bfloat16
    assert torch.equal(loaded["ec_cache"], embeds.tensor())
    assert not torch.equal(loaded["ec_cache"], embeds_of(1, 5).tensor())  # the control
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_it_replaces_what_was_there(tmp_path: Path) -> None:
    write_encoder_cache(tmp_path, "a", embeds_of(0, 5))
    path = write_encoder_cache(tmp_path, "a", embeds_of(1, 7))
    assert torch.equal(safetensors.torch.load_file(path)["ec_cache"], embeds_of(1, 7).tensor())


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\\b", "a\0"])
def test_a_hash_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with refused(InputError, "mm_hash", reason="unsafe"):
        write_encoder_cache(tmp_path / "cache", name, embeds_of(0, 5))
    assert not list(tmp_path.iterdir())


def test_an_identifier_with_a_lora_is_a_name(tmp_path: Path) -> None:
    assert write_encoder_cache(tmp_path, "adapter:0123", embeds_of(0, 5)).is_file()


def test_a_mixed_prompt_has_each_image_between_start_and_end() -> None:
    images = [embeds_of(0, 3), embeds_of(1, 2)]
    prompt = embeds_prompt([7, IMAGE, 8, IMAGE], images)
    assert prompt["prompt_token_ids"] == [
        *[7, START, IMAGE, IMAGE, IMAGE, END],
        *[8, START, IMAGE, IMAGE, END],
    ]
    is_token = prompt["prompt_is_token_ids"]
    assert is_token == [token != IMAGE for token in prompt["prompt_token_ids"]]
    values = prompt["prompt_embeds"]
    assert values.dtype == torch.bfloat16
    assert tuple(values.shape) == (11, 16)
    at_images = values[~torch.tensor(is_token)]
    assert torch.equal(at_images, torch.cat([each.tensor() for each in images]))
    assert not torch.equal(at_images, torch.cat([each.tensor() for each in images[::-1]]))
    assert values[torch.tensor(is_token)].count_nonzero() == 0


def test_prompts_that_do_not_fit_are_refused() -> None:
    with refused(InputError, 1, 2, IMAGE):
        embeds_prompt([IMAGE], [embeds_of(0, 3), embeds_of(1, 3)])
    with refused(InputError, reason="missing"):
        embeds_prompt([7], [])
    with refused(InputError, 16, 8):
        embeds_prompt([IMAGE, IMAGE], [embeds_of(0, 3), embeds_of(1, 3, width=8)])
    with refused(InputError, START):
        embeds_prompt([START, IMAGE, END], [embeds_of(0, 3)])


@pytest.fixture
def connector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own `ECExampleConnector` as a consumer; what it imports for types only is stubbed."""
    root = unpacked("MMVISION_VLLM")
    stub(monkeypatch, "vllm")
    stub(monkeypatch, "vllm.config", VllmConfig=object)
    stub(monkeypatch, "vllm.logger", init_logger=logging.getLogger)
    stub(monkeypatch, "vllm.v1.core.sched.output", SchedulerOutput=object)
    stub(monkeypatch, "vllm.v1.outputs", ECConnectorOutput=object, ModelRunnerOutput=object)
    stub(monkeypatch, "vllm.utils.collection_utils", is_list_of=None)
    stub(monkeypatch, "vllm.utils.gpu_sync_debug", gpu_sync_allowed=contextlib.nullcontext)
    platform = types.SimpleNamespace(device_type="cpu", is_cuda_alike=lambda: False)
    stub(monkeypatch, "vllm.platforms", current_platform=platform)
    folder = "vllm.distributed.ec_transfer.ec_connector"
    base = real(monkeypatch, root, f"{folder}.base")
    real(monkeypatch, root, f"{folder}.utils")
    module = real(monkeypatch, root, f"{folder}.example_connector")
    transfer = types.SimpleNamespace(
        is_ec_producer=False,
        is_ec_consumer=True,
        get_from_extra_config=lambda name, default: {"shared_storage_path": str(tmp_path)}[name],
    )
    config = types.SimpleNamespace(ec_transfer_config=transfer, model_config=None)
    return module.ECExampleConnector(config, base.ECConnectorRole.WORKER)


def test_vllms_own_connector_reads_what_we_wrote(connector: Any, tmp_path: Path) -> None:
    embeds = {"hash-of-a": embeds_of(0, 5), "hash-of-b": embeds_of(1, 9)}
    for mm_hash, each in embeds.items():
        assert not connector.has_cache_item(mm_hash)
        write_encoder_cache(tmp_path, mm_hash, each)
        assert connector.has_cache_item(mm_hash)
        feature = types.SimpleNamespace(identifier=mm_hash)
        request = types.SimpleNamespace(
            mm_features=[feature], get_num_encoder_embeds=lambda index: 5
        )
        connector.update_state_after_alloc(request, 0)
    connector.bind_connector_metadata(connector.build_connector_meta(None))
    loaded: dict[str, torch.Tensor] = {}
    connector.start_load_caches(loaded)
    assert set(loaded) == set(embeds)
    for mm_hash, each in embeds.items():
        assert loaded[mm_hash].dtype == torch.bfloat16
        assert torch.equal(loaded[mm_hash], each.tensor())
    assert not torch.equal(loaded["hash-of-a"], loaded["hash-of-b"][:5])  # the control


def test_control_vllms_connector_finds_nothing_under_another_name(
    connector: Any, tmp_path: Path
) -> None:
    path = write_encoder_cache(tmp_path, "hash-of-a", embeds_of(0, 5))
    path.rename(path.with_name("cache.safetensors"))
    assert not connector.has_cache_item("hash-of-a")
    assert not connector.has_cache_item("hash-of-b")


def test_the_mixed_prompt_has_vllms_own_fields() -> None:
    source = (unpacked("MMVISION_VLLM") / "vllm/inputs/llm.py").read_text()
    fields = next(
        {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name == "EmbedsPrompt"
    )
    assert set(embeds_prompt([IMAGE], [embeds_of(0, 3)])) <= fields
    assert "prompt_embeddings" not in fields  # the control
