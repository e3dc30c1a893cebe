"""Pictures into calls by a budget, with an encoder that only counts, and cells of the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmvision_export.core.errors import BackendError, InputError, NotFiniteError
from mmvision_export.embed.decoding import Decoded
from mmvision_export.embed.packing import Embedded, Failed, embedded_rows
from mmvision_export.embed.stored import array_from_cell, cell_from_array, rounded_to_bfloat16
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from tests.support.configs import HEAD_DIM_80

SIDE = 28


class Counting:
    """Gives each token the number of patches of its image; fails on images of the widths given."""

    dtype = np.dtype(np.float32)
    config = HEAD_DIM_80

    def __init__(self, **fails: type[Exception]) -> None:
        self.calls: list[list[int]] = []
        self.fails = {int(name[1:]): error for name, error in fails.items()}

    def encode(self, batch: PackedBatch) -> np.ndarray:
        counts = batch.grid.patches_per_image
        self.calls.append(counts)
        for count in counts:
            if (error := self.fails.get(count)) is not None:
                raise error(f"{count} patches")
        return np.concatenate([np.full((count // 4, 3), count, np.float32) for count in counts])


def pictures(*blocks: int) -> list[Decoded]:
    """Pictures of so many blocks of four patches, in a row."""
    return [
        Decoded(str(index), Image.new("RGB", (SIDE * count, SIDE)))
        for index, count in enumerate(blocks)
    ]


def embedded(encoder: Counting, rows: list[Decoded], budget: int) -> list[Embedded | Failed]:
    return list(
        embedded_rows(encoder, rows, PreprocessorConfig(), patches_per_call=budget)  # type: ignore[arg-type]
    )


def test_calls_hold_what_the_budget_has_room_for() -> None:
    encoder = Counting()
    results = embedded(encoder, pictures(1, 2, 3, 9, 1, 1), 24)
    assert encoder.calls == [[4, 8, 12], [36], [4, 4]]
    assert [result.id for result in results] == list("012345")
    for result, blocks in zip(results, (1, 2, 3, 9, 1, 1), strict=True):
        assert isinstance(result, Embedded)
        assert result.grid_thw == (1, 2, 2 * blocks)
        assert (result.image_embeds == 4 * blocks).all()


def test_a_row_without_a_picture_is_a_failure_and_the_others_are_not() -> None:
    rows = pictures(1, 1)
    results = embedded(Counting(), [rows[0], Decoded("x", None, "why"), rows[1]], 100)
    assert {result.id: type(result) for result in results} == {
        "0": Embedded,
        "1": Embedded,
        "x": Failed,
    }


@pytest.mark.parametrize("error", [InputError, BackendError])
def test_an_image_that_the_runtime_refuses_stops_no_other(error: type[Exception]) -> None:
    results = embedded(Counting(_12=error), pictures(1, 2, 3, 4), 1000)
    assert [type(result) for result in results] == [Embedded, Embedded, Failed, Embedded]
    assert isinstance(results[2], Failed)
    assert "12 patches" in results[2].error


def test_a_runtime_that_fails_on_any_image_ends_the_run() -> None:
    """As a lost device does: else every image that is left would be called a failure."""
    with pytest.raises(BackendError):
        embedded(
            Counting(_4=BackendError, _8=BackendError, _12=BackendError), pictures(1, 2, 3), 99
        )


def test_an_image_whose_embeddings_are_not_finite_is_a_failure() -> None:
    class Overflowing(Counting):
        def encode(self, batch: PackedBatch) -> np.ndarray:
            given = batch.grid.split(super().encode(batch))
            raise NotFiniteError("", images=[1], image_embeds=[given[0], None, given[2]])

    results = embedded(Overflowing(), pictures(1, 1, 2), 100)
    assert [type(result) for result in results] == [Embedded, Failed, Embedded]


def test_rounding_to_bfloat16_is_pytorchs() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert (rounded_to_bfloat16(values) == expected.view(np.uint16)).all()
    # The control: cutting the bits off is another rounding.
    assert (
        (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16) != expected.view(np.uint16)
    ).any()


def test_cells_come_back() -> None:
    values = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    for stored, most in (("float32", 0.0), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        cell = cell_from_array(values, stored)  # type: ignore[arg-type]
        assert cell is not None
        again = array_from_cell(cell, stored, 8)  # type: ignore[arg-type]
        assert again.shape == values.shape
        assert (np.abs(again - values) <= most * np.abs(values)).all()


def test_what_overflows_in_a_cell_is_none() -> None:
    large = np.array([[1.0, 7e4]], np.float32)
    assert cell_from_array(large, "float16") is None
    assert cell_from_array(large, "bfloat16") is not None
    assert cell_from_array(np.array([[3.4e38]], np.float32), "bfloat16") is None
