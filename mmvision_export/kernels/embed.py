"""Compiled kernels as sources of the plugin library: an assembly file with their bytes, a table that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmvision_export.core.precision import PRECISIONS
from mmvision_export.kernels.compile import PORTABLE_PTX
from mmvision_export.kernels.resources import ARCHITECTURES, CompiledKernel

__all__ = ["write_embedded_kernels"]

# .incbin takes the bytes as they are, for every CPU; a C array of them would take the compiler minutes.
_ASSEMBLY = """\
.section .rodata
{images}
.section .note.GNU-stack,"",%progbits
"""
_IMAGE = """\
.hidden mmvision_{name}
.hidden mmvision_{name}_end
.global mmvision_{name}
.global mmvision_{name}_end
.balign 64
mmvision_{name}: .incbin "{name}"
.byte 0
mmvision_{name}_end:
"""
_TABLE = """\
#include "common/kernels.h"

extern "C"
{{
{declarations}
}}

namespace mmvision
{{

EmbeddedKernel const kEMBEDDED_KERNELS[] = {{
{rows}
}};

int32_t const kNB_EMBEDDED_KERNELS = sizeof(kEMBEDDED_KERNELS) / sizeof(kEMBEDDED_KERNELS[0]);

}} // namespace mmvision
"""


def write_embedded_kernels(kernels: Sequence[CompiledKernel], folder: Path) -> None:
    """Write `embedded_kernels.S`, `embedded_kernels.cpp` and the images they include.

    Args:
        kernels: Each becomes a cubin; those for `PORTABLE_PTX` become PTX too, for GPUs that have no cubin.
        folder: An existing folder.
    """
    images: list[tuple[str, bytes, str]] = []
    for kernel in kernels:
        integrated = ARCHITECTURES[kernel.compute_capability].is_integrated
        reach = "kEXACT" if integrated or kernel.target.endswith("a") else "kSAME_MAJOR"
        images.append((_name(kernel, "cubin"), kernel.cubin, _row(kernel, "cubin", reach)))
        if kernel.compute_capability == PORTABLE_PTX:
            images.append(
                (_name(kernel, "ptx"), kernel.ptx.encode(), _row(kernel, "ptx", "kLATER"))
            )
    for name, image, _ in images:
        (folder / name).write_bytes(image)
    names = [name for name, _, _ in images]
    (folder / "embedded_kernels.S").write_text(
        _ASSEMBLY.format(images="".join(_IMAGE.format(name=n) for n in names))
    )
    (folder / "embedded_kernels.cpp").write_text(
        _TABLE.format(
            declarations="\n".join(
                f"extern unsigned char const mmvision_{n}[], mmvision_{n}_end[];" for n in names
            ),
            rows="\n".join(row for _, _, row in images),
        )
    )


def _name(kernel: CompiledKernel, kind: str) -> str:
    return f"{kernel.op}_{kernel.compute_capability.sm}_{kernel.dtype}_{kernel.head_dim}_{kind}"


def _row(kernel: CompiledKernel, kind: str, reach: str) -> str:
    name = f"mmvision_{_name(kernel, kind)}"
    return (
        f'    {{"{kernel.op}", {kernel.compute_capability.sm}, Reach::{reach}, '
        f"nvinfer1::DataType::k{PRECISIONS[kernel.dtype].tensorrt_type}, "
        f'{kernel.head_dim}, "{kernel.function}", {kernel.rows}, {kernel.num_warps}, {kernel.shared_bytes}, '
        f"{name}, {name}_end}},"
    )
