# SPDX-License-Identifier: Apache-2.0
"""The folder where each running backup has its socket, named by the job's id."""

from __future__ import annotations

import contextlib
import os
import re
import socket

from vmapipe.control.qmp.sockets import Listener, alone_in, listen_unix, private_folder
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import HeldFolder, temporary_folder

_NAME = re.compile(r"[0-9a-f]{32}\.sock")
# Whoever listens answers a connection at once; one that is stopped does so, too.
_PROBE_S = 1.0


def runtime_folder() -> str:
    """The path; it may not be there."""
    chosen = os.environ.get("VMAPIPE_RUNTIME_DIR")
    if chosen:
        return chosen
    if os.geteuid() == 0:
        return "/run/vmapipe"
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own:
        return os.path.join(own, "vmapipe")
    return os.path.join(temporary_folder(), f"vmapipe-{os.geteuid()}")


def listen(job: str) -> Listener:
    """The socket of a job that begins; those of killed ones are removed. Raises Failure."""
    folder = private_folder(runtime_folder(), others_may_look=True)
    sockets()
    return listen_unix(os.path.join(folder, f"{job}.sock"), 0o600, socket.SOCK_STREAM)


def sockets() -> dict[str, str]:
    """Job ids and the sockets where somebody listens; the others are removed."""
    try:
        with HeldFolder(runtime_folder()) as folder:
            return {
                name.removesuffix(".sock"): os.path.join(folder.path, name)
                for name in _alive(folder)
            }
    except OSError:
        return {}


def _alive(folder: HeldFolder) -> list[str]:
    """Raises OSError."""
    status = os.fstat(folder.fd)
    # Whoever else can make names in it may have made these: they are looked at, and left alone.
    ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    names = sorted(filter(_NAME.fullmatch, folder.names()))
    alive = {name: _is_alive(folder, name) for name in names}
    if ours and not all(alive.values()):
        # The file is there before somebody listens: while it is our turn, no maker is between.
        with contextlib.suppress(Failure), alone_in(folder):
            for name in [name for name in names if not alive[name]]:
                alive[name] = _is_alive(folder, name, remove=True)
    return [name for name in names if alive[name]]


def _is_alive(folder: HeldFolder, name: str, *, remove: bool = False) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(folder.address(name))
        except (ConnectionRefusedError, FileNotFoundError):
            # Its process died without removing it, or has just ended.
            if remove:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder.fd)
            return False
        except OSError:
            return True  # somebody is there, and busy
    return True
