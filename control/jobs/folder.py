# SPDX-License-Identifier: Apache-2.0
"""The folder where each running backup has its socket, named by the job's id."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile

from vmapipe.control.monitor.sockets import Listener, alone_in, listen_unix, private_folder
from vmapipe.runtime.errors import Failure

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
    return os.path.join(tempfile.gettempdir(), f"vmapipe-{os.geteuid()}")


def listen(job: str) -> Listener:
    """The socket of a job that begins; those of killed ones are removed. Raises Failure."""
    folder = private_folder(runtime_folder(), others_may_look=True)
    sockets()
    return listen_unix(os.path.join(folder, f"{job}.sock"), 0o600, socket.SOCK_STREAM)


def sockets() -> dict[str, str]:
    """Job ids and the sockets where somebody listens; the others are removed."""
    folder = runtime_folder()
    try:
        names = sorted(filter(_NAME.fullmatch, os.listdir(folder)))
    except OSError:
        return {}
    alive = {name: _is_alive(os.path.join(folder, name)) for name in names}
    if not all(alive.values()):
        # The file is there before somebody listens: while it is our turn, no maker is between.
        with contextlib.suppress(Failure), alone_in(folder):
            for name in [name for name in names if not alive[name]]:
                alive[name] = _is_alive(os.path.join(folder, name), remove=True)
    return {name.removesuffix(".sock"): os.path.join(folder, name) for name in names if alive[name]}


def _is_alive(path: str, *, remove: bool = False) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            # Its process died without removing it, or has just ended.
            if remove:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return False
        except OSError:
            return True  # somebody is there, and busy
    return True
