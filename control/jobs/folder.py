# SPDX-License-Identifier: Apache-2.0
"""The folder where each running backup has its socket, named by the job's id."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import tempfile

from vmapipe.control.monitor.sockets import Listener, listen_unix
from vmapipe.runtime.errors import Failure, os_error_text

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
    folder = _own_folder()
    sockets()
    # Under its name only when somebody listens: before, it would look like a dead one's.
    path = os.path.join(folder, f"{job}.sock")
    listener = listen_unix(path + "+", 0o600, socket.SOCK_STREAM)
    try:
        os.rename(listener.path, path)
    except OSError as error:
        listener.close()
        raise Failure(f"cannot listen on {path}: {os_error_text(error)}") from error
    listener.path = path
    return listener


def sockets() -> dict[str, str]:
    """Job ids and the sockets where somebody listens; the others are removed."""
    folder = runtime_folder()
    found = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    for name in names:
        path = os.path.join(folder, name)
        if _NAME.fullmatch(name) and _is_alive(path):
            found[name.removesuffix(".sock")] = path
    return found


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            # Its process died without removing it.
            with contextlib.suppress(OSError):
                os.unlink(path)
            return False
        except FileNotFoundError:
            return False
        except OSError:
            return True  # somebody is there, and busy
    return True


def _own_folder() -> str:
    """Made where it is absent; nobody else may enter it. Raises Failure."""
    folder = runtime_folder()
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError as error:
        raise Failure(f"cannot make {folder}: {os_error_text(error)}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise Failure(f"{folder} is no folder that only its owner, this user, can write to")
    return folder
