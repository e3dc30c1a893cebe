"""A hub id instead of a folder, against a local server that counts what is asked of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.models.hub import is_hub_id
from tests.support.checkpoints import LAYOUTS, STATE, write_checkpoint, write_sharded

REPOSITORY = "acme/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves one repository from a folder, as far as huggingface_hub asks."""

    def __init__(self, folder: Path) -> None:
        self.served: list[str] = []
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                hub.asked.append(self.path)
                prefix = f"/{REPOSITORY}/resolve/"
                name = self.path.removeprefix(prefix).partition("?")[0].partition("/")[2]
                path = folder / name
                if not self.path.startswith(prefix):
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.end_headers()
                    return
                if not path.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.end_headers()
                    return
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    hub.served.append(name)
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_sharded(tmp_path / "repository", LAYOUTS["released"](STATE))
    (folder / "preprocessor_config.json").write_text('{"size": [672, 672]}')
    server = Hub(folder)
    yield server
    server.close()


def environment(tmp_path: Path, url: str) -> dict[str, str]:
    """Of a process for which a local server is the hub."""
    return {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }


def export(
    tmp_path: Path, url: str, checkpoint: str, *more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmvision_export.cli.entry", "export", "--onnx", "--no-check"]
    command += ["--checkpoint", checkpoint, "--output", str(tmp_path / "out"), *more]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(tmp_path, url), check=False
    )


def test_only_what_is_needed_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    result = export(tmp_path, hub.url, REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert sorted(hub.served) == [
        "config.json",
        "model-00002-of-00005.safetensors",
        "model-00005-of-00005.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
    ]
    source = Manifest.read(tmp_path / "out").source
    assert (source["kind"], source["checkpoint"]) == ("checkpoint", REPOSITORY)
    # What is in the cache needs no network the second time.
    hub.close()
    again = export(tmp_path, "http://127.0.0.1:9", REPOSITORY, "--force")
    assert again.returncode == 0, again.stderr


def test_single_file(tmp_path: Path) -> None:
    server = Hub(write_checkpoint(tmp_path / "repository", LAYOUTS["transformers"](STATE)))
    result = export(tmp_path, server.url, REPOSITORY)
    server.close()
    assert result.returncode == 0, result.stderr
    assert sorted(server.served) == ["config.json", "model.safetensors"]


FROM_A_MANIFEST = """
import sys
import torch
from mmvision_export.core.errors import CheckpointError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.weights import WeightSource
source = {"kind": "checkpoint", "checkpoint": sys.argv[1]}
try:
    WeightSource.from_manifest(source, EncoderConfig()).load(torch.float32)
except CheckpointError as error:
    print(error.hint)
    sys.exit(3)
"""


def test_a_manifest_has_nothing_downloaded(hub: Hub, tmp_path: Path) -> None:
    """It may have come from anybody, and the hub is asked with the user's token."""

    def load() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FROM_A_MANIFEST, REPOSITORY]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment(tmp_path, hub.url), check=False
        )

    refused = load()
    assert (refused.returncode, hub.asked) == (3, []), refused.stderr
    assert f"--checkpoint {REPOSITORY}" in refused.stdout
    # The control: what the user had downloaded is taken from the cache.
    assert export(tmp_path, hub.url, REPOSITORY).returncode == 0
    assert hub.asked
    hub.asked.clear()
    assert load().returncode == 0
    assert hub.asked == []


@pytest.mark.parametrize(
    ("checkpoint", "online", "message", "hint"),
    [
        (REPOSITORY, False, "cannot reach the Hugging Face hub", "--random-weights"),
        ("acme/other", True, "acme/other: config.json could not be downloaded", "--checkpoint DIR"),
        ("no/such/folder", True, "no/such/folder: no such checkpoint folder", "--random-weights"),
    ],
)
def test_failures_are_one_error_and_leave_nothing(
    hub: Hub, tmp_path: Path, checkpoint: str, online: bool, message: str, hint: str
) -> None:
    result = export(tmp_path, hub.url if online else "http://127.0.0.1:9", checkpoint)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(errors) == 2
    assert message in errors[0]
    assert hint in errors[1]
    assert "Traceback" not in result.stderr
    assert "Retrying" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", True),
        ("a", False),
        ("./a/b", False),
        ("./a", False),
        ("a/b/c", False),
        ("a/", False),
        ("/a", False),
    ],
)
def test_hub_ids(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
