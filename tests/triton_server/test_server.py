"""The model in a real server, with the server's own clients. Skipped where it is not installed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export import VisionEncoder
from mmvision_export.triton_server.repository import write_repository
from tests.support.configs import HEAD_DIM_80, batch, relative_l2
from tests.support.embedding import noise
from tests.support.triton_server import TritonServer, no_server, server_folder, serving
from tests.support.triton_settings import settings

pytestmark = [
    pytest.mark.skipif(bool(no_server()), reason=no_server() or "there is a server"),
    # The clients' own.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

NAME = "vision_encoder"
COUNT = 200
# docs/runtime.md: what a batch's other images change in float32, by the order of sums.
PACKING = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
    """A request, and what the encoder gives for it alone."""

    inputs: dict[str, np.ndarray]
    expected: np.ndarray
    tokens: list[int]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    path = tmp_path_factory.mktemp("triton") / "models"
    write_repository(exported, path, settings(threads=1))
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_folder(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def running(program: Path, repository: Path) -> Iterator[TritonServer]:
    with serving(program, repository, [NAME], repository.parent / "log") as server:
        yield server


@pytest.fixture(scope="module")
def requests(exported: Path) -> list[Sent]:
    """Half of them images, one to three of different sizes, and half patches."""
    sent = []
    with VisionEncoder.open(exported, backend="onnxruntime-cpu", threads=1) as encoder:
        for number in range(COUNT):
            generator = np.random.default_rng(number)
            count = int(generator.integers(1, 4))
            if number % 2:
                images = [noise(1000 * number + i, 56, 240) for i in range(count)]
                values = np.array([[png(image) for image in images]], dtype=object)
                embeds = encoder.encode_images(images)
                tokens = [len(each) for each in embeds]
                sent.append(Sent({"image": values}, np.concatenate(embeds), tokens))
            else:
                sides = 2 * generator.integers(1, 9, (count, 2))
                grid = [(1, int(h), int(w)) for h, w in sides]
                patches, rows = batch(grid, HEAD_DIM_80, seed=number)
                inputs: dict[str, Any] = {"pixel_values": patches[None], "grid_thw": rows[None]}
                tokens = [h * w // 4 for _, h, w in grid]
                sent.append(Sent(inputs, encoder(patches, rows), tokens))
    return sent


def png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def module_of(protocol: str) -> Any:
    import tritonclient.grpc
    import tritonclient.http

    return {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]


def client_of(server: TritonServer, protocol: str) -> Any:
    return module_of(protocol).InferenceServerClient(getattr(server, protocol))


def inferred(client: Any, protocol: str, inputs: dict[str, np.ndarray]) -> Any:
    given = []
    for name, array in inputs.items():
        kind = {"O": "BYTES", "f": "FP32", "i": "INT64"}[array.dtype.kind]
        tensor = module_of(protocol).InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    return client.infer(NAME, given)


def refuse_wrong(result: Any, sent: Sent) -> None:
    embeds = result.as_numpy("image_embeds")
    assert embeds.shape == (1, *sent.expected.shape)
    assert relative_l2(embeds[0], sent.expected) <= PACKING
    assert result.as_numpy("tokens_per_image").tolist() == [sent.tokens]
    grid = result.as_numpy("image_grid_thw")
    assert (grid[0].prod(axis=1) // 4).tolist() == sent.tokens


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_is_ready_and_says_what_it_takes(running: TritonServer, protocol: str) -> None:
    client = client_of(running, protocol)
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    options = {"as_json": True} if protocol == "grpc" else {}
    metadata = client.get_model_metadata(NAME, **options)
    assert [each["name"] for each in metadata["inputs"]] == ["image", "pixel_values", "grid_thw"]
    client.close()


def test_many_requests_of_several_clients_each_have_what_they_have_alone(
    running: TritonServer, requests: list[Sent]
) -> None:
    def work(number: int) -> None:
        protocol = ("http", "grpc")[number % 2]
        with contextlib.closing(client_of(running, protocol)) as client:
            for sent in requests[number::clients]:
                refuse_wrong(inferred(client, protocol, sent.inputs), sent)

    clients = 8
    before = counted(running)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    after = counted(running)
    answered, executed = (now - then for now, then in zip(after, before, strict=True))
    assert answered == COUNT
    assert executed < COUNT  # some have shared a call
    # The control: another request's answer is told from its own.
    with contextlib.closing(client_of(running, "http")) as client:
        result = inferred(client, "http", requests[0].inputs)
    with pytest.raises(AssertionError):
        refuse_wrong(result, dataclasses.replace(requests[0], expected=requests[0].expected + 0.1))


def counted(server: TritonServer) -> tuple[int, int]:
    """Requests that were answered, and batches that were executed."""
    with contextlib.closing(client_of(server, "http")) as client:
        (stats,) = client.get_inference_statistics(NAME)["model_stats"]
    return int(stats["inference_count"]), int(stats["execution_count"])


def malformed() -> dict[str, dict[str, np.ndarray]]:
    patches, rows = batch([(1, 4, 4)], HEAD_DIM_80)
    good = {"pixel_values": patches[None], "grid_thw": rows[None]}
    nan = patches.copy()
    nan[3, 5] = np.nan
    image = np.array([[png(noise(1))]], dtype=object)
    return {
        "grid_thw": {**good, "grid_thw": np.array([[[1, 4, 6]]])},
        "multiple": {**good, "grid_thw": np.array([[[1, 1, 16]]])},
        "finite": {**good, "pixel_values": nan[None]},
        "leading": {name: np.concatenate([array, array]) for name, array in good.items()},
        "got pixel_values": {"pixel_values": good["pixel_values"]},
        "got image, grid_thw": {"image": image, "grid_thw": good["grid_thw"]},
        "image 1": {"image": np.array([[image[0, 0], b"no image"]], dtype=object)},
        "image 0": {"image": np.array([[image[0, 0][:200]]], dtype=object)},
    }


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_malformed_requests_are_answered_and_good_ones_beside_them_too(
    running: TritonServer, requests: list[Sent], protocol: str
) -> None:
    from tritonclient.utils import InferenceServerException

    def good(number: int) -> None:
        with contextlib.closing(client_of(running, protocol)) as client:
            for sent in requests[number:40:4]:
                refuse_wrong(inferred(client, protocol, sent.inputs), sent)

    def bad(_: int) -> None:
        with contextlib.closing(client_of(running, protocol)) as client:
            for fact, inputs in malformed().items():
                with pytest.raises(InferenceServerException) as caught:
                    inferred(client, protocol, inputs)
                assert fact in str(caught.value)
                assert str(caught.value.status()).split(".")[-1] in ("400", "INVALID_ARGUMENT")
            # What the configuration does not allow the server refuses itself.
            wrong = {
                "pixel_values": np.zeros((1, 4, 7), np.float32),
                "grid_thw": np.ones((1, 1, 3), int),
            }
            with pytest.raises(InferenceServerException):
                inferred(client, protocol, wrong)

    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(good, number) for number in range(4)]
        work += [pool.submit(bad, number) for number in range(2)]
        for each in work:
            each.result()
    assert running.is_ready()


def test_no_request_is_lost_when_the_model_is_loaded_anew(
    program: Path, repository: Path, requests: list[Sent], tmp_path: Path
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    log = tmp_path / "log"
    stop = threading.Event()

    def work(number: int) -> int:
        done = 0
        with contextlib.closing(client_of(server, "grpc")) as client:
            while not stop.is_set():
                sent = requests[(number + 4 * done) % COUNT]
                refuse_wrong(inferred(client, "grpc", sent.inputs), sent)
                done += 1
        return done

    with serving(program, copy, [NAME], log) as server, ThreadPoolExecutor(4) as pool:
        with contextlib.closing(client_of(server, "http")) as client:
            running = [pool.submit(work, number) for number in range(4)]
            try:
                for _ in range(2):
                    time.sleep(0.5)
                    path = copy / NAME / "config.pbtxt"  # the server looks at its time
                    path.write_text(path.read_text() + "\n")
                    client.load_model(NAME)
                time.sleep(0.5)
            finally:
                stop.set()
            assert all(each.result() > 0 for each in running)
    assert log.read_text(errors="replace").count(f"successfully loaded '{NAME}'") == 3


def test_a_server_that_is_killed_under_load_serves_again(
    program: Path, repository: Path, requests: list[Sent], tmp_path: Path
) -> None:
    def work(number: int) -> tuple[int, int]:
        """Answers that were right, and requests that failed."""
        right = failed = 0
        while failed == 0:
            try:
                with contextlib.closing(client_of(server, "grpc")) as client:
                    for sent in requests[number::4]:
                        result = inferred(client, "grpc", sent.inputs)
                        refuse_wrong(result, sent)
                        right += 1
            except InferenceServerException:
                failed += 1
        return right, failed

    from tritonclient.utils import InferenceServerException

    with serving(program, repository, [NAME], tmp_path / "log") as server:
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(work, number) for number in range(4)]
            time.sleep(1)
            server.kill()
            counts = [each.result() for each in running]
        assert sum(right for right, _ in counts) > 0  # and nobody has had a wrong one
        assert not server.is_ready()
        server.start()
        with contextlib.closing(client_of(server, "grpc")) as client:
            for sent in requests[:40]:
                refuse_wrong(inferred(client, "grpc", sent.inputs), sent)
        assert server.stop() == 0
