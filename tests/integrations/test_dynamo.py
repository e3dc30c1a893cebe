"""Dynamo's side: by a stand-in for its base class, and by its own driver where its wheel is unpacked."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import importlib
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmvision_export import VisionEncoder
from mmvision_export.integrations.image_embedder import ImageEmbedder
from mmvision_export.integrations.vllm import embeds_prompt
from tests.support.images import natural
from tests.support.wheels import real, stub, unpacked

MODULE = "mmvision_export.integrations.dynamo"
PLACE = "dynamo.vllm.multimodal_utils.custom_encoder"
START, END, IMAGE = 200029, 200030, 200025
SIZES = [(64, 96), (120, 80), (200, 60)]


@dataclasses.dataclass(frozen=True)
class Preprocessed:
    """Has the fields of Dynamo's."""

    item: Any
    cost: int = 1


class Base:
    """Has the attributes and methods of Dynamo's."""

    max_batch_cost = None
    buckets = None
    preprocess_concurrency = 0

    def preprocess(self, raw: Any) -> Any:
        return Preprocessed(raw)


@pytest.fixture
def surroundings(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("MMVISION_MODEL", str(exported))
    monkeypatch.setenv("MMVISION_BACKEND", "onnxruntime-cpu")
    sys.modules.pop(MODULE, None)
    yield monkeypatch
    sys.modules.pop(MODULE, None)


@pytest.fixture
def backend(surroundings: pytest.MonkeyPatch) -> Iterator[Any]:
    stub(surroundings, f"{PLACE}.backend", Preprocessed=Preprocessed, VisionEncoderBackend=Base)
    made = importlib.import_module(MODULE).MiniMaxM3Encoder()
    yield made
    made.close()


def data_url(size: tuple[int, int]) -> str:
    content = io.BytesIO()
    natural(*size).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def wanted(exported: Path) -> list[torch.Tensor]:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        images = [natural(*size) for size in SIZES]
        return [each.tensor() for each in ImageEmbedder(encoder).encode_images(images)]


def test_it_encodes_what_it_preprocessed(backend: Any, exported: Path) -> None:
    backend.build("language-model")
    prepared = [backend.preprocess(data_url(size)) for size in SIZES]
    expected = wanted(exported)
    assert [each.cost for each in prepared] == [4 * len(each) for each in expected]
    artifacts = backend.forward_batch([each.item for each in prepared])
    assert all(torch.equal(a, b) for a, b in zip(artifacts, expected, strict=True))
    assert not torch.equal(artifacts[0], artifacts[1][: len(artifacts[0])])  # the control
    assert {each.dtype for each in artifacts} == {torch.bfloat16}


def test_it_declares_what_dynamo_reads_before_build(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend.image_token_id == IMAGE
    assert backend.max_batch_cost == 16384
    assert backend.preprocess_concurrency >= 1
    monkeypatch.setenv("MMVISION_MAX_BATCH_PATCHES", "4096")
    assert type(backend)().max_batch_cost == 4096


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AAAA",
        "data:image/png;base64,%%%",
        "data:image/png,AAAA",
        "file:///etc/passwd",
        "/etc/passwd",
        "http://127.0.0.1:9/a.png",
        "",
    ],
)
def test_what_is_no_image_is_the_clients_fault_and_tells_nothing(
    url: str, backend: Any, exported: Path
) -> None:
    backend.build("language-model")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - Dynamo goes by the type
        backend.preprocess(url)
    assert str(exported) not in str(caught.value)
    assert "passwd" not in str(caught.value)


def test_a_failure_of_the_engine_is_nobodys_fault(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmvision_export.core.errors import InputError

    backend.build("language-model")
    item = backend.preprocess(data_url(SIZES[0])).item

    def failing(batch: Any) -> Any:
        raise InputError("no memory for it")

    monkeypatch.setattr(backend._embedder.encoder, "encode", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        backend.forward_batch([item])


def test_closing_twice_or_before_it_is_built_does_nothing(backend: Any) -> None:
    backend.close()
    backend.build("language-model")
    backend.close()
    backend.close()
    with pytest.raises(RuntimeError):
        backend.forward_batch([])


@pytest.fixture
def dynamo(surroundings: pytest.MonkeyPatch) -> Any:
    """Dynamo's own base class, batcher, driver and adapter; vLLM's names are stand-ins."""
    root = unpacked("MMVISION_DYNAMO")
    stub(surroundings, "vllm.inputs", EmbedsPrompt=dict, TokensPrompt=dict)
    stub(surroundings, PLACE)
    real(surroundings, root, f"{PLACE}.backend.base")
    backend = real(surroundings, root, f"{PLACE}.backend")
    real(surroundings, root, f"{PLACE}.batcher")
    driver = real(surroundings, root, f"{PLACE}.async_encoder")
    stub(
        surroundings,
        "dynamo.vllm.multimodal_utils.model_config",
        _hidden_size=lambda config: config.hidden_size,
        _is_multimodal_model=lambda config: False,
    )
    stub(surroundings, f"{PLACE}.adapter")
    real(surroundings, root, f"{PLACE}.adapter.base")
    linear = real(surroundings, root, f"{PLACE}.adapter.linear")
    return types.SimpleNamespace(
        base=backend.VisionEncoderBackend,
        driver=driver.AsyncVisionEncoder,
        adapter=linear.LinearEmbedsAdapter,
    )


def test_dynamos_own_driver_and_adapter_take_it(dynamo: Any, exported: Path) -> None:
    encoder_class = importlib.import_module(MODULE).MiniMaxM3Encoder
    assert issubclass(encoder_class, dynamo.base)
    backend = encoder_class()
    driver = dynamo.driver(backend)
    driver.load("language-model")
    try:

        async def requests() -> Any:
            one = driver.encode([data_url(SIZES[0]), data_url(SIZES[1])])
            return await asyncio.gather(one, driver.encode([data_url(SIZES[2])]))

        (first, second), (third,) = asyncio.run(requests())
        with pytest.raises(ValueError):  # noqa: PT011 - of one request, and the next is served
            asyncio.run(driver.encode([data_url(SIZES[0]), "data:image/png;base64,AAAA"]))
        (again,) = asyncio.run(driver.encode([data_url(SIZES[2])]))
    finally:
        driver.shutdown()
    expected = wanted(exported)
    # Batches of other images may round the last bit of float32 otherwise: at most one step of
    # bfloat16, 2**-7 of a value, beside what cancels below the largest.
    for artifact, reference in zip((first, second, third), expected, strict=True):
        bound = 2**-7 * reference.float().abs().max()
        assert (artifact.float() - reference.float()).abs().max() <= bound
    assert (again.float() - third.float()).abs().max() <= 2**-7 * third.float().abs().max()
    assert (first.float() - second.float()[: len(first)]).abs().max() > bound  # the control

    config = types.SimpleNamespace(hidden_size=first.shape[1], dtype=torch.bfloat16)
    adapter = dynamo.adapter(backend, config, types.SimpleNamespace(enable_prompt_embeds=True))
    theirs = adapter.prepare_prompt([7, START, IMAGE, END, 8], [first])
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        (embeds,) = ImageEmbedder(encoder).encode_images([natural(*SIZES[0])])
    ours = embeds_prompt([7, IMAGE, 8], [embeds])
    assert theirs["prompt_token_ids"] == ours["prompt_token_ids"]
    assert theirs["prompt_is_token_ids"] == ours["prompt_is_token_ids"]
    at_image = ~torch.tensor(theirs["prompt_is_token_ids"])
    assert torch.equal(theirs["prompt_embeds"][at_image], first)


def test_control_dynamos_adapter_adds_no_start_and_end(dynamo: Any, exported: Path) -> None:
    backend = importlib.import_module(MODULE).MiniMaxM3Encoder()
    (tensor, *_) = wanted(exported)
    config = types.SimpleNamespace(hidden_size=tensor.shape[1], dtype=torch.bfloat16)
    adapter = dynamo.adapter(backend, config, types.SimpleNamespace(enable_prompt_embeds=True))
    assert START not in adapter.prepare_prompt([7, IMAGE, 8], [tensor])["prompt_token_ids"]
