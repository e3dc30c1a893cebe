"""Where a launch has the patches of its images, and what every planner of launches gives.

A launch is one run of a graph or an engine. A planner cuts a batch into launches; each says which
rows of the batch's patches stand where in its own, and so which of its tokens are whose. A backend
copies by that, and knows nothing of how the batch was cut.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid

__all__ = ["LaunchLayout", "Piece", "Planner", "joined_pieces", "run_layouts", "whole_layout"]

_REMEMBERED_PLANS = 64

_Planned = TypeVar("_Planned")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive patches of a batch that a launch has as they are.

    Attributes:
        batch: Their rows of the batch's `pixel_values`.
        launch: Their rows of the launch's.
    """

    batch: slice
    launch: slice

    def tokens(self, patches_per_token: int) -> Piece:
        """The same for what has a row per image token."""
        return Piece(
            *(
                slice(rows.start // patches_per_token, rows.stop // patches_per_token)
                for rows in (self.batch, self.launch)
            )
        )


def joined_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """The same patches in as few pieces as there can be: of neighbours in both, one is made.

    Args:
        pieces: By their place in the launch.
    """
    joined: list[Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        if (
            before is not None
            and before.batch.stop == piece.batch.start
            and before.launch.stop == piece.launch.start
        ):
            joined[-1] = Piece(
                slice(before.batch.start, piece.batch.stop),
                slice(before.launch.start, piece.launch.stop),
            )
        else:
            joined.append(piece)
    return joined


@dataclasses.dataclass(frozen=True, eq=False)
class LaunchLayout:
    """What a launch is fed with, and whose its tokens are.

    Attributes:
        profile: Index of the engine's profile.
        rows: `[rows, 3]` int64, the launch's `grid_thw`, padding included.
        num_patches: Rows of the launch's `pixel_values`, padding included.
        pieces: The images' patches, by their place in the launch. What lies between is padding.
    """

    profile: int
    rows: npt.NDArray[np.int64]
    num_patches: int
    pieces: Sequence[Piece]

    @functools.cached_property
    def gaps(self) -> Sequence[slice]:
        """Rows of the launch's patches that are padding, which is zeros."""
        bounds = [0, *(at for p in self.pieces for at in (p.launch.start, p.launch.stop))]
        bounds.append(self.num_patches)
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        return [slice(start, stop) for start, stop in pairs if start < stop]

    @property
    def is_whole(self) -> bool:
        """Whether the launch has consecutive patches of the batch and nothing else."""
        return len(self.pieces) == 1 and not self.gaps

    def gathered(self, pixel_values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """The launch's patches, of a batch's: a view where they are one piece, else one copy.

        Args:
            pixel_values: `[num_patches, patch_dim]`, the batch's.

        Returns:
            `[self.num_patches, patch_dim]`, C-contiguous.
        """
        if self.is_whole:
            return pixel_values[self.pieces[0].batch]
        patches = np.empty((self.num_patches, pixel_values.shape[1]), pixel_values.dtype)
        for piece in self.pieces:
            patches[piece.launch] = pixel_values[piece.batch]
        for gap in self.gaps:
            patches[gap] = 0
        return patches

    def scatter(
        self, tokens: npt.NDArray[Any], result: npt.NDArray[Any], patches_per_token: int
    ) -> None:
        """Put a launch's tokens where the batch has them, and drop those of padding.

        Args:
            tokens: `[self.num_patches / patches_per_token, width]`, the launch's.
            result: `[num_tokens, width]`, the batch's, filled.
            patches_per_token: Patches that one token is made of.
        """
        for piece in self.pieces:
            of = piece.tokens(patches_per_token)
            result[of.batch] = tokens[of.launch]


def whole_layout(grid: PackedGrid) -> LaunchLayout:
    """Of the one launch of a batch that is not cut."""
    patches = slice(0, grid.num_patches)
    return LaunchLayout(0, grid.rows, grid.num_patches, [Piece(patches, patches)])


def run_layouts(
    layouts: Sequence[LaunchLayout],
    batch: PackedBatch,
    launch: Callable[[npt.NDArray[np.floating], npt.NDArray[np.int64]], npt.NDArray[np.floating]],
) -> npt.NDArray[np.floating]:
    """Run a batch in host memory, launch by launch.

    Args:
        layouts: Of its launches.
        batch: Its patches are in the type that `launch` takes.
        launch: Gives the tokens `[num_patches / merge**2, text_hidden_size]` of `pixel_values` and
            `grid_thw`, in an array of its own.

    Returns:
        `[num_image_tokens, text_hidden_size]`.
    """
    per_token = batch.grid.patches_per_token
    result: npt.NDArray[np.floating] | None = None
    for layout in layouts:
        tokens = launch(layout.gathered(batch.pixel_values), layout.rows)
        if len(layouts) == 1 and layout.is_whole:
            return tokens
        if result is None:
            result = np.empty((batch.grid.num_tokens, tokens.shape[1]), tokens.dtype)
        layout.scatter(tokens, result, per_token)
    assert result is not None  # a batch has at least one image
    return result


@dataclasses.dataclass(frozen=True)
class _Plan(Generic[_Planned]):
    launches: Sequence[_Planned]
    layouts: Sequence[LaunchLayout]


class Planner(abc.ABC, Generic[_Planned]):
    """Cuts batches into launches, and remembers the plans of the last grids.

    A camera always sends the same.

    Args:
        config: The encoder's dimensions.

    Attributes:
        splitting: How batches are cut, for people.
        largest_image: Most patches of an image, or None for any number.
    """

    splitting: str
    largest_image: int | None

    def __init__(self, config: EncoderConfig) -> None:
        def plan(rows: bytes) -> _Plan[_Planned]:
            grid = PackedGrid(
                np.frombuffer(rows, np.int64).reshape(-1, 3), config.patches_per_token
            )
            launches = tuple(self._planned(grid))
            return _Plan(launches, tuple(self._layout(launch, grid) for launch in launches))

        self._plan = functools.lru_cache(maxsize=_REMEMBERED_PLANS)(plan)

    def __call__(self, grid: PackedGrid) -> Sequence[_Planned]:
        """The launches of a batch.

        Raises:
            InputError: An image does not fit, or no cut of the batch does.
        """
        return self._plan(grid.rows.tobytes()).launches

    def layouts(self, grid: PackedGrid) -> Sequence[LaunchLayout]:
        """As `__call__`: what each launch is fed with."""
        return self._plan(grid.rows.tobytes()).layouts

    @abc.abstractmethod
    def idle(self, profile: int) -> LaunchLayout:
        """The launch of a bucket without an image: padding alone."""

    @abc.abstractmethod
    def size_text(self, profile: int) -> str:
        """The sizes of a profile, for people."""

    @abc.abstractmethod
    def _planned(self, grid: PackedGrid) -> Sequence[_Planned]: ...

    @abc.abstractmethod
    def _layout(self, launch: _Planned, grid: PackedGrid) -> LaunchLayout: ...
