"""No launch is begun that needs more memory than there is: it is refused, with what would fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.memory import LaunchBytes, LaunchMemory, gigabytes
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedGrid
from mmvision_export.runtime.launch_planner import size_that_fits
from mmvision_export.runtime.planner import LaunchLayout

__all__ = ["NOT_ASKED_BYTES", "MemoryGuard"]

NOT_ASKED_BYTES = 64 << 20
"""A launch that needs less is begun without asking: asking reads files of the system."""


class MemoryGuard:
    """Compares what launches need with what is available.

    Runtimes keep what a launch needed for the next one. So what the largest launch so far needed
    counts as available.

    Args:
        memory: What launches need.
        available: Bytes that are available now, or None where nothing tells.
        place: Whose memory it is, for messages: `host`, `device`.
    """

    def __init__(
        self, memory: LaunchMemory, available: Callable[[], int | None], place: str = "host"
    ) -> None:
        self._memory = memory
        self._available = available
        self._place = place
        self._held_bytes = 0

    def available_bytes(self) -> int | None:
        """What a launch may need, or None where nothing tells."""
        available = self._available()
        return None if available is None else available + self._held_bytes

    def image(self, num_patches: int) -> LaunchBytes:
        """What one image needs in a launch of its own."""
        return self._memory.image(num_patches)

    @contextlib.contextmanager
    def watched(self, grid: PackedGrid, layouts: Sequence[LaunchLayout]) -> Iterator[None]:
        """Run the launches of a batch in this block, one after the other.

        Args:
            grid: The batch's.
            layouts: Of its launches.

        Raises:
            InputError: A launch needs more than is available. None has been begun.
        """
        needs = [self._need(layout) for layout in layouts]
        largest = int(np.argmax([need.total for need in needs]))
        need = needs[largest]
        if need.total > max(NOT_ASKED_BYTES, self._held_bytes):
            available = self.available_bytes()
            if available is not None and need.total > available:
                self._refuse(grid, layouts[largest], need, available)
        yield
        self._held_bytes = max(self._held_bytes, need.total)

    def _need(self, layout: LaunchLayout) -> LaunchBytes:
        slots = len(layout.rows) // 2 if self._memory.way == "uniform" else 1
        return self._memory.of(layout.num_patches, rows=len(layout.rows), slots=slots)

    def _refuse(
        self, grid: PackedGrid, layout: LaunchLayout, need: LaunchBytes, available: int
    ) -> None:
        counts, config = grid.patches_per_image, self._memory.config
        images = _images_of(layout, grid)
        image = max(images, key=lambda index: counts[index])
        alone = self._memory.image(counts[image])
        room = f"{available} bytes ({gigabytes(available)}) of {self._place} memory are available"
        if alone.total <= available:
            raise InputError(
                f"a launch of {layout.num_patches} patches in {len(images)} images needs "
                f"{need.total} bytes: {need}; {room}",
                hint="send fewer images at once",
            )
        row = grid.tuples()[image]
        fits = size_that_fits(row, self.most_patches(available), config)
        raise InputError(
            f"image {image} has {counts[image]} patches, which need {alone.total} bytes: {alone}; "
            f"{room}; {fits}",
            hint="resize it, or free memory",
        )

    def most_patches(self, available_bytes: int) -> int:
        """Most patches of one image that so many bytes are enough for, by halving."""
        per_token = self._memory.config.patches_per_token
        fits, exceeds = 0, 1
        while self._memory.image(exceeds * per_token).total <= available_bytes:
            fits, exceeds = exceeds, 2 * exceeds
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if self._memory.image(middle * per_token).total <= available_bytes:
                fits = middle
            else:
                exceeds = middle
        return fits * per_token


def _images_of(layout: LaunchLayout, grid: PackedGrid) -> list[int]:
    starts = np.array(grid.bounds)
    images: list[int] = []
    for piece in layout.pieces:
        first, last = np.searchsorted(starts, [piece.batch.start, piece.batch.stop])
        images += range(int(first), int(last))
    return images
