"""LayerNormalization with float32 statistics, and what float16 statistics do."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest

from mmvision_export.core.errors import EngineError
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.engine.layer_norm import (
    LayerNormForm,
    float32_layer_norms,
    layer_norm_form_for_parser,
)
from mmvision_export.graph.passes import inline_functions
from tests.support.faults import statistics_in_float16
from tests.support.lowered import model_from_text, run_as_written, run_model

FORMS: tuple[LayerNormForm, ...] = get_args(LayerNormForm)
CHANNELS = 160
LAYER_NORM = """<ir_version: 10, opset_import: ["": 20]>
norm ({dtype}[n, {channels}] pixel_values, {dtype}[{channels}] w, {dtype}[{channels}] b)
    => ({dtype}[n, {channels}] y) {{
    y = LayerNormalization <epsilon: float = 0.00001, {attributes}> (pixel_values, w, b)
}}"""


def written(form: LayerNormForm, dtype: str = "float16") -> ir.Model:
    model = model_from_text(
        LAYER_NORM.format(dtype=dtype, channels=CHANNELS, attributes="axis: int = -1")
    )
    float32_layer_norms(model, form)
    inline_functions(model)
    return model


def rows(kind: str) -> np.ndarray:
    """Rows that are hard to normalise: a massive activation, or a mean far from zero."""
    x = np.random.default_rng(0).standard_normal((12, CHANNELS))
    if kind == "massive":
        x[:, 7] += 4000.0  # its square is beyond float16's largest value
    if kind == "mean":
        x = 1000.0 + x  # float16's steps are 0.5 there, and its sums are beyond its range
    return x.astype(np.float16)


def expected(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, w, b = (a.astype(np.float64) for a in (x, w, b))
    centred = x - x.mean(-1, keepdims=True)
    y: np.ndarray = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b
    return y


def affine() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    w, b = generator.standard_normal((2, CHANNELS))
    return (1 + w / 10).astype(np.float16), (b / 10).astype(np.float16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "massive", "mean"])
def test_only_the_result_is_rounded(form: LayerNormForm, kind: str, tmp_path: Path) -> None:
    x, (w, b) = rows(kind), affine()
    (y,) = run_model(written(form), tmp_path, pixel_values=x, w=w, b=b)
    assert y.dtype == np.float16
    # Half a unit in the last place of float16, and what float32 itself loses beside the mean.
    np.testing.assert_allclose(y, expected(x, w, b), rtol=2**-11, atol=1e-3)


@pytest.mark.parametrize("kind", ["massive", "mean"])
def test_float16_statistics_fail_the_gate(kind: str) -> None:
    """The control of the test above, at the gate that a float16 graph must pass."""
    x, (w, b) = rows(kind), affine()
    good, bad = written("separate"), written("separate")
    statistics_in_float16(bad)
    right, wrong = (
        metrics(run_as_written(m, pixel_values=x, w=w, b=b), expected(x, w, b)) for m in (good, bad)
    )
    assert right.non_finite == 0
    gate = PRECISIONS["fp16"].gate.min_cosine
    assert right.min_cosine >= gate
    assert wrong.non_finite or not wrong.min_cosine >= gate


def test_float32_written_as_a_whole_stays_as_it_is() -> None:
    assert [node.op_type for node in written("whole", "float").graph] == ["LayerNormalization"]
    assert "LayerNormalization" not in {node.op_type for node in written("separate", "float").graph}


@pytest.mark.parametrize(
    ("release", "form"),
    [((10, 3), "separate"), ((10, 5), "separate"), ((10, 6), "whole"), ((11, 1), "whole")],
)
def test_form_for_each_parser(release: tuple[int, int], form: LayerNormForm) -> None:
    assert layer_norm_form_for_parser(release) == form


@pytest.mark.parametrize("attributes", ["axis: int = 0", "axis: int = -1, stash_type: int = 10"])
def test_another_kind_is_refused(attributes: str) -> None:
    model = model_from_text(
        LAYER_NORM.format(dtype="float16", channels=CHANNELS, attributes=attributes)
    )
    with pytest.raises(EngineError) as caught:
        float32_layer_norms(model, "whole")
    assert attributes.rpartition(" ")[2] in str(caught.value)
