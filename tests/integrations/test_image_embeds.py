"""bfloat16 by NumPy, against PyTorch's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmvision_export.core.errors import InputError
from mmvision_export.integrations.image_embeds import (
    ImageEmbeds,
    bfloat16_bits_from_floats,
    floats_from_bfloat16_bits,
)
from tests.support.errors import refused


def torch_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def every_tail() -> np.ndarray:
    """Each of the 2**16 tails that rounding drops, under heads even, odd, subnormal, largest."""
    heads = np.array([0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x8000, 0xBF81], np.uint32)
    bits = (heads[:, None] << 16) | np.arange(1 << 16, dtype=np.uint32)
    return bits.view(np.float32)


def test_it_rounds_as_pytorch_does() -> None:
    values = every_tail()
    assert np.array_equal(bfloat16_bits_from_floats(values), torch_bits(values))


def test_control_truncation_is_another_rounding() -> None:
    values = every_tail()
    truncated = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert not np.array_equal(truncated, torch_bits(values))


def test_infinities_stay_and_nans_stay_nans() -> None:
    values = np.array([np.inf, -np.inf, np.nan], np.float32)
    # A NaN whose set bits are all in the dropped half would become an infinity.
    low = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    back = floats_from_bfloat16_bits(bfloat16_bits_from_floats(np.concatenate([values, low])))
    assert back[0] == np.inf
    assert back[1] == -np.inf
    assert np.isnan(back[2:]).all()


def test_every_bfloat16_comes_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[np.isfinite(floats_from_bfloat16_bits(bits))]
    assert np.array_equal(bfloat16_bits_from_floats(floats_from_bfloat16_bits(finite)), finite)


def test_float16_goes_by_way_of_its_own_value() -> None:
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float16)
    assert np.array_equal(bfloat16_bits_from_floats(values), torch_bits(values))


def test_a_tensor_is_a_copy_and_the_bits_are_read_only() -> None:
    embeds = ImageEmbeds.of(np.ones((2, 3), np.float32), (1, 2, 4))
    tensor = embeds.tensor()
    assert tensor.dtype == torch.bfloat16
    assert tuple(tensor.shape) == embeds.shape
    tensor.zero_()
    assert embeds.floats().min() == 1
    with pytest.raises(ValueError, match="read-only"):
        embeds.bits[0, 0] = 0


def test_other_arrays_are_refused() -> None:
    with refused(InputError, "float32"):
        ImageEmbeds(np.ones((2, 3), np.float32), (1, 2, 4))
    with refused(InputError):
        ImageEmbeds(np.ones((4, 3), np.uint16)[::2], (1, 2, 4))
