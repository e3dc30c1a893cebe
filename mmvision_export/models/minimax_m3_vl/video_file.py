"""Video files: opened if they are of a known container and their frames of a known size.

FFmpeg opens playlists, which name other files and addresses, and devices. Here the file is opened by
us and given to it, as one of a few containers, without a protocol to open another one by. These
containers say at their beginning which streams they have, so that the limit on a frame's size holds
from the first packet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmvision_export.core.errors import BackendError, InputError
from mmvision_export.core.install import install_command
from mmvision_export.core.regular_file import opened_regular_file
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS

__all__ = ["CONTAINERS", "measured_video", "opened_video"]

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi")
"""FFmpeg's names of what is opened."""


@contextlib.contextmanager
def opened_video(path: Path, *, max_pixels: int = MAX_FILE_PIXELS) -> Iterator[tuple[Any, Any]]:
    """PyAV's container of a file, and its first video stream.

    Args:
        path: A regular file.
        max_pixels: Most pixels of a frame, by its header and while it is decoded.

    Raises:
        InputError: The file is missing, no regular file, none of `CONTAINERS`, without a video
            stream, or its frames are too large.
        BackendError: PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise BackendError(
            f"PyAV is not installed: {error}", hint=install_command("video")
        ) from error
    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "protocol_whitelist": "none",  # no protocol has that name
        "enable_drefs": "0",  # a .mov may keep its frames in another file
        "max_pixels": str(max_pixels),  # of each stream's decoder, which looks at the first frames
    }
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opened_regular_file(path))
        try:
            container = stack.enter_context(av.open(file, mode="r", options=options))
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise InputError(
                f"{path}: not a readable video in an accepted container "
                f"({', '.join(CONTAINERS)}): {error}",
                hint="put it into another container: ffmpeg -i FILE -c copy video.mkv",
                reason="unreadable",
            ) from error
        if not container.streams.video:
            raise InputError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        decoder = stream.codec_context
        if decoder is None:
            raise InputError(f"{path}: has no decoder for its video", reason="unreadable")
        # FFmpeg forgets a size beyond the limit while it looks at the first frames.
        if not 0 < decoder.width * decoder.height <= max_pixels:
            raise InputError(
                f"{path}: has frames of more than {max_pixels} pixels, or of no size",
                hint="raise the limit with --max-pixels if you trust the file",
                reason="unsafe",
            )
        # A frame may have another size than the header says.
        decoder.options = {**decoder.options, "max_pixels": str(max_pixels)}
        yield container, stream


def measured_video(path: Path, *, max_pixels: int = MAX_FILE_PIXELS) -> tuple[int, float]:
    """Number of frames, counted where the file does not say it, and average rate.

    In a container of its own, since not every one can go back.

    Raises:
        InputError: See `opened_video`; or there are no frames, or no rate.
        BackendError: PyAV is missing.
    """
    with opened_video(path, max_pixels=max_pixels) as (container, stream):
        import av

        num_frames = stream.frames
        try:
            if num_frames <= 0:
                # One packet is one frame; nothing is decoded.
                num_frames = sum(packet.size > 0 for packet in container.demux(stream))
        except av.FFmpegError as error:
            raise InputError(f"{path}: not a readable video: {error}") from error
        if not num_frames or not stream.average_rate or stream.average_rate < 0:
            raise InputError(f"{path}: has no frames, or no frame rate")
        return num_frames, float(stream.average_rate)
