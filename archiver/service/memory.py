# SPDX-License-Identifier: Apache-2.0
"""How much memory further processes may take: the host's, or that of our control group."""

from __future__ import annotations

import contextlib
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """What is available on the host, or less where systemd's MemoryMax= (cgroup v2) leaves less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):
        name = Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
        group = _GROUPS / name
        while group != _GROUPS:
            available = min(available, left_in_group(group, available))
            group = group.parent
    return available


def left_in_group(group: Path, otherwise: int) -> int:
    """Bytes below a group's limit; pages that the kernel can drop do not count."""
    try:
        most = (group / "memory.max").read_text().strip()
        if most == "max":
            return otherwise
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return otherwise
