# SPDX-License-Identifier: Apache-2.0
"""A process that has given up its rights: what it still can do, and what not."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TRY = """
import os, resource, socket, subprocess, sys
from vmapipe.runtime.sandbox import give_up_rights
def works(action):
    try:
        action()
    except (OSError, ValueError):
        return False
    return True
mine = os.open(sys.argv[1], os.O_RDWR)
confined = give_up_rights(1 << 30, 60)
tries = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "write": lambda: os.pwrite(mine, b"x", 1 << 20),
    "mkdir": lambda: os.mkdir(sys.argv[1] + ".d"),
    "unlink": lambda: os.unlink(sys.argv[1]),
    "socket": lambda: socket.socket(socket.AF_INET),
    "unix": lambda: socket.socketpair(),
    "fork": lambda: os._exit(0) if not os.fork() else None,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "link": lambda: os.symlink("a", sys.argv[1] + ".l"),
    "limit": lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
}
print(confined, *(name for name, action in tries.items() if works(action)))
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="the filter does not know this machine"
)
def test_it_can_open_start_send_and_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"as it was")
    done = subprocess.run(
        [sys.executable, "-c", TRY, file], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["True"], done.stderr
    assert file.read_bytes() == b"as it was"
    assert os.listdir(tmp_path) == ["file"]


def test_memory_and_processor_time_have_an_end() -> None:
    text = (
        "from vmapipe.runtime.sandbox import give_up_rights\n"
        "give_up_rights(1 << 29, 1)\n"
        "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('no', flush=True)\n"
        "while True: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, timeout=60)
    assert done.stdout == b"no\n"
    assert done.returncode in (-signal.SIGKILL, -signal.SIGXCPU)
