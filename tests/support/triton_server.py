"""A real Triton Inference Server on this machine's CPU, from the wheel `nvidia-pytriton`.

The wheel has the server and its Python backend, for NumPy 1. The server's Python is the one whose
`python3` comes first in PATH: that of the tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

__all__ = ["TritonServer", "no_server", "server_folder", "serving"]

_READY_S = 120.0
_STOP_S = 60.0


def no_server() -> str:
    """Why no server can be started here; empty if one can."""
    for package in ("pytriton", "tritonclient"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: see CONTRIBUTING.md"
    if not np.__version__.startswith("1."):
        return f"the server's Python backend is for NumPy 1, this is {np.__version__}"
    return ""


def server_folder(folder: Path) -> Path:
    """The server as it has to lie to be started: the stub of this Python beside its backend."""
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    wheel = Path(spec.origin).parent / "tritonserver"
    shutil.copytree(wheel / "backends", folder / "backends")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / "backends" / "python" / "triton_python_backend_stub"
    shutil.copyfile(wheel / "python_backend_stubs" / version / stub.name, stub)
    shutil.copyfile(wheel / "bin" / "tritonserver", folder / "tritonserver")
    for program in (stub, folder / "tritonserver"):
        program.chmod(0o755)
    (folder / "libraries").symlink_to(wheel.parents[1] / "nvidia_pytriton.libs")
    return folder


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class TritonServer:
    """A server process.

    Attributes:
        http: Its address, as clients take it.
        grpc: The same for gRPC.
        log: What it says.
    """

    def __init__(self, folder: Path, repository: Path, models: Sequence[str], log: Path) -> None:
        http, grpc = free_ports(2)
        self.http, self.grpc, self.log = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log
        libraries = [str(folder / "libraries"), str(sysconfig.get_config_var("LIBDIR"))]
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        self._environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": os.pathsep.join(programs),
        }
        self._command = [str(folder / "tritonserver"), "--model-repository", str(repository)]
        self._command += ["--backend-directory", str(folder / "backends"), "--allow-metrics=false"]
        self._command += ["--http-address", "127.0.0.1", "--http-port", str(http)]
        self._command += ["--grpc-address", "127.0.0.1", "--grpc-port", str(grpc)]
        self._command += ["--model-control-mode", "explicit"]
        self._command += [word for name in models for word in ("--load-model", name)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log
            )
        end = time.monotonic() + _READY_S
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(self.log.read_text(errors="replace")[-4000:])
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Whether it says so."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def cpu_seconds(self) -> float:
        """Of its processes, so far."""
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        times = [each.cpu_times() for each in (server, *server.children(recursive=True))]
        return float(sum(each.user + each.system for each in times))

    def kill(self) -> None:
        """End it at once, as a crash does. Its Python process ends with it, or is ended."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ask it to end, and give its exit code."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@contextlib.contextmanager
def serving(
    folder: Path, repository: Path, models: Sequence[str], log: Path
) -> Iterator[TritonServer]:
    """A server that is ready, for the block."""
    server = TritonServer(folder, repository, models, log)
    server.start()
    try:
        yield server
    finally:
        if server._process is not None and server._process.poll() is None:
            server.stop()
