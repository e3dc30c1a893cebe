"""The plugins' Triton kernels, compiled ahead of time for GPUs that need not be here.

A kernel per op is the source of truth (`plugins/<op>/kernel.py`). Here each is compiled to a cubin per architecture,
in the best tile that spills no register and fits the shared memory, and what the compiler made of it is read back from
the binary: registers, spills, shared memory, occupancy, and the tensor-core instructions. No GPU, driver or CUDA
toolkit is needed: Triton brings its own assembler and disassembler.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from mmvision_export.errors import PluginError

__all__ = [
    "ARCHITECTURES",
    "PORTABLE_PTX_SM",
    "Architecture",
    "CompiledKernel",
    "Tile",
    "compile_qk_rotary_embedding",
    "compile_varlen_attention",
    "kernel_module",
    "resource_table",
]

_WARP = 32


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One GPU architecture's limits.

    Attributes:
        sm: Compute capability without its dot, 89 for 8.9.
        gpus: Where it is found.
        shared_per_block_bytes: Most shared memory one block can have.
        shared_per_sm_bytes: Shared memory of one multiprocessor; each block on it takes 1 KB more than it asks for.
        warps_per_sm: Most resident warps.
        tensor_core: The instruction (SASS) its matrix products have to be made of.

    References:
        CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability".
    """

    sm: int
    gpus: str
    shared_per_block_bytes: int
    shared_per_sm_bytes: int
    warps_per_sm: int
    tensor_core: str


_KB = 1024
ARCHITECTURES: dict[int, Architecture] = {
    a.sm: a
    for a in (
        Architecture(80, "A100", 163 * _KB, 164 * _KB, 64, "HMMA"),
        Architecture(86, "RTX 30, A10, A40", 99 * _KB, 100 * _KB, 48, "HMMA"),
        Architecture(87, "Jetson Orin", 163 * _KB, 164 * _KB, 48, "HMMA"),
        Architecture(89, "RTX 40, L4, L40", 99 * _KB, 100 * _KB, 48, "HMMA"),
        Architecture(90, "H100, H200", 227 * _KB, 228 * _KB, 64, "HGMMA"),
        Architecture(100, "B200", 227 * _KB, 228 * _KB, 64, "UTCHMMA"),
        Architecture(110, "Jetson Thor", 227 * _KB, 228 * _KB, 48, "UTCHMMA"),
        Architecture(120, "RTX 50", 99 * _KB, 100 * _KB, 48, "HMMA"),
    )
}
"""By compute capability without its dot. HMMA is `mma.sync`, HGMMA `wgmma`, UTCHMMA `tcgen05.mma`."""

_REGISTERS_PER_SM = 65536
PORTABLE_PTX_SM = 80
"""Architecture whose PTX serves later GPUs: from 90 on Triton emits features of one architecture (`sm_90a`), whose PTX
runs on no other."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one program of the attention kernel is cut.

    Attributes:
        block_m: Queries.
        block_n: Keys in one step.
        num_warps: Warps of the block.
        num_stages: Steps whose keys and values are in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Best first. More queries per program read the keys and values less often; more keys per step rescale the accumulator
# less often. tcgen05 accumulates in tensor memory rather than in registers, which leaves room for 128 keys.
_TILES = (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))
_TILES_TCGEN05 = (Tile(128, 128, 8, 2), *_TILES)


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A cubin, what is needed to launch it, and what it uses.

    Attributes:
        op: Folder of the kernel.
        sm: Architecture.
        dtype: fp16 or bf16.
        head_dim: Of the attention kernel; 0 for a kernel that serves all.
        tile: Of the attention kernel.
        function: Name of the function in the cubin.
        num_warps: Warps of a block.
        shared_bytes: Dynamic shared memory to launch with.
        registers: Per thread.
        spills: Instructions that move registers to or from local memory.
        tensor_core: Tensor-core instructions by name.
        cubin: The binary.
        ptx: The assembly it was made from.
    """

    op: str
    sm: int
    dtype: str
    head_dim: int
    tile: Tile | None
    function: str
    num_warps: int
    shared_bytes: int
    registers: int
    spills: int
    tensor_core: dict[str, int]
    cubin: bytes = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit one multiprocessor at once, by registers, shared memory and warps."""
        architecture = ARCHITECTURES[self.sm]
        # Registers are handed out in units of 256 per warp.
        per_warp = -(-self.registers * _WARP // 256) * 256
        return min(
            _REGISTERS_PER_SM // (per_warp * self.num_warps),
            architecture.shared_per_sm_bytes // (self.shared_bytes + _KB),
            architecture.warps_per_sm // self.num_warps,
        )

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of the most there can be."""
        return self.blocks_per_sm * self.num_warps / ARCHITECTURES[self.sm].warps_per_sm

    @property
    def flops_per_step(self) -> int:
        """Multiplications and additions of one step: two products of `block_m x block_n x head_dim`."""
        return 0 if self.tile is None else 4 * self.tile.block_m * self.tile.block_n * self.head_dim

    @property
    def bytes_per_step(self) -> int:
        """Keys and values read in one step, in bytes."""
        return 0 if self.tile is None else 2 * self.tile.block_n * self.head_dim * 2


def plugins_root() -> Path:
    """The folder `plugins/`, in a checkout or as the wheel carries it.

    Raises:
        PluginError: It is in neither place.
    """
    package = Path(__file__).parent
    for root in (package.parent / "plugins", package / "_plugins"):
        if (root / "varlen_attention" / "kernel.py").is_file():
            return root
    raise PluginError("the folder plugins/ with the kernels' sources is missing", hint="install mmvision-export again")


def kernel_module(op: str) -> ModuleType:
    """Import `plugins/<op>/kernel.py`; a kernel's source file must be on disk, for Triton reads it.

    Raises:
        PluginError: There is no such op.
    """
    name = f"mmvision_plugins.{op}"
    if name not in sys.modules:
        path = plugins_root() / op / "kernel.py"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise PluginError(f"{path}: no such kernel")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def compile_varlen_attention(sm: int, dtype: str, head_dim: int) -> CompiledKernel:
    """Compile the attention kernel in the largest tile that spills no register and fits shared memory.

    Raises:
        PluginError: No tile does, or Triton cannot compile for this machine's settings.
    """
    module = kernel_module("varlen_attention")
    architecture = ARCHITECTURES[sm]
    tiles = _TILES_TCGEN05 if architecture.tensor_core == "UTCHMMA" else _TILES
    tried = []
    for tile in tiles:
        parts = dict(zip(("D0", "D1", "D2"), module.head_parts(head_dim), strict=True))
        compiled = _compile(
            module.varlen_attention_kernel,
            op="varlen_attention",
            sm=sm,
            dtype=dtype,
            head_dim=head_dim,
            tile=tile,
            signature={
                **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"),
                "cu_seqlens_ptr": "*i32",
                "num_segments": "i32",
                "row_stride": "i32",
                "scale_log2": "fp32",
            },
            constants={**parts, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            # TensorRT aligns tensors to 256 bytes, and heads are multiples of 16 channels.
            multiples_of_16=("q_ptr", "k_ptr", "v_ptr", "out_ptr", "row_stride"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if compiled.spills == 0 and compiled.shared_bytes <= architecture.shared_per_block_bytes:
            return compiled
        tried.append(f"{tile}: {compiled.spills} spills, {compiled.shared_bytes} bytes of shared memory")
    raise PluginError(f"no tile of varlen_attention suits sm_{sm}, {dtype}, head_dim {head_dim}: {'; '.join(tried)}")


def compile_qk_rotary_embedding(sm: int, dtype: str) -> CompiledKernel:
    """Compile the rotary kernel, which serves every head_dim.

    Raises:
        PluginError: Triton cannot compile for this machine's settings.
    """
    module = kernel_module("qk_rotary_embedding")
    pointers = ("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr")
    return _compile(
        module.qk_rotary_embedding_kernel,
        op="qk_rotary_embedding",
        sm=sm,
        dtype=dtype,
        head_dim=0,
        tile=None,
        signature={
            **dict.fromkeys(pointers, f"*{dtype}"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            **dict.fromkeys(("num_patches", "num_heads", "head_dim", "half"), "i32"),
        },
        constants={"CHANNELS": module.HEAD_BLOCK, "BLOCK_N": module.BLOCK_N},
        multiples_of_16=(*pointers, "cos_ptr", "sin_ptr", "head_dim"),
        num_warps=4,
        num_stages=1,
    )


def _compile(
    kernel: Any,
    *,
    op: str,
    sm: int,
    dtype: str,
    head_dim: int,
    tile: Tile | None,
    signature: dict[str, str],
    constants: dict[str, int],
    multiples_of_16: tuple[str, ...],
    num_warps: int,
    num_stages: int,
) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise PluginError("TRITON_INTERPRET is set: kernels are interpreted, and cannot be compiled", hint="unset it")
    names = list(kernel.arg_names)
    source = ASTSource(
        kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples_of_16},
    )
    # Fused multiply-add said outright: Triton's default is about to change.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, _WARP), options=options)
    except Exception as error:  # Triton's passes raise bare RuntimeErrors
        raise PluginError(f"{op} cannot be compiled for sm_{sm}, {dtype}, head_dim {head_dim}: {error}") from error
    cubin = compiled.asm["cubin"]
    registers, instructions = _disassembled(cubin)
    return CompiledKernel(
        op=op,
        sm=sm,
        dtype=dtype,
        head_dim=head_dim,
        tile=tile,
        function=compiled.metadata.name,
        num_warps=num_warps,
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        spills=instructions["STL"] + instructions["LDL"],
        tensor_core={name: count for name, count in sorted(instructions.items()) if name.endswith("MMA")},
        cubin=cubin,
        ptx=compiled.asm["ptx"],
    )


def _disassembled(cubin: bytes) -> tuple[int, Counter[str]]:
    """Registers per thread, and how often each tensor-core and local-memory instruction stands in the code."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(str(tools / "cuobjdump"), "-res-usage", file.name)
        code = _output(str(tools / "nvdisasm"), "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise PluginError(f"cuobjdump reports no registers: {usage.strip()}")
    return int(registers[1]), Counter(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|STL|LDL)\b", code))


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PluginError(f"{Path(command[0]).name} failed: {result.stderr.strip()}")
    return result.stdout


def resource_table(kernels: Iterable[CompiledKernel]) -> str:
    """What compiled kernels use, as a Markdown table."""
    rows = [
        "| op | GPU | dtype | head_dim | tile | registers | spills | shared KB | occupancy | tensor core | FLOP/byte |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for k in kernels:
        tile = f"{k.tile.block_m} x {k.tile.block_n}, {k.num_warps} warps" if k.tile else f"{k.num_warps} warps"
        products = ", ".join(f"{count} {name}" for name, count in k.tensor_core.items()) or "-"
        intensity = f"{k.flops_per_step / k.bytes_per_step:.0f}" if k.tile else "-"
        rows.append(
            f"| {k.op} | {k.sm} ({ARCHITECTURES[k.sm].gpus}) | {k.dtype} | {k.head_dim or 'any'} | {tile} "
            f"| {k.registers} | {k.spills} | {k.shared_bytes / _KB:.1f} | {k.occupancy:.0%} "
            f"| {products} | {intensity} |"
        )
    return "\n".join(rows)
