"""The running sum of patch counts without a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmvision_export.core.errors import EngineError
from mmvision_export.engine.masked_sum import masked_sums_from_cumsums
from mmvision_export.graph.passes import inline_functions
from tests.support.lowered import model_from_text, run_model

CUMSUM = """<ir_version: 10, opset_import: ["": 20]>
running ({dtype}[{shape}] pixel_values) => ({dtype}[{shape}] sums)
<int64 axis = {{{axis}}}> {{
    sums = CumSum <exclusive: int = {exclusive}, reverse: int = {reverse}> (pixel_values, axis)
}}"""
ONE = {"dtype": "int32", "shape": "num_images", "axis": 0, "exclusive": 0, "reverse": 0}


@pytest.mark.parametrize(
    "terms",
    [
        [4],
        [24, 16],
        [16384, 0, 0],  # padding rows of a bucket count no patches
        [0, 4, 0, 8],
        list(range(4, 4 * 65 + 1, 4)),
    ],
)
def test_equal_to_the_bit(terms: list[int], tmp_path: Path) -> None:
    model = model_from_text(CUMSUM.format(**ONE))
    masked_sums_from_cumsums(model)
    inline_functions(model)
    assert "CumSum" not in {node.op_type for node in model.graph}
    assert set(model.opset_imports) == {""}
    (sums,) = run_model(model, tmp_path, pixel_values=np.array(terms, np.int32))
    assert sums.dtype == np.int32
    np.testing.assert_array_equal(sums, np.cumsum(terms, dtype=np.int32))


def test_the_mask_is_what_makes_it_a_running_sum(tmp_path: Path) -> None:
    """The control: with the mask turned round, the sum runs from the other end."""
    model = model_from_text(CUMSUM.format(**ONE))
    masked_sums_from_cumsums(model)
    inline_functions(model)
    next(node for node in model.graph if node.op_type == "GreaterOrEqual").op_type = "LessOrEqual"
    (sums,) = run_model(model, tmp_path, pixel_values=np.array([1, 2, 4], np.int32))
    assert sums.tolist() == [7, 6, 4]


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"exclusive": 1}, "exclusive"),
        ({"reverse": 1}, "reverse"),
        ({"dtype": "float"}, "FLOAT"),
        ({"shape": "2, num_images"}, "rank 2"),
        ({"axis": 1}, "axis 1"),
    ],
)
def test_another_kind_is_refused(change: dict[str, object], fact: str) -> None:
    model = model_from_text(CUMSUM.format(**{**ONE, **change}))
    with pytest.raises(EngineError) as caught:
        masked_sums_from_cumsums(model)
    assert fact in str(caught.value)
