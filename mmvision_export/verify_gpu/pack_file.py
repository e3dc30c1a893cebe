"""A pack on disk: `pack.json` with its kernels and cases, `cases.npz` with arrays, a file for each binary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.verify_gpu.cases import Case

__all__ = ["KernelImage", "Pack", "kernel_for"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class KernelImage:
    """A compiled kernel, as `plugins/common/kernels.h` describes it.

    Attributes:
        op: Folder of the kernel.
        sm: Compute capability without its dot.
        reach: Which GPUs can run it: `same_major` and later minors, `exact`, or `later` for PTX.
        dtype: fp16 or bf16.
        head_dim: 0 if it serves every one.
        function: Name in the image.
        rows: Patches of one program.
        num_warps: Of a block.
        shared_bytes: Dynamic shared memory.
        file: Name of the image in the pack.
    """

    op: str
    sm: int
    reach: str
    dtype: str
    head_dim: int
    function: str
    rows: int
    num_warps: int
    shared_bytes: int
    file: str


@dataclasses.dataclass(frozen=True)
class Pack:
    """What is carried to a GPU."""

    head_dim: int
    version: str
    kernels: list[KernelImage]
    cases: list[Case]

    def write(self, folder: Path) -> None:
        """Write all but the images."""
        arrays: dict[str, Any] = {}
        cases = []
        for index, case in enumerate(self.cases):
            for kind in ("inputs", "expected"):
                for i, array in enumerate(getattr(case, kind)):
                    arrays[f"{index}.{kind}.{i}"] = array
            facts = ("name", "op", "dtype", "scalars", "allowed")
            cases.append({fact: getattr(case, fact) for fact in facts})
        np.savez_compressed(folder / "cases.npz", **arrays)
        content = {
            "format": _FORMAT,
            "version": self.version,
            "head_dim": self.head_dim,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
            "cases": cases,
        }
        (folder / "pack.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Pack:
        """Read a pack.

        Raises:
            ManifestError: The folder is none, or damaged.
        """
        path = folder / "pack.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, this program reads {_FORMAT}")
            with np.load(folder / "cases.npz", allow_pickle=False) as arrays:
                cases = [
                    Case(
                        **facts,
                        inputs=_listed(arrays, f"{index}.inputs."),
                        expected=_listed(arrays, f"{index}.expected."),
                    )
                    for index, facts in enumerate(content["cases"])
                ]
            kernels = [KernelImage(**kernel) for kernel in content["kernels"]]
            return cls(content["head_dim"], content["version"], kernels, cases)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{path} is not a readable pack: {error}",
                hint="make one with: python -m mmvision_export.verify_gpu pack --output DIR",
            ) from error


def _listed(arrays: Any, prefix: str) -> list[Any]:
    count = sum(name.startswith(prefix) for name in arrays.files)
    return [arrays[f"{prefix}{i}"] for i in range(count)]


def kernel_for(
    kernels: Sequence[KernelImage],
    op: str,
    dtype: str,
    *,
    compute_capability: ComputeCapability,
    is_integrated: bool,
) -> KernelImage:
    """The binary that the plugin library would take on a GPU: the same rules as `plugins/common/kernels.cpp`.

    Raises:
        InputError: There is none.
    """
    sm = compute_capability.sm

    def runs(kernel: KernelImage) -> bool:
        if kernel.reach == "later":
            return kernel.sm <= sm
        if kernel.reach == "exact" or is_integrated:
            return kernel.sm == sm
        return kernel.sm // 10 == sm // 10 and kernel.sm <= sm

    found = [k for k in kernels if (k.op, k.dtype) == (op, dtype) and runs(k)]
    if not found:
        raise InputError(
            f"the pack has no kernel {op}, {dtype} for compute capability {compute_capability}",
            hint="pack again with --sm for this GPU",
        )
    return max(found, key=lambda kernel: (kernel.reach != "later", kernel.sm))
