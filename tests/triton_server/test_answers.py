"""Requests into calls, with an encoder that only counts: an answer or an error of its own for each."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import BackendError, InputError, MmvisionError, NotFiniteError
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.triton_server.answers import (
    Answer,
    Request,
    answers_by_call,
    request_from_arrays,
    warm_up,
)
from tests.support.configs import HEAD_DIM_80, batch, relative_l2
from tests.support.embedding import noise
from tests.support.errors import refused


class Counting:
    """Gives each token its image's number of patches; fails on images of the numbers given."""

    dtype = np.dtype(np.float32)
    config = HEAD_DIM_80
    patches_per_call = 100

    def __init__(self, fails: dict[int, type[MmvisionError]] | None = None) -> None:
        self.calls: list[list[int]] = []
        self.fails = fails or {}

    def encode(self, given: PackedBatch) -> np.ndarray:
        counts = given.grid.patches_per_image
        self.calls.append(counts)
        for count in counts:
            if (error := self.fails.get(count)) is not None:
                raise error(f"{count} patches")
        return np.concatenate([np.full((count // 4, 3), count, np.float32) for count in counts])


def request(*blocks: int) -> Request:
    """Images of so many blocks of four patches."""
    patches, rows = batch([(1, 2, 2 * count) for count in blocks], HEAD_DIM_80)
    return Request(pixel_values=patches, grid_thw=rows)


def answered(encoder: Any, requests: list[Request]) -> dict[int, Answer | MmvisionError]:
    decoder = ImageDecoder(PreprocessorConfig())
    given = [pair for call in answers_by_call(encoder, decoder, requests) for pair in call]
    answers = dict(given)
    assert len(answers) == len(given)
    assert answers.keys() == set(range(len(requests)))
    return answers


def test_requests_share_a_call_until_it_has_enough_patches() -> None:
    encoder = Counting()
    answers = answered(encoder, [request(5), request(3, 7), request(11), request(40), request(1)])
    assert encoder.calls == [[20, 12, 28], [44], [160], [4]]
    answer = answers[1]
    assert isinstance(answer, Answer)
    assert answer.grid_thw.tolist() == [[1, 2, 6], [1, 2, 14]]
    assert answer.tokens_per_image.tolist() == [3, 7]
    assert answer.image_embeds[:, 0].tolist() == [12.0] * 3 + [28.0] * 7


def test_an_answer_is_there_before_the_next_call_begins() -> None:
    encoder = Counting()
    calls = answers_by_call(
        encoder,  # type: ignore[arg-type]
        ImageDecoder(PreprocessorConfig()),
        [request(20), request(20)],
    )
    next(calls)
    assert len(encoder.calls) == 1


@pytest.mark.parametrize("error", [InputError, BackendError])
def test_a_request_that_fails_fails_alone(error: type[MmvisionError]) -> None:
    encoder = Counting({12: error})
    bad = Request(pixel_values=np.zeros((3, 1176), np.float32), grid_thw=np.array([[1, 2, 2]]))
    junk = Request(images=(b"junk",))
    answers = answered(encoder, [request(1), request(3), bad, request(2), junk])
    assert [type(answers[i]) for i in range(5)] == [Answer, error, InputError, Answer, InputError]
    assert "12 patches" in str(answers[1])


def test_embeddings_that_are_not_finite_are_an_error_of_their_request() -> None:
    class Overflowing(Counting):
        def encode(self, given: PackedBatch) -> np.ndarray:
            embeds: list[Any] = given.grid.split(super().encode(given))
            embeds[2] = None
            raise NotFiniteError("", images=[2], image_embeds=embeds)

    answers = answered(Overflowing(), [request(1), request(2, 3), request(4)])
    assert [type(answers[i]) for i in range(3)] == [Answer, InputError, Answer]
    assert "1" in str(answers[1])  # the second image of its request


def test_images_and_patches_share_a_call_and_have_what_they_have_alone(exported: Path) -> None:
    stream = io.BytesIO()
    noise(3).save(stream, "PNG")
    patches = request(5, 9)
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        answers = answered(encoder, [Request(images=(stream.getvalue(),)), patches])
        (image,) = encoder.encode_images([Image.open(stream)])
        alone = encoder(patches.pixel_values, patches.grid_thw)
        warm_up(encoder, [[[1, 16, 16]]])
    first, second = answers[0], answers[1]
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    # docs/runtime.md: what a batch's other images change in float32, by the order of sums.
    assert relative_l2(first.image_embeds, image) <= 1e-6
    assert relative_l2(second.image_embeds, alone) <= 1e-6
    assert relative_l2(second.image_embeds, alone[::-1]) > 1e-6  # the control


def test_requests_that_are_refused() -> None:
    image = np.array([[b"a", b"b"]], dtype=object)
    patches, grid = np.zeros((1, 4, 1176), np.float32), np.array([[[1, 2, 2]]])
    assert request_from_arrays(image, None, None).images == (b"a", b"b")
    whole = request_from_arrays(None, patches, grid)
    assert whole.pixel_values is not None
    assert whole.pixel_values.shape == (4, 1176)
    for given, fact in (
        ((None, None, None), "none"),
        ((image, patches, grid), "image"),
        ((None, patches, None), "pixel_values"),
        ((None, None, grid), "grid_thw"),
        ((None, np.zeros((2, 4, 1176), np.float32), grid), "pixel_values"),
        ((np.array([[b"a"], [b"b"]], dtype=object), None, None), "image"),
    ):
        with refused(InputError, fact):
            request_from_arrays(*given)
