"""Videos to segments of patches, as the checkpoint's processor makes them.

Frames are sampled evenly; every `temporal_patch_size` of them make a temporal patch, the last one
repeated to fill it; every `segment_max_frames` temporal patches make a segment, a grid row of its
own. The timestamp of a temporal patch is that of its first frame, its index over the average frame
rate, as the processor writes it into the prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.core.errors import InputError
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig, patches_from_frames
from mmvision_export.models.minimax_m3_vl.resize import DEFAULT_LONG_SIDE
from mmvision_export.models.minimax_m3_vl.video_file import measured_video, opened_video

__all__ = ["VideoConfig", "VideoSegment", "encoded_segments", "sampled_indices"]

_MAX_FRAME_PIXELS = 768 * 28 * 28


class Encoder(Protocol):
    """What of `VisionEncoder` is used here."""

    @property
    def config(self) -> EncoderConfig: ...

    @property
    def patches_per_call(self) -> int: ...

    def encode(self, batch: PackedBatch) -> npt.NDArray[np.floating]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How a video becomes patches. Defaults are the released model's.

    Attributes:
        frame: How a frame becomes patches.
        fps: Frames sampled per second.
        min_frames: Fewest frames sampled, if the video has so many.
        max_frames: Most frames sampled.
        max_pixels: Most pixels of a frame of the file.
    """

    frame: PreprocessorConfig
    fps: float = 1.0
    min_frames: int = 4
    max_frames: int = 768
    max_pixels: int = MAX_FILE_PIXELS

    def __post_init__(self) -> None:
        if not 0 < self.fps < float("inf"):
            raise InputError(f"fps must be a positive number, got {self.fps}")

    @classmethod
    def for_preprocessor(cls, image: PreprocessorConfig, *, fps: float) -> VideoConfig:
        """A model's preprocessing of images, with the bounds of a video's frames.

        By the rule `long-side` a frame has at most the square that SGLang derives from the frames'
        area, unless another longest side than the images' default was chosen.
        """
        if image.resize == "box":
            return cls(frame=image, fps=fps)
        if image.resize == "long-side":
            side = math.isqrt(_MAX_FRAME_PIXELS) // image.factor * image.factor
            side = side if image.max_long_side == DEFAULT_LONG_SIDE else image.max_long_side
            return cls(frame=image.by(max_long_side=side), fps=fps)
        frame = dataclasses.replace(
            image, min_pixels=4 * image.factor**2, max_pixels=_MAX_FRAME_PIXELS
        )
        return cls(frame=frame, fps=fps)

    def within(self, max_patches: int) -> VideoConfig:
        """The same, with frames of at most so many patches (see `PreprocessorConfig.within`)."""
        return dataclasses.replace(self, frame=self.frame.within(max_patches))


@dataclasses.dataclass(frozen=True)
class VideoSegment:
    """One encoded segment.

    Attributes:
        index: Its place in the video, from 0.
        timestamps: Seconds of each of its temporal patches.
        grid_thw: Its grid row.
        image_embeds: `[t * h * w / merge**2, text_hidden_size]`.
    """

    index: int
    timestamps: tuple[float, ...]
    grid_thw: tuple[int, int, int]
    image_embeds: npt.NDArray[np.floating]


def sampled_indices(
    num_frames: int, video_fps: float, config: VideoConfig
) -> npt.NDArray[np.int64]:
    """Which frames are taken.

    `fps` per second, within `min_frames` and `max_frames`, evenly over the video.

    Args:
        num_frames: Of the video.
        video_fps: Its average frame rate.
        config: The sampling.

    References:
        `default_sample_indices_fn` in transformers' `video_utils.py`.
    """
    wanted = int(num_frames / video_fps * config.fps)
    count = min(max(wanted, config.min_frames), config.max_frames, num_frames)
    return np.arange(count, dtype=np.int64) * num_frames // count


def encoded_segments(
    encoder: Encoder, path: Path, config: VideoConfig, progress: Progress
) -> Iterator[VideoSegment]:
    """See `VisionEncoder.encode_video`."""
    num_frames, video_fps = measured_video(path, max_pixels=config.max_pixels)
    with opened_video(path, max_pixels=config.max_pixels) as (container, stream):
        indices = sampled_indices(num_frames, video_fps, config)
        seconds = [int(index) / video_fps for index in indices]
        per_patch, per_segment = config.frame.temporal_patch_size, encoder.config.segment_max_frames
        num_patches = -(-len(indices) // per_patch)
        num_segments = -(-num_patches // per_segment)
        progress.step(f"encoding {path.name}", total=num_segments)
        pending: list[tuple[npt.NDArray[np.float32], tuple[int, int, int]]] = []
        done = 0
        for frames in _batched(
            _sampled_frames(path, container, stream, indices), per_patch * per_segment
        ):
            pending.append(patches_from_frames(frames, config.frame))
            gathered, one_more = len(pending), len(pending[0][0])
            is_last = done + gathered == num_segments
            if not is_last and (gathered + 1) * one_more <= encoder.patches_per_call:
                continue
            batch = PackedBatch.of_images(pending, encoder.config.patches_per_token)
            pending = []
            for row, embeds in zip(
                batch.grid.tuples(), batch.grid.split(encoder.encode(batch)), strict=True
            ):
                first = done * per_segment
                times = tuple(seconds[(first + t) * per_patch] for t in range(row[0]))
                yield VideoSegment(done, times, row, embeds)
                done += 1
                progress.advance()
    if done < num_segments:
        raise InputError(
            f"{path}: ends after {done} of {num_segments} segments", hint="the file is truncated"
        )


def _batched(frames: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    batch: list[Image.Image] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _sampled_frames(
    path: Path, container: Any, stream: Any, indices: npt.NDArray[np.int64]
) -> Iterator[Image.Image]:
    """The frames of these indices, ascending and distinct, decoded one after the other."""
    import av

    wanted = iter(indices.tolist())
    target = next(wanted)
    try:
        for index, frame in enumerate(container.decode(stream)):
            if index == target:
                yield Image.fromarray(frame.to_ndarray(format="rgb24"))
                if (target := next(wanted, -1)) < 0:
                    return
    except av.FFmpegError as error:
        raise InputError(f"{path}: not a readable video: {error}") from error
