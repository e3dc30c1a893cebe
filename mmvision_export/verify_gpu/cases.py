"""Random batches for the kernels, and what they must give, in float64 and by no code of ours that runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "DTYPES",
    "HEADS",
    "Case",
    "bits_from_float",
    "float_from_bits",
    "relative_l2",
    "sample_cases",
]

DTYPES = ("fp16", "bf16")
HEADS = 3
_SEED = 13
_MARGIN = 2.0  # of what a plain computation with roundings in this type loses
_ONE_ROUNDING = {
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
}  # relative, at most: a result is always rounded once

# Shapes that hurt: one tile, primes, a tile plus and minus one, many tiny segments, an empty one
# within, one of many steps over its keys, and a bucket in which one image leaves the other rows empty.
_SEGMENTS = {
    "one": [1],
    "one tile": [128],
    "around a tile": [127, 129, 64, 65],
    "primes": [7, 131, 53, 2, 89],
    "many tiny": [4] * 75,
    "empty ones": [0, 36, 0, 0, 100, 0],
    "long": [1531],
    "bucket of 64 images": [300, 84, *[0] * 63],
}
_PATCHES = {"one": 1, "one block": 16, "blocks and one": 33, "many": 601}
_ROTATED_HALF = 39

Bits = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        name: For people; unique with op and dtype.
        op: Folder of the kernel.
        dtype: fp16 or bf16.
        inputs: In the order of the kernel's pointers. Floats of `dtype` as uint16.
        scalars: By name.
        expected: Float64, an array for each output.
        allowed: Largest relative L2 distance, for each output.
    """

    name: str
    op: str
    dtype: str
    inputs: list[npt.NDArray[Any]]
    scalars: dict[str, float]
    expected: list[npt.NDArray[np.float64]]
    allowed: list[float]


def sample_cases(head_dim: int) -> Iterator[Case]:
    """The cases of both kernels in both types; the same ones each time."""
    generator = np.random.default_rng(_SEED)
    for dtype in DTYPES:
        for name, lengths in _SEGMENTS.items():
            yield _attention(name, dtype, lengths, head_dim, generator)
        for name, patches in _PATCHES.items():
            yield _rotary(name, dtype, patches, head_dim, generator)


def _attention(
    name: str, dtype: str, lengths: list[int], head_dim: int, generator: np.random.Generator
) -> Case:
    shape = (sum(lengths), HEADS, head_dim)
    q, k, v = (bits_from_float(generator.standard_normal(shape), dtype) for _ in range(3))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    scale = head_dim**-0.5
    exact, plain = np.empty(shape), np.empty(shape)
    floats = [float_from_bits(x, dtype) for x in (q, k, v)]
    for start, end in itertools.pairwise(bounds):
        q_, k_, v_ = (x[start:end].transpose(1, 0, 2) for x in floats)  # [heads, length, head_dim]
        if end > start:
            exact[start:end] = _softmax_attention(q_, k_, v_, scale).transpose(1, 0, 2)
            rounded = _softmax_attention(q_, k_, v_, scale, dtype=dtype)
            plain[start:end] = rounded.transpose(1, 0, 2)
    allowed = _allowed(plain, exact, dtype)
    return Case(
        name, "varlen_attention", dtype, [q, k, v, bounds], {"scale": scale}, [exact], [allowed]
    )


def _softmax_attention(
    q: npt.NDArray[np.float64],
    k: npt.NDArray[np.float64],
    v: npt.NDArray[np.float64],
    scale: float,
    dtype: str | None = None,
) -> npt.NDArray[np.float64]:
    """Attention of a segment; with a dtype, each step's result is rounded to it, as eager PyTorch does."""

    def step(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return x if dtype is None else float_from_bits(bits_from_float(x, dtype), dtype)

    scores = step(q @ k.transpose(0, 2, 1) * scale)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return step(step(weights / weights.sum(axis=-1, keepdims=True)) @ v)


def _rotary(
    name: str, dtype: str, patches: int, head_dim: int, generator: np.random.Generator
) -> Case:
    shape, half = (patches, HEADS, head_dim), min(_ROTATED_HALF, head_dim // 2)
    q, k = (bits_from_float(generator.standard_normal(shape), dtype) for _ in range(2))
    angle = generator.uniform(-np.pi, np.pi, (patches, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    exact, allowed = [], []
    for bits in (q, k):
        x = float_from_bits(bits, dtype)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        c, s = (t.astype(np.float64)[:, None, :] for t in (cos, sin))
        rotated = np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)
        exact.append(rotated)
        plain = float_from_bits(bits_from_float(rotated, dtype), dtype)
        allowed.append(_allowed(plain, rotated, dtype))
    scalars = {"half": float(half)}
    return Case(name, "qk_rotary_embedding", dtype, [q, k, cos, sin], scalars, exact, allowed)


def _allowed(plain: npt.NDArray[np.float64], exact: npt.NDArray[np.float64], dtype: str) -> float:
    return _MARGIN * max(relative_l2(plain, exact), _ONE_ROUNDING[dtype])


def relative_l2(actual: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """Norm of the difference over the norm of what is expected; infinite for what is not finite."""
    distance = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return distance if np.isfinite(distance) else float("inf")


def bits_from_float(values: npt.NDArray[Any], dtype: str) -> Bits:
    """Round to fp16 or bf16, to the nearest and of two to the even one; as uint16."""
    if dtype == "fp16":
        return values.astype(np.float16).view(np.uint16)
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def float_from_bits(bits: Bits, dtype: str) -> npt.NDArray[np.float64]:
    """The values that `bits_from_float` rounded to."""
    if dtype == "fp16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
