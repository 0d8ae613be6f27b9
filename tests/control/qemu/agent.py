# SPDX-License-Identifier: Apache-2.0
"""The real guest agent, for a guest that has nothing but what tests give it; and a freeze cut short."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.control.qemu.running_guest import OBEY, Extra
from tests.guest import PORT_MODULES
from tests.machine import LIMIT_S

_PORT = "org.qemu.guest_agent.0"
# The program is told its port by number: nobody in the guest makes names for ports. Its folder for
# pid and state is in memory. Like a service manager, this starts it again when it has died, unless
# somebody has made the file /tmp/no-agent.
_START = """
until [ -c /dev/vport?p1 ]; do true; done
(until [ -e /tmp/no-agent ]; do
    qemu-ga -m virtio-serial -p /dev/vport?p1 -t /tmp -f /tmp/ga.pid || true
done) >/tmp/words 2>&1 &
"""


def find_agent() -> Path | None:
    """As scripts/setup has unpacked it, or installed."""
    unpacked = Path(__file__).parents[3] / ".venv" / "guest-agent/usr/sbin/qemu-ga"
    installed = shutil.which("qemu-ga", path=f"{os.defpath}:/usr/sbin")
    found = [unpacked, *([Path(installed)] if installed else [])]
    return next((program for program in found if os.access(program, os.X_OK)), None)


def with_agent(program: Path, socket: Path) -> Extra:
    """A guest with this agent, whose port is `socket`; QEMU's options are every manager's."""
    options = (
        *("-chardev", f"socket,id=agent,path={socket},server=on,wait=off"),
        *("-device", "virtio-serial-pci,id=ports"),
        *("-device", f"virtserialport,bus=ports.0,chardev=agent,name={_PORT}"),
    )
    files = {"bin/qemu-ga": program, **libraries(program)}
    return Extra(options, PORT_MODULES, files, _START + OBEY)


def libraries(program: Path) -> dict[str, Path]:
    """What a program is linked with, and who links it, where the latter looks for them."""
    words = ["ldd", str(program)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "not found" not in said, said
    found = {f"lib/{path.name}": path for path in map(Path, re.findall(r"=> (/\S+)", said))}
    for loader in re.findall(r"^\s+(/\S+) \(", said, re.MULTILINE):
        found[loader.lstrip("/")] = Path(loader)
    return found


def be_killed_while_frozen(socket: Path) -> None:
    """A process freezes the guest and is killed at once."""
    program = (
        "import os, signal\n"
        "from vmapipe.control.qemu.guest_agent import frozen\n"
        "from vmapipe.runtime.cancel import Cancel\n"
        f"with frozen({str(socket)!r}, print, Cancel()):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], timeout=LIMIT_S)
    assert done.returncode == -signal.SIGKILL
