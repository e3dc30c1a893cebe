"""Video files: known containers with frames of bounded size, and nothing that opens another file."""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from pathlib import Path

import av
import pytest

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS
from mmvision_export.models.minimax_m3_vl.video_file import measured_video, opened_video
from tests.support.errors import refused
from tests.support.hostile_images import fifo, png_of_zeros
from tests.support.memory import peak_bytes
from tests.support.videos import moving, write_video

MB = 1 << 20
SETUP = """
from pathlib import Path
import av
from mmvision_export.models.minimax_m3_vl.video_file import opened_video
def decoded(path, **options):
    with opened_video(Path(path), **options) as (container, stream):
        try:
            for frame in container.decode(stream):
                pass
        except av.FFmpegError:
            pass
"""


@pytest.mark.parametrize("suffix", ["mkv", "avi", "mov", "mp4", "webm"])
def test_every_container_of_the_list_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"v.{suffix}"
    codec = {"mkv": "ffv1", "avi": "ffv1", "webm": "libvpx-vp9"}.get(suffix, "mpeg4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for levels in moving(8, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode())
    assert measured_video(path) == (8, 4.0)
    with opened_video(path) as (container, stream):
        assert sum(1 for _ in container.decode(stream)) == 8


@pytest.mark.parametrize("suffix", ["ts", "flv", "gif", "nut"])
def test_other_containers_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"v.{suffix}"
    codec = {"gif": "gif", "flv": "flv1"}.get(suffix, "mpeg4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb8" if suffix == "gif" else "yuv420p"
        for levels in moving(8, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode())
    with refused(InputError, path, "mov", "matroska", "avi", reason="unreadable"):
        with opened_video(path):
            pass


PLAYLISTS = {
    "a.ffconcat": "ffconcat version 1.0\nfile 'secret.mkv'\n",
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "a.mp4": "ffconcat version 1.0\nfile 'secret.mkv'\n",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_opens_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "secret.mkv", moving(8))
    path = tmp_path / name
    path.write_text(PLAYLISTS[name])
    with refused(InputError, path, "mov", "matroska", "avi", reason="unreadable"):
        with opened_video(path):
            pass
    if "ffconcat" in PLAYLISTS[name]:
        # The control: FFmpeg by itself follows it.
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 8


def test_no_file_that_is_not_regular(tmp_path: Path) -> None:
    for path in (fifo(tmp_path / "a.mp4"), Path("/dev/zero"), tmp_path):
        with refused(InputError, path, reason="unsafe"), opened_video(path):
            pass
    with refused(InputError, "http", reason="missing"), opened_video(Path("http://127.0.0.1/a")):
        pass


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    plain = write_video(tmp_path / "v.mkv", moving(4))
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.mkv"))
    plain.rename(path)
    assert measured_video(path) == (4, 4.0)


def test_a_limit_on_the_frames_of_the_header(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", moving(4, 56, 84))
    with opened_video(path, max_pixels=56 * 84):
        pass
    with refused(InputError, path, 56 * 84 - 1, reason="unsafe"):
        with opened_video(path, max_pixels=56 * 84 - 1):
            pass


def avi_of_png_frames(path: Path, size: tuple[int, int], frame: Path) -> Path:
    """An AVI that says one size and has frames of another: some KB that decode to much more."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=4)
        stream.width, stream.height = size
        stream.pix_fmt = "gray"
        for index in range(4):
            packet = av.Packet(frame.read_bytes())
            packet.stream, packet.pts, packet.dts = stream, index, index
            packet.time_base = Fraction(1, 4)
            packet.is_keyframe = True
            container.mux(packet)
    return path


def test_frames_larger_than_the_header_says(tmp_path: Path) -> None:
    """Neither what looks at the first frames while the file is opened, nor the decoding, pays."""
    frame = png_of_zeros(tmp_path / "frame.png", 8000, 8000)
    path = avi_of_png_frames(tmp_path / "bomb.avi", (64, 48), frame)
    assert path.stat().st_size < MB
    assert peak_bytes(SETUP, f"decoded({str(path)!r}, max_pixels=1_000_000)") < 16 * MB
    # The control: with a limit that lets them pass they cost their 64 MB.
    assert peak_bytes(SETUP, f"decoded({str(path)!r})") > 50 * MB


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    frame = png_of_zeros(tmp_path / "frame.png", 14000, 13000, bits=1)
    path = avi_of_png_frames(tmp_path / "bomb.avi", (14000, 13000), frame)
    with contextlib.ExitStack() as stack:
        stack.enter_context(refused(InputError, path, MAX_FILE_PIXELS, reason="unsafe"))
        stack.enter_context(opened_video(path))
    assert peak_bytes(SETUP, f"decoded({str(path)!r})") < 16 * MB
