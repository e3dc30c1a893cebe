"""How much memory there is for a launch: of the host, of its control group, of a CUDA device.

References:
    https://docs.kernel.org/filesystems/proc.html (MemAvailable),
    https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current, memory.stat),
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html (memory.limit_in_bytes and so on).
"""

from __future__ import annotations

from pathlib import Path

from mmvision_export.core.errors import BackendError
from mmvision_export.runtime.backends.cuda import Cuda

__all__ = [
    "device_available_bytes",
    "device_available_bytes_or_none",
    "host_available_bytes",
]


def host_available_bytes(
    *,
    meminfo: Path = Path("/proc/meminfo"),
    own_group: Path = Path("/proc/self/cgroup"),
    groups: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """What this process can still take before the system swaps or kills it.

    The least of what Linux says is available and of what each control group around the process
    leaves; page cache of files counts as free in both, since the system drops it.

    Args:
        meminfo: Where Linux tells its memory.
        own_group: Which groups the process is in.
        groups: Where the groups are.

    Returns:
        Bytes, or None where nothing tells.
    """
    found = [_meminfo_available(meminfo), *_group_rooms(own_group, groups)]
    return min((size for size in found if size is not None), default=None)


def _meminfo_available(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _group_rooms(own_group: Path, groups: Path) -> list[int | None]:
    """What each group around the process leaves, of both versions of control groups."""
    rooms: list[int | None] = []
    for line in _lines(own_group):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            root = groups
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = groups / "memory"
        else:
            continue
        folder = Path(path.lstrip("/"))
        # In a container the path may be the host's, which is not there: its root still is.
        rooms.extend(_room(root / group, *names) for group in (folder, *folder.parents))
    return rooms


def _room(group: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = (_number(next(iter(_lines(group / name)), "")) for name in (limit, usage))
    if most is None or used is None:
        return None
    dropped = 0
    for line in _lines(group / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == cache:
            dropped = _number(value) or 0
    return max(0, most - used + dropped)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None  # v2 says "max" where there is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def device_available_bytes(cuda: Cuda) -> int:
    """What is free of a CUDA device's memory; the device must be in use by the calling thread.

    A device that shares the host's memory counts page cache as taken, which the system drops.

    Raises:
        BackendError: The driver does not tell.
    """
    free = cuda.free_bytes()
    return max(free, host_available_bytes() or 0) if cuda.is_integrated() else free


def device_available_bytes_or_none(device: int) -> int | None:
    """As `device_available_bytes`, of a device by its index; None where there is no such thing."""
    try:
        cuda = Cuda(device)
        cuda.use()
        try:
            return device_available_bytes(cuda)
        finally:
            cuda.close()
    except BackendError:
        return None
