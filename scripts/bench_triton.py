"""Requests a second of the Triton model, beside one request a call, in one server and one run.

`python scripts/bench_triton.py MODEL_DIRECTORY`

Two models of one repository: one gathers requests, the other takes each alone. Clients send images of 64
to 256 patches, as JPEG. The two are measured in turns.
CONTRIBUTING.md says how to install the server.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS
from mmvision_export.triton_server.config import ServerSettings
from mmvision_export.triton_server.repository import write_repository
from tests.support.images import natural
from tests.support.triton_server import TritonServer, no_server, server_folder, serving

_SIDES = (8, 10, 12, 14, 16)  # of a square image, in patches: 64 to 256
_PATCH_SIZE = 14


def repository_of(model: Path, folder: Path, threads: int) -> Path:
    """Both models, in one repository."""
    for name, requests in (("packed", 64), ("alone", 1)):
        settings = ServerSettings(
            backend="onnxruntime-cpu",
            threads=threads,
            instances=1,
            max_delay_ms=2.0 if requests > 1 else 0.0,
            max_requests=requests,
            resize_to_fit=False,
            max_pixels=MAX_FILE_PIXELS,
        )
        written = write_repository(model, folder / f"of_{name}", settings, name=name)
        (folder / "both").mkdir(exist_ok=True)
        (written.path / name).rename(folder / "both" / name)
    return folder / "both"


@dataclasses.dataclass(frozen=True)
class Rate:
    """Requests of one measurement.

    Attributes:
        per_second: By the clock, which counts what else the machine does, and the clients.
        per_cpu_second: Of the server's processes, which does not.
    """

    per_second: float
    per_cpu_second: float


def measured(server: TritonServer, name: str, clients: int, seconds: float) -> Rate:
    """With so many clients, each of which has one request under way."""
    import tritonclient.grpc as grpc

    end = time.perf_counter() + seconds
    done = [0] * clients

    def work(number: int) -> None:
        client = grpc.InferenceServerClient(server.grpc)
        prepared = [_inputs(grpc, side) for side in _SIDES]
        outputs = [grpc.InferRequestedOutput("image_embeds")]
        for inputs in itertools.cycle(prepared):
            if time.perf_counter() > end:
                return
            client.infer(name, inputs, outputs=outputs)
            done[number] += 1

    cpu_before, start = server.cpu_seconds(), time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    return Rate(sum(done) / wall, sum(done) / (server.cpu_seconds() - cpu_before))


def _inputs(grpc: Any, side: int) -> list[Any]:
    stream = io.BytesIO()
    natural(side * _PATCH_SIZE, side * _PATCH_SIZE).save(stream, "JPEG")
    image = grpc.InferInput("image", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[stream.getvalue()]], dtype=object))
    return [image]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime")
    arguments = parser.parse_args()
    if reason := no_server():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = repository_of(arguments.model, folder, arguments.threads)
        server_files = server_folder(folder / "server")
        with serving(server_files, repository, ["packed", "alone"], folder / "log") as server:
            rounds = [
                {
                    model: measured(server, model, arguments.clients, arguments.seconds)
                    for model in ("alone", "packed")
                }
                for _ in range(arguments.rounds)
            ]
    for unit, title in (("per_second", "second"), ("per_cpu_second", "CPU second of the server")):
        pairs = [(getattr(each["alone"], unit), getattr(each["packed"], unit)) for each in rounds]
        print(f"requests a {title}, {arguments.clients} clients:")
        for alone, packed in pairs:
            print(f"  alone {alone:.1f}, packed {packed:.1f}, ratio {packed / alone:.2f}")
        print(f"  median ratio {statistics.median(packed / alone for alone, packed in pairs):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
