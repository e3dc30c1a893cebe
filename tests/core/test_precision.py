"""The table of precisions against the libraries whose types it names."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.precision import (
    FLOAT_PRECISIONS,
    PRECISIONS,
    QUANTIZED_PRECISIONS,
    Precision,
)

ROWS = [pytest.param(row, id=name) for name, row in PRECISIONS.items()]


@pytest.mark.parametrize("row", ROWS)
def test_one_type_by_every_library(row: Precision) -> None:
    numpy = np.dtype(getattr(ml_dtypes, row.dtype, row.dtype))
    assert ir.DataType[row.onnx_type].numpy() == numpy
    assert getattr(torch, row.dtype).itemsize == numpy.itemsize
    assert np.dtype(row.io_dtype).itemsize >= 2


@pytest.mark.parametrize("row", [row for row in ROWS if row.id != "int8"])
def test_range_and_rounding_of_the_float_types(row: Precision) -> None:
    facts = torch.finfo(getattr(torch, row.dtype))
    assert row.largest == facts.max
    assert row.unit_roundoff == facts.eps / 2
    # The control: no other row has these facts.
    others = [other for other in PRECISIONS.values() if other is not row]
    assert all(
        (other.largest, other.unit_roundoff) != (facts.max, facts.eps / 2) for other in others
    )


def test_rounding_of_int8() -> None:
    row = PRECISIONS["int8"]
    assert row.largest == -(np.iinfo(np.int8).min + 1)
    values = np.linspace(-row.largest, row.largest, 100_001)
    error = np.abs(np.rint(values) - values).max() / row.largest
    assert 0.99 * row.unit_roundoff < error <= row.unit_roundoff


@pytest.mark.parametrize("row", ROWS)
def test_rows_name_rows(row: Precision) -> None:
    hidden = PRECISIONS[row.hidden]
    assert not hidden.is_quantized
    assert row.io_dtype == hidden.io_dtype
    assert row.has_half_attention == (ir.DataType[hidden.onnx_type].itemsize == 2)
    assert set(row.derived_from) <= set(FLOAT_PRECISIONS) - {row.name}
    assert (row.name in QUANTIZED_PRECISIONS) == row.is_quantized != (row.name in FLOAT_PRECISIONS)


def test_what_runs_where() -> None:
    def on(capability: str) -> set[str]:
        here = ComputeCapability.parse(capability)
        return {name for name, row in PRECISIONS.items() if row.runs_on(here)}

    assert on("7.5") == {"fp32", "fp16", "int8"}
    assert on("8.6") == {"fp32", "fp16", "int8", "bf16"}
    assert on("8.9") == on("10.0") == set(PRECISIONS)
