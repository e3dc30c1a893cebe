"""Videos: against transformers' processor, and in bounded memory."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import InputError
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig, patches_from_frames
from mmvision_export.models.minimax_m3_vl.video import VideoConfig, VideoSegment, sampled_indices
from mmvision_export.models.minimax_m3_vl.video_file import measured_video, opened_video
from tests.support.configs import HEAD_DIM_80, relative_l2
from tests.support.errors import refused
from tests.support.images import from_transformers
from tests.support.peers import run_peer, weights
from tests.support.videos import moving, write_video

CONFIG = VideoConfig(frame=PreprocessorConfig())


def processed(frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What transformers' video processor makes of sampled frames.

    Its own `_preprocess`, from its source.

    Its module imports torchvision. What that does here is stood in for: the resize by torch's
    antialiased bicubic one, which is what torchvision calls, and the grouping of videos by shape,
    of which there is one.
    """
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    path = (
        Path(spec.submodule_search_locations[0])
        / "models/minimax_m3_vl/video_processing_minimax_m3_vl.py"
    )
    node = next(
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.FunctionDef) and n.name == "_preprocess"
    )
    node.returns = None
    for argument in node.args.args + ([node.args.kwarg] if node.args.kwarg else []):
        argument.annotation = None
    scope: dict[str, Any] = {
        "torch": torch,
        "smart_resize": from_transformers("smart_resize"),
        "SizeDict": SimpleNamespace,
        "BatchFeature": lambda data, tensor_type: data,
        "group_videos_by_shape": lambda videos: ({0: torch.stack(videos)}, None),
        "reorder_videos": lambda grouped, _: list(grouped[0]),
    }
    exec(compile(ast.Module([node], []), str(path), "exec"), scope)

    def resize(images: torch.Tensor, size: Any, resample: Any) -> torch.Tensor:
        if images.shape[-2:] == (size.height, size.width):
            return images
        return torch.nn.functional.interpolate(
            images, (size.height, size.width), mode="bicubic", antialias=True, align_corners=False
        )

    def rescale_and_normalize(
        images: torch.Tensor, _: bool, factor: float, __: bool, mean: Any, std: Any
    ) -> torch.Tensor:
        shape = (3, 1, 1)
        return (images.float() * factor - torch.tensor(mean).view(shape)) / torch.tensor(std).view(
            shape
        )

    frame = CONFIG.frame
    out = scope["_preprocess"](
        SimpleNamespace(resize=resize, rescale_and_normalize=rescale_and_normalize),
        [torch.from_numpy(frames).permute(0, 3, 1, 2)],
        do_resize=True, size=None, resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=frame.image_mean, image_std=frame.image_std, patch_size=14, temporal_patch_size=2, merge_size=2,
        min_pixels=4 * 28 * 28, max_pixels=768 * 28 * 28, vision_segment_max_frames=4,
    )  # fmt: skip
    return out["pixel_values_videos"], out["video_grid_thw"], out["num_chunks_per_video"]


@pytest.fixture(scope="module")
def runtime(exported: Path) -> Any:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        yield encoder


def tower(pixels: torch.Tensor, grid: torch.Tensor) -> Any:
    """What transformers' tower and projector make of it, with the exported weights."""
    return run_peer("transformers-sdpa", HEAD_DIM_80, weights("80"), pixels.numpy(), grid.numpy())


def test_video_equals_the_processor_and_the_tower(runtime: VisionEncoder, tmp_path: Path) -> None:
    """21 frames: segments of 4, 4 and 3 temporal patches, the last of one frame."""
    frames = moving(84)
    path = write_video(tmp_path / "v.mkv", frames)
    segments = list(runtime.encode_video(path))
    sampled = np.arange(21) * 84 // 21
    pixels, grid, chunks = processed(frames[sampled])
    assert chunks == [3]
    assert [segment.grid_thw for segment in segments] == [tuple(row) for row in grid.tolist()]
    expected = tower(pixels, grid)
    assert relative_l2(np.concatenate([s.image_embeds for s in segments]), expected) <= 2e-6
    times = [t for segment in segments for t in segment.timestamps]
    assert times == [float(index) / 4 for index in sampled[::2]]
    # Control: another video is not equal.
    other, _, _ = processed(frames[sampled[::-1].copy()])
    assert (
        relative_l2(np.concatenate([s.image_embeds for s in segments]), tower(other, grid)) > 0.01
    )


def test_resized_frames_are_close_to_the_processors(tmp_path: Path, runtime: VisionEncoder) -> None:
    """Pillow's bicubic filter and torch's differ by a fraction of a level."""
    from mmvision_export.models.minimax_m3_vl.video import _batched, _sampled_frames

    frames = moving(8, 60, 90)
    path = write_video(tmp_path / "v.mkv", frames)
    assert measured_video(path) == (8, 4.0)
    with opened_video(path) as (container, stream):
        (batch,) = _batched(_sampled_frames(path, container, stream, np.arange(8)), 8)
    ours, row = patches_from_frames(batch, CONFIG.frame)
    theirs, grid, _ = processed(frames)
    assert [list(row)] == grid.tolist()
    level = 1 / 255 / 0.27
    assert np.abs(ours - theirs.numpy()).mean() < 0.5 * level


@given(st.integers(4, 100_000), st.floats(1, 240), st.floats(0.1, 30))
def test_sampling_is_transformers(num_frames: int, video_fps: float, fps: float) -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    config = dataclasses.replace(CONFIG, fps=fps)
    ours = sampled_indices(num_frames, video_fps, config)
    wanted = int(num_frames / video_fps * fps)
    assert len(ours) == min(max(wanted, 4), 768, num_frames)
    metadata = VideoMetadata(total_num_frames=num_frames, fps=video_fps)
    theirs = default_sample_indices_fn(metadata, num_frames=len(ours))
    np.testing.assert_array_equal(ours, theirs)
    if 4 <= wanted <= min(768, num_frames):
        np.testing.assert_array_equal(ours, default_sample_indices_fn(metadata, fps=fps))


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_very_short_videos(frames: int, runtime: VisionEncoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", moving(frames), fps=30)
    (segment,) = runtime.encode_video(path)
    assert segment.grid_thw[0] == (min(frames, 4) + 1) // 2
    assert len(segment.timestamps) == segment.grid_thw[0]


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    """Peak of Python's and NumPy's memory, with a backend that computes nothing."""

    class Nothing:
        name, profiles, largest_image, is_isolated = "none", (), None, True
        dtype = np.dtype(np.float32)

        def __init__(self) -> None:
            self.config = HEAD_DIM_80

        def run(self, batch: PackedBatch) -> np.ndarray:
            return np.zeros((batch.grid.num_tokens, self.config.text_hidden_size), np.float32)

    peaks = []
    for count in (160, 640):
        path = write_video(
            tmp_path / f"{count}.mkv", np.tile(moving(8, 112, 168), (count // 8, 1, 1, 1))
        )
        tracemalloc.start()
        segments = 0
        for _ in VisionEncoder(Nothing(), PreprocessorConfig()).encode_video(path, fps=4):  # type: ignore[arg-type]
            segments += 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert segments == count // 8
    assert peaks[1] < 1.2 * peaks[0]


def test_progress_counts_segments(runtime: VisionEncoder, tmp_path: Path) -> None:
    from tests.support.notes import Notes

    notes: Progress = Notes()
    path = write_video(tmp_path / "v.mkv", moving(40))
    segments: list[VideoSegment] = list(runtime.encode_video(path, fps=4, progress=notes))
    assert isinstance(notes, Notes)
    assert notes.steps == ["encoding v.mkv"]
    assert notes.advanced == len(segments) == 5


def test_bad_videos(runtime: VisionEncoder, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with refused(InputError, tmp_path / "text.mp4", reason="unreadable"):
        list(runtime.encode_video(tmp_path / "text.mp4"))
    with refused(InputError, tmp_path / "nothing.mp4", reason="missing"):
        list(runtime.encode_video(tmp_path / "nothing.mp4"))
    with refused(InputError, "fps", 0):
        list(runtime.encode_video(tmp_path / "nothing.mp4", fps=0))
    whole = write_video(tmp_path / "v.avi", moving(80)).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    with refused(InputError, tmp_path / "cut.avi"):
        list(runtime.encode_video(tmp_path / "cut.avi", fps=4))
