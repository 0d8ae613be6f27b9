# SPDX-License-Identifier: Apache-2.0
"""The first process of the appliance's kernel."""

from __future__ import annotations

import ctypes
import os

from vmapipe.access.files.inside.port import Port
from vmapipe.access.files.inside.volumes import Guest, first_line, load_modules, wait_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What these programs import; all other modules are left behind.
MODULES = ("__future__", "ctypes", "errno", "fcntl", "os", "stat", "struct", "time")


def _find_port() -> str | None:
    folder = "/sys/class/virtio-ports"
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            device = f"/dev/{name}"
            if first_line(f"{folder}/{name}/name") == "files" and os.path.exists(device):
                return device
    return None


def run(config: dict[str, Any]) -> None:
    """Serve the host. It never returns: the kernel would panic."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, place in ((b"proc", b"/proc"), (b"sysfs", b"/sys"), (b"devtmpfs", b"/dev")):
        libc.mount(b"none", place, kind, 0, None)
    loaded: set[str] = set()
    load_modules(libc, config["modules"]["base"], loaded)
    port = os.open(wait_for(_find_port, "the port"), os.O_RDWR | os.O_CLOEXEC)
    Guest(Port(port), config, loaded).run()
