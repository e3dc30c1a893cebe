"""Export of one tower by this package and by transformers' own exporter.

`python scripts/measure_export.py`.

Each export is a process of its own, and they take turns. What is timed is from an encoder in
memory, with seeded random weights of the full size, to files on disk: tracing and writing; reading
or making weights is not in it. The peak is the process's, weights included. The graphs are not the
same: transformers' has no projector and merger in this measurement (its exporter takes the tower
alone), so that its weights are fewer, and it is right for equal images only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmvision_export.models.minimax_m3_vl.config import Preset

SIDES = ("mmvision-export", "transformers")


def export(side: str, preset: Preset, folder: Path) -> dict[str, Any]:
    """Export once, in this process; seconds, peak memory and bytes written."""
    import torch

    from mmvision_export.models.weights import WeightSource

    encoder = WeightSource.random(preset, 0).load(torch.float32).encoder
    if side == "transformers":
        from transformers.exporters import configs, exporter_onnx

        from mmvision_export.benchmark.peers import transformers_modules

        tower, _ = transformers_modules(encoder, "sdpa")
        grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
        exporter: Any = exporter_onnx.OnnxExporter  # typed for PreTrainedModel alone
        inputs = {"pixel_values": torch.zeros(32, encoder.config.patch_dim), "grid_thw": grid}
        start = time.perf_counter()
        exporter().export(tower, inputs, config=configs.OnnxConfig(dynamic=True)).save_pretrained(
            str(folder)
        )
    else:
        from mmvision_export.export.onnx_export import onnx_from_encoder
        from mmvision_export.graph.files import save_graph

        start = time.perf_counter()
        save_graph(onnx_from_encoder(encoder), folder, "model.onnx")
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "written_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def main() -> None:
    """Run the sides in turn and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="full")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.side:
            print(json.dumps(export(arguments.side, arguments.preset, Path(folder))))
            return
    for round_ in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--preset", arguments.preset, "--side", side]
            ended = subprocess.run(command, check=True, capture_output=True, text=True)
            print(
                json.dumps(
                    {"round": round_, "side": side, **json.loads(ended.stdout.splitlines()[-1])}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
